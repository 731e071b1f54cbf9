"""Calls that are like one before: the compiled module runs them by the Launch of that one.

Each function returns the result, or None: there was no such call. Without the compiled module no call is known.
torch.compile must not trace them.
"""

from __future__ import annotations

from typing import Any

from ..plan import native
from .cuda_backend import connected_module


def bind(name: str) -> Any:
    """A function of the compiled module, or without it one that knows no call."""
    return _know_nothing if native.extension() is None else getattr(connected_module(), name)


def _know_nothing(*call: Any) -> None:
    return None


run_known = bind("run_known")
run_known_shared = bind("run_known_shared")
run_known_append = bind("run_known_append")
run_known_merge = bind("run_known_merge")
run_known_metadata = bind("run_known_metadata")
