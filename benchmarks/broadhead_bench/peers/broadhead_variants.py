"""Adapters for broadhead's own variants of the backward pass: sums in a fixed order, and the portable kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from broadhead import support
from broadhead.plan import dispatch

from broadhead_bench.cases_prefill import BACKWARD_AREAS
from broadhead_bench.peers.broadhead_api import Broadhead


class Deterministic(Broadhead):
    """broadhead with deterministic=True."""

    name = "broadhead-det"
    areas = BACKWARD_AREAS
    _deterministic = True


class Portable(Broadhead):
    """broadhead with the portable backward kernels alone, whatever the device has better ones for."""

    name = "broadhead-sm80"
    areas = BACKWARD_AREAS

    def __init__(self) -> None:
        self._rows = tuple(row for row in support.ROWS if row.direction == "forward" or row.family == "sm80")
        # Plans are kept by problem, and those of all rows must not be found here.
        self._decisions = dispatch.Decisions()

    def why_unavailable(self, device: torch.device) -> str | None:
        return super().why_unavailable(device) if device.type == "cuda" else "needs a CUDA device, to have kernels"

    def kernel(self) -> str | None:
        row = super().kernel()
        if row is None or not row.startswith("sm80_bwd_"):
            raise RuntimeError(f"ran {row} instead of a portable backward kernel")
        return row

    def context(self) -> AbstractContextManager[Any]:
        return self._only_portable()

    @contextmanager
    def _only_portable(self) -> Iterator[None]:
        """Each backward pass is planned anew, from these two names of the module."""
        saved = dispatch.ROWS, dispatch._decided
        dispatch.ROWS, dispatch._decided = self._rows, self._decisions
        try:
            yield
        finally:
            dispatch.ROWS, dispatch._decided = saved
