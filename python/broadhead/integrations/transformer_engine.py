"""Transformer Engine on broadhead: its FlashAttention-3 and -4 paths, context parallelism and head_dim 512 among them.

    import broadhead.integrations.transformer_engine as broadhead_te

    broadhead_te.enable()  # before or after the import of transformer_engine.pytorch

Transformer Engine takes its FlashAttention-3 path on compute capability 9.0, up to head_dim 256, and its
FlashAttention-4 path, which asks ``_validate_head_dims``, from 9.0 on up to head_dim 512.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ..api import head_dims
from .environment import Obstacle, kernel_obstacle, package_obstacle
from .surfaces import install_surface

__all__ = ["_validate_head_dims", "enable", "obstacle"]

_DOT_PRODUCT = "transformer_engine.pytorch.attention.dot_product_attention"
#: The releases whose surfaces Transformer Engine is told that it has.
_VERSIONS = {"3": "3.0.0", "4": "4.0.0"}
#: From Transformer Engine's name to that of the surface's module.
_V3 = {
    "flash_attn_func_v3": "flash_attn_func",
    "flash_attn_varlen_func_v3": "flash_attn_varlen_func",
    "flash_attn_with_kvcache_v3": "flash_attn_with_kvcache",
    "_flash_attn_fwd_v3": "_flash_attn_forward",
    "_flash_attn_bwd_v3": "_flash_attn_backward",
}
_V4 = {"flash_attn_func_v4": "flash_attn_func", "flash_attn_varlen_func_v4": "flash_attn_varlen_func"}


def obstacle() -> Obstacle | None:
    """Why Transformer Engine would not run on kernels of broadhead here; None: it would. The text names what lacks."""
    missing = package_obstacle(
        "transformer_engine",
        "transformer_engine.pytorch",
        "pip install --no-build-isolation transformer_engine[pytorch]",
    )
    return missing or kernel_obstacle("transformer_engine")


def _validate_head_dims(
    head_dim: int,
    head_dim_v: int,
    compute_capability: int | tuple[int, int],
    alignment: int = 8,
    is_training: bool = True,
    dtype: torch.dtype | None = None,
) -> None:
    """Assert that kernels of this installation run attention of these head dims, as Transformer Engine asks it.

    It asks without saying whether it trains, so backward needs a kernel, too, unless is_training is False.

    Args:
        head_dim: columns of q and k.
        head_dim_v: columns of v.
        compute_capability: a major version, or (major, minor).
        alignment: both head dims must be multiples of it.
        is_training: whether gradients must have kernels as well.
        dtype: of q, k and v; None: bf16 and fp16, both.

    Raises:
        AssertionError: with the reason; Transformer Engine then takes another backend.
    """
    for direction in ("forward", "backward") if is_training else ("forward",):
        head_dims._validate_head_dims(
            head_dim, head_dim_v, compute_capability, alignment, direction=direction, dtype=dtype
        )


def enable(override: bool = False) -> Obstacle | None:
    """Let Transformer Engine find broadhead as FlashAttention-3 and -4.

    Args:
        override: also where FlashAttention itself is installed; else a version that Transformer Engine found stays.

    Returns:
        What keeps kernels from running, or None. Without Transformer Engine nothing is changed.

    Raises:
        UnsupportedError: this installation has no broadhead.compat.
    """
    missing = package_obstacle("transformer_engine", _DOT_PRODUCT, "pip install transformer_engine[pytorch]")
    if missing is not None:
        return missing
    backends = importlib.import_module(f"{_DOT_PRODUCT}.backends")
    utils: Any = importlib.import_module(f"{_DOT_PRODUCT}.utils").FlashAttentionUtils
    if override or not utils.v3_is_installed:
        install_surface("transformer_engine", "flash_attn_interface", override)
        _fill(backends, _V3, "flash_attn_interface")
        utils.fa3_version = type(utils.version)(_VERSIONS["3"])
        utils.set_flash_attention_3_params()
    if override or not utils.v4_is_installed:
        install_surface("transformer_engine", "flash_attn.cute", override)
        _fill(backends, _V4, "flash_attn.cute.interface")
        utils.fa4_version = type(utils.version)(_VERSIONS["4"])
        utils.v4_validate_head_dims = _validate_head_dims
        utils.set_flash_attention_4_params()
    return kernel_obstacle("transformer_engine")


def _fill(backends: Any, names: dict[str, str], module: str) -> None:
    surface = importlib.import_module(module)
    for theirs, ours in names.items():
        setattr(backends, theirs, getattr(surface, ours))
