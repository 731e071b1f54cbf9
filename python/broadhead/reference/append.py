"""Rotary embedding of queries and in-place append of new keys and values to a KV cache, on torch ops.

Runs before attention, on any device, without a host sync and without data-dependent shapes, so that it can be captured
in a CUDA graph and traced by torch.compile. The kernel csrc/kernels/append_kv.cu agrees with it bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..call.validation import INT32_MAX
from .layout import find_tokens
from .rows import packed_offsets

__all__ = ["append", "appended_lengths", "apply_rotary", "apply_rotary_q"]


def apply_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """Rotates the first ``2 * cos.size(1)`` columns of ``x`` by the angles of its tokens' positions.

    x: ``(..., H, D)``; cos, sin: ``(max_positions, rotary_dim / 2)``; positions: integer, ``x.shape[:-2]`` (or what
    broadcasts to it). interleaved: the pairs are columns ``(0, 1), (2, 3), ...`` instead of the two halves of the
    rotary columns. Returns a new tensor of x's shape and of ``dtype`` (x's); the angles are applied in fp32 (fp64 for
    fp64).
    """
    compute = _compute_dtype(x)
    dtype = x.dtype if dtype is None else dtype
    half = cos.shape[-1]
    # A padding token may carry any position: it is never stored, but the look-up must stay inside the table.
    index = positions.clamp(0, max(cos.shape[0] - 1, 0))
    c = cos[index].to(compute).unsqueeze(-2)
    s = sin[index].to(compute).unsqueeze(-2)
    rotated, rest = x[..., : 2 * half].to(compute), x[..., 2 * half :]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated[..., :half], rotated[..., half:]
    new_first = first * c - second * s
    new_second = first * s + second * c
    if interleaved:
        turned = torch.stack((new_first, new_second), dim=-1).flatten(-2)
    else:
        turned = torch.cat((new_first, new_second), dim=-1)
    turned = _round(turned, dtype)
    return _join(turned, rest.to(dtype)) if rest.shape[-1] else turned


def _join(a: Tensor, b: Tensor) -> Tensor:
    """Columns of a, then those of b; 8-bit floats as bytes."""
    if a.dtype.itemsize > 1:
        return torch.cat((a, b), dim=-1)
    return torch.cat((a.view(torch.uint8), b.view(torch.uint8)), dim=-1).view(a.dtype)


def apply_rotary_q(
    q: Tensor,
    rotary_cos: Tensor,
    rotary_sin: Tensor,
    *,
    cache_seqlens: Tensor,
    rotary_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    causal_or_local: bool,
    rotary_interleaved: bool = True,
) -> Tensor:
    """Rotates the queries of an appending call as FlashAttention-3 does.

    q: ``(B, Sq, Hq, D)``, or ``(T, Hq, D)`` with ``cu_seqlens_q`` (int32 ``(B + 1,)``). Query i of sequence b is at
    position ``start[b] + i`` under a causal or local mask and at ``start[b]`` otherwise, where start is
    ``rotary_seqlens`` if given, else ``cache_seqlens`` (the lengths before the append, int32 ``(B,)``).
    Returns a new tensor like q.
    """
    start = cache_seqlens if rotary_seqlens is None else rotary_seqlens
    if cu_seqlens_q is None:
        token = torch.arange(q.shape[1], device=q.device)
        positions = start[:, None] + token if causal_or_local else start[:, None].expand(q.shape[0], q.shape[1])
    else:
        sequence, token, _ = _locate_tokens(cu_seqlens_q, q.shape[0])
        start = start.long()
        positions = start[sequence] + token if causal_or_local else start[sequence]
    return apply_rotary(q, rotary_cos, rotary_sin, positions, interleaved=rotary_interleaved)


@torch.no_grad()
def append(
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    *,
    cache_seqlens: Tensor,
    page_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    rotary_interleaved: bool = True,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> None:
    """Writes new key i of sequence b to cache row ``cache_seqlens[b] + i``, rotated if cos and sin are given; in place.

    k_cache, v_cache: ``(B_cache, S, Hkv, D | Dv)``, or ``(pages, page_size, Hkv, D | Dv)`` with ``page_table`` (int32
    ``(B, max_pages)``); any strides. k_new, v_new: ``(B, S_new, Hkv, D | Dv)``, or ``(T_new, Hkv, D | Dv)`` with
    ``cu_seqlens_k_new`` (int32 ``(B + 1,)``); cast to the cache's dtype. Wider ones become float8 after division by
    k_descale, v_descale (fp32 ``(B, Hkv)``; None: 1), and saturate. cache_seqlens: int32 ``(B,)``, the lengths before
    the append. cache_batch_idx: the row of the cache, or of the page table, of each sequence. Left padding needs
    no argument: ``cache_seqlens`` counts cache rows, padding included, for the destination and for the rotary
    position alike. rotary_seqlens: the rotary position of each sequence's first new key, instead of cache_seqlens.

    Padding rows past ``cu_seqlens_k_new[-1]``, and rows that would land past the cache, on a page or in a row of the
    cache that does not exist, are written nowhere. The caller then attends over ``appended_lengths``.
    """
    if cu_seqlens_k_new is None:
        batch, num_new = k_new.shape[:2]
        offset = torch.arange(num_new, device=k_new.device)
        sequence = torch.arange(batch, device=k_new.device).repeat_interleave(num_new)
        token = offset.repeat(batch)
        live = None
        k_new, v_new = k_new.flatten(0, 1), v_new.flatten(0, 1)
    else:
        sequence, token, live = _locate_tokens(cu_seqlens_k_new, k_new.shape[0])
    no_place = k_cache.shape[0] == 0 or k_cache.shape[1] == 0 or (page_table is not None and page_table.numel() == 0)
    if k_new.shape[0] == 0 or no_place:
        return

    row = cache_seqlens.long()[sequence] + token
    divides = _narrows(k_new, k_cache)  # float8 keys have been divided already
    if rotary_cos is not None and rotary_sin is not None:
        position = row if rotary_seqlens is None else rotary_seqlens.long()[sequence] + token
        # On the way to float8 there is one rounding, at the end.
        dtype = _compute_dtype(k_new) if k_cache.dtype.itemsize == 1 else k_new.dtype
        k_new = apply_rotary(k_new, rotary_cos, rotary_sin, position, interleaved=rotary_interleaved, dtype=dtype)
    k_new = _to_cache_dtype(k_new, k_cache, k_descale if divides else None, sequence)
    v_new = _to_cache_dtype(v_new, v_cache, v_descale if divides else None, sequence)

    owner = sequence if cache_batch_idx is None else cache_batch_idx[sequence]
    block, slot, inside = _destination(k_cache, owner, row, page_table)
    live = inside if live is None else inside & live
    _store(k_cache, k_new, block, slot, live)
    _store(v_cache, v_new, block, slot, live)


def appended_lengths(
    k_cache: Tensor, cache_seqlens: Tensor, k_new: Tensor, cu_seqlens_k_new: Tensor | None, page_table: Tensor | None
) -> Tensor:
    """The lengths of the sequences after ``append``, int32 ``(B,)``: of the keys that fit into the cache."""
    capacity = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    added: Tensor | int = k_new.shape[1]
    if cu_seqlens_k_new is not None:
        added = packed_offsets(cu_seqlens_k_new, k_new.shape[0])[1]
    return (cache_seqlens.long() + added).clamp(0, min(capacity, INT32_MAX)).to(torch.int32)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _narrows(new: Tensor, cache: Tensor) -> bool:
    """Whether storing ``new`` in ``cache`` turns wider numbers into float8."""
    return cache.dtype.itemsize == 1 < new.dtype.itemsize


def _to_cache_dtype(new: Tensor, cache: Tensor, descale: Tensor | None, sequence: Tensor) -> Tensor:
    """New rows ``(T, Hkv, D)`` as the cache stores them."""
    if not _narrows(new, cache):
        return new.to(cache.dtype)
    wide = new.to(_compute_dtype(new))
    if descale is not None:
        wide = wide / descale[sequence].to(wide.dtype).unsqueeze(-1)
    return _round(wide, cache.dtype)


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in dtype; float8 saturates."""
    if dtype.itemsize > 1:
        return x.to(dtype)
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def _locate_tokens(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each of ``total`` packed tokens ``(T,)``: its sequence, its index there, and whether any sequence owns it."""
    if cu_seqlens.shape[0] < 2:
        nothing = torch.zeros(total, dtype=torch.long, device=cu_seqlens.device)
        return nothing, nothing, nothing > 0
    return find_tokens(*packed_offsets(cu_seqlens, total), total)


def _destination(cache: Tensor, owner: Tensor, row: Tensor, page_table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Indices into the first two dims of ``cache`` for row ``row`` of ``owner``, and whether that place exists."""
    pool = cache.shape[0] if page_table is None else page_table.shape[0]
    inside = (row >= 0) & (owner >= 0) & (owner < pool)
    owner = owner.clamp(0, pool - 1)
    if page_table is None:
        return owner, row.clamp(0, cache.shape[1] - 1), inside & (row < cache.shape[1])
    page_size, max_pages = cache.shape[1], page_table.shape[1]
    column = torch.div(row, page_size, rounding_mode="floor")
    inside = inside & (column < max_pages)
    page = page_table[owner, column.clamp(0, max_pages - 1)]
    # The table may hold garbage where nothing was allocated.
    inside = inside & (page >= 0) & (page < cache.shape[0])
    return page.clamp(0, cache.shape[0] - 1), torch.remainder(row, page_size), inside


def _store(cache: Tensor, new: Tensor, block: Tensor, slot: Tensor, live: Tensor) -> None:
    """``cache[block[t], slot[t]] = new[t]`` for live t only, with static shapes.

    A dead row must still write something somewhere. It repeats the write of the first live row, or, when none is live,
    every row rewrites what row 0's place holds already: rows that share a place always carry the same value, so the
    order of the writes cannot matter.
    """
    values = new.to(cache.dtype)
    if cache.dtype.itemsize == 1:  # fp8: indexing moves bytes
        cache, values = cache.view(torch.uint8), values.view(torch.uint8)
    first = live.to(torch.uint8).argmax()
    source = torch.where(live, torch.arange(live.shape[0], device=live.device), first)
    block, slot = block[source].long(), slot[source].long()
    values = torch.where(live.any(), values[source], cache[block, slot])
    cache.index_put_((block, slot), values)
