"""What the index-based mask functions of transformers say: packed sequences, prefixes, chunks; found by asking them.

A mask function takes indices of batch, head, query and key, which broadcast, and returns bool: may the query see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def is_chunked(config: Any, local_size: int | None) -> bool:
    """Whether a local layer of ``local_size`` is chunked rather than windowed."""
    if local_size is None:
        return False
    chunk, window = getattr(config, "attention_chunk_size", None), getattr(config, "sliding_window", None)
    return chunk == local_size and window != local_size


def has_blocks(mask_function: Callable[..., Any] | None) -> bool:
    """Whether the function is a union: transformers joins blocks of tokens that see each other so, and nothing else."""
    if torch.compiler.is_compiling():
        # The tracer knows no closures: a union inside another function is found by sees_ahead.
        return getattr(mask_function, "__name__", "") == "or_mask"
    return any(getattr(part, "__name__", "") == "or_mask" for part in _parts(mask_function))


def _parts(function: Any) -> Iterator[Any]:
    """``function`` and the functions that its closures hold."""
    if not callable(function):
        return
    yield function
    for cell in getattr(function, "__closure__", None) or ():
        held = cell.cell_contents
        for inner in held if isinstance(held, tuple) else (held,):
            yield from _parts(inner)


def _sees(mask_function: Callable[..., Any], batch: int, query: Tensor, key: Tensor) -> Tensor:
    """bool ``(B, n)``: whether query i of the ``(B | 1, n)`` given sees key i."""
    rows = torch.arange(batch, device=query.device)[:, None]
    head = torch.zeros((1, 1), dtype=torch.int64, device=query.device)
    return mask_function(rows, head, query, key).expand(batch, query.shape[1])


def find_starts(
    mask_function: Callable[..., Any] | None, batch: int, length: int, device: torch.device | str
) -> Tensor:
    """bool ``(B, length)``: tokens that do not see the one before them, where a packed sequence (or chunk) starts."""
    place = torch.arange(1, length, device=device)[None]
    if mask_function is None:
        starts = torch.zeros((batch, length - 1), dtype=torch.bool, device=device)
    else:
        starts = ~_sees(mask_function, batch, place, place - 1)
    return torch.nn.functional.pad(starts, (1, 0), value=True)


def sees_ahead(mask_function: Callable[..., Any] | None, batch: int, length: int, device: torch.device | str) -> Tensor:
    """bool ``(B, length - 1)``: tokens that see the one after them, as those of a block do."""
    place = torch.arange(length - 1, device=device)[None]
    if mask_function is None:
        return torch.zeros((batch, length - 1), dtype=torch.bool, device=device)
    return _sees(mask_function, batch, place, place + 1)


def find_prefix(
    mask_function: Callable[..., Any] | None, starts: Tensor, begin: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """Which tokens belong to the block that begins their sequence.

    Args:
        mask_function: a union of a causal mask and blocks of tokens.
        starts: bool ``(B, S)``, True where a sequence starts.
        begin: ``(B,)``, the first token of a row that is no padding.
        end: ``(B,)``, behind the last such token.

    Returns:
        ``(in_prefix, told)``: bool ``(B, S)``, and bool ``(B,)``: whether this describes all that tokens see ahead.
    """
    assert mask_function is not None
    batch, length = starts.shape
    place = torch.arange(length, device=starts.device)
    live = (place >= begin[:, None]) & (place < end[:, None])
    first = torch.where(starts, place, torch.zeros_like(place)).cummax(1).values
    everywhere = place.expand(batch, length)
    in_prefix = _sees(mask_function, batch, first, everywhere) & live & (everywhere >= first)
    ahead = _sees(mask_function, batch, everywhere[:, :-1], everywhere[:, 1:])
    # Equal groups see each other. So the prefix is one run from the start, and no other group has two neighbours,
    # exactly if each token sees the next one where that one belongs to the prefix of the same sequence.
    expected = in_prefix[:, 1:] & ~starts[:, 1:]
    wrong = (ahead != expected) & live[:, :-1] & live[:, 1:]
    return in_prefix, ~wrong.any(1)
