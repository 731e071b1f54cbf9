"""Tensors of an Edge by which every key shows, the public call and the reference on them, and what judges a result.

q is 0, so that all visible keys weigh the same, and each row of v has a single 1: the non-zero columns of out are the
visible keys, and softmax_lse is the log of their count. What must not be read or written holds NaN.
"""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import broadhead
import torch
from broadhead import reference
from broadhead.run.append import Append, run_append
from edges import Answer, Edge, answer
from layouts import NAN, bytes_of, int32
from torch import Tensor

#: Rows of NaN before and behind out that nothing may write; more than a tile has.
OUT_GUARD_ROWS = 300
#: Rows of NaN before and behind q, k and v that nothing may read.
GUARD_ROWS = 16
#: Absolute tolerance of the LSE: a count of 400 and its neighbour differ by 2.5e-3.
LSE_ATOL = 3e-4
#: Of the weights, which are stored in 16 bits.
OUT_RTOL = 1e-2


@dataclasses.dataclass(frozen=True)
class Shape:
    """What an Edge leaves open: heads, head dims, dtypes, and how the call is launched."""

    head_dim: int = 64
    head_dim_v: int = 512
    heads_q: int = 4
    heads_kv: int = 2
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    qv: bool = False
    everything: bool = False  # no NaN in q, k and v: for calls whose values change in place
    num_splits: int | None = None
    pack_gqa: bool | None = None
    metadata: bool = False


@dataclasses.dataclass
class EdgeCall:
    """The tensors of an Edge, what it must give, and the memory around its output."""

    edge: Edge
    shape: Shape
    answer: Answer
    kwargs: dict[str, Any]
    columns: list[int]  # of each slot: where its row of v is 1
    out_store: Tensor
    before: dict[str, Tensor]  # of a call that appends: copies of the caches

    def change(self, edge: Edge) -> None:
        """Other values in the same tensors, as between two replays of a graph; for a Shape with ``everything``."""
        assert self.shape.everything and not self.before
        self.edge, self.answer = edge, answer(edge)
        for name, x in _index_tensors(edge, torch.device("cpu")).items():
            if isinstance(x, Tensor):
                self.kwargs[name].copy_(x)

    def run(self, **overrides: Any) -> tuple[Tensor, Tensor]:
        """Call the public function: ``(out, softmax_lse)``, out poisoned before."""
        self.out_store.fill_(NAN)
        kwargs = {**self.kwargs, **overrides}
        if self.edge.function == "kvcache":
            return broadhead.flash_attn_with_kvcache(**kwargs, return_softmax_lse=True)
        return broadhead.flash_attn_varlen_func(**kwargs, return_attn_probs=True)


def guarded(
    rows: int, tail: tuple[int, ...], dtype: torch.dtype, device: torch.device, guard: int = GUARD_ROWS
) -> tuple[Tensor, Tensor]:
    """NaN rows, and the whole with the guards before and behind them."""
    store = torch.full((rows + 2 * guard, *tail), NAN, dtype=dtype, device=device)
    return store[guard : guard + rows], store


