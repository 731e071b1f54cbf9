"""torch.compile(fullgraph=True) of the public functions: one graph, and what runs eagerly; mha_bwd as an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import broadhead
import oracle
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

BACKENDS = ("eager", "aot_eager")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_public_function_takes_fake_tensors() -> None:
    with FakeTensorMode():
        q, k = torch.empty(2, 5, 4, 16), torch.empty(2, 7, 2, 16)
        out, lse = broadhead.flash_attn_func(q, k, k, return_attn_probs=True)
    assert out.shape == (2, 5, 4, 16) and lse.shape == (2, 4, 5)


# --- torch.compile ---------------------------------------------------------------------------------------------------


def check_compiled(function: Callable[..., Any], *arguments: Any, backend: str, **options: Any) -> None:
    """Compiled with fullgraph=True, ``function`` returns and writes what it does eagerly."""

    def clone(values: Any) -> Any:
        return [x.clone() if isinstance(x, Tensor) else x for x in values]

    eager_arguments, compiled_arguments = clone(arguments), clone(arguments)
    eager = function(*eager_arguments)
    compiled = torch.compile(function, fullgraph=True, backend=backend, **options)(*compiled_arguments)
    torch.testing.assert_close(compiled, eager, equal_nan=True)
    for a, b in zip(compiled_arguments, eager_arguments, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, msg="an argument was changed differently")


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_dense(backend: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Any:
        return broadhead.flash_attn_func(
            q * 2, k, v, causal=True, window_size=[3, 0], s_aux=sinks, return_attn_probs=True
        )

    check_compiled(function, randn(2, 5, 4, 16), randn(2, 7, 2, 16), randn(2, 7, 2, 24), randn(4), backend=backend)


def test_compile_dense_dynamic_shapes() -> None:
    compiled = torch.compile(broadhead.flash_attn_func, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 9, 13):
        q, k, v = randn(2, length, 4, 16), randn(2, length + 2, 2, 16), randn(2, length + 2, 2, 16)
        torch.testing.assert_close(compiled(q, k, v), broadhead.flash_attn_func(q, k, v))


def test_compile_out() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        return broadhead.flash_attn_func(q, k, v, out=out) + 1

    check_compiled(
        function, randn(2, 5, 4, 16), randn(2, 7, 2, 16), randn(2, 7, 2, 16), randn(2, 5, 4, 16), backend="aot_eager"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_varlen(backend: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Any:
        return broadhead.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 6, 6, causal=True, return_attn_probs=True)

    check_compiled(
        function, randn(9, 4, 16), randn(11, 2, 16), randn(11, 2, 16), int32(0, 3, 9), int32(0, 6, 11), backend=backend
    )


def test_compile_varlen_paged_with_lengths_from_cu_seqlens_k() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, table: Tensor) -> Any:
        return broadhead.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 6, 9, block_table=table)

    table = int32(5, 0, 1, 2, 4, 3).view(2, 3)
    cache = (randn(6, 4, 2, 16), randn(6, 4, 2, 16))
    check_compiled(function, randn(9, 4, 16), *cache, int32(0, 3, 9), int32(0, 9, 12), table, backend="aot_eager")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [4, None], ids=["int", "tensor"])
def test_compile_kvcache_with_append(lengths: int | None, backend: str) -> None:
    def function(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, seqlens: Tensor) -> Any:
        return broadhead.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=seqlens if lengths is None else lengths, causal=True, num_splits=1
        )

    tensors = (randn(2, 3, 4, 16), randn(2, 12, 2, 16), randn(2, 12, 2, 16), randn(2, 3, 2, 16), randn(2, 3, 2, 16))
    check_compiled(function, *tensors, int32(9, 2), backend=backend)


def graph_of(function: Callable[..., Any], *arguments: Any) -> tuple[Any, set[str]]:
    """What ``function`` returns when compiled with fullgraph=True, and the operators of its graph."""
    seen: set[str] = set()

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.update(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    return torch.compile(function, fullgraph=True, backend=backend)(*arguments), seen


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
def test_compile_kvcache_append_with_rotary(ragged: bool, causal: bool) -> None:
    def function(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, cos: Tensor, sin: Tensor, n: Tensor) -> Any:
        packed = {"cu_seqlens_q": cu, "cu_seqlens_k_new": cu, "max_seqlen_q": 3} if ragged else {}
        return broadhead.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, k, rotary_cos=cos, rotary_sin=sin, cache_seqlens=n, causal=causal, **packed
        )

    cu = int32(0, 3, 4)
    caches = (randn(2, 12, 2, 16), randn(2, 12, 2, 16))
    q, new = (randn(4, 4, 16), randn(4, 2, 16)) if ragged else (randn(2, 3, 4, 16), randn(2, 3, 2, 16))
    arguments = (q, *caches, new, randn(20, 4), randn(20, 4), int32(5, 0))
    check_compiled(function, *arguments, backend="aot_eager")
    torch.compiler.reset()
    _, operators = graph_of(function, *arguments)
    # Rotary embedding and the new lengths are the operator's: nothing is left to torch.
    assert operators == {"broadhead.append_kv", "broadhead.mha_fwd", "<built-in function getitem>"}, operators


@pytest.mark.parametrize("given", ["new", "other", "out_a", "out_b"])
def test_compile_merge(given: str) -> None:
    def function(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, other: Tensor) -> Any:
        out = {"new": None, "other": other, "out_a": out_a, "out_b": out_b}[given]
        return broadhead.merge_attn_states(out_a, lse_a, out_b, lse_b, out=out)[1] + 1, out_a, out_b, other

    states = (randn(5, 4, 16), randn(4, 5), randn(5, 4, 16), randn(4, 5), randn(5, 4, 16))
    check_compiled(function, *states, backend="aot_eager")
    torch.compiler.reset()
    assert f"broadhead.merge_states{'' if given == 'new' else '_out'}" in graph_of(function, *states)[1]


def test_compile_merge_with_gradients() -> None:
    tensors = [randn(5, 4, 16), randn(4, 5), randn(5, 4, 16), randn(4, 5)]
    gradients = []
    for function in (broadhead.merge_attn_states, torch.compile(broadhead.merge_attn_states, backend="aot_eager")):
        leaves = [t.clone().requires_grad_(True) for t in tensors]
        out, lse = function(*leaves)
        gradients.append(torch.autograd.grad(out.square().sum() + lse.sin().sum(), leaves))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert all(g.abs().sum() > 0 for g in gradients[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_paged_decode_with_metadata(backend: str) -> None:
    def function(q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, n: Tensor, buffer: Tensor) -> Any:
        plan = {"causal": True, "page_size": 4, "qkv_dtype": torch.float32}
        metadata = broadhead.get_scheduler_metadata(2, 1, 12, 4, 2, 16, n, **plan)
        broadhead.get_scheduler_metadata(2, 1, 12, 4, 2, 16, n, **plan, out=buffer)
        out = broadhead.flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=n, page_table=table, causal=True, scheduler_metadata=metadata
        )
        return out, metadata

    check_compiled(
        function, randn(2, 1, 4, 16), randn(6, 4, 2, 16), randn(6, 4, 2, 16), int32(5, 0, 1, 2, 4, 3).view(2, 3),
        int32(9, 3), torch.zeros(17, dtype=torch.int32), backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_oracle(compiled: bool, with_lse: bool) -> None:
    q, k, v = randn(2, 5, 4, 16), randn(2, 5, 4, 16), randn(2, 5, 4, 16)
    dout, dlse = randn(2, 5, 4, 16), randn(2, 4, 5)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = broadhead.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        return (out * dout).sum() + ((lse * dlse).sum() if with_lse else 0.0)

    def expected_loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = oracle.dense(q, k, v, oracle.Rule(0.25, (-1, 0)))
        return (out * dout).sum() + ((lse * dlse).sum() if with_lse else 0.0)

    gradients = []
    for function in (loss, expected_loss):
        leaves = [t.clone().requires_grad_(True) for t in (q, k, v)]
        if compiled and function is loss:
            function = torch.compile(function, fullgraph=True, backend="aot_eager")
        gradients.append(torch.autograd.grad(function(*leaves), leaves))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_compiled_gradients_know_factors() -> None:
    """Descales scale the gradients too, whichever way the call came."""
    q, k, v, factors = randn(2, 5, 4, 16), randn(2, 7, 2, 16), randn(2, 7, 2, 16), torch.rand(3, 2, 2) + 0.5
    descales = dict(zip(("q_descale", "k_descale", "v_descale"), factors, strict=True))
    gradients = []
    for backend in (None, "aot_eager"):
        leaves = [t.clone().requires_grad_(True) for t in (q, k, v)]
        function = torch.compile(broadhead.flash_attn_func, fullgraph=True, backend=backend) if backend else None
        out = (function or broadhead.flash_attn_func)(*leaves, **descales)
        gradients.append(torch.autograd.grad(out.square().sum(), leaves))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_mha_bwd_matches_autograd_and_keeps_rows_nobody_owns() -> None:
    cu, used = int32(0, 4, 9), int32(3, 5)
    q, k, v, dout = randn(11, 4, 16), randn(11, 2, 16), randn(11, 2, 16), randn(11, 4, 16)
    sinks = randn(4)
    leaves = [t.clone().requires_grad_(True) for t in (q, k, v, sinks)]
    options = {"seqused_q": used, "seqused_k": used, "causal": True}
    out = broadhead.flash_attn_varlen_func(*leaves[:3], cu, cu, 5, 5, sinks=leaves[3], **options)
    live = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8])
    expected = torch.autograd.grad(out[live], leaves, dout[live])
    given = [torch.full_like(t, 7.0) for t in (q, k, v)]
    got = broadhead.mha_bwd(dout, q, k, v, None, None, cu, cu, used, used, 5, 5, *given, causal=True, sinks=sinks)
    for name, a, b in zip(("dq", "dk", "dv"), got, expected, strict=False):
        torch.testing.assert_close(a[live], b[live], msg=f"{name} differs")
        dead = torch.tensor([3, 9, 10])
        assert (a[dead] == 7).all(), f"{name}: rows that no sequence owns were written"
    torch.testing.assert_close(got[3], expected[3])


def test_compile_refuses_what_eager_refuses() -> None:
    q = randn(1, 4, 2, 16)
    k = randn(1, 4, 2, 16).requires_grad_(True)
    with pytest.raises(broadhead.UnsupportedError, match="out="):
        broadhead.flash_attn_func(q, k, k, out=torch.empty_like(q))
    compiled = torch.compile(broadhead.flash_attn_func, backend="aot_eager")
    with pytest.raises(broadhead.BroadheadError, match="softmax_scale"):
        compiled(q, q, q, softmax_scale=float("nan"))


# --- mha_bwd as an operator ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "varlen"])
def test_compiled_mha_bwd(packed: bool) -> None:
    cu = int32(0, 3, 9)
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 6, "max_seqlen_k": 6} if packed else {}
    q, k, v = (randn(9, 4, 16) for _ in range(3)) if packed else (randn(2, 5, 4, 16) for _ in range(3))
    out, lse = broadhead.mha_fwd(q, k, v, causal=True, **lengths)

    def function(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
        return broadhead.mha_bwd(dout, q, k, v, out, lse, causal=True, **lengths)[:3]

    check_compiled(function, torch.randn_like(out), q, k, v, out, lse, backend="aot_eager")
    torch.compiler.reset()
    _, operators = graph_of(function, torch.randn_like(out), q, k, v, out, lse)
    assert "broadhead.mha_bwd" in operators


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "varlen"])
def test_mha_bwd_below_autograd(packed: bool) -> None:
    """Inside an operator of somebody else, where torch records no derivative."""
    cu = int32(0, 3, 9)
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 6, "max_seqlen_k": 6} if packed else {}
    q, k, v = (randn(9, 4, 16) for _ in range(3)) if packed else (randn(2, 5, 4, 16) for _ in range(3))
    dout = torch.randn_like(q)
    name = f"broadhead_tests::backward_{'varlen' if packed else 'dense'}"

    @torch.library.custom_op(name, mutates_args=())
    def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = broadhead.mha_fwd(q, k, v, causal=True, **lengths)
        dq, dk, dv, _ = broadhead.mha_bwd(dout, q, k, v, out, lse, causal=True, **lengths)
        return dq, dk, dv

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, _ = broadhead.mha_fwd(*leaves, causal=True, **lengths)
    torch.testing.assert_close(backward(dout, q, k, v), torch.autograd.grad(out, leaves, dout))
