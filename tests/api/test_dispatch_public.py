"""Dispatch as callers see it: is_supported, explain, the support matrix, the backend argument, fallback and refusal."""

from __future__ import annotations

import warnings

import broadhead
import pytest
import torch
from broadhead.plan import device as device_module
from broadhead.plan import native
from broadhead.plan.native import NO_KERNELS
from broadhead.run import choice
from broadhead.run import fallback as fallback_notice
from broadhead.support import EXTRA_FEATURES, FEATURES, ROWS
from described import FULL, build_of, h200, problem

pytestmark = pytest.mark.usefixtures("first_rows")


def test_is_supported_and_explain() -> None:
    ok, reason = broadhead.is_supported(head_dim=512, device=(8, 9), build=FULL)
    assert ok and "d512" in reason
    ok, reason = broadhead.is_supported(head_dim=512, device=(7, 5), build=FULL)
    assert not ok and "7.5" in reason
    ok, reason = broadhead.is_supported(head_dim=100, device=(9, 0), build=FULL)
    assert not ok and "multiple of 8" in reason
    assert broadhead.is_supported(head_dim=128, device=(9, 0), build=FULL, requires_grad=True)[0]
    ok, reason = broadhead.is_supported(head_dim=128, page_size=16, device=(9, 0), build=FULL, requires_grad=True)
    assert not ok and "no CUDA kernel differentiates" in reason and "paged" in reason
    ok, reason = broadhead.is_supported(head_dim=128, device=(9, 0), build=NO_KERNELS)
    assert not ok and "left out of this build" in reason
    text = broadhead.explain(
        head_dim=256, num_heads_q=16, num_heads_kv=2, seqlen_k=65536, page_size=16, device=(9, 0), build=FULL
    )
    assert "kernel sm80_fwd_decode_d256_bf16" in text and "splits" in text and "takes dtype fp16, not bf16" in text
    text = broadhead.explain(head_dim=192, head_dim_v=128, seqlen_q=4096, device=(9, 0), build=FULL)
    assert "kernel sm90_fwd_d192_v128_bf16: the first prefill row for head_dim 192, head_dim_v 128" in text
    assert "sm90_fwd_d64_bf16, sm90_fwd_d64_m64_bf16 and " in text and ": takes head_dim up to 64, not 192" in text
    text = broadhead.explain(head_dim=256, device="cpu")
    assert "torch fallback" in text and "refused by the device:\n  every kernel: " in text


def test_questions_about_tensors() -> None:
    q, k = torch.randn(2, 5, 4, 64, dtype=torch.bfloat16), torch.randn(2, 7, 2, 64, dtype=torch.bfloat16)
    ok, reason = broadhead.is_supported(q, k, k)
    assert not ok and "cpu" in reason
    assert broadhead.is_supported(q, k, k, device=h200(), build=FULL)[0]
    assert "4 query and 2 key heads" in broadhead.explain(q, k, k, device=h200(), build=FULL)
    with pytest.raises(broadhead.InvalidArgumentError, match="k and v"):
        broadhead.explain(q)
    with pytest.raises(broadhead.InvalidArgumentError, match="head_dim"):
        broadhead.is_supported()
    with pytest.raises(broadhead.InvalidTypeError, match="device"):
        broadhead.is_supported(head_dim=64, device=9.0)


def test_support_matrix_is_the_table() -> None:
    entries = broadhead.support_matrix(build_of("90a", without=(ROWS[0].id,)))
    assert [e.kernel for e in entries] == [row.id for row in ROWS]
    assert [e.in_build for e in entries] == [False] + [True] * (len(ROWS) - 1)
    assert all(set(e.features) <= {*FEATURES, *EXTRA_FEATURES} for e in entries)
    assert {e.kernel for e in entries if e.requires == ("qv",)} == {row.id for row in ROWS if "qv" in row.features}
    assert ("sm90_fwd_d192_v128_bf16", 192, 128) in {(e.kernel, e.head_dim, e.head_dim_v) for e in entries}
    assert broadhead.support_matrix(), "for this installation"


# --- backend selection ----------------------------------------------------------------------------------------------


def test_backend_argument_on_cpu() -> None:
    q = torch.randn(1, 3, 2, 16)
    broadhead.flash_attn_func(q, q, q)
    backend, row, reason = broadhead.last_dispatch()
    assert (backend, row) == ("torch", None) and "cpu" in reason
    broadhead.flash_attn_func(q, q, q, backend="torch")
    assert broadhead.last_dispatch()[0] == "torch"
    with pytest.raises(broadhead.UnsupportedError, match=r"flash_attn_func.*backend='cuda'.*cpu"):
        broadhead.flash_attn_func(q, q, q, backend="cuda")
    with pytest.raises(broadhead.UnsupportedError, match="mha_bwd"):
        broadhead.mha_bwd(q, q, q, q, backend="cuda")
    for wrong in ("tpu", 3):
        with pytest.raises(broadhead.BroadheadError, match="backend"):
            broadhead.flash_attn_func(q, q, q, backend=wrong)


def test_cpu_is_silent_and_not_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROADHEAD_STRICT", "1")
    q = torch.randn(1, 3, 2, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        broadhead.flash_attn_func(q, q, q)


def test_fallback_on_a_cuda_device_warns_once_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decision on a CUDA device, without one: the device is described, nothing runs."""
    monkeypatch.setattr(choice, "describe", lambda device: h200())
    monkeypatch.setattr(fallback_notice, "_warned", set())
    monkeypatch.setattr(native, "build_description", lambda: NO_KERNELS)
    cuda = torch.device("cuda", 0)
    wide = problem(head_dim=520)
    with pytest.warns(broadhead.FallbackWarning, match=r"mha_fwd.*NVIDIA H200.*head_dim 520") as caught:
        for _ in range(3):
            assert choice.select("mha_fwd", wide, cuda, None) is None
    assert len(caught) == 1, "once a kind of reason"
    with pytest.warns(broadhead.FallbackWarning, match="head_dim_v 1024"):
        choice.select("mha_fwd", problem(head_dim=64, head_dim_v=1024), cuda, None)
    assert broadhead.last_dispatch()[0] == "torch"
    with pytest.raises(broadhead.UnsupportedError, match="no CUDA kernel"):
        choice.select("mha_fwd", wide, cuda, "cuda")
    monkeypatch.setenv("BROADHEAD_STRICT", "1")
    with pytest.raises(broadhead.UnsupportedError, match=r"BROADHEAD_STRICT=1.*head_dim 520"):
        choice.select("mha_fwd", wide, cuda, None)
    assert choice.select("mha_fwd", wide, cuda, "torch") is None, "asking for torch is no fallback"


def test_describe_cpu() -> None:
    assert device_module.describe(torch.device("cpu")).type == "cpu"
    assert device_module.describe(torch.device("meta")).type == "meta"
