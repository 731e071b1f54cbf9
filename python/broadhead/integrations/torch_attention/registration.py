"""Puts broadhead behind aten's flash attention operators, and takes it away again."""

from __future__ import annotations

import warnings
from types import TracebackType

import torch
from torch.library import Library

from ...api.explain import is_supported
from ...errors import FallbackWarning, InvalidArgumentError, UnsupportedError
from . import kernels, selection

#: What torch.nn.attention.activate_flash_attention_impl calls this implementation.
NAME = "broadhead"
_OPERATORS = {
    "_flash_attention_forward": kernels.flash_attention_forward,
    "_flash_attention_forward_no_dropout_inplace": kernels.flash_attention_forward_inplace,
    "_flash_attention_backward": kernels.flash_attention_backward,
    "_scaled_dot_product_flash_attention": kernels.sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": kernels.sdpa_backward,
}
#: Dispatch keys of the operators of a device, and of the function that selects among them.
_KEYS = {"cuda": ("CUDA", ("AutogradCUDA", "CUDA")), "cpu": ("CPU", ("AutogradCPU", "CPU"))}
#: Devices whose operators are broadhead's now.
_active: dict[str, Handle] = {}


class Handle:
    """What an activation holds. ``remove()``, or the end of a ``with`` block, gives torch its kernels back."""

    def __init__(self, device: str) -> None:
        operators, selecting = _KEYS[device]
        self.device = device
        self._libraries = [Library("aten", "IMPL", operators)]
        for name, kernel in _OPERATORS.items():
            if hasattr(torch.ops.aten, name):  # torch before 2.13 has no operator that writes a given out
                self._libraries[0].impl(name, kernel)
        for key in selecting:
            library = Library("aten", "IMPL", key)
            library.impl("scaled_dot_product_attention", selection.scaled_dot_product_attention)
            self._libraries.append(library)
        _active[device] = self

    def remove(self) -> None:
        """Give torch its kernels back; nothing happens when it has them."""
        for library in self._libraries:
            library._destroy()
        self._libraries = []
        if _active.get(self.device) is self:
            del _active[self.device]

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


class _CudaHandle(Handle):
    """A handle that torch's registry holds."""

    def remove(self) -> None:
        from torch.nn import attention

        held = _active.get(self.device) is self
        super().remove()
        if held and attention.current_flash_attention_impl() == NAME:
            attention.restore_flash_attention_impl()  # comes back here, with nothing left to do


def register() -> None:
    """Make the name "broadhead" known to ``torch.nn.attention.activate_flash_attention_impl``.

    Importing this package does it. No kernel of torch is replaced before that function is called.

    Raises:
        ImportError: this torch has no registry of flash attention implementations.
    """
    from torch.nn import attention

    if not hasattr(attention, "register_flash_attention_impl"):
        raise ImportError(
            "broadhead.integrations.torch_attention: torch >= 2.10 is needed, whose torch.nn.attention has "
            f"register_flash_attention_impl, got torch {torch.__version__}; install a newer torch, or call "
            "broadhead.flash_attn_func and broadhead.flash_attn_varlen_func, which every torch since 2.6 runs"
        )
    attention.register_flash_attention_impl(NAME, register_fn=_activate_cuda)


def activate(device: str = "cuda") -> Handle:
    """Run torch's attention functions on broadhead, until the handle's ``remove()`` or the end of its ``with`` block.

    Args:
        device: "cuda", which is ``torch.nn.attention.activate_flash_attention_impl("broadhead")``; or "cpu", where the
            torch reference computes: for tests, no faster than torch's own CPU kernels.

    Returns:
        The handle. Without a ``with`` block it need not be kept.

    Raises:
        InvalidArgumentError: another device.
        UnsupportedError: kernels of torch would be replaced by none, as this build has none for the GPU.
    """
    if device not in _KEYS:
        raise InvalidArgumentError(
            f"broadhead.integrations.torch_attention.activate: device must be 'cuda' or 'cpu', got {device!r}; torch's"
            " own kernels stay on other devices"
        )
    if device == "cuda":
        torch.nn.attention.activate_flash_attention_impl(NAME)
    elif device not in _active:
        Handle(device)
    return _active[device]


def _activate_cuda() -> Handle:
    """What torch's registry calls; it has removed an implementation that was active before."""
    _check_cuda()
    return _CudaHandle("cuda")


def _check_cuda() -> None:
    """Raise where torch's kernels are better than what would replace them; warn where there is nothing to replace."""
    function = "torch.nn.attention.activate_flash_attention_impl('broadhead')"
    if not torch.cuda.is_available():
        warnings.warn(
            f"{function}: this process sees no CUDA device, so no call will run on broadhead. A CPU keeps torch's own "
            "kernels; for a test there use broadhead.integrations.torch_attention.activate('cpu')",
            FallbackWarning,
            stacklevel=4,
        )
        return
    supported, reason = is_supported(
        head_dim=128, dtype=torch.bfloat16, seqlen_q=256, seqlen_k=256, device=torch.device("cuda")
    )
    if not supported:
        raise UnsupportedError(
            f"{function}: torch's kernels would be replaced by none: {reason}. torch keeps its own; to see broadhead's "
            "results without its kernels call broadhead.flash_attn_func(..., backend='torch')"
        )
