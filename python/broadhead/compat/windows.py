"""FlashAttention-4's windows: None is unbounded, and a negative number is an offset."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedError


class Window(NamedTuple):
    """A window as the native functions take it, over keys of which the last ``cut`` are left out."""

    causal: bool
    sides: tuple[int, int]
    cut: int


def resolve(function: str, causal: bool, left: int | None, right: int | None) -> Window:
    """The window of FlashAttention-4's arguments.

    A right side of -3 ends three keys before the query's position. Without the last three keys of the sequence, that
    position is the causal one, so such a window is a causal one of fewer keys. As in FlashAttention-4, sides whose sum
    is negative are no window, and a window takes the place of ``causal`` once that has made its right side 0.

    Raises:
        UnsupportedError: a left side that begins behind the query's position.
    """
    if causal:
        right = 0
    if left is not None and right is not None and left + right < 0:
        left = right = None
    if left is None and right is None:
        return Window(causal, (-1, -1), 0)
    if left is not None and left < 0:
        raise UnsupportedError(
            f"{function}: window_size must have None or a number of at least 0 as its left side, got {left}: keys that"
            " begin behind the query's position are not available; use broadhead's query_ranges"
        )
    if right is None or right >= 0:
        return Window(False, (-1 if left is None else left, -1 if right is None else right), 0)
    return Window(False, (-1 if left is None else left + right, 0), -right)


def shortened(k: Tensor, cu_seqlens_k: Any, seqused_k: Any, page_table: Any, cut: int) -> Tensor:
    """int32 ``(B,)``: the keys of each sequence without the last ``cut``."""
    if seqused_k is not None:
        lengths = seqused_k
    elif cu_seqlens_k is not None:
        lengths = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
    elif page_table is not None:
        full = page_table.shape[1] * k.shape[1]
        lengths = torch.full((page_table.shape[0],), full, dtype=torch.int32, device=k.device)
    else:
        lengths = torch.full((k.shape[0],), k.shape[1], dtype=torch.int32, device=k.device)
    return (lengths - cut).clamp(min=0)
