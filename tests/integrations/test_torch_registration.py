"""broadhead in torch's registry of flash attention implementations: what activation does, undoes and refuses."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from typing import Any

import broadhead
import pytest
import torch
import torch.nn.functional as F

PACKAGE = "broadhead.integrations.torch_attention"
HAS_REGISTRY = hasattr(torch.nn.attention, "register_flash_attention_impl")
needs_registry = pytest.mark.skipif(not HAS_REGISTRY, reason=f"torch {torch.__version__} has no registry")


def package() -> Any:
    return importlib.import_module(PACKAGE)


def runs_here() -> bool:
    """Whether SDPA on a CPU runs broadhead."""
    q = torch.randn(1, 2, 5, 16, requires_grad=True)
    out = F.scaled_dot_product_attention(q, q, q)
    return "ForCpu" not in type(out.grad_fn).__name__


def test_an_older_torch_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl", raising=False)
    with pytest.raises(ImportError, match=r"torch >= 2\.10 is needed.*got torch .*flash_attn_varlen_func"):
        package()


@needs_registry
def test_the_import_makes_the_name_known_and_changes_nothing() -> None:
    program = (
        "import torch, broadhead\n"
        "before = torch.nn.attention.list_flash_attention_impls()\n"
        "assert 'broadhead' not in before, before\n"
        f"import {PACKAGE}\n"
        "assert set(torch.nn.attention.list_flash_attention_impls()) == {*before, 'broadhead'}\n"
        "assert torch.nn.attention.current_flash_attention_impl() is None\n"
        "q = torch.randn(1, 2, 5, 16, requires_grad=True)\n"
        "out = torch.nn.functional.scaled_dot_product_attention(q, q, q)\n"
        "assert 'ForCpu' in type(out.grad_fn).__name__\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@needs_registry
def test_a_with_block_ends_it() -> None:
    assert not runs_here()
    with package().activate("cpu"):
        assert runs_here()
    assert not runs_here()
    with pytest.raises(ZeroDivisionError), package().activate("cpu"):
        raise ZeroDivisionError
    assert not runs_here()
    with pytest.raises(NotImplementedError):
        x = torch.randn(1, 2, 5, 16)
        torch.ops.aten._scaled_dot_product_flash_attention(x, x, x)


@needs_registry
def test_a_handle_need_not_be_kept_and_removes_once() -> None:
    handle = package().activate("cpu")
    assert package().activate("cpu") is handle
    assert runs_here()
    handle.remove()
    handle.remove()
    assert not runs_here()


@needs_registry
@pytest.mark.skipif(torch.cuda.is_available(), reason="the warning is for processes without a CUDA device")
def test_cuda_through_torchs_own_functions() -> None:
    package()
    attention: Any = torch.nn.attention
    key = "aten::_scaled_dot_product_flash_attention", "CUDA"
    had_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(*key)
    with pytest.warns(broadhead.FallbackWarning, match="sees no CUDA device"):
        attention.activate_flash_attention_impl("broadhead")
    try:
        assert attention.current_flash_attention_impl() == "broadhead"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(*key)
        assert not runs_here(), "a CPU runs it"
    finally:
        attention.restore_flash_attention_impl()
    assert attention.current_flash_attention_impl() is None
    assert torch._C._dispatch_has_kernel_for_dispatch_key(*key) == had_kernel
    with pytest.warns(broadhead.FallbackWarning), package().activate("cuda"):
        assert attention.current_flash_attention_impl() == "broadhead"
    assert attention.current_flash_attention_impl() is None


@needs_registry
def test_a_build_without_kernels_does_not_replace_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    registration = importlib.import_module(PACKAGE + ".registration")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(registration, "is_supported", lambda **_: (False, "this build has no kernels for sm_75"))
    with pytest.raises(broadhead.UnsupportedError, match=r"no kernels for sm_75.*torch keeps its own"):
        torch.nn.attention.activate_flash_attention_impl("broadhead")
    assert torch.nn.attention.current_flash_attention_impl() is None


@needs_registry
def test_other_devices_are_refused() -> None:
    with pytest.raises(broadhead.InvalidArgumentError, match="'cuda' or 'cpu', got 'xpu'"):
        package().activate("xpu")


@needs_registry
def test_on_cuda_what_a_kernel_runs_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selection for a CUDA device, asked of tensors without memory: every head_dim that a kernel runs."""
    selection = importlib.import_module(PACKAGE + ".selection")
    asked: list[tuple[int, bool]] = []

    def has_kernel(head_dim: int, dtype: torch.dtype, needs_grad: bool, device: int) -> bool:
        asked.append((head_dim, needs_grad))
        return head_dim != 264

    monkeypatch.setattr(selection, "_has_kernel", has_kernel)
    with torch._subclasses.FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")

        def taken(head_dim: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> bool:
            q = torch.empty(1, 4, 64, head_dim, dtype=dtype, device="cuda", **options)
            return bool(selection.takes(q, q, q, True, False))

        assert [taken(d) for d in (128, 264, 512)] == [True, False, True]
        assert taken(512, requires_grad=True) and not taken(512, torch.float32)
    assert asked == [(128, False), (264, False), (512, False), (512, True)]
