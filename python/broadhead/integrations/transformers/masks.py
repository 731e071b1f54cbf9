"""The mask function: reads the model's mask once a forward pass and describes it in one of the forms of `forms`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from broadhead.errors import UnsupportedError

from . import forms, patterns

_FUNCTION = "broadhead.integrations.transformers"


def attention_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    cache_position: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Describe a layer's mask to `attention_forward`: which keys are real, and where sequences and prefixes end.

    The causal, windowed or chunked part is not in it: the layer says that by ``is_causal`` and ``sliding_window``.
    Outside traced code it may wait for the device, once. Traced code waits for nothing; what it would have had to read
    (padding between live keys, packed sequences) is asserted on the device.

    Args:
        batch_size: sequences.
        q_length: queries of a sequence.
        kv_length: keys of a sequence.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: the index-based mask of the model.
        attention_mask: bool ``(batch_size, seen tokens)``, False where a token is padding.
        use_vmap: transformers sets it when the model gave its own mask function.
        local_size: the window or the chunk of a local layer.
        cache_position: int ``(q_length,)``, in place of q_length and q_offset (transformers before 5.0).

    Returns:
        None when every key is real and no other form is needed, or an int32 tensor as `forms` describes.

    Raises:
        UnsupportedError: the model adds its own pattern to the mask.
    """
    if use_vmap:
        raise UnsupportedError(
            f"{_FUNCTION}: the model adds its own function to the attention mask; accepted are causal, sliding-window, "
            "chunked, bidirectional, prefix and padding masks; use attn_implementation='sdpa' for this model"
        )
    traced = torch.compiler.is_compiling()
    if cache_position is not None:
        q_length = cache_position.shape[0]
        q_offset = cache_position[0] if traced else int(cache_position[0])
    assert q_length is not None
    bidirectional = "allow_is_bidirectional_skip" in kwargs
    # A model that will join or compile its masks asks for one whose shape depends on no value.
    stable = traced or not kwargs.get("allow_is_bidirectional_skip" if bidirectional else "allow_is_causal_skip", True)
    chunked = not bidirectional and patterns.is_chunked(kwargs.get("config"), local_size)
    if chunked and local_size is not None and kv_offset and kv_offset + kv_length > local_size:
        raise UnsupportedError(
            f"{_FUNCTION}: chunked attention past one chunk ({local_size}) needs a cache that keeps all keys, because "
            "chunks begin at absolute positions; give the model a DynamicCache() made without its config, which keeps "
            "all keys, or use attn_implementation='sdpa'"
        )

    first_query = q_offset - kv_offset
    query_end = first_query + q_length
    device = kwargs.get("device", "cpu" if attention_mask is None else attention_mask.device)
    alone = isinstance(q_offset, int) and attention_mask is None
    if alone and (bidirectional or query_end >= kv_length):
        keys = None
    else:
        real = _real_keys(
            attention_mask, batch_size, kv_length, kv_offset, None if bidirectional else query_end, device
        )
        if q_length == 1 and local_size is not None and not bidirectional and not chunked:
            # One query: what its window shows is a set of keys as good as any, wherever padding lies in it.
            real = real & (torch.arange(kv_length, device=device) > first_query - local_size)
        keys = forms.find_keys(real)

    blocks = q_length > 1 and not bidirectional and patterns.has_blocks(mask_function)
    starts = None
    if keys is None and not bidirectional and 1 < q_length == kv_length and kv_offset == 0 and local_size != 1:
        starts = patterns.find_starts(mask_function, batch_size, q_length, device)
        if traced and not blocks:
            # Traced functions do not tell their parts: blocks inside a packed mask show by what tokens see ahead.
            ahead = patterns.sees_ahead(mask_function, batch_size, q_length, device).sum(1)
            count = _count(starts, local_size if chunked else None)
            return forms.make_ranges(batch_size, forms.COUNT_COLUMNS, count, ahead)
        if not bool(_count(starts, local_size if chunked else None).any()):
            starts = None
    if blocks:
        return _with_prefix(mask_function, batch_size, q_length, kv_length, q_offset, local_size, keys, starts, device)
    if starts is not None:
        return forms.make_packed(starts, None)
    if keys is None:
        if not stable:
            return None
        end = torch.full((batch_size,), kv_length, dtype=torch.int32, device=device)
        return forms.make_ranges(batch_size, forms.BEGIN_COLUMNS, end)

    # Without positions every query may stay: no mask tells the padding among the queries of a cross attention.
    positional = not bidirectional or local_size is not None
    dead = (query_end - keys.end).clamp(min=0) if positional else torch.zeros_like(keys.end)
    if traced:
        torch._assert_async(
            ~keys.holes.any(),
            f"{_FUNCTION}: in compiled code padding must lie at the ends of a row, not between tokens",
        )
        return forms.make_ranges(batch_size, forms.BEGIN_COLUMNS, keys.end, dead, keys.begin)
    too_wide = keys.holes & (keys.end - keys.begin > (kv_length if local_size is None else local_size))
    hidden = (keys.begin > 0) | (keys.end < kv_length)
    torn, any_holes, any_begin, any_hidden = torch.stack(
        [too_wide.any(), keys.holes.any(), (keys.begin > 0).any(), hidden.any()]
    ).tolist()
    if torn:
        raise UnsupportedError(
            f"{_FUNCTION}: padding lies between the tokens of a row that is longer than the window or chunk of a layer "
            f"({local_size}), and would count as part of it; pad rows at their ends, or use attn_implementation='sdpa'"
        )
    if any_holes:
        return forms.make_gathered(real, query_end)
    if stable or any_begin:
        return forms.make_ranges(batch_size, forms.BEGIN_COLUMNS, keys.end, dead, keys.begin)
    return forms.make_ranges(batch_size, forms.END_COLUMNS, keys.end, dead) if any_hidden else None