def build(edge: Edge, shape: Shape, device: torch.device, rng: random.Random) -> EdgeCall:
    """The tensors: q of zeros, keys with one column each, and NaN wherever nothing is to be read or written."""
    right = answer(edge)
    slots = edge.blocks * edge.block_rows
    dim_v, kv_dtype = shape.head_dim_v, shape.kv_dtype or shape.dtype
    unique = rng.sample(range(dim_v), slots) if slots <= dim_v else None
    columns = unique or [rng.randrange(dim_v) for _ in range(slots)]
    kwargs: dict[str, Any] = {
        "causal": edge.causal,
        "window_size": edge.window,
        "attention_chunk": edge.attention_chunk,
        "softmax_scale": 1.0,
    }
    kwargs |= {} if shape.num_splits is None else {"num_splits": shape.num_splits}
    kwargs |= {} if shape.pack_gqa is None else {"pack_gqa": shape.pack_gqa}

    owned = range(edge.rows_q) if shape.everything else sorted(right.seen)
    lead = (edge.total_q,) if edge.cu_seqlens_q else (edge.batch, edge.seqlen_q)
    widths = {"q": shape.head_dim} | ({"qv": dim_v} if shape.qv else {})
    for name, width in widths.items():
        x, _ = guarded(edge.rows_q, (shape.heads_q, width), shape.dtype, device)
        bytes_of(x)[torch.tensor(owned, dtype=torch.long, device=device)] = 0
        kwargs[name] = x.view(*lead, shape.heads_q, width)
    out_dtype = torch.bfloat16 if shape.dtype.itemsize == 1 else shape.dtype
    out, out_store = guarded(edge.rows_q, (shape.heads_q, dim_v), out_dtype, device, OUT_GUARD_ROWS)
    kwargs["out"] = out.view(*lead, shape.heads_q, dim_v)

    old = list(range(slots)) if shape.everything else sorted(right.live - set(right.written))
    k = _keys(slots, old, shape, kv_dtype, device)
    v = _values(slots, {slot: columns[slot] for slot in old}, shape, kv_dtype, device)
    names = ("k_cache", "v_cache") if edge.function == "kvcache" else ("k", "v")
    for name, x in zip(names, (k, v), strict=True):
        kwargs[name] = x if edge.packed_k else x.unflatten(0, (edge.blocks, edge.block_rows))
    if edge.appends:
        fresh = edge.total_new if edge.cu_seqlens_k_new else edge.batch * edge.seqlen_new
        places = {token: columns[slot] for slot, token in right.written.items()}
        dtype = shape.dtype if kv_dtype.itemsize == 1 else kv_dtype
        new = (_keys(fresh, sorted(places), shape, dtype, device), _values(fresh, places, shape, dtype, device))
        for name, x in zip(("k", "v"), new, strict=True):
            kwargs[name] = x if edge.cu_seqlens_k_new else x.unflatten(0, (edge.batch, edge.seqlen_new))
    kwargs |= _index_tensors(edge, device)
    before = {name: kwargs[name].clone() for name in names} if edge.appends else {}
    call = EdgeCall(edge, shape, right, kwargs, columns, out_store, before)
    if shape.metadata and edge.function == "kvcache":
        kwargs["scheduler_metadata"] = _metadata(call)
    return call


