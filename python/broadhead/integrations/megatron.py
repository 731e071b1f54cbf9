"""Megatron-LM on broadhead: core attention for training by a module spec, FlashAttention-3's module for its inference.

from broadhead.integrations import megatron as broadhead_megatron

spec = broadhead_megatron.use_core_attention(get_gpt_layer_local_spec())  # training
broadhead_megatron.enable()  # inference, before megatron.core is imported
"""

from __future__ import annotations

import sys
from typing import Any

from ..errors import InvalidArgumentError
from .core_attention import BroadheadCoreAttention
from .environment import Obstacle, conflict, kernel_obstacle, package_obstacle
from .surfaces import install_surface

__all__ = ["BroadheadCoreAttention", "enable", "obstacle", "use_core_attention"]

#: Distributions that give the modules which Megatron's inference imports.
_FLASH_ATTN_3 = ("flash_attn_3", "flashattn-hopper")
_ATTENTION = "megatron.core.transformer.attention"


def obstacle() -> Obstacle | None:
    """Why Megatron would not run on kernels of broadhead here; None: it would. The text names what lacks."""
    missing = package_obstacle("megatron", "megatron.core", "pip install megatron-core")
    return missing or kernel_obstacle("megatron")


def use_core_attention(spec: Any) -> Any:
    """Set BroadheadCoreAttention as the core attention of every layer that a spec describes.

    Args:
        spec: a ModuleSpec of a layer or of a block of layers, or its submodules; it is changed.

    Returns:
        spec.

    Raises:
        InvalidArgumentError: nothing in the spec has a core attention.
    """
    if _replace(spec, set()) == 0:
        raise InvalidArgumentError(
            f"use_core_attention: spec must be a ModuleSpec with a core_attention below it, got {type(spec).__name__}"
            " without: pass the layer spec that goes to GPTModel"
        )
    return spec


def _replace(node: Any, seen: set[int]) -> int:
    """Set core_attention wherever it stands below ``node``, and count the places."""
    if id(node) in seen or node is None or isinstance(node, (str, int, float, type)):
        return 0
    seen.add(id(node))
    if isinstance(node, (list, tuple)):
        return sum(_replace(each, seen) for each in node)
    fields = vars(node) if hasattr(node, "__dict__") else {}
    count = 0
    for name, value in list(fields.items()):
        if name == "core_attention" and value is not None:
            # A spec of a class keeps its form; newer versions hold the class itself.
            setattr(node, name, _as_held(value))
            count += 1
        elif name in ("submodules", "layer_specs", "self_attention", "cross_attention") or hasattr(value, "submodules"):
            count += _replace(value, seen)
    return count


def _as_held(before: Any) -> Any:
    if hasattr(before, "module") and hasattr(before, "submodules"):
        return type(before)(module=BroadheadCoreAttention)
    return BroadheadCoreAttention


def enable(override: bool = False) -> Any:
    """Give Megatron's inference the module ``flash_attn_3.flash_attn_interface``. Call it before it imports it.

    Args:
        override: also where FlashAttention-3 is installed.

    Returns:
        The installation of broadhead.compat, whose uninstall() takes the module away again.

    Raises:
        UnsupportedError: this installation has no broadhead.compat.
        InvalidArgumentError: Megatron's attention was imported before, and found no FlashAttention-3; or another
            package gives the module.
    """
    taken = None if override else conflict("megatron", "flash_attn_3", _FLASH_ATTN_3)
    if taken is not None:
        raise InvalidArgumentError(taken.text)
    imported = sys.modules.get(_ATTENTION)
    if imported is not None and not getattr(imported, "HAVE_FA3", False):
        raise InvalidArgumentError(
            f"megatron: {_ATTENTION} is already imported, and looked for FlashAttention-3 then: call"
            " broadhead.integrations.megatron.enable() before the first import of megatron.core"
        )
    return install_surface("megatron", "flash_attn_interface", override)
