"""Layouts of the torch fallback: dense, packed and paged tensors to padded ones, and results back to their rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gather", "heads_first", "key_rows", "packed_rows", "per_sequence", "scatter_dense", "scatter_packed"]


def packed_rows(cu_seqlens: Tensor, num_rows: int, total: int) -> Tensor:
    """Index ``(B, num_rows)`` that pads packed sequences to num_rows each; rows past a sequence's end repeat others."""
    row = cu_seqlens[:-1, None] + torch.arange(num_rows, device=cu_seqlens.device)
    return row.clamp(0, max(total - 1, 0))


def key_rows(
    k: Tensor,
    batch: int,
    max_seqlen_k: int,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    kv_batch_idx: Tensor | None,
    page_table: Tensor | None,
) -> tuple[Tensor | None, Tensor | int]:
    """Which rows of k's and v's first dim make the padded keys, and where each sequence ends in them.

    The first is ``(B, rows)`` of tokens or pages, ``(B,)`` of cache rows, or None: k and v are padded already.
    The page table may hold garbage past the pages a sequence needs: clamped, it names pages that the mask hides.
    """
    row_end: Tensor | int
    index: Tensor | None = kv_batch_idx
    if page_table is not None:
        page_size, max_pages = k.shape[1], page_table.shape[1]
        # With left padding the last key may lie beyond row max_seqlen_k.
        num_pages = max_pages if leftpad_k is not None else min(max_pages, -(-max_seqlen_k // page_size))
        table = page_table[:batch] if kv_batch_idx is None else page_table.index_select(0, kv_batch_idx)
        table = table[:, :num_pages] if num_pages > 0 else table.new_zeros((batch, 1))
        index = table.clamp(0, max(k.shape[0] - 1, 0))
        row_end = min(max_seqlen_k, max_pages * page_size)
    elif cu_seqlens_k is not None:
        index = packed_rows(cu_seqlens_k, max(max_seqlen_k, 1), k.shape[0])
        row_end = 0
    else:
        row_end = k.shape[1]
    if seqused_k is not None:
        row_end = seqused_k
    elif cu_seqlens_k is not None:
        row_end = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
    return index, row_end


def gather(x: Tensor, index: Tensor | None) -> Tensor:
    """Rows ``index`` (see key_rows) of x's first dim as ``(B, rows, H, D)`` with at least one row."""
    dtype = x.dtype
    if dtype.itemsize == 1:  # fp8: indexing moves bytes
        x = x.view(torch.uint8)
    if x.dim() == 4 and x.shape[1] == 0:
        x = F.pad(x, (0, 0, 0, 0, 0, 1))
    if index is not None:
        if x.shape[0] == 0:
            x = F.pad(x, (0,) * (2 * x.dim() - 1) + (1,))
        rows = x.index_select(0, index.reshape(-1))
        if index.dim() == 2:
            page_size = x.shape[1] if x.dim() == 4 else 1
            rows = rows.view(index.shape[0], index.shape[1] * page_size, x.shape[-2], x.shape[-1])
        x = rows
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


def per_sequence(x: Tensor | int) -> Tensor | int:
    """``(B,)`` shaped to broadcast against scores ``(B, Hkv, G, Sq, Sk)``; an int as it is."""
    return x.view(-1, 1, 1, 1, 1) if isinstance(x, Tensor) else x


def scatter_dense(
    result: Tensor, softmax_lse: Tensor, live: Tensor | None, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The padded result where live ``(B, Sq)`` is true (None: everywhere); elsewhere 0 and -inf, or what out holds."""
    if live is not None:
        softmax_lse = softmax_lse.masked_fill(~live[:, None, :], float("-inf"))
        live = live[:, :, None, None]
    return _write(result, live, out), softmax_lse


def scatter_packed(
    result: Tensor, softmax_lse: Tensor, cu_seqlens_q: Tensor, seqlen_q: Tensor, total_q: int, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The padded result ``(B, Sq, Hq, Dv)``, ``(B, Hq, Sq)`` as ``(T, Hq, Dv)``, ``(Hq, T)``.

    Rows that no sequence owns, or past the live ones of a sequence, are as in ``scatter_dense``.
    """
    batch, num_queries, num_heads_q, head_dim_v = result.shape
    if batch == 0:
        # Padding keeps the (empty) results in the autograd graph.
        empty = F.pad(result.reshape(0, num_heads_q, head_dim_v), (0, 0, 0, 0, 0, total_q))
        lse = F.pad(softmax_lse.reshape(num_heads_q, 0), (0, total_q), value=float("-inf"))
        return (empty if out is None else out), lse
    token = torch.arange(total_q, device=result.device, dtype=cu_seqlens_q.dtype)
    # Counting the sequences that end at or before the token passes over empty ones.
    sequence = torch.searchsorted(cu_seqlens_q[1:], token, right=True).clamp(max=batch - 1)
    row = token - cu_seqlens_q[sequence]
    # Rows before cu_seqlens_q[0] belong to nobody either: the second pass of a prefix-LM starts behind the prefix.
    live = (row >= 0) & (row < seqlen_q[sequence].clamp(max=num_queries))
    index = sequence * num_queries + row.clamp(0, num_queries - 1)
    packed = result.reshape(batch * num_queries, num_heads_q, head_dim_v).index_select(0, index)
    lse = softmax_lse.transpose(0, 1).reshape(num_heads_q, batch * num_queries).index_select(1, index)
    return _write(packed, live[:, None, None], out), lse.masked_fill(~live, float("-inf"))


def _write(result: Tensor, live: Tensor | None, out: Tensor | None) -> Tensor:
    """Live rows of result, in ``out`` if there is one."""
    if out is None:
        return result if live is None else result.masked_fill(~live, 0.0)
    return out.copy_(result if live is None else torch.where(live, result.to(out.dtype), out))
