"""One cache length for all sequences, which the host knows: every device refuses one that does not fit."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..errors import InvalidArgumentError, InvalidTypeError
from . import validation as check
from .plain import is_plain_type
from .scalars import read_scalar


def lengths_tensor(
    function: str,
    q: Any,
    cu_seqlens_q: Any,
    length: Any,
    k_cache: Any,
    page_table: Any,
    k: Any = None,
    cu_seqlens_k_new: Any = None,
) -> Tensor:
    """``length`` for each sequence of q, on its device.

    Args:
        length: an int, or a NumPy scalar or 0-dim tensor on the CPU that holds one.
        k: the new keys that are appended behind it, if any.

    Raises:
        InvalidTypeError: it is no int.
        InvalidArgumentError: the cache has fewer rows.
    """
    if not is_compiling():
        check.check_tensor(function, "q", q, "a tensor")
        read = read_scalar(function, "cache_seqlens", length, "a Python int or an int32 tensor of shape (batch,)")
        if isinstance(read, bool) or not isinstance(read, (numbers.Integral, torch.SymInt)):
            raise InvalidTypeError(
                f"{function}: cache_seqlens must be an int or an int32 tensor of shape (batch,), got"
                f" {check.describe_value(length)}"
            )
        if isinstance(read, numbers.Integral):
            length = check.check_int(function, "cache_seqlens", int(read))
            _check_capacity(function, length, k_cache, page_table, k if cu_seqlens_k_new is None else None)
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if not is_compiling() and not is_plain_type(type(q)):
        return q.new_full((batch,), length, dtype=torch.int32)  # a DTensor goes together with its own kind only
    return torch.full((batch,), length, dtype=torch.int32, device=q.device)


def _check_capacity(function: str, length: int, k_cache: Any, page_table: Any, k: Any) -> None:
    if not isinstance(k_cache, Tensor) or k_cache.dim() != 4:
        return  # validation names it
    capacity, of = k_cache.shape[1], "k_cache.shape[1]"
    if isinstance(page_table, Tensor) and page_table.dim() == 2:
        capacity, of = page_table.shape[1] * capacity, "page_table.size(1) * page_size"
    new = k.shape[1] if isinstance(k, Tensor) and k.dim() == 4 else 0
    if length + new > capacity:
        behind = f" with {new} new keys behind them" if new else ""
        raise InvalidArgumentError(
            f"{function}: cache_seqlens must be at most the rows of the cache, {of} = {capacity}, got {length}{behind}"
        )
