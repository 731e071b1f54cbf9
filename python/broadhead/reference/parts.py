"""Results of parts of the keys of sequences, put together by their log-sum-exp; part of the torch fallback."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import accumulate

__all__ = ["merge_key_parts"]


def merge_key_parts(
    outs: Tensor, lses: Tensor, sequence: Tensor, batch: int, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of whole sequences, ``(batch, Sq, Hq, Dv)`` and ``(batch, Hq, Sq)``, of the dtype of the parts.

    outs: ``(N, Sq, Hq, Dv)``; lses: ``(N, Hq, Sq)``; sequence: ``(N,)``, to which of the sequences a part belongs.
    sinks ``(Hq,)`` join the denominator once.
    """
    index = sequence.view(-1, 1, 1).expand(lses.shape)
    top = lses.new_full((batch, *lses.shape[1:]), float("-inf")).scatter_reduce(0, index, lses, "amax")
    empty = top == float("-inf")
    row_max = top.masked_fill(empty, 0.0)
    if sinks is not None:
        row_max = torch.maximum(row_max, sinks.to(lses.dtype)[None, :, None])
    weights = torch.exp(lses - row_max[sequence])
    row_sum = torch.zeros_like(row_max)
    accumulate(row_sum, sequence, weights)
    if sinks is not None:
        row_sum = row_sum + torch.exp(sinks.to(lses.dtype)[None, :, None] - row_max)
    lse = (row_sum.log() + row_max).masked_fill(empty, float("-inf"))
    share = weights / row_sum.masked_fill(empty, 1.0)[sequence]
    out = outs.new_zeros((batch, *outs.shape[1:]))
    accumulate(out, sequence, outs * share.transpose(1, 2).unsqueeze(-1))
    return out, lse
