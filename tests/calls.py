"""Describes one call of a public function by its logical sequences, lays it out as a client would, and judges it.

A `Call` says what is asked, lengths and all (cases.py has the normalised arguments underneath). `build` draws fresh
sequences and scatters them into the layout of the call: every slot, row and page that no sequence owns holds NaN, and
so do keys that no query sees (freed pages); table entries past the pages a sequence needs are garbage, and `out` and
the gaps in it hold NaN. `judge` computes the answer from the logical sequences alone: no mistake of layout can hide.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import broadhead
import oracle
import torch
from torch import Tensor

NAN = float("nan")
#: What a page table may hold where no page is needed.
GARBAGE_PAGES = (2**31 - 1, -(2**31), -1, 10**6)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a public function: "func" (dense), "varlen" or "kvcache". Lengths are those of the live rows."""

    function: str
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    heads_q: int = 2
    heads_kv: int = 2
    head_dim: int = 64
    head_dim_v: int = 0  # 0: head_dim
    dtype: torch.dtype = torch.bfloat16
    causal: bool = False
    window: Any = (-1, -1)
    attention_chunk: int = 0
    softcap: float = 0.0
    softmax_scale: float | None = None
    sinks: str = ""  # "", "fp32", "q" (the dtype of q)
    prefix: tuple[int, ...] = ()
    page_size: int = 0  # 0: not paged
    q_layout: str = "plain"  # "plain", "packed" (slice of q|k|v heads), "heads_first" (transposed), "gapped" (columns)
    # "plain", "rows" (K|V in a row), "interleaved" (vLLM), "heads_first", "gapped" (columns), "overlapping" (HF)
    k_layout: str = "plain"
    out_layout: str = "plain"  # "plain", "heads_first", "gapped" (columns and a head)
    freed_entries: bool = False  # garbage in the page table also for pages whose keys no query sees
    ragged_q: bool = False  # kvcache with cu_seqlens_q
    slack_q: int = 0  # varlen: dead rows after each sequence (seqused_q)
    slack_k: int = 0  # dead rows after each sequence (seqused_k)
    tail: int = 0  # varlen: rows past cu_seqlens[-1]
    leftpad: tuple[int, ...] = ()
    batch_idx: bool = False
    num_new: tuple[int, ...] = ()  # kvcache: how many of seqlens_k the call appends
    num_splits: int | None = None
    metadata: bool = False
    pack_gqa: bool | None = None
    max_seqlen_slack: int = 0  # how much larger than needed the max_seqlen arguments are

    @property
    def batch(self) -> int:
        return len(self.seqlens_q)

    @property
    def dim_v(self) -> int:
        return self.head_dim_v or self.head_dim

    @property
    def normalized_window(self) -> tuple[int, int]:
        left, right = self.window if isinstance(self.window, (tuple, list)) else (self.window, self.window)
        left = -1 if left is None or left < 0 else left
        right = -1 if right is None or right < 0 else right
        return left, 0 if self.causal else right

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    def with_(self, **changes: Any) -> Call:
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass
class Built:
    """A call with its tensors: logical sequences, keyword arguments of the public function, where the live rows are."""

    call: Call
    q: list[Tensor]  # per sequence (sq, Hq, D)
    k: list[Tensor]  # per sequence (sk, Hkv, D)
    v: list[Tensor]
    sinks: Tensor | None
    kwargs: dict[str, Any]
    out: Tensor
    rows: list[Tensor]  # per sequence: indices of its live rows in out.flatten(0, -3)
    out_store: Tensor | None = None  # what out is a view of: NaN all around it

    def run(self, **overrides: Any) -> tuple[Tensor, Tensor]:
        """Call the public function; ``(out, softmax_lse)``."""
        call, kwargs = self.call, {**self.kwargs, **overrides}
        if call.metadata:
            kwargs.setdefault("scheduler_metadata", self.scheduler_metadata())
        if call.function == "kvcache":
            return broadhead.flash_attn_with_kvcache(**kwargs, return_softmax_lse=True)
        function = broadhead.flash_attn_func if call.function == "func" else broadhead.flash_attn_varlen_func
        return function(**kwargs, return_attn_probs=True)

    def scheduler_metadata(self, **overrides: Any) -> Tensor:
        call, kwargs = self.call, self.kwargs
        lengths = kwargs.get("cache_seqlens", kwargs.get("seqused_k"))
        max_q = kwargs["max_seqlen_q"] if kwargs.get("max_seqlen_q") is not None else max(call.seqlens_q)
        capacity = self.max_seqlen_k()
        arguments = {
            "qkv_dtype": call.dtype,
            "headdim_v": call.dim_v,
            "cu_seqlens_q": kwargs.get("cu_seqlens_q"),
            "cache_leftpad": kwargs.get("cache_leftpad"),
            "page_size": call.page_size or None,
            "max_seqlen_k_new": max(call.num_new, default=0),
            "causal": call.causal,
            "window_size": call.window,
            "attention_chunk": call.attention_chunk,
            "has_softcap": call.softcap > 0,
            "num_splits": call.num_splits or 0,
            "pack_gqa": call.pack_gqa,
            **overrides,
        }
        return broadhead.get_scheduler_metadata(
            call.batch, max_q, capacity, call.heads_q, call.heads_kv, call.head_dim, lengths, **arguments
        )

    def max_seqlen_k(self) -> int:
        """The length rule: what forward derives for this call."""
        if self.call.page_size:
            return self.kwargs["page_table"].shape[1] * self.call.page_size
        if self.call.function == "kvcache":
            return self.kwargs["k_cache"].shape[1]
        return self.kwargs.get("max_seqlen_k") or max(self.call.seqlens_k)

    def live_mask(self) -> Tensor:
        """``(rows of out,)``: which rows a sequence owns."""
        mask = torch.zeros(self.out.shape[:-2].numel(), dtype=torch.bool, device=self.out.device)
        for rows in self.rows:
            mask[rows] = True
        return mask

    def split(self, out: Tensor) -> list[Tensor]:
        """An output's live rows, per sequence ``(sq, Hq, Dv)``."""
        flat = out.reshape(-1, *out.shape[-2:])
        return [flat[rows] for rows in self.rows]

    def split_lse(self, lse: Tensor) -> list[Tensor]:
        """A softmax_lse's live rows, per sequence ``(Hq, sq)``."""
        flat = lse if lse.dim() == 2 else lse.transpose(0, 1).reshape(lse.shape[1], -1)
        return [flat[:, rows] for rows in self.rows]


