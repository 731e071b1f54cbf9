"""The torch fallback against the oracle: every layout, mask and option of the contract, forward and backward."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from broadhead import reference
from broadhead.reference import core as reference_core
from calls import Built, Call, build
from checks import check_against, check_dead_rows, check_equal, check_gradients, check_new_rows, random_gradients
from dispatch_modes import LargestTensor, NoSync
from layouts import int32
from random_calls import drawn_call
from torch import Tensor
from torch.fx.experimental import _config as shape_config

LAYOUTS = {
    "dense": {},
    "varlen": {"ragged_q": True, "packed_k": True},
    "paged": {"page_size": 16},
    "ragged_paged": {"ragged_q": True, "page_size": 16},
    "dense_q_packed_k": {"packed_k": True},
}
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "local": {"window": (5, 3)},
    "left_only": {"window": (6, -1)},
    "right_only": {"window": (-1, 4)},
    "sliding": {"window": (7, 0)},
    "diagonal": {"window": (0, 0)},
    "chunk": {"attention_chunk": 7},
    "chunk_causal": {"attention_chunk": 7, "causal": True},
    "chunk_sliding": {"attention_chunk": 9, "window": (4, 0)},
    "prefix": {"causal": True, "prefix": True},
    "prefix_sliding": {"window": (5, 0), "prefix": True},
}
OPTIONS = {
    "softcap": {"softcap": 2.5},
    "sinks": {"sinks": "fp32", "causal": True},
    "softcap_sinks_local": {"softcap": 2.0, "sinks": "fp32", "window": (5, 2)},
    "scale_1": {"softmax_scale": 1.0},
    "mqa": {"heads_q": 6, "heads_kv": 1},
    "mha": {"heads_q": 3, "heads_kv": 3, "causal": True},
    "narrow_v": {"head_dim": 24, "head_dim_v": 8},
    "wide_v": {"head_dim": 8, "head_dim_v": 40, "causal": True},
    "qv": {"head_dim": 8, "head_dim_v": 32, "qv": True, "causal": True},
    "qv_softcap": {"qv": True, "softcap": 2.0},
    "more_queries": {"longest_q": 41, "longest_k": 19, "causal": True},
    "more_queries_sinks": {"longest_q": 41, "longest_k": 19, "causal": True, "sinks": "fp32"},
    "one_query": {"longest_q": 1, "causal": True},
    "one_query_sliding": {"longest_q": 1, "window": (8, 0)},
    "no_queries": {"longest_q": 0},
    "no_keys": {"longest_k": 0, "sinks": "fp32"},
    "no_sequences": {"batch": 0},
    "one_sequence": {"batch": 1, "causal": True},
    "seqused_q": {"used_q": True, "causal": True},
    "seqused_k": {"used_k": True, "causal": True},
    "seqused_both": {"used_q": True, "used_k": True, "window": (4, 1)},
    "batch_idx": {"batch_idx": True, "used_k": True, "causal": True},
    "leftpad": {"leftpad": True, "used_k": True, "causal": True},
    "leftpad_chunk": {"leftpad": True, "attention_chunk": 6, "window": (9, 0), "prefix": True},
    "interleaved": {"k_layout": "interleaved", "causal": True},
    "followed": {"k_layout": "followed", "causal": True},
    "strided_q": {"q_layout": "gapped"},
    "descale": {"descale": "all", "causal": True},
    "descale_qv": {"descale": "all", "qv": True},
}
CPU = torch.device("cpu")

#: As on a CPU in eager mode, where lengths are read, and as on a device, where none is.
on_a_cpu = functools.partial(reference.attention, read_lengths=True)
on_a_device = functools.partial(reference.attention, read_lengths=False)


def drawn(rng: random.Random, **options: Any) -> Built:
    """A call of those options, its lengths and tensors drawn."""
    return build(drawn_call(rng, **options), CPU, rng)


def run(built: Built, out: Tensor | None = None, fn: Any = on_a_cpu) -> tuple[Tensor, Tensor]:
    return fn(**built.normalised(), out=out)


def check_forward(built: Built, fn: Any = on_a_cpu) -> None:
    """Without and with a poisoned ``out=``."""
    out, lse = run(built, fn=fn)
    check_against(built, out, lse)
    check_new_rows(built, out, lse)
    same, lse_again = run(built, built.out, fn)
    assert same is built.out
    check_dead_rows(built, same)
    live = built.live_mask()
    check_equal(same.flatten(0, -3)[live], out.flatten(0, -3)[live])
    check_equal(lse_again, lse)


def gradients(built: Built, through_lse: bool = True, fn: Any = on_a_cpu) -> None:
    """Backward with NaN coming in at the rows that no sequence owns."""
    leaves = built.requires_grad()
    check_gradients(built, *random_gradients(built, leaves, *fn(**built.normalised()), through_lse))


def check(call: Call, rng: random.Random) -> None:
    """On the same tensors with lengths that are read and with lengths that are not."""
    built = build(call, CPU, rng)
    for fn in (on_a_cpu, on_a_device):
        check_forward(built, fn)
        built.out.fill_(float("nan"))
    for fn in (on_a_cpu, on_a_device):
        gradients(built, fn=fn)


def check_drawn(rng: random.Random, **options: Any) -> None:
    check(drawn_call(rng, **options), rng)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks(layout: str, mask: str, rng: random.Random) -> None:
    check_drawn(rng, **LAYOUTS[layout], **MASKS[mask])


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_options(layout: str, option: str, rng: random.Random) -> None:
    if OPTIONS[option].get("batch_idx") and layout in ("varlen", "dense_q_packed_k"):
        pytest.skip("a batch index selects rows of a cache; packed keys have none")
    check_drawn(rng, **LAYOUTS[layout], **OPTIONS[option])


@pytest.mark.parametrize("k_layout", ["plain", "interleaved", "overlapping", "followed"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 32, 48, 64, 128, 256])
def test_page_sizes(page_size: int, k_layout: str, rng: random.Random) -> None:
    options = {"ragged_q": True, "page_size": page_size, "k_layout": k_layout}
    options["longest_k"] = min(3 * page_size + 2, 300)
    check_drawn(rng, **options, causal=True)
    check_forward(drawn(rng, **options, window=(20, 0), sinks="fp32"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes(layout: str, dtype: torch.dtype, rng: random.Random) -> None:
    options = {**LAYOUTS[layout], "dtype": dtype, "causal": True, "head_dim": 32}
    check_drawn(rng, **options, sinks="fp32")
    check_drawn(rng, **options, softcap=3.0, window=(9, -1))


@pytest.mark.parametrize("q_dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8(layout: str, q_dtype: torch.dtype, rng: random.Random) -> None:
    dtypes = {"dtype": q_dtype, "kv_dtype": torch.float8_e4m3fn, "descale": "all"}
    built = drawn(rng, **LAYOUTS[layout], **dtypes, causal=True)
    out, lse = run(built)
    assert out.dtype == torch.bfloat16
    check_against(built, out, lse)
    check_new_rows(built, out, lse)


@pytest.mark.parametrize("head_dim", [72, 256, 512])
def test_head_dims(head_dim: int, rng: random.Random) -> None:
    check_drawn(rng, head_dim=head_dim, ragged_q=True, page_size=16, causal=True, dtype=torch.bfloat16)


@pytest.mark.parametrize("number", range(40))
def test_anything_goes(number: int, rng: random.Random) -> None:
    """Random combinations of everything."""

    def maybe(p: float = 0.3) -> bool:
        return rng.random() < p

    layout = dict(rng.choice(list(LAYOUTS.values())))
    paged = "page_size" in layout
    if paged:
        layout["page_size"] = rng.choice([1, 2, 3, 16, 48])
    kv, group, equal_dims = rng.randint(1, 3), rng.randint(1, 4), maybe(0.6)
    head_dim = 8 * rng.randint(1, 6)
    check_drawn(
        rng,
        **layout,
        **rng.choice(list(MASKS.values())),
        batch=rng.randint(1, 5),
        longest_q=rng.choice([1, 2, 9, 33]),
        longest_k=rng.randint(1, 90),
        heads_q=kv * group,
        heads_kv=kv,
        head_dim=head_dim,
        head_dim_v=head_dim if equal_dims else 8 * rng.randint(1, 6),
        dtype=rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]),
        k_layout=rng.choice(["plain", "interleaved"] + (["overlapping"] if equal_dims and paged else [])),
        freed_entries=paged and maybe(),
        softcap=rng.choice([0.0, 0.0, 3.0]),
        softmax_scale=rng.choice([None, 0.3]),
        sinks="fp32" if maybe() else "",
        qv=maybe(0.2),
        descale="all" if maybe(0.2) else "",
        used_q=maybe(),
        used_k=maybe(),
        leftpad=maybe(),
        batch_idx=maybe() and "packed_k" not in layout,
        q_layout="gapped" if maybe() else "plain",
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_of_queries(layout: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same results when a call takes many chunks, down to one query each."""
    monkeypatch.setattr(reference_core, "CPU_QUERIES", 1)
    for scores in (1, 4 * 3 * 43 * 5):
        monkeypatch.setattr(reference_core, "CPU_SCORES", scores)
        for mask in ("full", "causal", "local", "chunk_sliding", "prefix_sliding"):
            check_drawn(rng, **LAYOUTS[layout], **MASKS[mask], sinks="fp32", dtype=torch.bfloat16)
        check_drawn(rng, **LAYOUTS[layout], longest_q=41, longest_k=19, causal=True, qv=True)