def _real_keys(
    attention_mask: Tensor | None,
    batch: int,
    kv_length: int,
    kv_offset: int,
    query_end: int | Tensor | None,
    device: torch.device | str,
) -> Tensor:
    """bool ``(B, kv_length)``: keys that are tokens, and not unused slots of a static cache behind the last query."""
    if attention_mask is None:
        real = torch.ones((batch, kv_length), dtype=torch.bool, device=device)
    else:
        real = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
        real = torch.nn.functional.pad(real, (0, kv_length - real.shape[1]))
    if query_end is not None:
        real = real & (torch.arange(kv_length, device=device) < query_end)
    return real


def _count(starts: Tensor, chunk: int | None) -> Tensor:
    """How many sequences start inside each row, ``(B,)``; starts at the borders of chunks change no chunked mask."""
    inside = starts[:, 1:]
    if chunk is not None:
        inside = inside & (torch.arange(1, starts.shape[1], device=starts.device) % chunk != 0)
    return inside.sum(1)


def _with_prefix(
    mask_function: Callable[..., Any] | None,
    batch: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    local_size: int | None,
    keys: forms.Keys | None,
    starts: Tensor | None,
    device: torch.device | str,
) -> Tensor | None:
    """The form of a causal mask with blocks of tokens that see each other: each sequence may begin with one block."""
    traced = torch.compiler.is_compiling()
    if keys is None:
        end = torch.full((batch,), q_length, dtype=torch.int64, device=device)
        keys = forms.Keys(torch.zeros_like(end), end, torch.zeros_like(end, dtype=torch.bool))
    if starts is None:
        place = torch.arange(q_length, device=device)
        starts = place == keys.begin[:, None]
    in_prefix, told = patterns.find_prefix(mask_function, starts, keys.begin, keys.end)
    wrong = ~told | keys.holes
    if local_size is not None:
        wrong = wrong | (keys.end - keys.begin > local_size)
    wrong = wrong | (torch.zeros_like(keys.end) + q_offset != 0)
    text = (
        f"{_FUNCTION}: the model joins blocks of tokens that see each other to its causal mask; one block that begins "
        "each sequence runs (a prefix, no longer than the layer's window, with padding at the ends of rows only); for "
        "other blocks, such as those of images between text, use attn_implementation='sdpa'"
    )
    packed = starts.sum(1) > 1
    if getattr(mask_function, "__name__", "") == "or_mask" or traced:
        wrong = wrong | packed  # blocks joined after the sequences were separated reach from one into another
    if traced:
        torch._assert_async(~wrong.any(), text)
    elif bool(wrong.any()):
        raise UnsupportedError(text)
    if not traced and bool(packed.any()):
        lengths = torch.zeros_like(starts, dtype=torch.int64).flatten()
        owner = starts.flatten().cumsum(0) - 1
        lengths = lengths.index_add(0, owner, in_prefix.flatten().long())
        return forms.make_packed(starts, lengths[: int(owner[-1]) + 1])
    dead = (q_length - keys.end).clamp(min=0)
    return forms.make_ranges(batch, forms.PREFIX_COLUMNS, keys.end, dead, keys.begin, in_prefix.sum(1))
