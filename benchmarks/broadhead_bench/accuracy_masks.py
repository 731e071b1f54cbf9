"""Relative errors against fp32 mathematics where masks are values. The masks are written down from the cases here, not
read from what the implementations get."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from broadhead_bench.accuracy import PagedReference, Squares, causal_visible, checked_rows, forward_error, worst
from broadhead_bench.cases_masks import WORD_BITS, CausalityCase, ChunkCase, ImagesCase, TreeCase
from broadhead_bench.inputs import DenseInputs
from broadhead_bench.inputs_decode import Fp8PagedInputs
from broadhead_bench.inputs_masks import ImagesInputs, TreeInputs

Error = Callable[[Tensor], float]


class ImagesMask(NamedTuple):
    """Which keys a query sees where the tokens of images see each other; what GradientReference asks of a mask."""

    spans: tuple[tuple[int, int], ...]
    window: int | None = None
    in_window: bool = False

    def keys(self, first: int, behind: int, seqlen: int) -> tuple[int, int]:
        """Bounds of what the queries from ``first`` to below ``behind`` see."""
        low, high = 0 if self.window is None else max(0, first - self.window + 1), behind
        for start, end in self.spans:
            if start < behind and first < end:
                low, high = low if self.in_window else min(low, start), max(high, end)
        return low, min(high, seqlen)

    def visible(self, positions: Tensor, keys: Tensor) -> Tensor:
        """``(positions, keys)``."""
        distance = positions[:, None] - keys[None, :]
        near = torch.ones_like(distance, dtype=torch.bool) if self.window is None else distance < self.window
        seen = (distance >= 0) & near
        for start, end in self.spans:
            both = ((positions >= start) & (positions < end))[:, None] & ((keys >= start) & (keys < end))[None, :]
            seen |= both & near if self.in_window else both
        return seen


def images_mask(case: ImagesCase) -> ImagesMask:
    """The mask of a case."""
    return ImagesMask(case.spans, case.window, case.in_window)


def images_error(case: ImagesCase, inputs: ImagesInputs) -> Error:
    """Of ``out (1, S, H, D)``, on rows spread over the sequence and in each image its first, middle and last."""
    q, k, v = inputs[:3]
    marks = [row for start, end in case.spans for row in (start, (start + end) // 2, end - 1)]
    spread = checked_rows(case.seqlen, q.device)
    rows = torch.cat((spread, torch.tensor(marks, dtype=torch.long, device=q.device))).unique()
    visible = images_mask(case).visible(rows, torch.arange(case.seqlen, device=q.device))

    def error(out: Tensor) -> float:
        squares = Squares(q.device)
        squares.add(q[0, rows], k[0], v[0], out[0, rows], visible)
        return squares.relative()

    return error


def chunk_error(case: ChunkCase, inputs: Fp8PagedInputs) -> Error:
    """Of ``out (1, Sq, H, D)``, against the e4m3 numbers times their factors."""
    mask = ImagesMask(case.spans)
    keys = torch.arange(case.context, device=inputs.q.device)
    offset = case.context - case.new
    return PagedReference(case.plain, inputs.wide, lambda _, rows: mask.visible(rows + offset, keys)).error


def tree_error(case: TreeCase, inputs: TreeInputs) -> Error:
    """Of ``out (B, Sq, H, D)``, of sequences spread over the batch."""
    words = torch.tensor(case.words, dtype=torch.int64, device=inputs.words.device)
    bits = torch.arange(WORD_BITS, device=words.device)

    def visible(sequence: int, rows: Tensor) -> Tensor:
        seen = causal_visible(rows + case.context - case.drafts, case.context)
        seen[:, case.context - WORD_BITS :] = (words[sequence, rows, None] >> bits & 1).bool()
        return seen

    return PagedReference(case.plain, inputs.paged, visible).error


def causality_error(case: CausalityCase, inputs: DenseInputs) -> Error:
    """Of ``out (B, S, H, D)``: the larger of the errors of the causal sequences and of the others."""
    q, k, v = inputs[:3]
    return lambda out: worst([forward_error(half, q[s], k[s], v[s], out[s]) for s, half in case.halves])
