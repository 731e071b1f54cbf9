"""Puts the modules of FlashAttention in place for a client that imports them, through broadhead.compat."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import UnsupportedError


def install_surface(client: str, surface: str, override: bool = False) -> Any:
    """``broadhead.compat.install(surface)``: the client's imports of that module then find broadhead.

    Args:
        client: the name of the integration, for the text.
        surface: "flash_attn_interface" (FlashAttention-3), "flash_attn" (2) or "flash_attn.cute" (4).
        override: also where FlashAttention itself is installed, which else stays.

    Returns:
        What compat.install returns; its use as a context manager takes the modules away again.

    Raises:
        UnsupportedError: this installation has no broadhead.compat.
    """
    try:
        compat = importlib.import_module("broadhead.compat")
    except ModuleNotFoundError as error:
        if error.name != "broadhead.compat":
            raise
        raise UnsupportedError(
            f"{client}: this installation of broadhead has no broadhead.compat, which gives the module {surface}:"
            " install a newer broadhead"
        ) from error
    return compat.install(surface, override=override)
