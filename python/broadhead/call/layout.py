"""Tensors whose last dimension is not contiguous: which are copied, and which are refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgumentError


def is_strided(value: Any) -> bool:
    """Whether a tensor's last dimension is not contiguous."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[-1] > 1 and value.stride(-1) != 1


def contiguous(value: Any) -> Any:
    """A tensor with a contiguous last dimension, copied if it has none; anything else as it is."""
    # Not contiguous(), which gives an empty tensor back as it is.
    return value.clone(memory_format=torch.contiguous_format) if is_strided(value) else value


def refuse_strided(function: str, name: str, value: Any) -> None:
    """Raise where a tensor that is written, or too large to copy, has a last dimension that is not contiguous."""
    if is_strided(value):
        raise InvalidArgumentError(
            f"{function}: {name} must be contiguous in its last dimension, got strides {value.stride()}; it is not"
            " copied, because the call writes to it or it is a cache"
        )
