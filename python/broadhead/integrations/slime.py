"""slime on broadhead: its core attention by FlashAttention-2's module, or ours in its place, by a model spec.

from broadhead.integrations import slime as broadhead_slime

broadhead_slime.enable()  # slime_plugins.models.flash_dot_product_attention then imports
spec = broadhead_slime.use_core_attention(spec)  # or: sinks inside the kernel, not around it
"""

from __future__ import annotations

from typing import Any

from ..errors import InvalidArgumentError
from .core_attention import BroadheadCoreAttention
from .environment import Obstacle, conflict, kernel_obstacle, package_obstacle
from .megatron import use_core_attention
from .surfaces import install_surface

__all__ = ["BroadheadCoreAttention", "enable", "obstacle", "use_core_attention"]

_FLASH_ATTN_2 = ("flash-attn", "flash_attn")


def obstacle() -> Obstacle | None:
    """Why slime would not run on kernels of broadhead here; None: it would. The text names what lacks."""
    missing = package_obstacle("slime", "slime", "install slime from its repository")
    return missing or kernel_obstacle("slime")


def enable(override: bool = False) -> Any:
    """Give slime the module ``flash_attn.flash_attn_interface``. Call it before slime's models are imported.

    Args:
        override: also where FlashAttention-2 is installed.

    Returns:
        The installation of broadhead.compat, whose uninstall() takes the module away again.

    Raises:
        UnsupportedError: this installation has no broadhead.compat.
        InvalidArgumentError: another package gives the module.
    """
    taken = None if override else conflict("slime", "flash_attn", _FLASH_ATTN_2)
    if taken is not None:
        raise InvalidArgumentError(taken.text)
    return install_surface("slime", "flash_attn", override)
