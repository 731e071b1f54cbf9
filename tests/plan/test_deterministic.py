"""Deterministic gradients: which row they take on described devices, and what is_supported and explain say of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import broadhead
import pytest
import torch
from broadhead.plan.device import hypothetical
from broadhead.plan.dispatch import resolve
from broadhead.support import ROWS
from described import ALL_ARCHS, FULL, build_of, problem

#: The same on every device whose blocks have 99 KB of shared memory.
SMALL = {
    64: ("sm80_bwd_d64_fused_smem99", "sm80_bwd_d64_smem99"),
    96: ("sm80_bwd_d96_smem99", "sm80_bwd_d96_smem99"),
    128: ("sm80_bwd_d128_fused_smem99", "sm80_bwd_d128_smem99"),
    192: ("sm80_bwd_d192_smem99", "sm80_bwd_d192_smem99"),
    256: ("sm80_bwd_d256_smem99", "sm80_bwd_d256_smem99"),
    384: ("sm80_bwd_d512_smem99", "sm80_bwd_d512_smem99"),
    512: ("sm80_bwd_d512_smem99", "sm80_bwd_d512_smem99"),
}
#: The row of a backward call by compute capability and head_dim: the fastest, and the one whose sums have an order.
EXPECTED = {
    (9, 0): {
        64: ("sm90_bwd_d64_fused", "sm90_bwd_d64"),
        96: ("sm90_bwd_d96_fused", "sm90_bwd_d96"),
        128: ("sm90_bwd_d128_fused", "sm90_bwd_d128"),
        192: ("sm90_bwd_d192", "sm90_bwd_d192"),
        256: ("sm90_bwd_d256", "sm90_bwd_d256"),
        384: ("sm90_bwd_d384", "sm90_bwd_d384"),
        512: ("sm90_bwd_d512", "sm90_bwd_d512"),
    },
    (8, 6): SMALL,
    (12, 0): SMALL,
    (8, 0): {
        64: ("sm80_bwd_d64_fused_smem99", "sm80_bwd_d64"),
        256: ("sm80_bwd_d256_fused_smem163", "sm80_bwd_d256_smem163"),
    },
    (10, 0): {64: ("sm80_bwd_d64_fused", "sm80_bwd_d64"), 192: ("sm80_bwd_d192_fused", "sm80_bwd_d192")},
}
CASES = [(capability, head_dim) for capability, rows in EXPECTED.items() for head_dim in rows]
#: A build whose backward kernels are all fused.
UNORDERED = build_of(*ALL_ARCHS, without=tuple(row.id for row in ROWS if "deterministic" in row.features))
LONG = {"seqlen_q": 4096, "seqlen_k": 4096}


@pytest.fixture
def torch_asks() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def ids(case: Any) -> str:
    return ".".join(map(str, case)) if isinstance(case, tuple) else f"d{case}"


@pytest.mark.parametrize(("capability", "head_dim"), CASES, ids=ids)
def test_the_row_with_and_without(capability: tuple[int, int], head_dim: int) -> None:
    fastest, ordered = EXPECTED[capability][head_dim]
    for features, stem in (
        (("lse",), fastest),
        (("deterministic", "lse"), ordered),
        (("lse", "short_sequences"), ordered),
        (("deterministic", "lse", "short_sequences"), ordered),
    ):
        asked = problem(direction="backward", head_dim=head_dim, features=features)
        plan = resolve(asked, hypothetical(capability), FULL)
        assert plan.row is not None and plan.row.stem == stem, features


@pytest.mark.parametrize(("capability", "head_dim"), CASES, ids=ids)
def test_explain_and_is_supported_name_it(capability: tuple[int, int], head_dim: int) -> None:
    fastest, ordered = (f"kernel {stem}_bf16: " for stem in EXPECTED[capability][head_dim])
    asked: dict[str, Any] = {"head_dim": head_dim, "device": capability, "build": FULL, **LONG}
    for deterministic, kernel in ((False, fastest), (None, fastest), (True, ordered)):
        options = {**asked, "deterministic": deterministic}
        assert f"runs on: cuda, {kernel}" in broadhead.explain(direction="backward", **options)
        supported, reason = broadhead.is_supported(direction="backward", **options)
        assert supported and reason.startswith(kernel.removeprefix("kernel "))
        text = broadhead.explain(requires_grad=True, **options)
        assert f"gradients: cuda, {kernel}" in text and "runs on: cuda, kernel sm" in text
        # A forward kernel has no gradients: nobody asks it for an order, nor a call that needs none.
        assert "deterministic" not in broadhead.explain(**options)


def test_torch_asks_for_all_calls(torch_asks: None) -> None:
    asked: dict[str, Any] = {"head_dim": 128, "device": (9, 0), "build": FULL, **LONG}
    assert "runs on: cuda, kernel sm90_bwd_d128_bf16" in broadhead.explain(direction="backward", **asked)
    assert "gradients: cuda, kernel sm90_bwd_d128_bf16" in broadhead.explain(requires_grad=True, **asked)
    assert "gradients" not in broadhead.explain(**asked)


def test_tensors_ask_as_well() -> None:
    q = torch.empty(4, 4096, 8, 64, dtype=torch.bfloat16, requires_grad=True)
    packed = torch.empty(4096, 8, 64, dtype=torch.bfloat16, requires_grad=True)
    options: dict[str, Any] = {"device": (9, 0), "build": FULL}
    for tensor in (q, packed):
        text = broadhead.explain(tensor, tensor, tensor, deterministic=True, **options)
        assert "gradients: cuda, kernel sm90_bwd_d64_bf16" in text
        text = broadhead.explain(tensor, tensor, tensor, **options)
        assert "gradients: cuda, kernel sm90_bwd_d64_fused_bf16" in text


@pytest.mark.parametrize("asked", [{"requires_grad": True}, {"direction": "backward"}])
def test_what_is_not_built_is_refused_by_name(asked: dict[str, Any]) -> None:
    """There is a kernel without an order: that is what the call gets if it asks for none."""
    options: dict[str, Any] = {"head_dim": 64, "device": (9, 0), "build": UNORDERED, **LONG, **asked}
    assert broadhead.is_supported(**options)[0]
    supported, reason = broadhead.is_supported(deterministic=True, **options)
    assert not supported and "kernel sm90_bwd_d64_bf16 is left out of this build" in reason
    assert ("no deterministic CUDA kernel differentiates" in reason) == ("requires_grad" in asked)
    text = broadhead.explain(deterministic=True, **options)
    assert "runs on: the torch fallback" in text and "features: deterministic" in text


def test_what_no_table_has_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from broadhead.plan import dispatch
    from described import forget_plans

    monkeypatch.setattr(dispatch, "ROWS", tuple(row for row in ROWS if "deterministic" not in row.features))
    forget_plans(monkeypatch)
    options: dict[str, Any] = {"head_dim": 64, "device": (9, 0), "build": FULL, **LONG}
    words = "there is no CUDA kernel for bf16 with deterministic"
    assert broadhead.is_supported(direction="backward", deterministic=True, **options) == (False, words)
    supported, reason = broadhead.is_supported(requires_grad=True, deterministic=True, **options)
    assert not supported and f"no deterministic CUDA kernel differentiates: {words}" in reason


def test_short_sequences_say_why() -> None:
    """Nobody asked for an order: the text tells memory, not determinism."""
    options: dict[str, Any] = {"head_dim": 64, "batch_size": 9, "device": (9, 0), "build": FULL}
    for seqlen, kernel in ((63, "sm90_bwd_d64_bf16"), (64, "sm90_bwd_d64_fused_bf16")):
        text = broadhead.explain(direction="backward", seqlen_q=seqlen, **options)
        assert f"runs on: cuda, kernel {kernel}: " in text and "deterministic" not in text
        assert ("too much memory for short ones" in text) == (seqlen == 63)
