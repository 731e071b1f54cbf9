"""Layouts of the torch fallback: dense, packed and paged rows to padded ones, and results back to their rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "accumulate",
    "find_pages",
    "find_tokens",
    "heads_first",
    "put_rows",
    "select_rows",
    "spread_rows",
    "take_pages",
    "take_rows",
]


def take_rows(x: Tensor, begin: Tensor | int | None, index: Tensor | int | None, first: int, last: int) -> Tensor:
    """Rows ``[first, last)`` of sequences, ``(B, last - first, ...)``; a view where it can be.

    begin: first rows of packed sequences in ``x`` ``(T, ...)``; rows past the tensor repeat its last. None: ``x`` is
    ``(B, S, ...)`` and index says which of its sequences are meant.
    """
    if isinstance(begin, int):
        return x[begin + first : begin + last].unsqueeze(0)
    if begin is None:
        if first > 0 or last != x.shape[1]:
            x = x[:, first:last]
        if isinstance(index, int):
            return x[index : index + 1]
        return x if index is None else select_rows(x, index)
    row = begin[:, None] + torch.arange(first, last, device=x.device)
    row = row.clamp(0, max(x.shape[0] - 1, 0))
    return select_rows(x, row.view(-1)).view(*row.shape, *x.shape[1:])


def find_pages(table: Tensor, owner: Tensor | int | None, num_pages: int, pool: int) -> tuple[Tensor, Tensor]:
    """The ids ``(B, num_pages)`` in the first columns of the owners' rows, within the pool, and which of them exist."""
    if isinstance(owner, int):
        table = table[owner : owner + 1]
    elif owner is not None:
        table = select_rows(table, owner)
    table = table[:, :num_pages]
    return table.clamp(0, max(pool - 1, 0)), (table >= 0) & (table < pool)


def take_pages(cache: Tensor, pages: Tensor) -> Tensor:
    """Pages ``(B, P)`` of ``cache`` ``(pages, page_size, H, D)`` one after the other: ``(B, P * page_size, H, D)``."""
    rows = select_rows(cache, pages.reshape(-1))
    return rows.view(pages.shape[0], pages.shape[1] * cache.shape[1], *cache.shape[2:])


def select_rows(x: Tensor, index: Tensor) -> Tensor:
    """``x.index_select(0, index)``, also of 8-bit floats; an ``x`` without rows is taken for one row of zeros."""
    dtype = x.dtype
    if dtype.itemsize == 1:  # fp8: indexing moves bytes
        x = x.view(torch.uint8)
    if x.shape[0] == 0:
        x = F.pad(x, (0,) * (2 * x.dim() - 1) + (1,))
    x = x.index_select(0, index)
    return x.view(dtype) if x.dtype != dtype else x


def heads_first(x: Tensor, compute: torch.dtype, unused: Tensor | None) -> Tensor:
    """``(B, rows, Hkv, D)`` as ``(B * Hkv, rows, D)`` of the compute dtype, zero in the rows that nobody uses.

    unused: ``(B | 1, 1, 1, 1, rows | 1)`` or None.
    """
    batch, rows, num_heads, head_dim = x.shape
    x = x.transpose(1, 2)
    if x.dtype != compute:
        x = x.to(compute, memory_format=torch.contiguous_format)
    if unused is not None:
        x = torch.where(unused.view(unused.shape[0], 1, unused.shape[-1], 1), 0.0, x)
    return x.reshape(batch * num_heads, rows, head_dim)


def put_rows(
    target: Tensor,
    values: Tensor,
    begin: Tensor | int | None,
    index: Tensor | int | None,
    first: int,
    live: Tensor | None,
) -> None:
    """Undoes ``take_rows``: writes ``values`` ``(B, n, ...)`` at rows ``[first, first + n)`` where live ``(B, n)``.

    live None: everywhere. With packed sequences of several lengths it reads tensors.
    """
    last = first + values.shape[1]
    values = values.to(target.dtype)
    if isinstance(begin, Tensor):
        row = begin[:, None] + torch.arange(first, last, device=target.device)
        if live is None:
            target.index_copy_(0, row.view(-1), values.flatten(0, 1))
        else:
            target.index_copy_(0, row[live], values[live])
        return
    view = target[begin + first : begin + last].unsqueeze(0) if isinstance(begin, int) else target[:, first:last]
    if begin is None and isinstance(index, int):
        view = view[index : index + 1]
    if begin is None and isinstance(index, Tensor):
        if live is not None:
            values = torch.where(_trailing(live, values), values, view.index_select(0, index))
        view.index_copy_(0, index, values)
        return
    view.copy_(values if live is None else torch.where(_trailing(live, values), values, view))


def spread_rows(values: Tensor, begin: Tensor, length: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Padded ``values`` ``(B, n, ...)`` as packed ones ``(total, ...)``, and which of these rows a sequence owns.

    Sequence b has rows ``[begin[b], begin[b] + length[b])``. The other rows hold anything. No tensor is read.
    """
    batch, num_rows = values.shape[:2]
    if batch == 0 or num_rows == 0:
        return values.new_zeros((total, *values.shape[2:])), torch.zeros(total, dtype=torch.bool, device=values.device)
    sequence, row, live = find_tokens(begin, length, total)
    flat = sequence * num_rows + row.clamp(0, num_rows - 1)
    return values.reshape(batch * num_rows, *values.shape[2:]).index_select(0, flat), live


def find_tokens(begin: Tensor, length: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sequence of each packed token, its row there, and whether a sequence owns it: ``(total,)`` each.

    Sequence b, of at least one, has rows ``[begin[b], begin[b] + length[b])`` within the tokens. No tensor is read.
    """
    number = torch.arange(begin.shape[0], device=begin.device)
    # Each sequence that has a row marks its first one; a token belongs to the last mark up to it.
    place = torch.where(length > 0, begin, total).long()
    marks = torch.zeros(total + 1, dtype=torch.long, device=begin.device).scatter_reduce(0, place, number, "amax")
    sequence = marks[:total].cummax(0).values
    row = torch.arange(total, device=begin.device) - begin[sequence]
    return sequence, row, (row >= 0) & (row < length[sequence])


def accumulate(target: Tensor, index: Tensor, values: Tensor) -> None:
    """``target[index[i]] += values[i]``, in an order that is the same in every run."""
    if target.device.type == "cpu":
        target.index_add_(0, index, values)
    else:  # sorts the index; index_add_ adds in any order
        target.index_put_((index.long(),), values, accumulate=True)


def _trailing(live: Tensor, like: Tensor) -> Tensor:
    """``(B, n)`` shaped to broadcast against ``like`` ``(B, n, ...)``."""
    return live.view(*live.shape, *([1] * (like.dim() - 2)))