@pytest.mark.parametrize("layout", ["dense", "ragged_paged"])
def test_memory_is_bounded(layout: str, rng: random.Random) -> None:
    """8k x 8k (67M scores) never holds more than the bound, forward and backward."""
    n = 8192
    sizes = {"batch": 1, "longest_q": n, "longest_k": n, "heads_q": 1, "heads_kv": 1, "head_dim": 8}
    built = drawn(rng, **LAYOUTS[layout], **sizes, window=(1000, 0))
    leaves = built.requires_grad()
    with LargestTensor() as largest:
        out, _ = run(built)
        torch.autograd.grad(out.sum(), list(leaves.values()))
    assert n < largest.numel <= reference_core.CPU_SCORES


def test_32k_is_chunked() -> None:
    """The chunk length of 32k x 32k and 16 heads, on a CPU and elsewhere."""
    n = 32768
    k = torch.empty(16, 1, 8)
    mask: Any = type("Mask", (), {"num_rows": n})
    q = torch.empty(1, 1, 16, 8).expand(1, n, 16, 8)
    for device in ("cpu", "meta"):
        x = reference_core.Operands(q.to(device), k, k, None, None, 16)
        assert reference_core.chunk_size(x, mask) * 16 * n <= reference_core.MAX_SCORES


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_in_one_graph(layout: str, rng: random.Random) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(reference.attention, fullgraph=True, backend="aot_eager", dynamic=False)
    options = {"window": (9, 0), "sinks": "fp32", "softcap": 4.0, "used_q": layout != "dense"}
    built = drawn(rng, **LAYOUTS[layout], **options)
    with torch.no_grad():
        out, lse = compiled(**built.normalised())
    check_against(built, out, lse)
    check_new_rows(built, out, lse)
    gradients(built, fn=compiled)


