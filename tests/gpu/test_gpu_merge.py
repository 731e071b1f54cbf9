"""The merge kernel against fp64: dtypes, head dims, strides, out that is an input, empty parts, graphs, compiled."""

from __future__ import annotations

import random

import broadhead
import pytest
import torch
from broadhead.run import fallback as fallback_notice
from broadhead.run.merge import BY_KERNEL
from gpu_calls import capture
from torch import Tensor

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The numbers of ``x`` in another layout; outputs keep a contiguous last dimension."""
    if layout == "plain":
        return x.contiguous()
    if layout == "transposed":
        dims = (0, 1) if x.dim() == 3 else (-2, -1) if x.dim() == 2 else (1, 2)
        return x.transpose(*dims).contiguous().transpose(*dims)
    wide = torch.empty(*x.shape[:-1], x.shape[-1] + (8 if layout == "gapped" else 3), dtype=x.dtype, device=x.device)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Two parts; where a part saw no key its output is NaN."""
    lse_shape = (*shape[:-3], shape[-2], shape[-3])
    states = []
    for _ in range(2):
        out, lse = torch.randn(shape, device=device).to(dtype), torch.randn(lse_shape, device=device) * 4
        empty = torch.rand_like(lse) < 0.3
        lse[empty], out[empty.transpose(-1, -2)] = float("-inf"), float("nan")
        states += [out, lse]
    return states


def expected_of(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lses = torch.stack((lse_a, lse_b)).double()
    weights = torch.softmax(lses, 0).nan_to_num(0.0).transpose(-1, -2).unsqueeze(-1)
    return (weights * torch.stack((out_a, out_b)).double().nan_to_num(0.0)).sum(0), torch.logsumexp(lses, 0)


def check(states: list[Tensor], out: Tensor | None = None) -> None:
    expected, expected_lse = expected_of(*states)
    fallback_notice.state.merge = ("none", None, "")
    got, lse = broadhead.merge_attn_states(*states, out=out)
    assert fallback_notice.state.merge == BY_KERNEL
    assert out is None or got is out
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-6)
    assert lse.dtype == torch.float32 and (got[(lse == float("-inf")).transpose(-1, -2)] == 0).all()


@pytest.mark.curated
@pytest.mark.parametrize("shape", [(7, 4, 128), (2, 5, 3, 72)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_merge(dtype: torch.dtype, shape: tuple[int, ...], cuda: torch.device) -> None:
    check(draw(shape, dtype, cuda))


@pytest.mark.full
@pytest.mark.parametrize("lead", [(1, 1), (1000, 8), (3, 1, 16), (2, 333, 3)], ids=str)
@pytest.mark.parametrize("head_dim_v", [1, 8, 20, 64, 96, 128, 192, 256, 512, 520])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_shapes(dtype: torch.dtype, head_dim_v: int, lead: tuple[int, ...], cuda: torch.device) -> None:
    check(draw((*lead, head_dim_v), dtype, cuda))


@pytest.mark.full
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_strides_and_aliases(dtype: torch.dtype, cuda: torch.device, rng: random.Random) -> None:
    layouts = ("plain", "transposed", "gapped", "odd")
    for shape in ((9, 6, 128), (2, 9, 6, 64)):
        for number in range(30):
            states = [laid_out(x, rng.choice(layouts)) for x in draw(shape, dtype, cuda)]
            own = laid_out(torch.empty_like(states[0]), rng.choice(layouts))
            check(states, (own, states[0], states[2])[number % 3])


@pytest.mark.curated
def test_merge_in_a_graph(cuda: torch.device) -> None:
    states = draw((2, 5, 3, 64), torch.bfloat16, cuda)
    results: list[tuple[Tensor, Tensor]] = []
    graph = capture(lambda: results.append(broadhead.merge_attn_states(*states)))
    for state, new in zip(states, draw((2, 5, 3, 64), torch.bfloat16, cuda)):
        state.copy_(new)
    graph.replay()
    expected, expected_lse = expected_of(*states)
    torch.testing.assert_close(results[-1][0].double(), expected, atol=8e-3, rtol=8e-3)
    torch.testing.assert_close(results[-1][1].double(), expected_lse, atol=1e-5, rtol=1e-6)


def test_gradients_take_torch_ops(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback_notice, "_warned", set())
    states = [x.nan_to_num(0.0).clamp(min=-50).requires_grad_(True) for x in draw((5, 3, 64), torch.float32, cuda)]
    with pytest.raises(broadhead.UnsupportedError, match=r"BROADHEAD_STRICT=1: merge_attn_states: .* requires grad"):
        broadhead.merge_attn_states(*states)
    monkeypatch.delenv("BROADHEAD_STRICT")
    with pytest.warns(broadhead.FallbackWarning, match="merge_attn_states: .*an input requires grad"):
        out, lse = broadhead.merge_attn_states(*states)
    assert fallback_notice.state.merge[0] == "torch"
    (out.square().sum() + lse.sum()).backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in states)


@pytest.mark.full
@pytest.mark.parametrize("given", [False, True])
def test_compiled_merge_uses_the_kernel(given: bool, cuda: torch.device) -> None:
    states = draw((5, 3, 64), torch.bfloat16, cuda)
    expected, _ = broadhead.merge_attn_states(*states)
    out = torch.empty_like(expected) if given else None
    fallback_notice.state.merge = ("none", None, "")
    torch.compiler.reset()
    got, _ = torch.compile(broadhead.merge_attn_states, fullgraph=True)(*states, out=out)
    assert fallback_notice.state.merge == BY_KERNEL and torch.equal(got, expected)
