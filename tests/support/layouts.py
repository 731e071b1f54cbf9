"""Places the sequences of a call (calls.py) in memory: strides, pages, gaps, and NaN in all that must not be read."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import oracle
import torch
from torch import Tensor

if TYPE_CHECKING:
    from calls import Built, Call

NAN = float("nan")
#: Rows of NaN behind those of a tensor with k_layout="followed", more than the rest of any tile.
FOLLOWING = 200
E4M3_NAN = 0x7F
#: What a page table may hold where no page is needed.
GARBAGE_PAGES = (2**31 - 1, -(2**31), -1, 10**6)
#: What int32 may hold where a sequence is causal.
TRUE = (1, -1, 2, 256, 1 << 16, -(2**31))


def bytes_of(x: Tensor) -> Tensor:
    """A view to move values by: torch can not index or fill 8-bit floats on every device."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def nan_of(dtype: torch.dtype) -> float | int:
    """NaN as bytes_of has it."""
    return E4M3_NAN if dtype.itemsize == 1 else NAN


def gap_of(dtype: torch.dtype) -> int:
    """Columns behind a head of a gapped layout: at least 16 bytes, so that kernels take it."""
    return max(8, 16 // dtype.itemsize)


def place_output(call: Call, lead: tuple[int, ...], value: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """``out`` by the call's strides, and the whole that it is a view of."""
    heads, options = call.heads_q, {"dtype": call.out_dtype, "device": device}
    if call.out_layout == "heads_first":
        store = torch.full((*lead[:-1], heads, lead[-1], call.dim_v), value, **options)
        return store.transpose(-3, -2), store
    if call.out_layout == "guarded":
        store = torch.full((lead[0] + 2, *lead[1:], heads + 1, call.dim_v + 8), value, **options)
        return store[1:-1, ..., :heads, : call.dim_v], store
    gap = (1, 8) if call.out_layout == "gapped" else (0, 0)
    store = torch.full((*lead, heads + gap[0], call.dim_v + gap[1]), value, **options)
    return store[..., :heads, : call.dim_v], store


def int32(values: Any, device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=device)


def _offsets(lengths: list[int], device: torch.device) -> Tensor:
    return int32([sum(lengths[:i]) for i in range(len(lengths) + 1)], device)


def place_queries(built: Built, device: torch.device) -> None:
    call, kwargs = built.call, built.kwargs
    packed = call.packs_queries
    if not packed:
        seqlen_q = max(call.seqlens_q, default=0) + call.slack_q
        lead: tuple[int, ...] = (call.batch, seqlen_q)
        starts = [b * seqlen_q for b in range(call.batch)]
        if any(n != seqlen_q for n in call.seqlens_q):
            assert call.function == "mha_fwd", "dense q has one length"
            kwargs["seqused_q"] = int32(call.seqlens_q, device)
    else:
        capacity = [n + call.slack_q for n in call.seqlens_q]
        lead = (sum(capacity) + call.tail,)
        starts = [sum(capacity[:b]) for b in range(call.batch)]
        kwargs["cu_seqlens_q"] = _offsets(capacity, device)
        kwargs["max_seqlen_q"] = max(capacity, default=0) + call.max_seqlen_slack
        if call.slack_q:
            kwargs["seqused_q"] = int32(call.seqlens_q, device)
    built.rows = [torch.arange(s, s + n, device=device) for s, n in zip(starts, call.seqlens_q, strict=False)]

    kwargs["q"] = _place_rows(call, lead, starts if packed else None, built.q, call.head_dim, device)
    if built.qv is not None:
        kwargs["qv"] = _place_rows(call, lead, starts if packed else None, built.qv, call.dim_v, device)


def _place_rows(
    call: Call, lead: tuple[int, ...], starts: list[int] | None, rows: list[Tensor], width: int, device: torch.device
) -> Tensor:
    """q or qv ``(*lead, Hq, width)`` by the call's strides, the sequences in place; starts: where packed ones begin."""
    options = {"dtype": call.dtype, "device": device}
    spare = 3 if call.q_layout == "packed" else 0  # heads of the fused projection that are not q
    if call.q_layout == "heads_first":
        x = torch.full((*lead[:-1], call.heads_q, lead[-1], width), NAN, **options).transpose(-3, -2)
    else:
        gap = gap_of(call.dtype) if call.q_layout == "gapped" else 0
        x = torch.full((*lead, call.heads_q + spare, width + gap), NAN, **options)[..., : call.heads_q, :width]
    for b, sequence in enumerate(rows):
        if starts is None:
            bytes_of(x)[b, : len(sequence)] = bytes_of(sequence)
        else:
            bytes_of(x)[starts[b] : starts[b] + len(sequence)] = bytes_of(sequence)
    return x


def place_masks(built: Built, device: torch.device, rng: random.Random) -> None:
    """Masks that are values: ranges and words as q has its rows, anything in those that no sequence owns."""
    call, kwargs = built.call, built.kwargs
    lead = kwargs["q"].shape[:-2]
    if call.ranges:
        kwargs["query_ranges"] = _place_values(built, lead.numel(), (2,), call.ranges, torch.int32, rng).to(device)
        kwargs["ranges_in_window"] = call.ranges_in_window
    if call.tree:
        kwargs["tree_mask"] = _place_values(built, lead.numel(), (), call.tree, torch.int64, rng).to(device)
    for name in ("query_ranges", "tree_mask"):
        if name in kwargs:
            kwargs[name] = _apart(kwargs[name]) if call.strided_masks else kwargs[name]
            kwargs[name] = kwargs[name].unflatten(0, lead)
    if call.causal_each:
        assert not call.causal and len(call.causal_each) == call.batch
        values = [causal and (call.causal_dtype == torch.bool or rng.choice(TRUE)) for causal in call.causal_each]
        kwargs["causal"] = torch.tensor(values, dtype=call.causal_dtype, device=device)


def _place_values(
    built: Built, rows: int, tail: tuple[int, ...], values: Any, dtype: torch.dtype, rng: random.Random
) -> Tensor:
    """``(rows, *tail)`` on the CPU: the values of each sequence in its rows, anything in the others."""
    least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    drawn = [rng.choice((0, 1, 3, rows, most, least, -1)) for _ in range(rows * (tail or (1,))[0])]
    x = torch.tensor(drawn, dtype=dtype).reshape(rows, *tail)
    for place, given in zip(built.rows, values, strict=True):
        if given:
            x[place.cpu()] = torch.tensor(given, dtype=dtype)
    return x


def _apart(x: Tensor) -> Tensor:
    """The same rows among others, which hold anything; the last dimension of ranges stays together."""
    store = torch.full((len(x), 3, *x.shape[1:]), 5, dtype=x.dtype, device=x.device)
    store[:, 1] = x
    return store[:, 1]


def place_keys(built: Built, device: torch.device, rng: random.Random) -> None:
    call, kwargs = built.call, built.kwargs
    leftpad = call.leftpad or (0,) * call.batch
    ends = [pad + n for pad, n in zip(leftpad, call.seqlens_k, strict=False)]
    num_new = call.num_new or (0,) * call.batch
    # Keys that are in the cache before the call.
    stored = [n - new for n, new in zip(call.seqlens_k, num_new, strict=False)]
    names = ("k_cache", "v_cache") if call.function == "kvcache" else ("k", "v")

    if call.page_size:
        (k, v), slots = _paged(built, device, rng, ends)
    elif call.packs_keys:
        capacity = [end + call.slack_k for end in ends]
        k, v = key_store(call, (sum(capacity) + call.tail,), device)
        slots = [torch.arange(end, device=device) + sum(capacity[:b]) for b, end in enumerate(ends)]
        kwargs["cu_seqlens_k"] = _offsets(capacity, device)
        kwargs["max_seqlen_k"] = max(capacity, default=0) + call.max_seqlen_slack
        if call.slack_k:
            kwargs["seqused_k"] = int32(ends, device)
    else:
        owners = list(range(call.batch))
        if call.batch_idx:
            owners = rng.sample(range(call.batch + 2), call.batch)
            kwargs["cache_batch_idx"] = int32(owners, device)
        rows, capacity_k = call.batch + 2 if call.batch_idx else call.batch, max(ends, default=0) + call.slack_k
        k, v = key_store(call, (rows, capacity_k), device)
        slots = [torch.arange(end, device=device) + owners[b] * capacity_k for b, end in enumerate(ends)]
        if call.function == "mha_fwd" and any(end != capacity_k for end in ends):
            kwargs["seqused_k"] = int32(ends, device)
    built.slots = [rows[pad:] for rows, pad in zip(slots, leftpad, strict=False)]
    for b, n in enumerate(stored):
        rows = built.slots[b][:n]
        place = (rows,) if k.dim() == 3 else (rows // k.shape[1], rows % k.shape[1])
        if n:
            bytes_of(k)[place], bytes_of(v)[place] = _stored(built, b, n)
    kwargs[names[0]], kwargs[names[1]] = k, v

    if call.function == "mha_fwd" and call.leftpad:
        kwargs["cache_leftpad"] = int32(call.leftpad, device)
    if call.function == "kvcache":
        kwargs["cache_seqlens"] = int32([pad + n for pad, n in zip(leftpad, stored, strict=False)], device)
        if call.leftpad:
            kwargs["cache_leftpad"] = int32(call.leftpad, device)
        if call.num_new:
            _place_new_keys(built, device, stored)


def _stored(built: Built, b: int, n: int) -> tuple[Tensor, Tensor]:
    """The first n keys and values of sequence b, NaN where none of its queries sees them, as bytes_of has them."""
    hidden = ~_seen(built, b)[:n, None, None]
    k, v = (bytes_of(x[b][:n]).masked_fill(hidden, nan_of(x[b].dtype)) for x in (built.k, built.v))
    return k, v


def _seen(built: Built, b: int) -> Tensor:
    """``(sk,)``: the keys of sequence b that a query sees; all of them where the call appends."""
    call, k = built.call, built.k[b]
    if call.num_new:
        return torch.ones(len(k), dtype=torch.bool, device=k.device)
    return oracle.visible(len(built.q[b]), len(k), call.rule(b), k.device).any(dim=0)


def _place_new_keys(built: Built, device: torch.device, stored: list[int]) -> None:
    """The keys that the call appends: dense where all sequences append alike, else packed."""
    call, kwargs = built.call, built.kwargs
    new_k, new_v = ([x[n:] for x, n in zip(tensors, stored, strict=False)] for tensors in (built.k, built.v))
    if len(set(call.num_new)) == 1 and not call.ragged_q:
        kwargs["k"], kwargs["v"] = torch.stack(new_k), torch.stack(new_v)
        return
    kwargs["k"], kwargs["v"] = torch.cat(new_k), torch.cat(new_v)
    kwargs["cu_seqlens_k_new"] = _offsets(list(call.num_new), device)


def key_store(call: Call, lead: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """K and V filled with NaN, ``(*lead, Hkv, D | Dv)`` by the call's strides."""
    heads, dims, options = call.heads_kv, (call.head_dim, call.dim_v), {"dtype": call.k_dtype, "device": device}
    if call.k_layout == "plain":
        k, v = (torch.full((*lead, heads, dim), NAN, **options) for dim in dims)
    elif call.k_layout == "gapped":
        gap = gap_of(call.k_dtype)
        k, v = (torch.full((*lead, heads, dim + gap), NAN, **options)[..., :dim] for dim in dims)
    elif call.k_layout == "rows":
        k, v = torch.full((*lead, heads, sum(dims)), NAN, **options).split(dims, dim=-1)
    elif call.k_layout == "interleaved":
        store = torch.full((*lead[:-1], heads, lead[-1], sum(dims)), NAN, **options)
        k, v = store.transpose(-3, -2).split(dims, dim=-1)
    elif call.k_layout == "heads_first":
        k, v = (torch.full((*lead[:-1], heads, lead[-1], dim), NAN, **options).transpose(-3, -2) for dim in dims)
    elif call.k_layout == "followed":
        rows = (*lead[:-1], lead[-1] + FOLLOWING, heads)
        k, v = (torch.full((*rows, dim), NAN, **options).narrow(-3, 0, lead[-1]) for dim in dims)
    elif call.k_layout == "overlapping":
        assert call.page_size and dims[0] == dims[1], "overlapping views are of one page pool"
        store = torch.full((lead[0] + 1, *lead[1:], heads, dims[0]), NAN, **options)
        k, v = store[:-1], store[1:]
    else:
        raise AssertionError(f"unknown k_layout {call.k_layout}")
    return k, v


def _paged(built: Built, device: torch.device, rng: random.Random, ends: list[int]) -> Any:
    """K and V, and for each sequence the slots of its cache rows; the page table joins the arguments."""
    call, kwargs, size = built.call, built.kwargs, built.call.page_size
    leftpad = call.leftpad or (0,) * call.batch
    needed = [-(-end // size) for end in ends]
    width = max(needed, default=0) + (1 + call.slack_k // size if call.slack_k else 0)
    width = max(width, 1)
    num_pages = sum(needed) + 3
    step = 2 if call.k_layout == "overlapping" else 1  # the V of page p is the K of page p + 1
    ids = rng.sample(range(num_pages), sum(needed))
    num_rows = call.batch + 2 if call.batch_idx else call.batch
    owners = rng.sample(range(num_rows), call.batch) if call.batch_idx else list(range(call.batch))
    table = [[rng.choice(GARBAGE_PAGES) for _ in range(width)] for _ in range(num_rows)]
    slots = []
    for b, count in enumerate(needed):
        pages = [ids.pop() * step for _ in range(count)]
        seen = _seen(built, b).tolist()
        for column in range(count):
            first, last = (max(edge * size - leftpad[b], 0) for edge in (column, column + 1))
            if not call.freed_entries or any(seen[first:last]):
                table[owners[b]][column] = pages[column]
        flat = [pages[row // size] * size + row % size for row in range(ends[b])]
        slots.append(torch.tensor(flat, dtype=torch.long, device=device))

    kwargs["page_table"] = torch.tensor(table, dtype=torch.int32, device=device).reshape(num_rows, width)
    if call.batch_idx:
        kwargs["cache_batch_idx"] = int32(owners, device)
    if call.function in ("varlen", "mha_fwd"):
        kwargs["seqused_k"] = int32(ends, device)
    if call.function == "varlen":
        kwargs["cu_seqlens_k"] = None
        kwargs["max_seqlen_k"] = width * size
    return key_store(call, (num_pages * step, size), device), slots
