"""lmdeploy on broadhead: its FlashAttention-3 classes run prefill and speculative decoding on our kernels.

import broadhead.integrations.lmdeploy as broadhead_lmdeploy

broadhead_lmdeploy.enable()  # before the first import of lmdeploy.pytorch
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

from ..api.explain import is_supported
from ..errors import InvalidArgumentError
from .environment import Obstacle, conflict, kernel_obstacle, package_obstacle
from .surfaces import install_surface

__all__ = ["enable", "obstacle", "supports"]

_ATTENTION = "lmdeploy.pytorch.backends.cuda.attention"
_FLASH_ATTN_3 = ("flash_attn_3", "flash-attn-3")
#: The head dim that lmdeploy gives to FlashAttention-3 at most.
_LMDEPLOY_HEAD_DIM = 256


def obstacle() -> Obstacle | None:
    """Why lmdeploy would not run on kernels of broadhead here; None: it would. The text names what lacks."""
    missing = package_obstacle("lmdeploy", "lmdeploy.pytorch", "pip install lmdeploy")
    return missing or kernel_obstacle("lmdeploy")


@functools.lru_cache
def supports(head_size: int) -> bool:
    """Whether kernels of this installation run lmdeploy's prefill of a head dim on the current device."""
    runs, _ = is_supported(
        head_dim=head_size, dtype=torch.bfloat16, seqlen_q=4096, seqlen_k=4096, causal=True, varlen=True
    )
    return bool(runs)


def enable(override: bool = False) -> Obstacle | None:
    """Give lmdeploy the module ``flash_attn_interface``, and have it use that for head dims up to 512.

    Without a GPU lmdeploy's own check leaves FlashAttention-3 out, and only the module is put in place.

    Args:
        override: also where FlashAttention-3 is installed.

    Returns:
        What keeps kernels from running, or None.

    Raises:
        UnsupportedError: this installation has no broadhead.compat.
        InvalidArgumentError: another package gives the module.
    """
    taken = None if override else conflict("lmdeploy", "flash_attn_interface", _FLASH_ATTN_3)
    if taken is not None:
        raise InvalidArgumentError(taken.text)
    install_surface("lmdeploy", "flash_attn_interface", override)
    found = obstacle()
    if found is None:
        widen(importlib.import_module(_ATTENTION))
    return found


def widen(attention: ModuleType) -> None:
    """Let lmdeploy's choice of FlashAttention-3 take head dims above 256, which it bars.

    Args:
        attention: the module ``lmdeploy.pytorch.backends.cuda.attention``.
    """
    ask: Any = attention._enable_fa3
    if getattr(ask, "broadhead", False):
        return

    def _enable_fa3(alibi: bool, learnable_sink: bool, block_sparse_size: int, head_size: int) -> bool:
        if head_size > _LMDEPLOY_HEAD_DIM and supports(head_size):
            # All but the head dim is asked of lmdeploy itself.
            head_size = _LMDEPLOY_HEAD_DIM
        return bool(ask(alibi, learnable_sink, block_sparse_size, head_size))

    _enable_fa3.broadhead = True  # type: ignore[attr-defined]
    attention._enable_fa3 = _enable_fa3  # type: ignore[attr-defined]
