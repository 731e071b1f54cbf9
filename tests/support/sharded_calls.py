"""Calls on DTensors of two ranks, each judged by the same call on plain tensors: values, gradients and placements."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import broadhead
import pytest
import torch
from attention_layer import AttentionLayer
from broadhead.ops import sharding
from ranks import RANKS
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

WHOLE, BATCH, ROWS, HEADS = Replicate(), Shard(0), Shard(1), Shard(2)
SHARE = Partial()

Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: its tensors, which of them are sharded, and how results and gradients must be."""

    tensors: Tensors
    sharded: dict[str, Placement]  # the others are replicated
    expected: dict[str, Placement]  # of out, softmax_lse and the gradients by the names of their inputs
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    function: Callable[..., Any] = broadhead.flash_attn_func
    written: tuple[str, ...] = ()


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense(heads: int, heads_kv: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensors:
    shapes = {"q": (batch, 5, heads, 16), "k": (batch, 7, heads_kv, 16), "v": (batch, 7, heads_kv, 24)}
    return {name: randn(*shape, dtype=dtype) for name, shape in shapes.items()}


def packed() -> Tensors:
    tensors = {"q": randn(9, 4, 16), "k": randn(11, 2, 16), "v": randn(11, 2, 16)}
    return tensors | {"cu_seqlens_q": int32(0, 3, 9), "cu_seqlens_k": int32(0, 6, 11)}


def cache(*, paged: bool) -> Tensors:
    pool = {"q": randn(2, 1, 4, 16), "k_cache": randn(6, 4, 2, 16), "v_cache": randn(6, 4, 2, 16)}
    if paged:
        return pool | {"cache_seqlens": int32(9, 3), "page_table": int32(5, 0, 1, 2, 4, 3).view(2, 3)}
    pool |= {name: randn(2, 12, 2, 16) for name in ("k_cache", "v_cache")}
    return pool | {"cache_seqlens": int32(9, 3)}


def states() -> Tensors:
    shapes = {"out_a": (2, 6, 4, 16), "lse_a": (2, 4, 6), "out_b": (2, 6, 4, 16), "lse_b": (2, 4, 6)}
    return {name: randn(*shape, dtype=torch.float32) for name, shape in shapes.items()}


def every(names: str, placement: Placement) -> dict[str, Placement]:
    return dict.fromkeys(names.split(), placement)


BY_HEADS = every("out q k v", HEADS) | {"softmax_lse": Shard(1)}
BY_BATCH = every("out softmax_lse q k v", BATCH)
NOT_AT_ALL = every("out softmax_lse q k v", WHOLE)


def cases() -> dict[str, Case]:
    """By what they show."""
    causal = {"causal": True}
    masks = {"causal": True, "window_size": (3, 0), "softcap": 2.0}
    varlen: dict[str, Any] = {
        "function": broadhead.flash_attn_varlen_func,
        "values": {"max_seqlen_q": 6, "max_seqlen_k": 6, "causal": True},
    }
    decode: dict[str, Any] = {"function": broadhead.flash_attn_with_kvcache}
    append = decode | {"written": ("k_cache", "v_cache")}
    new_keys = {"k": randn(2, 2, 2, 16), "v": randn(2, 2, 2, 16)}
    merge: dict[str, Any] = {"function": broadhead.merge_attn_states}
    caches = every("k_cache v_cache", HEADS)
    return {
        "heads": Case(dense(4, 4), every("q k v", HEADS), BY_HEADS),
        "heads of GQA": Case(dense(4, 2), every("q k v", HEADS), BY_HEADS, masks),
        "heads in fp32": Case(dense(4, 2, dtype=torch.float32), every("q k v", HEADS), BY_HEADS, causal),
        "heads with sinks": Case(
            dense(4, 2) | {"sinks": randn(4)},
            every("q k v", HEADS) | {"sinks": BATCH},
            BY_HEADS | {"sinks": BATCH},
        ),
        "heads from replicated k, v and sinks": Case(
            dense(4, 2) | {"sinks": randn(4)}, {"q": HEADS}, BY_HEADS | {"sinks": BATCH}, causal
        ),
        "one KV head": Case(
            dense(4, 1) | {"qv": randn(2, 5, 4, 24)},
            every("q qv", HEADS),
            BY_HEADS | {"qv": HEADS} | every("k v", SHARE),
        ),
        "KV heads that do not divide": Case(dense(6, 3), every("q k v", HEADS), NOT_AT_ALL, causal),
        "batch": Case(dense(4, 2) | {"sinks": randn(4)}, every("q k v", BATCH), BY_BATCH | {"sinks": SHARE}, masks),
        "batch in unequal parts": Case(
            dense(4, 2, batch=3) | {"prefix_lens": int32(0, 4, 2)},
            every("q k v prefix_lens", BATCH),
            BY_BATCH,
            causal,
        ),
        "batch with ranges": Case(
            dense(4, 2) | {"query_ranges": int32(*[0, 4] * 5, *[2, 9] * 5).view(2, 5, 2)},
            every("q k v query_ranges", BATCH),
            BY_BATCH,
            causal,
        ),
        "heads with ranges": Case(
            dense(4, 2) | {"query_ranges": int32(*[0, 4] * 5, *[2, 9] * 5).view(2, 5, 2)},
            every("q k v", HEADS),
            BY_HEADS,
            causal,
        ),
        "batch with causality by sequence": Case(
            dense(4, 2) | {"causal": int32(1, 0)}, every("q k v causal", BATCH), BY_BATCH
        ),
        "batch of 1": Case(dense(4, 2, batch=1), every("q k v", BATCH), NOT_AT_ALL, causal),
        "rows": Case(dense(4, 2), every("q k v", ROWS), NOT_AT_ALL, causal),
        "replicated": Case(dense(4, 2), {}, NOT_AT_ALL, causal),
        "heads of packed sequences": Case(
            packed() | {"sinks": randn(4)},
            every("q k v", ROWS) | {"sinks": BATCH},
            every("out q k v", ROWS) | every("softmax_lse sinks", BATCH),
            **varlen,
        ),
        "tokens of packed sequences": Case(packed(), every("q k v", BATCH), NOT_AT_ALL, **varlen),
        "heads over pages": Case(
            cache(paged=True),
            every("q", HEADS) | caches,
            every("out q", HEADS) | {"softmax_lse": Shard(1)} | caches,
            **decode,
        ),
        "batch over pages": Case(
            cache(paged=True),
            every("q cache_seqlens page_table", BATCH),
            every("out q softmax_lse", BATCH) | every("k_cache v_cache", SHARE),
            **decode,
        ),
        "heads of an append": Case(
            cache(paged=False) | new_keys, every("q k v", HEADS) | caches, {"out": HEADS}, causal, **append
        ),
        "heads of an append to pages": Case(
            cache(paged=True) | new_keys, every("q k v", HEADS) | caches, {"out": HEADS}, causal, **append
        ),
        "batch of an append": Case(
            {**cache(paged=False), **new_keys, "rotary_cos": randn(12, 8), "rotary_sin": randn(12, 8)},
            every("q k v k_cache v_cache cache_seqlens", BATCH),
            {"out": BATCH},
            causal,
            **append,
        ),
        "append at one length": Case(
            {name: x for name, x in (cache(paged=False) | new_keys).items() if name != "cache_seqlens"},
            every("q k v", HEADS) | caches,
            {"out": HEADS},
            causal | {"cache_seqlens": 5},
            **append,
        ),
        "out is given": Case(
            dense(4, 2) | {"out": torch.zeros(2, 5, 4, 24, dtype=torch.float64)},
            every("q k v", HEADS) | {"out": BATCH},
            every("out softmax_lse", BATCH),
            written=("out",),
        ),
        "heads of a merge": Case(
            states(),
            every("out_a out_b", HEADS) | every("lse_a lse_b", ROWS),
            {"out": HEADS, "softmax_lse": ROWS},
            **merge,
        ),
        "rows of a merge": Case(states(), every("out_a out_b", ROWS), {"out": ROWS, "softmax_lse": HEADS}, **merge),
        "batch of a merge": Case(
            states(), every("out_a lse_a out_b lse_b", BATCH), every("out softmax_lse", BATCH), **merge
        ),
    }


def part_of(x: Tensor, placement: Placement) -> Tensor:
    """What this rank has of ``x``."""
    if not isinstance(placement, Shard):
        return x
    parts = x.chunk(RANKS, placement.dim)
    rank = torch.distributed.get_rank()
    return parts[rank].contiguous() if rank < len(parts) else x.narrow(placement.dim, 0, 0).contiguous()


def place(x: Tensor, mesh: Any, placement: Placement) -> DTensor:
    """``x``, which every rank has, as a DTensor; ranks that wait for each other take long where others work as well."""
    part = part_of(x, placement)
    part = part.clone() if part is x else part
    return DTensor.from_local(part, mesh, [placement], run_check=False, shape=x.shape, stride=x.stride())


def check_case(name: str, case: Case, mesh: Any) -> None:
    """The call on DTensors gives what the call on plain tensors gives, placed as it must be."""
    has_gradients = [key for key in case.tensors if key in case.expected and key != "out"]
    plain = {key: x.clone().requires_grad_(key in has_gradients) for key, x in case.tensors.items()}
    sharded = {
        key: place(x, mesh, case.sharded.get(key, WHOLE)).requires_grad_(key in has_gradients)
        for key, x in case.tensors.items()
    }
    results = run(case, plain)
    sharding._registered.clear()
    found = run(case, sharded)
    assert sharding._registered, f"{name}: the rules would not be known if this were the first call"
    for part, got, right in zip(("out", "softmax_lse"), found, results, strict=True):
        check_tensor(f"{name}: {part}", got, right, case.expected.get(part))
    for key in case.written:
        check_tensor(f"{name}: {key}", sharded[key], plain[key], case.sharded[key])
    if not has_gradients:
        return
    weights = [torch.randn_like(x) for x in results]
    torch.autograd.backward(results, weights)
    torch.autograd.backward(found, [place(weight, mesh, WHOLE) for weight in weights])
    for key in has_gradients:
        check_tensor(f"{name}: gradient of {key}", sharded[key].grad, plain[key].grad, case.expected[key])


def run(case: Case, tensors: Tensors) -> tuple[Tensor, Tensor]:
    if case.function is broadhead.merge_attn_states:
        return case.function(**tensors, **case.values)
    return case.function(**tensors, **case.values, return_softmax_lse=True)


def check_tensor(what: str, got: Any, right: Any, placement: Placement | None) -> None:
    assert isinstance(got, DTensor), f"{what} is a {type(got).__name__}"
    assert placement is None or got.placements == (placement,), f"{what} is {got.placements}, not {placement}"
    assert got.shape == right.shape and got.stride() == right.stride(), f"{what} has another shape or other strides"
    (is_at,) = got.placements
    local = got.full_tensor() if is_at.is_partial() else got.to_local()
    torch.testing.assert_close(local, part_of(right, is_at), msg=lambda text: f"{what}: {text}")


def check_calls(rank: int) -> None:
    """All cases, then what is refused, in a process of two."""
    mesh = init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(torch.distributed.get_world_size())
    sharding.register()
    parts = torch.ops.broadhead.merge_states(*(place(x, mesh, BATCH) for x in states().values()))
    assert [part.placements for part in parts] == [(BATCH,), (BATCH,)]
    for name, case in cases().items():
        check_case(name, case, mesh)
    check_refusals(mesh)


def check_refusals(mesh: Any) -> None:
    """What can not be right is refused by name on every rank, and nothing is written."""

    def shard(x: Tensor, placement: Placement) -> DTensor:
        return place(x, mesh, placement)

    q, k, v = (shard(x, HEADS) for x in dense(4, 2).values())
    out = shard(torch.zeros(2, 5, 4, 24, dtype=torch.float64), ROWS)
    with pytest.raises(broadhead.UnsupportedError, match=r"mha_fwd_out: out is written, and .* with placements"):
        broadhead.flash_attn_func(q, k, v, out=out)
    assert not out.to_local().any()
    # 5 heads would be 3 and 2 on the ranks, each a multiple of the KV head that is there.
    with pytest.raises(broadhead.InvalidArgumentError, match="must be a multiple of the heads of k, got 5 and 2"):
        broadhead.flash_attn_func(shard(randn(2, 5, 5, 16), HEADS), k, v)
    # A plan is of the heads of one rank.
    token, lengths = shard(randn(2, 1, 4, 16), HEADS), shard(int32(7, 3), WHOLE)
    for heads in ((4, 2), (2, 1)):
        sharding._registered.clear()
        plan = broadhead.get_scheduler_metadata(2, 1, 7, *heads, 16, lengths, headdim_v=24, qkv_dtype=token.dtype)
        assert sharding._registered and isinstance(plan, DTensor) and plan.placements == (WHOLE,)
        values = {"cache_seqlens": lengths, "scheduler_metadata": plan}
        if heads == (4, 2):
            with pytest.raises(broadhead.InvalidArgumentError, match=r"made for num_heads_q=4, .* has num_heads_q=2"):
                broadhead.flash_attn_with_kvcache(token, k, v, **values)
        else:
            assert broadhead.flash_attn_with_kvcache(token, k, v, **values).placements == (HEADS,)


def check_compiled(rank: int) -> None:
    """torch.compile learns how to shard while it traces, and traces both directions."""
    mesh = init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(0)
    plain = [x.requires_grad_() for x in dense(4, 2).values()]
    sharded = [place(x.detach(), mesh, HEADS).requires_grad_() for x in plain]

    def attend(*tensors: Tensor) -> Tensor:
        return broadhead.flash_attn_func(*tensors, causal=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=False)
    out, right = compiled(*sharded), attend(*plain)
    check_tensor("out", out, right, HEADS)
    weights = torch.randn_like(right)
    right.backward(weights)
    out.backward(place(weights, mesh, HEADS))
    for got, x in zip(sharded, plain, strict=True):
        check_tensor("a gradient", got.grad, x.grad, HEADS)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return broadhead.flash_attn_func(q, k, v, causal=True, sinks=sinks)


def fully_sharded_gradients(rank: int, model: torch.nn.Sequential, x: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of each weight its name, its gradient under FSDP2, each rank with its part of the batch, and that of it all."""
    from torch.distributed.fsdp import fully_shard

    model(x).float().square().mean().backward()
    right = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    for module in (*model, model):
        fully_shard(module, mesh=init_device_mesh(x.device.type, (RANKS,)))
    model(x[rank : rank + 1]).float().square().mean().backward()
    for name, parameter in model.named_parameters():
        yield name, parameter.grad, right[name]


def check_fully_sharded(rank: int) -> None:
    """Two layers: the gradients are those of the whole batch."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 32)
    model = torch.nn.Sequential(*(AttentionLayer(causal_attention, 32, 16) for _ in range(2)))
    for name, got, right in fully_sharded_gradients(rank, model, x):
        check_tensor(f"gradient of {name}", got, right, BATCH)
