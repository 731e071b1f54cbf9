"""torch.compile(fullgraph=True) and fake tensors over every layout of the public functions; gradients; mha_fwd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import broadhead
import pytest
import torch
from calls import Call, build
from checks import check_against, check_gradients
from torch._subclasses.fake_tensor import FakeTensorMode

CPU = torch.device("cpu")
FUNCTIONS = {
    "func": broadhead.flash_attn_func,
    "varlen": broadhead.flash_attn_varlen_func,
    "kvcache": broadhead.flash_attn_with_kvcache,
}
CALLS = {
    "dense": Call("func", (5, 5), (9, 9), heads_q=4, causal=True, softcap=5.0),
    "dense_splits_heuristic": Call("func", (5, 5), (9, 9), heads_q=4, num_splits=0, sinks="fp32"),
    "varlen": Call("varlen", (3, 0, 7), (5, 4, 8), causal=True, window=(3, 0), slack_q=2),
    "varlen_prefix": Call("varlen", (6, 8), (6, 8), causal=True, prefix=(2, 5)),
    "varlen_paged": Call("varlen", (3, 0, 7), (5, 4, 19), page_size=4, causal=True),
    "kvcache": Call("kvcache", (2, 2, 2), (9, 2, 0), slack_k=4, causal=True, heads_q=4),
    "kvcache_paged": Call("kvcache", (1, 1), (40, 17), page_size=16, heads_q=4),
    "kvcache_ragged": Call("kvcache", (4, 0, 1), (9, 5, 20), page_size=8, ragged_q=True, causal=True),
    "kvcache_append": Call("kvcache", (3, 3), (9, 3), num_new=(3, 3), page_size=4, causal=True),
}


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(step, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("with_out", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_fullgraph(name: str, with_out: bool) -> None:
    """One graph, no break, the result of eager; the caches are appended to and out is written through the graph."""
    built = build(CALLS[name].with_(dtype=torch.float32), CPU)
    kwargs = dict(built.kwargs)
    if not with_out:
        kwargs["out"] = None
    function = FUNCTIONS[built.call.function]

    def step(q: torch.Tensor) -> torch.Tensor:
        return function(**{**kwargs, "q": q * 1.0})

    with torch.no_grad():
        out = compiled(step)(kwargs["q"])
    check_against(built, out)
    if with_out:
        check_against(built, built.out)


def test_fullgraph_returns_lse() -> None:
    built = build(CALLS["varlen"].with_(dtype=torch.float32), CPU)
    kwargs = {**built.kwargs, "out": None}
    out, lse = compiled(lambda q: broadhead.flash_attn_varlen_func(**{**kwargs, "q": q}, return_attn_probs=True))(
        kwargs["q"]
    )
    check_against(built, out, lse)


@pytest.mark.parametrize("compile_it", [False, True])
@pytest.mark.parametrize("layout", ["dense", "varlen"])
def test_gradients(layout: str, compile_it: bool) -> None:
    """Gradients of q, k, v and sinks through the public functions, with a gradient of the LSE too."""
    function = {"dense": "func", "varlen": "varlen"}[layout]
    seqlens = ((6, 6), (6, 6)) if layout == "dense" else ((4, 8), (4, 8))
    options = {"heads_q": 4, "head_dim": 16, "head_dim_v": 24, "causal": True, "window": (3, 0), "softcap": 4.0}
    built = build(Call(function, *seqlens, **options, sinks="fp32", dtype=torch.float64), CPU)
    leaves = built.requires_grad()
    given = {name: x for name, x in built.kwargs.items() if name not in (*leaves, "out")}

    def step(**leaves: torch.Tensor) -> Any:
        return FUNCTIONS[function](**given, **leaves, return_attn_probs=True)

    out, lse = (compiled(step) if compile_it else step)(**leaves)
    check_against(built, out, lse)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    found = torch.autograd.grad([out, lse], list(leaves.values()), [grad_out, grad_lse])
    check_gradients(built, dict(zip(leaves, found, strict=True)), grad_out, grad_lse)


@pytest.mark.parametrize("name", [n for n in CALLS if n != "kvcache_append"])
def test_fake_tensors(name: str) -> None:
    """Shapes, dtypes and strides of the fake results are those of the real ones."""
    built = build(CALLS[name].with_(dtype=torch.bfloat16), CPU)
    real = built.run(out=None)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in built.kwargs.items()}
        built.kwargs = {**fakes, "out": None}
        fake = built.run()
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


@pytest.mark.parametrize("name", ["varlen", "varlen_paged", "kvcache_paged", "kvcache_ragged"])
def test_mha_fwd_is_under_the_functions(name: str) -> None:
    call = CALLS[name]
    layout = {"ragged_q": call.packs_queries, "packed_k": call.packs_keys}
    built = build(call.with_(function="mha_fwd", dtype=torch.float32, **layout), CPU)
    out, lse = built.run()
    check_against(built, out, lse)


def test_mha_fwd_takes_seqused_with_dense_q() -> None:
    q, k, v, out = (
        torch.randn(2, 6, 2, 16),
        torch.randn(2, 9, 2, 16),
        torch.randn(2, 9, 2, 16),
        torch.zeros(2, 6, 2, 16),
    )
    result, lse = broadhead.mha_fwd(
        q, k, v, out=out, seqused_q=int32(6, 2), seqused_k=int32(9, 4), causal=True, window_size_right=0
    )
    assert result is out and (out[1, 2:] == 0).all() and lse.shape == (2, 2, 6)
    torch.testing.assert_close(out[1:, :2], broadhead.flash_attn_func(q[1:, :2], k[1:, :4], v[1:, :4], causal=True))


def test_cuda_backward_says_that_it_is_missing() -> None:
    q = torch.randn(1, 4, 2, 16, requires_grad=True)
    with pytest.raises(broadhead.UnsupportedError):
        broadhead.flash_attn_func(q, q, q, backend="cuda")
    with pytest.raises(broadhead.UnsupportedError, match="mha_bwd"):
        broadhead.mha_bwd(torch.randn(1, 4, 2, 16), q.detach(), q.detach(), q.detach(), backend="cuda")
