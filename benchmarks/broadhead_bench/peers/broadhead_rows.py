"""broadhead with one row of its table forced, where the landscape asks whether the table chose well."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import broadhead
import torch
from broadhead import support
from broadhead.plan import dispatch
from broadhead.run.cuda_backend import forget_calls
from torch import Tensor

from broadhead_bench import timing
from broadhead_bench.cases_landscape import LandscapeCase
from broadhead_bench.inputs_landscape import LandscapeInputs
from broadhead_bench.peers.base import Skip
from broadhead_bench.peers.broadhead_api import Broadhead

#: Runs of each row, of which the median counts, before the best one is timed beside the others.
TRIES = 5


#: The dtypes of cases as the table names them.
ROW_DTYPES = {"bf16": "bf16", "fp16": "fp16", "e4m3": "float8_e4m3fn"}
#: Query rows from which decode kernels are left out: they read all keys for each 16 or 32 rows.
MOST_DECODE_ROWS = 512


@contextmanager
def only(rows: tuple[support.KernelRow, ...]) -> Iterator[None]:
    """Calls are decided among these rows alone."""
    saved = dispatch.ROWS
    dispatch.ROWS = rows
    _forget()
    try:
        yield
    finally:
        dispatch.ROWS = saved
        _forget()


def _forget() -> None:
    dispatch._decided.cache_clear()
    forget_calls()


class ForcedRow(Broadhead):
    """Calls that run on some rows alone. Plans are forgotten around each call: only captured calls can be timed."""

    areas: tuple[str, ...] = ("landscape",)

    def why_unavailable(self, device: torch.device) -> str | None:
        return super().why_unavailable(device) if device.type == "cuda" else "needs a CUDA device, to have kernels"

    def forced(
        self, rows: tuple[support.KernelRow, ...], case: LandscapeCase, inputs: LandscapeInputs
    ) -> Callable[[], Tensor]:
        """The call on these rows. It is prepared among them as well: scheduler metadata is made for one kernel, and
        another refuses it."""
        with only(rows):
            call = super().landscape(case, inputs)

        def run() -> Tensor:
            with only(rows):
                return call()

        return run


class BestRow(ForcedRow):
    """The fastest row that computes the call, whichever the table chooses."""

    name = "broadhead-best"

    def landscape(self, case: LandscapeCase, inputs: LandscapeInputs) -> Callable[[], Tensor]:
        device = inputs.q.device
        calls, graphs = [], []
        for row in candidates(case, torch.cuda.get_device_capability(device)):
            try:
                call = self.forced((row,), case, inputs)
                graphs.append(timing.captured(call, device))
                calls.append(call)
            except (broadhead.UnsupportedError, broadhead.InvalidTypeError):
                continue
            except broadhead.BroadheadError as error:
                raise RuntimeError(f"row {row.id}: {error}") from error
        if not calls:
            raise Skip("no row computes this call by itself")
        times = timing.time_interleaved(graphs, timing.L2Flusher(device), budget=0.0, least=TRIES, warm_up=0.0)
        seconds = [math.inf if isinstance(time, Exception) else time for time in times]
        return calls[seconds.index(min(seconds))]


class PortableForward(ForcedRow):
    """The portable kernels of prefill, beside FlashAttention-2, on what both of them do."""

    name = "broadhead-sm80-fwd"

    def landscape(self, case: LandscapeCase, inputs: LandscapeInputs) -> Callable[[], Tensor]:
        if case.kind not in ("dense", "varlen") or case.head_dim > 256 or case.dtype == "e4m3":
            raise Skip("is measured on what FlashAttention-2 does")
        rows = tuple(row for row in support.ROWS if row.family == "sm80" and row.direction == "forward")
        return self.forced(rows, case, inputs)


def candidates(case: LandscapeCase, capability: tuple[int, int]) -> list[support.KernelRow]:
    """Rows of the device whose tiles are at most twice as wide as the head, or 128 columns."""
    widest = max(case.head_dim, case.head_dim_v)
    query_rows = max(case.seqlens_q) * (case.num_heads_q // case.num_heads_kv)
    return [
        row
        for row in support.ROWS
        if row.direction == "forward"
        and capability in row.capabilities
        and row.head_dim >= case.head_dim
        and row.head_dim_v >= case.head_dim_v
        and max(row.head_dim, row.head_dim_v) <= max(2 * widest, 128)
        and row.dtype == ROW_DTYPES[case.dtype]
        and not row.kv_dtype
        and "qv" not in row.requires
        and (row.phase != "decode" or query_rows <= MOST_DECODE_ROWS)
    ]