def _keys(rows: int, live: list[int], shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(rows, Hkv, D)``: numbers that e4m3 has too in the live rows, NaN in the others and around them all."""
    x, _ = guarded(rows, (shape.heads_kv, shape.head_dim), dtype, device)
    some = torch.randint(-16, 17, (len(live), *x.shape[1:]), device=device).float().div(4).to(dtype)
    bytes_of(x)[torch.tensor(live, dtype=torch.long, device=device)] = bytes_of(some)
    return x


def _values(rows: int, columns: dict[int, int], shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(rows, Hkv, Dv)``: of each row in ``columns`` its column is 1 and the others are 0; NaN elsewhere."""
    x, _ = guarded(rows, (shape.heads_kv, shape.head_dim_v), dtype, device)
    if columns:
        index = torch.tensor(list(columns), dtype=torch.long, device=device)
        ones = torch.zeros(len(columns), shape.head_dim_v, device=device)
        ones[torch.arange(len(columns), device=device), torch.tensor(list(columns.values()), device=device)] = 1.0
        bytes_of(x)[index] = bytes_of(ones.to(dtype))[:, None].expand(-1, shape.heads_kv, -1)
    return x


def _index_tensors(edge: Edge, device: torch.device) -> dict[str, Any]:
    """The int32 arguments by their names in the public function."""
    cached = edge.function == "kvcache"
    named = {
        "cu_seqlens_q": edge.cu_seqlens_q,
        "seqused_q": edge.seqused_q,
        "cu_seqlens_k": edge.cu_seqlens_k,
        "cache_seqlens" if cached else "seqused_k": edge.lengths,
        "cache_batch_idx": edge.batch_idx,
        "cache_leftpad": edge.leftpad,
        "cu_seqlens_k_new": edge.cu_seqlens_k_new,
    }
    tensors: dict[str, Any] = {name: int32(x, device) for name, x in named.items() if x}
    if edge.page_table:
        tensors["page_table"] = torch.tensor(edge.page_table, dtype=torch.int32, device=device)
    if edge.ranges:
        tensors["query_ranges"] = _by_query(edge, torch.tensor(edge.ranges, dtype=torch.int32, device=device))
        tensors["ranges_in_window"] = edge.ranges_in_window
    if edge.tree:
        tensors["tree_mask"] = _by_query(edge, torch.tensor(edge.tree, dtype=torch.int64, device=device))
    if edge.causal_each:
        tensors["causal"] = int32(edge.causal_each, device)
    if edge.cu_seqlens_q:
        tensors["max_seqlen_q"] = edge.max_seqlen_q
    if not cached:
        tensors |= {"max_seqlen_k": edge.max_seqlen_k} | ({} if edge.packed_k else {"cu_seqlens_k": None})
    return tensors


def _by_query(edge: Edge, x: Tensor) -> Tensor:
    """Values of the rows of q, as q has them."""
    return x if edge.cu_seqlens_q else x.unflatten(0, (edge.batch, edge.seqlen_q))


def _metadata(call: EdgeCall) -> Tensor:
    """Scheduler metadata made from the very lengths that are out of range."""
    edge, shape, kwargs = call.edge, call.shape, call.kwargs
    capacity = edge.block_rows * (len(edge.page_table[0]) if edge.page_table else 1)
    return broadhead.get_scheduler_metadata(
        edge.batch, edge.max_seqlen_q or edge.seqlen_q, capacity, shape.heads_q, shape.heads_kv, shape.head_dim,
        kwargs["cache_seqlens"], qkv_dtype=shape.dtype, headdim_v=shape.head_dim_v,
        cu_seqlens_q=kwargs.get("cu_seqlens_q"), cache_leftpad=kwargs.get("cache_leftpad"),
        page_size=edge.block_rows if edge.page_table else None, causal=kwargs["causal"], window_size=edge.window,
        max_seqlen_k_new=edge.seqlen_new or edge.total_new, attention_chunk=edge.attention_chunk,
        num_splits=shape.num_splits or 0, pack_gqa=shape.pack_gqa, has_qv=shape.qv,
    )  # fmt: skip


# --- judgement --------------------------------------------------------------------------------------------------------


def check(call: EdgeCall, out: Tensor, lse: Tensor) -> None:
    """Compare a result with the rule, exactly: each row's keys, its LSE, every row that must not be written."""
    edge, shape, right = call.edge, call.shape, call.answer
    what = f"{edge} {shape}"
    rows = out.reshape(edge.rows_q, shape.heads_q, shape.head_dim_v).float().cpu()
    by_row = (lse if lse.dim() == 2 else lse.transpose(0, 1).reshape(lse.shape[1], -1)).T.float().cpu()
    expected = torch.zeros(edge.rows_q, shape.head_dim_v)
    expected_lse = torch.full((edge.rows_q,), float("-inf"))
    for row, slots in right.seen.items():
        for slot in slots:
            expected[row, call.columns[slot]] += 1.0 / len(slots)
        if slots:
            expected_lse[row] = math.log(len(slots))
    judged = torch.tensor(sorted(set(right.seen) - right.contested), dtype=torch.long)
    got, want = rows[judged], expected[judged][:, None].expand(-1, shape.heads_q, -1)
    assert not got.isnan().any(), f"{what}: NaN in rows {_where(judged, got.isnan())}"
    wrong_keys = (got != 0) != (want != 0)
    assert not wrong_keys.any(), f"{what}: other keys than the rule says in rows {_where(judged, wrong_keys)}"
    off = (got - want).abs() > OUT_RTOL * want
    assert not off.any(), f"{what}: wrong weights in rows {_where(judged, off)}"
    lse_got, lse_want = by_row[judged], expected_lse[judged][:, None].expand(-1, shape.heads_q)
    empty = lse_want == float("-inf")
    off = torch.where(empty, lse_got != lse_want, ~((lse_got - lse_want).abs() <= LSE_ATOL))
    assert not off.any(), f"{what}: softmax_lse is not the log of the number of keys in rows {_where(judged, off)}"
    _check_untouched(call, what)
    _check_caches(call, what)


def _where(rows: Tensor, wrong: Tensor) -> list[int]:
    return rows[wrong.flatten(1).any(dim=1)].tolist()[:12]


def _check_untouched(call: EdgeCall, what: str) -> None:
    """Rows that no sequence owns, and those before and behind out, hold their NaN."""
    dead = torch.ones(len(call.out_store), dtype=torch.bool)
    dead[[OUT_GUARD_ROWS + row for row in call.answer.seen]] = False
    touched = dead & ~call.out_store.isnan().flatten(1).all(dim=1).cpu()
    written = (torch.nonzero(touched).flatten() - OUT_GUARD_ROWS).tolist()
    assert not written, f"{what}: out has {call.edge.rows_q} rows; written without an owner: {written[:12]}"


def _check_caches(call: EdgeCall, what: str) -> None:
    """The new keys that fit are where they belong, bit for bit, and no other slot changed."""
    for name, new in (("k_cache", "k"), ("v_cache", "v")) if call.before else ():
        cache = bytes_of(call.kwargs[name]).flatten(0, 1)
        want = bytes_of(call.before[name]).flatten(0, 1).clone()
        fresh = bytes_of(call.kwargs[new].to(call.kwargs[name].dtype))
        fresh = fresh if call.edge.cu_seqlens_k_new else fresh.flatten(0, 1)
        for slot, token in call.answer.written.items():
            want[slot] = fresh[token]
        same = torch.where(want.isnan(), cache.isnan(), cache == want) if want.is_floating_point() else cache == want
        changed = torch.nonzero(~same.flatten(1).all(dim=1)).flatten().tolist()
        assert not changed, f"{what}: {name} is wrong in slots {changed[:12]}"


# --- the reference as it runs on a device -----------------------------------------------------------------------------


def run_reference(call: EdgeCall) -> tuple[Tensor, Tensor]:
    """The torch reference, without the checks of values that an eager call on the CPU makes first."""
    edge, kwargs = call.edge, call.kwargs
    call.out_store.fill_(NAN)
    cached = edge.function == "kvcache"
    k, v = (kwargs[name] for name in (("k_cache", "v_cache") if cached else ("k", "v")))
    lengths = kwargs.get("cache_seqlens" if cached else "seqused_k")
    if edge.appends:
        fields = dict.fromkeys(Append._fields) | {"k_cache": k, "v_cache": v, "cache_seqlens": lengths}
        fields |= {"k_new": kwargs["k"], "v_new": kwargs["v"], "rotary_interleaved": True, "causal_or_local": True}
        for name in ("page_table", "cache_batch_idx", "cu_seqlens_k_new"):
            fields[name] = kwargs.get(name)
        _, lengths = run_append(Append(**fields), "torch")
    table = kwargs.get("page_table")
    max_seqlen_k = edge.max_seqlen_k if edge.packed_k else k.shape[1] * (1 if table is None else table.shape[1])
    left, right = edge.window
    return reference.attention(
        kwargs["q"], k, v, qv=kwargs.get("qv"), softmax_scale=1.0, window_left=left,
        window_right=0 if edge.causal else right, attention_chunk=edge.attention_chunk,
        cu_seqlens_q=kwargs.get("cu_seqlens_q"), cu_seqlens_k=kwargs.get("cu_seqlens_k"),
        max_seqlen_q=edge.max_seqlen_q if edge.cu_seqlens_q else edge.seqlen_q, max_seqlen_k=max_seqlen_k,
        seqused_q=kwargs.get("seqused_q"), seqused_k=lengths, leftpad_k=kwargs.get("cache_leftpad"),
        kv_batch_idx=kwargs.get("cache_batch_idx"), page_table=table, out=kwargs["out"],
        **{name: kwargs[name] for name in ("query_ranges", "ranges_in_window", "tree_mask") if name in kwargs},
        **({"causal_by_sequence": kwargs["causal"]} if edge.causal_each else {}),
    )  # fmt: skip
