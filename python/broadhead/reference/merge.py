"""Merges attention results over disjoint keys by their log-sum-exp, on torch ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call.plain import is_autocast


def merge_parts(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """``outs`` (n, ..., Dv) weighted by ``lses`` (n, ...): the merged output and LSE. Empty parts count for nothing."""
    if is_autocast(outs):
        with torch.autocast(outs.device.type, enabled=False):
            return merge_parts(outs, lses)
    absent = lses == float("-inf")
    empty = absent.all(dim=0)
    # Where every part is empty the sum has no logarithm, and its gradient would be NaN.
    summed = lses.masked_fill(empty, 0.0)
    lse = torch.logsumexp(summed, dim=0)
    weights = torch.exp(summed - lse)
    # A part without keys may hold anything, NaN included.
    parts = outs.masked_fill(absent.unsqueeze(-1), 0.0)
    return (weights.unsqueeze(-1) * parts).sum(dim=0), lse.masked_fill(empty, float("-inf"))
