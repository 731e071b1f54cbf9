"""The mask function: reads the model's mask once a forward pass and describes it in one of the forms of `forms`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from broadhead.errors import UnsupportedError

from . import blocks, forms, patterns

_FUNCTION = "broadhead.integrations.transformers"
_OTHER_BLOCKS = (
    f"{_FUNCTION}: the model joins blocks of tokens that see each other to its causal mask; the tokens of a block must "
    "lie together, in one sequence, with padding at the ends of rows only; for other blocks use "
    "attn_implementation='sdpa'"
)


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

    The windowed or chunked part is not in it: the layer says that by ``sliding_window``. So does its ``is_causal``,
    where no form says that the mask is causal.
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
    traced = torch.compiler.is_compiling()
    # The tracer knows no closures, so that traced code has to find blocks by asking: see _traced_prefix.
    found = None if traced else blocks.read(mask_function, local_size, kwargs.get("config"))
    if use_vmap and found is None:
        raise UnsupportedError(
            f"{_FUNCTION}: the model adds its own function to the attention mask; accepted are causal, sliding-window, "
            "chunked, bidirectional, prefix and padding masks, and blocks of tokens that see each other; in compiled "
            "code blocks in a window are not: make the masks outside of what is compiled, as generate does; use "
            "attn_implementation='sdpa' for other models"
        )
    if cache_position is not None:
        q_length = cache_position.shape[0]
        q_offset = cache_position[0] if traced else int(cache_position[0])
    assert q_length is not None
    bidirectional = "allow_is_bidirectional_skip" in kwargs
    # A model that will join or compile its masks asks for one whose shape depends on no value.
    stable = traced or not kwargs.get("allow_is_bidirectional_skip" if bidirectional else "allow_is_causal_skip", True)
    # Layers that say they are not causal (PaliGemma, GIT) get causal masks, too: then the form of the mask says it.
    says_causal = not bidirectional and (
        found is not None or getattr(kwargs.get("config"), "use_bidirectional_attention", None) is True
    )
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
    if found is not None:
        local_size = found.window
        if q_length > 1 or not (local_size is None or found.bounded or kv_length <= local_size):
            return _with_blocks(found, attention_mask, batch_size, q_length, kv_length, q_offset, kv_offset, device)
        # One query sees all of its block that there is so far.
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

    joined = found is None and q_length > 1 and not bidirectional and patterns.has_blocks(mask_function)
    if joined and not traced:
        raise UnsupportedError(_OTHER_BLOCKS)
    starts = None
    if keys is None and not bidirectional and 1 < q_length == kv_length and kv_offset == 0 and local_size != 1:
        starts = patterns.find_starts(mask_function, batch_size, q_length, device)
        if traced and not joined:
            # Traced functions do not tell their parts: blocks inside a packed mask show by what tokens see ahead.
            ahead = patterns.sees_ahead(mask_function, batch_size, q_length, device).sum(1)
            count = _count(starts, local_size if chunked else None)
            if not says_causal:
                return forms.make_ranges(batch_size, forms.COUNT_COLUMNS, count, ahead)
            torch._assert_async(
                ~(count + ahead).any(), f"{_FUNCTION}: compiled code cannot find packed sequences in position_ids"
            )
            starts = None
        elif not joined and not bool(_count(starts, local_size if chunked else None).any()):
            starts = None
    if joined:
        return _traced_prefix(mask_function, batch_size, q_length, q_offset, local_size, keys, starts, device)
    if starts is not None:
        return forms.make_packed(starts, torch.zeros_like(starts[starts], dtype=torch.int64) if says_causal else None)
    if keys is None:
        if not stable and not says_causal:
            return None
        end = torch.full((batch_size,), kv_length, dtype=torch.int32, device=device)
        keys = forms.Keys(torch.zeros_like(end), end, torch.zeros_like(end, dtype=torch.bool))
        return _lengths(keys, torch.zeros_like(end), stable, stable, says_causal)

    # Without positions every query may stay: no mask tells the padding among the queries of a cross attention.
    positional = not bidirectional or local_size is not None
    dead = (query_end - keys.end).clamp(min=0) if positional else torch.zeros_like(keys.end)
    if traced:
        torch._assert_async(
            ~keys.holes.any(),
            f"{_FUNCTION}: in compiled code padding must lie at the ends of a row, not between tokens",
        )
        return _lengths(keys, dead, True, True, says_causal)
    answers = _ask(keys, kv_length, local_size)
    return _plain_form(real, keys, query_end, dead, answers, local_size, stable, says_causal)


class _Answers(NamedTuple):
    """What one wait for the device brought, of any row."""

    torn: bool  # padding lies between the keys of a row that is longer than its window
    holes: bool  # padding lies between keys
    begin: bool  # padding lies before keys
    hidden: bool  # not every key is seen
    others: tuple[bool, ...]


def _ask(keys: forms.Keys, kv_length: int, local_size: int | None, *others: Tensor) -> _Answers:
    """Wait for the device once, for what is to be known of the keys and of ``others``, each bool ``(B,)``."""
    too_wide = keys.holes & (keys.end - keys.begin > (kv_length if local_size is None else local_size))
    hidden = (keys.begin > 0) | (keys.end < kv_length)
    questions = torch.stack([too_wide, keys.holes, keys.begin > 0, hidden, *others])
    torn, holes, begin, any_hidden, *rest = questions.any(1).tolist()
    return _Answers(torn, holes, begin, any_hidden, tuple(rest))


def _plain_form(
    real: Tensor,
    keys: forms.Keys,
    query_end: int | Tensor,
    dead: Tensor,
    answers: _Answers,
    local_size: int | None,
    stable: bool,
    says_causal: bool,
) -> Tensor | None:
    """The form of rows that hold one sequence each and no blocks."""
    if answers.torn:
        raise UnsupportedError(
            f"{_FUNCTION}: padding lies between the tokens of a row that is longer than the window or chunk of a layer "
            f"({local_size}), and would count as part of it; pad rows at their ends, or use attn_implementation='sdpa'"
        )
    if answers.holes:
        return forms.make_gathered(real, query_end)
    return _lengths(keys, dead, stable or answers.hidden, stable or answers.begin, says_causal)


def _lengths(keys: forms.Keys, dead: Tensor, has_end: bool, has_begin: bool, says_causal: bool) -> Tensor | None:
    """The form of live keys that lie together; None where nothing is to be said of them."""
    if says_causal:
        return forms.make_blocks(keys, dead, None, forms.BlockRows(False, False, has_end, has_begin))
    if has_begin:
        return forms.make_ranges(len(dead), forms.BEGIN_COLUMNS, keys.end, dead, keys.begin)
    return forms.make_ranges(len(dead), forms.END_COLUMNS, keys.end, dead) if has_end else None


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


def _with_blocks(
    found: blocks.Blocks,
    attention_mask: Tensor | None,
    batch: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    device: torch.device | str,
) -> Tensor | None:
    """The form of a causal mask with blocks of tokens that see each other. It waits for the device once.

    Blocks that begin their sequences are prefixes, where no window cuts them and no earlier keys are in a cache. Others
    are ranges of keys.
    """
    first_query = q_offset - kv_offset
    query_end = first_query + q_length
    real = _real_keys(attention_mask, batch, kv_length, kv_offset, query_end, device)
    keys = forms.find_keys(real)
    dead = (query_end - keys.end).clamp(min=0)
    runs = blocks.find_runs(found, real, kv_offset)
    origin = keys.begin[:, None] if runs.sequence_begin is None else runs.sequence_begin
    ranges = blocks.ranges_of(runs, first_query, q_length, origin)
    # Their own keys are seen in any case: what counts is a range with a key ahead, or behind the window.
    some = (ranges[:, :, 1] - ranges[:, :, 0] > 1).any(1)
    no_prefix = (runs.inside & (runs.begin != origin)).any(1) | (torch.zeros_like(keys.end) + q_offset != 0)
    if found.window is not None:
        no_prefix = no_prefix | (keys.end - keys.begin > found.window)
    answers = _ask(keys, kv_length, found.window, some, runs.torn, no_prefix)
    any_block, torn, not_only_prefixes = answers.others
    if found.owner is not None and (answers.holes or answers.hidden):
        raise UnsupportedError(_OTHER_BLOCKS)
    if torn or (any_block and answers.holes):
        raise UnsupportedError(_OTHER_BLOCKS)
    if runs.sequence_begin is not None:
        starts = runs.sequence_begin == torch.arange(kv_length, device=real.device)
        owner = starts.flatten().cumsum(0) - 1
        prefix = torch.zeros_like(owner).index_add(0, owner, runs.inside.flatten().long() * any_block)
        packed = forms.make_packed(starts, prefix[: int(owner[-1]) + 1])
        return forms.make_packed_blocks(packed, ranges, found.bounded) if any_block and not_only_prefixes else packed
    if not any_block:
        return _plain_form(real, keys, query_end, dead, answers, found.window, stable=q_length == 1, says_causal=True)
    if not not_only_prefixes:
        return forms.make_ranges(batch, forms.PREFIX_COLUMNS, keys.end, dead, keys.begin, runs.inside.sum(1))
    has_begin = answers.begin or q_length == 1
    rows = forms.BlockRows(False, found.bounded, has_begin or answers.hidden, has_begin)
    return forms.make_blocks(keys, dead, ranges, rows)


def _traced_prefix(
    mask_function: Callable[..., Any] | None,
    batch: int,
    q_length: int,
    q_offset: int | Tensor,
    local_size: int | None,
    keys: forms.Keys | None,
    starts: Tensor | None,
    device: torch.device | str,
) -> Tensor:
    """The form of a causal mask with blocks, in traced code: each row may begin with one. It is asserted on the device.

    What the function is made of is not known there; what tokens see tells of such a block.
    """
    if keys is None:
        end = torch.full((batch,), q_length, dtype=torch.int64, device=device)
        keys = forms.Keys(torch.zeros_like(end), end, torch.zeros_like(end, dtype=torch.bool))
    if starts is None:
        place = torch.arange(q_length, device=device)
        starts = place == keys.begin[:, None]
    in_prefix, told = patterns.find_prefix(mask_function, starts, keys.begin, keys.end)
    wrong = ~told | keys.holes | (starts.sum(1) > 1)
    if local_size is not None:
        wrong = wrong | (keys.end - keys.begin > local_size)
    wrong = wrong | (torch.zeros_like(keys.end) + q_offset != 0)
    torch._assert_async(
        ~wrong.any(),
        f"{_FUNCTION}: compiled code takes one block of tokens that see each other, which begins each row (a prefix, "
        "no longer than the layer's window, with padding at the ends of rows only); for other blocks make the masks "
        "outside of what is compiled, as generate does, or use attn_implementation='sdpa'",
    )
    dead = (q_length - keys.end).clamp(min=0)
    return forms.make_ranges(batch, forms.PREFIX_COLUMNS, keys.end, dead, keys.begin, in_prefix.sum(1))
