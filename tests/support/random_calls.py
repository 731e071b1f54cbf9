"""Random calls for the fuzz: every layout and flag in every mixture that the public functions accept."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import Any

import torch
from calls import Built, Call
from masks import MOST_DRAFTS, RANGES, TREES

PAGE_SIZES = (1, 2, 3, 4, 5, 8, 16, 32, 48, 64, 128, 256)
HEADS = ((1, 1), (2, 2), (2, 1), (3, 1), (4, 2), (6, 1), (8, 1), (9, 3), (16, 1), (16, 2), (24, 1))
#: Tokens of each split in the batch-invariant mode.
SPLIT_TOKENS = (64, 128, 192, 256, 4096)
#: Packed rows (tokens x heads of a KV head) up to which a call is for the decode kernels.
DECODE_ROWS = 32
#: The masks of a Call that are values on the device.
VALUE_MASKS = ("ranges", "causal_each", "tree")


def random_call(
    rng: random.Random,
    dtypes: tuple[torch.dtype, ...],
    longest: int,
    head_dims: tuple[int, ...],
    qv: float = 0.0,
    decode: float = 0.5,
    invariant: float = 0.0,
    e4m3_cache: float = 0.0,
    values: Collection[str] = VALUE_MASKS,
) -> Call:
    """One call that the contract allows. ``longest`` bounds the sequences.

    Shares: qv: of 16-bit calls with it; decode: of calls with few queries; of those that decode kernels take,
    invariant: with tokens_per_split, and e4m3_cache: with 8-bit keys beside 16-bit queries. values: those of
    VALUE_MASKS that calls may have.
    """
    function = rng.choice(("func", "varlen", "varlen", "kvcache", "kvcache"))
    is_decode = rng.random() < decode
    batch = rng.choice((8, 17, 33, 64)) if is_decode and rng.random() < 0.15 else rng.choice((1, 1, 2, 3, 5))
    lengths = lambda top: tuple(rng.choice((0, 1, top, rng.randint(0, top))) for _ in range(batch))  # noqa: E731
    same = lambda n: (n,) * batch  # noqa: E731
    ragged = function == "varlen" or (function == "kvcache" and rng.random() < 0.4)
    top_q = rng.choice((1, 1, 2, 4, rng.randint(1, 16))) if is_decode else rng.randint(1, longest)
    seqlens_q = lengths(top_q) if ragged else same(top_q)
    seqlens_k = same(rng.randint(1, longest)) if function == "func" else lengths(rng.randint(1, longest))
    heads_q, heads_kv = rng.choice(HEADS)
    head_dim = rng.choice(head_dims)
    paged = (function == "kvcache" and rng.random() < 0.7) or (function == "varlen" and rng.random() < 0.4)
    options: dict[str, Any] = {
        "page_size": rng.choice(PAGE_SIZES) if paged else 0,
        "freed_entries": paged and rng.random() < 0.3,
        "head_dim_v": rng.choice((0, 0, 0, rng.choice(head_dims))),
        "causal": rng.random() < 0.5,
        "window": rng.choice(
            (None, (-1, -1), rng.randint(0, longest), (rng.randint(0, 40), rng.randint(-1, 9)), [3, None])
        ),
        "softcap": rng.choice((0.0, 0.0, 0.0, 2.5, 30.0)),
        "softmax_scale": rng.choice((None, None, 1.0 if head_dim <= 64 else 0.1, 0.05)),
        "sinks": rng.choice(("", "", "fp32", "q")),
        "q_layout": rng.choice(("plain", "plain", "packed", "heads_first", "gapped")),
        "k_layout": rng.choice(("plain", "plain", "rows", "interleaved", "heads_first", "gapped", "followed")),
        "out_layout": rng.choice(("plain", "plain", "plain", "heads_first", "gapped", "guarded")),
        "num_splits": rng.choice((None, 0, 1, 2, 3, 7, 32, 128)),
        "sm_margin": rng.choice((0, 0, 0, 5, 200)),
        "pack_gqa": rng.choice((None, None, True, False)),
        "ragged_q": function == "kvcache" and ragged,
    }
    if rng.random() < 0.1:
        options["attention_chunk"] = rng.randint(1, longest)
    if function == "kvcache" or function == "func":
        options["metadata"] = function == "kvcache" and rng.random() < 0.4
    if function == "kvcache" or paged:
        options["slack_k"] = rng.choice((0, 0, 5, 70))
    if function == "varlen":
        options["tail"] = rng.choice((0, 3))
        options["slack_q"] = rng.choice((0, 0, 2))
        options["max_seqlen_slack"] = rng.choice((0, 0, 5))
        if not paged:
            options["slack_k"] = rng.choice((0, 0, 2))
    elif options["ragged_q"]:
        options["tail"] = rng.choice((0, 3))
    if function != "kvcache" and options["causal"] and rng.random() < 0.3:
        options["prefix"] = tuple(rng.randint(0, longest + 5) for _ in range(batch))
    if function == "kvcache":
        options["batch_idx"] = rng.random() < 0.25
        if rng.random() < 0.25:
            options["leftpad"] = tuple(rng.randint(0, 9) for _ in range(batch))
        if rng.random() < 0.25:
            options["num_new"] = tuple(min(a, b) for a, b in zip(seqlens_q, seqlens_k, strict=False))
    call = Call(function, seqlens_q, seqlens_k, heads_q, heads_kv, head_dim, dtype=rng.choice(dtypes), **options)
    if paged and rng.random() < 0.15 and call.dim_v == call.head_dim and not call.num_new:
        call = call.with_(k_layout="overlapping")
    if function != "func" and call.packed_rows <= DECODE_ROWS and rng.random() < invariant:
        call = call.with_(tokens_per_split=rng.choice(SPLIT_TOKENS), num_splits=rng.choice((None, 0, 1)))
    call = with_value_masks(call, rng, values)
    if call.dtype.itemsize == 1:
        return call.with_(descale=rng.choice(("", "each", "each", "one", "kv")))
    if rng.random() < e4m3_cache and takes_e4m3_cache(call):
        dims = {"head_dim": -(-call.head_dim // 16) * 16, "head_dim_v": -(-call.head_dim_v // 16) * 16}
        return call.with_(kv_dtype=torch.float8_e4m3fn, descale=rng.choice(("", "kv", "kv", "one")), **dims)
    return call.with_(qv=rng.random() < qv) if qv else call


def with_value_masks(call: Call, rng: random.Random, names: Collection[str] = VALUE_MASKS) -> Call:
    """The call with masks of ``names`` that are values, each in a fifth of the calls that may have it."""
    changes: dict[str, Any] = {"strided_masks": rng.random() < 0.3}
    if rng.random() < 0.2 and "causal_each" in names:
        changes |= {"causal": False, "causal_each": tuple(rng.random() < 0.5 for _ in range(call.batch))}
        changes["causal_dtype"] = rng.choice((torch.bool, torch.int32))
        if not call.batch:
            changes |= {"causal": call.causal}
    changed = call.with_(**changes)
    if rng.random() < 0.2 and "tree" in names and takes_tree(changed):
        return changed.with_(tree=rng.choice(list(TREES)))
    if rng.random() < 0.25 and "ranges" in names:
        return changed.with_(ranges=rng.choice(list(RANGES)), ranges_in_window=rng.random() < 0.4)
    return changed


def takes_tree(call: Call) -> bool:
    """Whether drafts of a call may form a tree."""
    queries = max(call.seqlens_q, default=0) + call.slack_q + (call.max_seqlen_slack if call.packs_queries else 0)
    others = call.ranges or call.prefix or call.attention_chunk
    return queries <= MOST_DRAFTS and call.normalized_window[1] <= 0 and not others


def drawn_call(
    rng: random.Random,
    batch: int = 3,
    longest_q: int = 17,
    longest_k: int = 43,
    used_q: bool = False,
    used_k: bool = False,
    leftpad: bool = False,
    prefix: bool = False,
    causal_each: bool = False,
    **options: Any,
) -> Call:
    """A call of mha_fwd whose lengths are random, ``longest_q`` and ``longest_k`` at most, and reached by one sequence.

    Dense q and k are full but where they are ``used_q`` and ``used_k``; packed ones have dead rows behind theirs then.
    """
    options = {"heads_q": 4, "heads_kv": 2, "head_dim": 16, "dtype": torch.float32, **options}
    packed_q, packed_k = options.get("ragged_q"), options.get("packed_k")
    seqlens_q = _lengths(rng, batch, longest_q) if packed_q or used_q else [longest_q] * batch
    full_k = not (packed_k or used_k or options.get("page_size"))
    ends = [longest_k] * batch if full_k else _lengths(rng, batch, longest_k)
    if leftpad:
        options["leftpad"] = tuple(rng.randint(0, end) for end in ends)
        ends = [end - pad for end, pad in zip(ends, options["leftpad"], strict=True)]
    if prefix:
        options["prefix"] = tuple(rng.randint(0, longest_k + 3) for _ in ends)
    if causal_each:
        options["causal_each"] = tuple(b % 2 == 0 for b in rng.sample(range(batch), batch))
    if packed_q or packed_k:
        options["tail"] = rng.choice((0, rng.randint(1, 5)))
    slack = {"slack_q": rng.randint(1, 4) if used_q else 0, "slack_k": rng.randint(1, 4) if used_k else 0}
    return Call("mha_fwd", tuple(seqlens_q), tuple(ends), **{**slack, **options})


def _lengths(rng: random.Random, batch: int, longest: int) -> list[int]:
    """Random lengths whose largest is ``longest``; among three or more one is 0."""
    lengths = [rng.randint(0, longest) for _ in range(batch)]
    for spot, length in zip(rng.sample(range(batch), min(batch, 1 + (batch > 2))), (longest, 0)):
        lengths[spot] = length
    return lengths


def takes_e4m3_cache(call: Call) -> bool:
    """Whether the keys of a call may be 8-bit beside 16-bit queries: a cache that is read, by a decode kernel."""
    cached = call.function == "kvcache" or call.page_size > 0
    return cached and not call.num_new and call.dtype.itemsize == 2 and call.packed_rows <= DECODE_ROWS


# --- mutations: legal oddities, and mistakes ---


def _keys(built: Built) -> tuple[str, str]:
    return ("k_cache", "v_cache") if built.call.function == "kvcache" else ("k", "v")


def _restride(x: torch.Tensor, row_pad: int, offset: int) -> torch.Tensor:
    """The same values with ``row_pad`` elements between heads and a start ``offset`` elements into the storage."""
    stride, strides = x.shape[-1] + row_pad, [1]
    for size in reversed(x.shape[:-1]):
        strides.insert(0, stride)
        stride *= max(size, 1)
    store = torch.full((stride + offset,), float("nan"), dtype=x.dtype, device=x.device)
    view = store.as_strided(x.shape, strides, offset)
    view.copy_(x)
    return view


def odd_strides(built: Built, rng: random.Random) -> None:
    """Legal: strides or addresses that are no multiple of 16 bytes."""
    name = rng.choice(("q", *_keys(built)))
    if not (built.call.k_layout == "overlapping" and name != "q"):
        built.kwargs[name] = _restride(built.kwargs[name], rng.choice((0, 1, 4, 8)), rng.choice((0, 1, 4, 8)))


def odd_out(built: Built, rng: random.Random) -> None:
    """Legal: out is a slice of a wider tensor, at any address."""
    built.out = _restride(built.out, rng.choice((0, 1, 8)), rng.choice((0, 1, 8)))
    built.kwargs["out"], built.out_store = built.out, built.out._base


def repeated_heads(built: Built, rng: random.Random) -> None:
    """Legal: q with stride 0 over heads (every head the same query)."""
    q = built.kwargs["q"][..., :1, :]
    built.kwargs["q"] = q.expand(*q.shape[:-2], built.call.heads_q, -1)
    built.q = [x[:, :1].expand(-1, built.call.heads_q, -1) for x in built.q]


def broadcast_keys(built: Built, rng: random.Random) -> None:
    """Legal: dense k and v with stride 0 over the batch (every sequence the same keys)."""
    call = built.call
    if call.function != "func" or call.prefix or call.ranges or call.causal_each or call.tree:
        return  # with these the sequences see different keys, and all others are NaN
    for name, logical in (("k", built.k), ("v", built.v)):
        built.kwargs[name] = built.kwargs[name][:1].expand(len(logical), -1, -1, -1)
        logical[:] = logical[:1] * len(logical)


def _every_second(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def _has_cache(built: Built) -> bool:
    return built.call.function == "kvcache" or built.kwargs.get("page_table") is not None


def strided_last_dim(built: Built, rng: random.Random) -> None:
    """Legal: a last dimension that is not contiguous, of q, or of k or v where they are no cache: it is copied."""
    name = rng.choice(("q",) if _has_cache(built) else ("q", *_keys(built)))
    built.kwargs[name] = _every_second(built.kwargs[name])


def strided_values(built: Built, rng: random.Random) -> None:
    """Legal: masks that are values with a last dimension that is not contiguous, or expanded: they are copied."""
    for name in ("query_ranges", "tree_mask", "causal"):
        x = built.kwargs.get(name)
        if isinstance(x, torch.Tensor) and x.numel():
            built.kwargs[name] = _every_second(x)


LEGAL: tuple[Callable[[Built, random.Random], None], ...] = (
    odd_strides, odd_out, repeated_heads, broadcast_keys, strided_last_dim, strided_values,
)  # fmt: skip


def _set(name: str, make: Callable[[Built], Any]) -> Callable[[Built, random.Random], None]:
    def mutate(built: Built, rng: random.Random) -> None:
        built.kwargs[name] = make(built)

    mutate.__name__ = f"wrong_{name}"
    return mutate


def _wrong_key(
    change: Callable[[torch.Tensor], torch.Tensor], both: bool = False
) -> Callable[[Built, random.Random], None]:
    def mutate(built: Built, rng: random.Random) -> None:
        names = _keys(built)
        for name in names if both else (rng.choice(names),):
            built.kwargs[name] = change(built.kwargs[name])

    return mutate


def _per_token(built: Built, dtype: torch.dtype, *tail: int) -> torch.Tensor:
    """Zeros shaped as q without its heads."""
    return torch.zeros(*built.kwargs["q"].shape[:-2], *tail, dtype=dtype, device=built.out.device)


#: Mistakes: each must raise a BroadheadError, whatever else the call holds.
WRONG: dict[str, Callable[[Built, random.Random], None]] = {
    "head_dim not a multiple of 8": _set("q", lambda b: b.kwargs["q"][..., :-4]),
    "head_dim of k": _wrong_key(lambda x: torch.cat((x, x), dim=-1), both=True),
    "rank of q": _set("q", lambda b: b.kwargs["q"][None]),
    "dtype of q": _set("q", lambda b: b.kwargs["q"].to(torch.int32)),
    "dtype of a key": _wrong_key(lambda x: x.double()),
    "heads of k": _wrong_key(lambda x: torch.cat((x,) * 17, dim=-2), both=True),
    "q not a tensor": _set("q", lambda b: b.kwargs["q"].tolist()),
    "NaN scale": _set("softmax_scale", lambda b: float("nan")),
    "infinite scale": _set("softmax_scale", lambda b: float("inf")),
    "negative softcap": _set("softcap", lambda b: -1.0),
    "NaN softcap": _set("softcap", lambda b: float("nan")),
    "negative chunk": _set("attention_chunk", lambda b: -1),
    "window of three": _set("window_size", lambda b: (1, 2, 3)),
    "float window": _set("window_size", lambda b: (1.5, 0)),
    "window text": _set("window_size", lambda b: "full"),
    "negative splits": _set("num_splits", lambda b: -1),
    "too many splits": _set("num_splits", lambda b: 10**6),
    "float splits": _set("num_splits", lambda b: 2.0),
    "causal text": _set("causal", lambda b: "yes"),
    "sinks shape": _set("sinks", lambda b: torch.zeros(b.call.heads_q + 1, device=b.out.device)),
    "sinks dtype": _set("sinks", lambda b: torch.zeros(b.call.heads_q, device=b.out.device, dtype=torch.int32)),
    "batch of causal": _set("causal", lambda b: torch.ones(b.call.batch + 1, device=b.out.device, dtype=torch.bool)),
    "rank of causal": _set("causal", lambda b: torch.ones(b.call.batch, 1, device=b.out.device, dtype=torch.bool)),
    "dtype of causal": _set("causal", lambda b: torch.ones(b.call.batch, device=b.out.device)),
    "rank of ranges": _set("query_ranges", lambda b: _per_token(b, torch.int32)),
    "columns of ranges": _set("query_ranges", lambda b: _per_token(b, torch.int32, 3)),
    "dtype of ranges": _set("query_ranges", lambda b: _per_token(b, torch.int64, 2)),
    "ranges not a tensor": _set("query_ranges", lambda b: [(0, 1)]),
    "in_window text": _set("ranges_in_window", lambda b: "yes"),
    "rank of a tree": _set("tree_mask", lambda b: _per_token(b, torch.int64, 1)),
    "dtype of a tree": _set("tree_mask", lambda b: _per_token(b, torch.int32)),
    "out shape": _set("out", lambda b: b.out[..., :-8] if b.call.dim_v > 8 else b.out[..., :0]),
    "out dtype": _set("out", lambda b: b.out.double()),
    "out strides": _set("out", lambda b: _every_second(b.out)),
}


def _has_table(built: Built) -> bool:
    return built.kwargs.get("page_table") is not None


#: Of calls with ranges, and of those that a tree does not go with.
WRONG_RANGES: dict[str, Callable[[Built, random.Random], None]] = {
    "ranges and a tree": _set("tree_mask", lambda b: _per_token(b, torch.int64)),
}
WRONG_WITHOUT_RANGES: dict[str, Callable[[Built, random.Random], None]] = {
    "in_window without ranges": _set("ranges_in_window", lambda b: True),
}
WRONG_TREE: dict[str, Callable[[Built, random.Random], None]] = {
    "a tree in this call": _set("tree_mask", lambda b: _per_token(b, torch.int64)),
}
WRONG_TABLE: dict[str, Callable[[Built, random.Random], None]] = {
    "int64 page table": _set("page_table", lambda b: b.kwargs["page_table"].long()),
    "float page table": _set("page_table", lambda b: b.kwargs["page_table"].float()),
    "rank of the page table": _set("page_table", lambda b: b.kwargs["page_table"].flatten()),
    "page_size 0": _wrong_key(lambda x: x[:, :0], both=True),
}
WRONG_LENGTHS: dict[str, Callable[[Built, random.Random], None]] = {
    "float lengths": _set("cache_seqlens", lambda b: b.kwargs["cache_seqlens"].float()),
    "batch of the lengths": _set("cache_seqlens", lambda b: b.kwargs["cache_seqlens"].repeat(2)),
}
WRONG_OFFSETS: dict[str, Callable[[Built, random.Random], None]] = {
    "int64 cu_seqlens_q": _set("cu_seqlens_q", lambda b: b.kwargs["cu_seqlens_q"].long()),
    "rank of cu_seqlens_q": _set("cu_seqlens_q", lambda b: b.kwargs["cu_seqlens_q"][None]),
    "no max_seqlen_q": _set("max_seqlen_q", lambda b: None),
}


def wrong_mutations(built: Built) -> dict[str, Callable[[Built, random.Random], None]]:
    """The mistakes that can be made in this call."""
    names = dict(WRONG)
    names |= WRONG_RANGES if built.call.ranges else WRONG_WITHOUT_RANGES
    if not built.call.tree and not takes_tree(built.call):
        names |= WRONG_TREE
    if _has_cache(built):
        names["strided last dim of a cache"] = _wrong_key(_every_second)
    if _has_table(built):
        names |= WRONG_TABLE
    if built.call.function == "kvcache":
        names |= WRONG_LENGTHS
    if "cu_seqlens_q" in built.kwargs:
        names |= WRONG_OFFSETS
    if built.call.dtype == torch.float64:
        del names["dtype of a key"], names["out dtype"]
    return names