def judge(built: Built, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """Per sequence ``(sq, Hq, Dv)`` and ``(Hq, sq)`` by textbook attention in ``dtype``, heads batched."""
    call, outs, lses = built.call, [], []
    left, right = call.normalized_window
    for b, (q, k, v) in enumerate(zip(built.q, built.k, built.v, strict=False)):
        sq, sk, group = len(q), len(k), call.heads_q // call.heads_kv
        if sq == 0 or sk == 0:
            outs.append(torch.zeros(sq, call.heads_q, call.dim_v, dtype=dtype, device=q.device))
            lses.append(torch.full((call.heads_q, sq), float("-inf"), dtype=dtype, device=q.device))
            continue
        keys = k.to(dtype).repeat_interleave(group, dim=1).transpose(0, 1)
        values = v.to(dtype).repeat_interleave(group, dim=1).transpose(0, 1)
        scores = q.to(dtype).transpose(0, 1) @ keys.transpose(1, 2) * call.scale
        if call.softcap > 0:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        prefix = call.prefix[b] if call.prefix else None
        mask = oracle.visible(sq, sk, left, right, call.attention_chunk, prefix, q.device)
        scores = scores.masked_fill(~mask, float("-inf"))
        if built.sinks is not None:
            sink = built.sinks.to(dtype)[:, None, None].expand(-1, sq, 1)
            scores = torch.cat((scores, sink), dim=2)
        empty = ~mask.any(dim=1)
        weights = torch.softmax(scores, dim=2).masked_fill(empty[None, :, None], 0.0)[:, :, :sk]
        outs.append((weights @ values).transpose(0, 1))
        lses.append(torch.logsumexp(scores, dim=2).masked_fill(empty, float("-inf")))
    return outs, lses


def build(call: Call, device: torch.device, rng: random.Random | None = None, poison: bool = True) -> Built:
    """Draw the sequences of ``call`` and lay them out. ``rng`` shuffles pages; torch's generator draws the values."""
    rng = rng or random.Random(torch.initial_seed())
    draw = {"dtype": call.dtype, "device": device}
    q = [torch.randn(n, call.heads_q, call.head_dim, **draw) for n in call.seqlens_q]
    k = [torch.randn(n, call.heads_kv, call.head_dim, **draw) for n in call.seqlens_k]
    v = [torch.randn(n, call.heads_kv, call.dim_v, **draw) for n in call.seqlens_k]
    sinks = None
    if call.sinks:
        sinks = torch.randn(call.heads_q, device=device) * 2
        sinks = sinks if call.sinks == "fp32" else sinks.to(call.dtype)

    kwargs: dict[str, Any] = {
        "causal": call.causal,
        "window_size": call.window,
        "attention_chunk": call.attention_chunk,
        "softcap": call.softcap,
        "softmax_scale": call.softmax_scale,
        "sinks": sinks,
        "pack_gqa": call.pack_gqa,
    }
    if call.num_splits is not None:
        kwargs["num_splits"] = call.num_splits
    if call.prefix:
        kwargs["prefix_lens"] = _int32(call.prefix, device)

    built = Built(call, q, k, v, sinks, kwargs, torch.empty(0), [])
    _place_queries(built, device)
    _place_keys(built, device, rng)
    built.out, built.out_store = _place_output(call, kwargs["q"].shape[:-2], NAN if poison else 0.0, device)
    kwargs["out"] = built.out
    return built


def _place_output(call: Call, lead: tuple[int, ...], value: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """``out`` by the call's strides, and the whole that it is a view of."""
    heads, options = call.heads_q, {"dtype": call.dtype, "device": device}
    if call.out_layout == "heads_first":
        store = torch.full((*lead[:-1], heads, lead[-1], call.dim_v), value, **options)
        return store.transpose(-3, -2), store
    gap = (1, 8) if call.out_layout == "gapped" else (0, 0)
    store = torch.full((*lead, heads + gap[0], call.dim_v + gap[1]), value, **options)
    return store[..., :heads, : call.dim_v], store


def _int32(values: Any, device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=device)


def _offsets(lengths: list[int], device: torch.device) -> Tensor:
    return _int32([sum(lengths[:i]) for i in range(len(lengths) + 1)], device)


def _place_queries(built: Built, device: torch.device) -> None:
    call, kwargs = built.call, built.kwargs
    packed = call.function == "varlen" or call.ragged_q
    spare = 3 if call.q_layout == "packed" else 0  # heads of the fused projection that are not q
    if not packed:
        seqlen_q = call.seqlens_q[0] if call.seqlens_q else 0
        assert all(n == seqlen_q for n in call.seqlens_q), "dense q has one length"
        lead: tuple[int, ...] = (call.batch, seqlen_q)
        starts = [b * seqlen_q for b in range(call.batch)]
    else:
        capacity = [n + call.slack_q for n in call.seqlens_q]
        lead = (sum(capacity) + call.tail,)
        starts = [sum(capacity[:b]) for b in range(call.batch)]
        kwargs["cu_seqlens_q"] = _offsets(capacity, device)
        kwargs["max_seqlen_q"] = max(capacity, default=0) + call.max_seqlen_slack
        if call.slack_q:
            kwargs["seqused_q"] = _int32(call.seqlens_q, device)
    built.rows = [torch.arange(s, s + n, device=device) for s, n in zip(starts, call.seqlens_q, strict=False)]

    if call.q_layout == "heads_first":
        store = torch.full((*lead[:-1], call.heads_q, lead[-1], call.head_dim), NAN, dtype=call.dtype, device=device)
        q = store.transpose(-3, -2)
    else:
        width = call.head_dim + (8 if call.q_layout == "gapped" else 0)
        store = torch.full((*lead, call.heads_q + spare, width), NAN, dtype=call.dtype, device=device)
        q = store[..., : call.heads_q, : call.head_dim]
    for b, sequence in enumerate(built.q):
        if packed:
            q[starts[b] : starts[b] + len(sequence)] = sequence
        else:
            q[b] = sequence
    kwargs["q"] = q


def _place_keys(built: Built, device: torch.device, rng: random.Random) -> None:
    call, kwargs = built.call, built.kwargs
    leftpad = call.leftpad or (0,) * call.batch
    ends = [pad + n for pad, n in zip(leftpad, call.seqlens_k, strict=False)]
    num_new = call.num_new or (0,) * call.batch
    # Keys that are in the cache before the call.
    stored = [n - new for n, new in zip(call.seqlens_k, num_new, strict=False)]
    names = ("k_cache", "v_cache") if call.function == "kvcache" else ("k", "v")

    if call.page_size:
        k, v = _paged(built, device, rng, ends, leftpad, stored)
    elif call.function == "varlen":
        capacity = [n + call.slack_k for n in call.seqlens_k]
        k, v = _key_store(call, (sum(capacity) + call.tail,), device)
        for b, n in enumerate(call.seqlens_k):
            start = sum(capacity[:b])
            k[start : start + n], v[start : start + n] = _stored(built, b, n)
        kwargs["cu_seqlens_k"] = _offsets(capacity, device)
        kwargs["max_seqlen_k"] = max(capacity, default=0) + call.max_seqlen_slack
        if call.slack_k:
            kwargs["seqused_k"] = _int32(call.seqlens_k, device)
    else:
        owners = list(range(call.batch))
        if call.batch_idx:
            owners = rng.sample(range(call.batch + 2), call.batch)
            kwargs["cache_batch_idx"] = _int32(owners, device)
        rows = call.batch + 2 if call.batch_idx else call.batch
        k, v = _key_store(call, (rows, max(ends, default=0) + call.slack_k), device)
        for b, n in enumerate(stored):
            begin = leftpad[b]
            k[owners[b], begin : begin + n], v[owners[b], begin : begin + n] = _stored(built, b, n)
    kwargs[names[0]], kwargs[names[1]] = k, v

    if call.function == "kvcache":
        kwargs["cache_seqlens"] = _int32([pad + n for pad, n in zip(leftpad, stored, strict=False)], device)
        if call.leftpad:
            kwargs["cache_leftpad"] = _int32(call.leftpad, device)
        if call.num_new:
            _place_new_keys(built, device, stored)


def _stored(built: Built, b: int, n: int) -> tuple[Tensor, Tensor]:
    """The first n keys and values of sequence b, NaN where none of its queries sees them."""
    hidden = ~_seen(built, b)[:n, None, None]
    return built.k[b][:n].masked_fill(hidden, NAN), built.v[b][:n].masked_fill(hidden, NAN)


def _seen(built: Built, b: int) -> Tensor:
    """``(sk,)``: the keys of sequence b that a query sees; all of them where the call appends."""
    call, k = built.call, built.k[b]
    if call.num_new:
        return torch.ones(len(k), dtype=torch.bool, device=k.device)
    left, right = call.normalized_window
    prefix = call.prefix[b] if call.prefix else None
    return oracle.visible(len(built.q[b]), len(k), left, right, call.attention_chunk, prefix, k.device).any(dim=0)


def _place_new_keys(built: Built, device: torch.device, stored: list[int]) -> None:
    """The keys that the call appends: dense where all sequences append alike, else packed."""
    call, kwargs = built.call, built.kwargs
    new_k, new_v = ([x[n:] for x, n in zip(tensors, stored, strict=False)] for tensors in (built.k, built.v))
    if len(set(call.num_new)) == 1 and not call.ragged_q:
        kwargs["k"], kwargs["v"] = torch.stack(new_k), torch.stack(new_v)
        return
    kwargs["k"], kwargs["v"] = torch.cat(new_k), torch.cat(new_v)
    kwargs["cu_seqlens_k_new"] = _offsets(list(call.num_new), device)


def _key_store(call: Call, lead: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """K and V filled with NaN, ``(*lead, Hkv, D | Dv)`` by the call's strides."""
    heads, dims, options = call.heads_kv, (call.head_dim, call.dim_v), {"dtype": call.dtype, "device": device}
    if call.k_layout == "plain":
        k, v = (torch.full((*lead, heads, dim), NAN, **options) for dim in dims)
    elif call.k_layout == "gapped":
        k, v = (torch.full((*lead, heads, dim + 8), NAN, **options)[..., :dim] for dim in dims)
    elif call.k_layout == "rows":
        k, v = torch.full((*lead, heads, sum(dims)), NAN, **options).split(dims, dim=-1)
    elif call.k_layout == "interleaved":
        store = torch.full((*lead[:-1], heads, lead[-1], sum(dims)), NAN, **options)
        k, v = store.transpose(-3, -2).split(dims, dim=-1)
    elif call.k_layout == "heads_first":
        k, v = (torch.full((*lead[:-1], heads, lead[-1], dim), NAN, **options).transpose(-3, -2) for dim in dims)
    elif call.k_layout == "overlapping":
        assert call.page_size and dims[0] == dims[1], "overlapping views are of one page pool"
        store = torch.full((lead[0] + 1, *lead[1:], heads, dims[0]), NAN, **options)
        k, v = store[:-1], store[1:]
    else:
        raise AssertionError(f"unknown k_layout {call.k_layout}")
    return k, v


def _paged(
    built: Built, device: torch.device, rng: random.Random, ends: list[int], leftpad: Any, stored: list[int]
) -> tuple[Tensor, Tensor]:
    call, kwargs, size = built.call, built.kwargs, built.call.page_size
    needed = [-(-end // size) for end in ends]
    width = max(needed, default=0) + (1 + call.slack_k // size if call.slack_k else 0)
    width = max(width, 1)
    num_pages = sum(needed) + 3
    step = 2 if call.k_layout == "overlapping" else 1  # the V of page p is the K of page p + 1
    ids = rng.sample(range(num_pages), sum(needed))
    num_rows = call.batch + 2 if call.batch_idx else call.batch
    owners = rng.sample(range(num_rows), call.batch) if call.batch_idx else list(range(call.batch))
    table = [[rng.choice(GARBAGE_PAGES) for _ in range(width)] for _ in range(num_rows)]
    slots = []  # per sequence: flat slot of each cache row
    for b, count in enumerate(needed):
        pages = [ids.pop() * step for _ in range(count)]
        seen = _seen(built, b).tolist()
        for column in range(count):
            first, last = (max(edge * size - leftpad[b], 0) for edge in (column, column + 1))
            if not call.freed_entries or any(seen[first:last]):
                table[owners[b]][column] = pages[column]
        slots.append([pages[row // size] * size + row % size for row in range(ends[b])])

    k, v = _key_store(call, (num_pages * step, size), device)
    for b, n in enumerate(stored):
        if n == 0:
            continue
        flat = torch.tensor(slots[b][leftpad[b] : leftpad[b] + n], device=device)
        k[flat // size, flat % size], v[flat // size, flat % size] = _stored(built, b, n)
    kwargs["page_table"] = torch.tensor(table, dtype=torch.int32, device=device).reshape(num_rows, width)
    if call.batch_idx:
        kwargs["cache_batch_idx"] = _int32(owners, device)
    if call.function == "varlen":
        kwargs["seqused_k"] = _int32(call.seqlens_k, device)
        kwargs["cu_seqlens_k"] = None
        kwargs["max_seqlen_k"] = width * size
    return k, v
