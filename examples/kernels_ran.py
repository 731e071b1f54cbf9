"""Counts which kernels ran a training, in both directions."""

from __future__ import annotations

from collections import Counter

import broadhead


class KernelsRan:
    """Call ``note`` behind each call of attention, in the thread that made it: that of the backward pass is its own."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, int, str]] = Counter()

    def note(self, direction: str, head_dim: int) -> None:
        backend, kernel, reason = broadhead.last_dispatch()
        self.calls[direction, head_dim, kernel or f"the {backend} reference ({reason})"] += 1

    def report(self) -> list[str]:
        """A line for each kernel and head_dim, those of the forward pass first."""
        order = sorted(self.calls.items(), key=lambda item: (item[0][0] == "backward", item[0][1:]))
        return [f"{way}, head_dim {dim}: {calls} calls of {what}" for (way, dim, what), calls in order]
