"""Where tests of other packages run: on a GPU where there is one, by kernels that took every call of attention.

A test marked ``attends("forward", "backward")`` has its tensors on ``DEVICE``. With a GPU it is a GPU test: strict, and
at its end kernels of the named directions must have run, and nothing else. On a CPU the reference runs it.
"""

from __future__ import annotations

import threading
from types import TracebackType

import torch
from broadhead.plan import dispatch as dispatch_module
from broadhead.run import fallback
from broadhead.run.fallback import Dispatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: What no kernel takes is drawn in fp32 on a CPU, where an error of the host's code shows best.
WIDE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


class Dispatches:
    """Notes what ran every call of attention while it is entered, of all threads.

    Attributes:
        seen: ``(backend, row id or None, reason)`` of each, as `broadhead.last_dispatch` would have told it.
    """

    def __init__(self) -> None:
        self.seen: list[Dispatch] = []

    def __enter__(self) -> Dispatches:
        last = threading.local()

        def read(_: object) -> Dispatch:
            return getattr(last, "value", fallback._NOTHING)

        def write(_: object, dispatch: Dispatch) -> None:
            self.seen.append(dispatch)
            last.value = dispatch

        # The compiled module sets the attribute, too: a property of the class hears of it.
        fallback._State.last = property(read, write)  # type: ignore[assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        fallback._State.last = fallback._NOTHING

    def check(self, *directions: str) -> None:
        """Rows of the table ran every call, and among them some of each of ``directions``.

        Raises:
            AssertionError: the text has what ran.
        """
        rows = {row.id: row for row in dispatch_module.ROWS}
        calls = [dispatch for dispatch in self.seen if dispatch != fallback._NOTHING]
        others = [dispatch for dispatch in calls if dispatch[0] != "cuda" or dispatch[1] not in rows]
        assert not others, f"{len(others)} of {len(calls)} calls ran on no kernel: {others[0]}"
        found = {rows[row].direction for _, row, _ in calls if row is not None}
        missing = set(directions) - found
        assert not missing, (
            f"no kernel ran {sorted(missing)}; {len(calls)} calls ran {sorted({c[1] or '' for c in calls})}"
        )
