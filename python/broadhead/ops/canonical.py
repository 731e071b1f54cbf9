"""The form in which operators return their results."""

from __future__ import annotations

from torch import Tensor


def canonical(x: Tensor) -> Tensor:
    """``x`` with the strides of a new tensor, also where a size is 1: what the fake implementations promise."""
    return x.contiguous().view(-1).view(x.shape)
