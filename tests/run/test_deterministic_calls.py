"""Calls that ask for deterministic gradients take kernels whose sums have an order, whatever function is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import broadhead
import pytest
import torch
from broadhead.call.arguments import AttentionArgs
from broadhead.call.check import check_forward
from broadhead.run import fallback
from broadhead.support import ROWS
from described import ALL_ARCHS, FULL, build_of
from stub_module import Module, install_module, row_of
from torch import Tensor

pytestmark = pytest.mark.usefixtures("first_rows")

#: A build whose backward kernels are all fused.
UNORDERED = build_of(*ALL_ARCHS, without=tuple(row.id for row in ROWS if "deterministic" in row.features))
FUSED, ORDERED = "sm90_bwd_d64_fused_bf16", "sm90_bwd_d64_bf16"
LENGTH = 72


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape).to(torch.bfloat16).requires_grad_()


def offsets() -> Tensor:
    return torch.tensor([0, LENGTH, 2 * LENGTH], dtype=torch.int32)


def dense(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **how: function(leaf(2, LENGTH, 4, 64), leaf(2, LENGTH, 2, 64), leaf(2, LENGTH, 2, 64), **how)


def varlen(**how: Any) -> Any:
    q, k, v = leaf(2 * LENGTH, 4, 64), leaf(2 * LENGTH, 2, 64), leaf(2 * LENGTH, 2, 64)
    return broadhead.flash_attn_varlen_func(q, k, v, offsets(), offsets(), LENGTH, LENGTH, **how)


def varlen_packed(**how: Any) -> Any:
    return broadhead.flash_attn_varlen_qkvpacked_func(leaf(2 * LENGTH, 3, 4, 64), offsets(), LENGTH, **how)


CALLS: dict[str, Callable[..., Any]] = {
    "flash_attn_func": dense(broadhead.flash_attn_func),
    "flash_attn_varlen_func": varlen,
    "flash_attn_qkvpacked_func": lambda **how: broadhead.flash_attn_qkvpacked_func(leaf(2, LENGTH, 3, 4, 64), **how),
    "flash_attn_kvpacked_func": lambda **how: broadhead.flash_attn_kvpacked_func(
        leaf(2, LENGTH, 4, 64), leaf(2, LENGTH, 2, 2, 64), **how
    ),
    "flash_attn_varlen_qkvpacked_func": varlen_packed,
    "flash_attn_with_kvcache": dense(broadhead.flash_attn_with_kvcache),
    "mha_fwd": dense(broadhead.mha_fwd),
}


@pytest.fixture
def torch_asks() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    return install_module(monkeypatch, FULL)


@pytest.fixture
def unordered(monkeypatch: pytest.MonkeyPatch) -> Module:
    monkeypatch.setattr(fallback, "_warned", set())
    return install_module(monkeypatch, UNORDERED)


def differentiate(call: Callable[..., Any], **how: Any) -> None:
    found = call(**how)
    out = found[0] if isinstance(found, tuple) else found
    out.float().square().sum().backward()


def backward_row(module: Module) -> str:
    """The backward kernel of the one call, whose forward pass ran on a kernel, too."""
    forward, backward = map(row_of, module.launches)
    module.launches.clear()
    assert forward.startswith("sm90_fwd_d64")
    return backward


@pytest.mark.parametrize("name", CALLS)
def test_every_function_takes_the_flag(name: str, module: Module) -> None:
    for deterministic, row in ((False, FUSED), (True, ORDERED)):
        differentiate(CALLS[name], deterministic=deterministic)
        assert module.launches[-1]["deterministic"] is deterministic
        assert backward_row(module) == row


@pytest.mark.parametrize("name", CALLS)
def test_every_function_hears_torch(name: str, module: Module, torch_asks: None) -> None:
    differentiate(CALLS[name])
    assert module.launches[-1]["deterministic"] is True
    assert backward_row(module) == ORDERED


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_with_kvcache", "mha_fwd"])
def test_the_operators_take_the_flag(name: str, module: Module) -> None:
    q, k = leaf(2, LENGTH, 4, 64), leaf(2, LENGTH, 2, 64)
    for deterministic, row in ((False, FUSED), (True, ORDERED)):
        torch.compiler.reset()
        compiled = torch.compile(getattr(broadhead, name), backend="aot_eager", fullgraph=True)
        differentiate(compiled, q=q, deterministic=deterministic, **keys(name, k))
        assert backward_row(module) == row


def keys(name: str, k: Tensor) -> dict[str, Tensor]:
    return dict.fromkeys(("k_cache", "v_cache") if name == "flash_attn_with_kvcache" else ("k", "v"), k)


@pytest.mark.parametrize("name", CALLS)
def test_the_forward_pass_knows_that_no_kernel_has_an_order(name: str, unordered: Module) -> None:
    """Torch then computes both directions, and says so: a forward kernel would only waste its work."""
    differentiate(CALLS[name], deterministic=False)
    assert backward_row(unordered) == FUSED
    with pytest.warns(broadhead.FallbackWarning, match="no deterministic CUDA kernel differentiates"):
        differentiate(CALLS[name], deterministic=True)
    assert unordered.launches == []
    words = f"{name}: .*no deterministic CUDA kernel differentiates.* {ORDERED} is left out .*features: deterministic"
    with pytest.raises(broadhead.UnsupportedError, match=words):
        CALLS[name](deterministic=True, backend="cuda")


def test_the_operators_know_as_well(unordered: Module) -> None:
    torch.compiler.reset()
    compiled = torch.compile(broadhead.flash_attn_func, backend="aot_eager", fullgraph=True)
    differentiate(dense(compiled), deterministic=True)
    assert unordered.launches == [], "torch computed both directions"
    with pytest.raises(broadhead.UnsupportedError, match=f"kernel {ORDERED} is left out of this build"):
        dense(compiled)(deterministic=True, backend="cuda")


def test_mha_bwd_is_refused_by_name(unordered: Module) -> None:
    q = leaf(2, LENGTH, 4, 64).detach()
    with pytest.raises(broadhead.UnsupportedError, match=f"{ORDERED} is left out .* features: deterministic, lse"):
        broadhead.mha_bwd(q, q, q, q, q, torch.zeros(2, 4, LENGTH), deterministic=True, backend="cuda")


def test_a_call_without_gradients_asks_for_no_order(unordered: Module, torch_asks: None) -> None:
    with torch.no_grad():
        for name in CALLS:
            CALLS[name](deterministic=True)
    assert len(unordered.launches) == len(CALLS)
    assert all(row_of(launch).startswith("sm90_fwd_d64") for launch in unordered.launches)


def test_what_a_problem_says_of_its_gradients(torch_asks: None) -> None:
    """One rule for the forward pass, the backward pass and explain: call.problem.gradient_features."""

    def said(length: int, grad: bool, deterministic: bool) -> set[str]:
        q = torch.zeros(3, length, 2, 16, requires_grad=grad)
        features = check_forward("f", AttentionArgs(q, q, q), deterministic).problem.features
        return set(features) & {"gradients", "deterministic", "short_sequences"}

    assert said(64, True, True) == said(64, True, False) == {"gradients", "deterministic"}
    assert said(64, False, True) == set()
    torch.use_deterministic_algorithms(False)
    assert said(64, True, False) == {"gradients"}
    assert said(63, True, False) == {"gradients", "short_sequences"}
    assert said(63, True, True) == {"gradients", "deterministic", "short_sequences"}
    assert said(63, False, True) == set()