# Sizes that happen to be equal in the first call need not be in the second.
@shape_config.patch(use_duck_shape=False)
def test_compiles_with_dynamic_shapes(rng: random.Random) -> None:
    """One compiled graph serves another batch, other lengths and another pool."""
    torch._dynamo.reset()
    compiled = torch.compile(reference.attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for changes in ({}, {"batch": 5, "longest_q": 29, "longest_k": 77}):
        built = drawn(rng, **{"ragged_q": True, "page_size": 16, "causal": True, **changes})
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile" if changes else "default"):
            out, lse = compiled(**built.normalised())
        check_against(built, out, lse)
        check_new_rows(built, out, lse)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_tensor_is_read(layout: str, rng: random.Random) -> None:
    """No op that copies a tensor's value to Python: the call can be captured in a CUDA graph."""
    built = drawn(rng, **LAYOUTS[layout], window=(9, 0), prefix=True, sinks="fp32", used_q=True)
    with NoSync() as ops:
        run(built, fn=on_a_device)
    assert ops.seen


def test_autocast_does_not_lower_the_precision(rng: random.Random) -> None:
    built = drawn(rng, causal=True)
    leaves = built.requires_grad()
    expected = run(built)
    (expected_q,) = torch.autograd.grad(expected[0].sum(), [leaves["q"]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = run(built)
        (grad_q,) = torch.autograd.grad(out.sum(), [leaves["q"]])
    torch.testing.assert_close((out, lse, grad_q), (*expected, expected_q), rtol=0, atol=0)


def test_two_passes_write_one_out(rng: random.Random) -> None:
    """Prefill and decode rows of one batch by two calls into one output, as prefix-LM users do."""
    built = drawn(rng, ragged_q=True, page_size=16, causal=True, batch=4)
    out = torch.full_like(built.out, float("nan"))
    for parity in (0, 1):
        used = [n if b % 2 == parity else 0 for b, n in enumerate(built.call.seqlens_q)]
        built.kwargs["seqused_q"] = int32(used, CPU)
        before = out.clone()
        run(built, out)
        dead = torch.ones(len(out), dtype=torch.bool)
        for rows in built.rows[parity::2]:
            dead[rows] = False
        check_equal(out[dead], before[dead])
    check_against(built, out)
    check_dead_rows(built, out)


def test_gradcheck(rng: random.Random) -> None:
    """Analytic gradients against finite differences, through out (the LSE is fp32)."""
    options = {"window": (4, 1), "softcap": 2.0, "sinks": "fp32", "qv": True}
    built = drawn(rng, batch=2, longest_q=3, longest_k=7, head_dim=2, dtype=torch.float64, **options)
    built.kwargs["sinks"] = built.kwargs["sinks"].double()
    leaves = built.requires_grad()
    for leaf in leaves.values():
        leaf.data.nan_to_num_()  # keys that no query sees

    def function(*tensors: Tensor) -> Tensor:
        return reference.attention(**{**built.normalised(), **dict(zip(leaves, tensors, strict=True))})[0]

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))
