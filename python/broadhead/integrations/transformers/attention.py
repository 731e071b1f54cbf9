"""The attention function of transformers' interface: one layer's call in broadhead's terms.

It reads nothing back from the device; `positions` is the exception, once a forward pass.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

import broadhead
from broadhead.errors import UnsupportedError

from . import forms
from .positions import packed_by_positions

_FUNCTION = "broadhead.integrations.transformers"
#: Keyword arguments of a layer that change its attention and that no broadhead call expresses.
_UNSUPPORTED_KWARGS = {
    "position_bias": "an additive position bias",
    "cache": "the continuous-batching cache of an older transformers",
    "alibi": "ALiBi slopes",
    "head_mask": "a head mask",
}
_UNSET: Any = object()


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = _UNSET,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    deterministic: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface.

    Args:
        module: the layer; its ``is_causal`` and config are read.
        query: ``(B, Hq, Sq, D)``; key, value: ``(B, Hkv, Sk, D)`` and ``(B, Hkv, Sk, Dv)``.
        attention_mask: what the mask function `attention_mask` returned.
        scaling: softmax scale, default ``D ** -0.5``.
        sliding_window: keys a query sees, itself included.
        softcap: tanh cap of the scores.
        s_aux: ``(Hq,)`` attention sinks.
        deterministic: gradients that are the same in every run, bit for bit; None: as the environment variable
            FLASH_ATTENTION_DETERMINISTIC says, which transformers' ``enable_full_determinism`` sets.
        kwargs: ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q``, ``max_length_k`` separate packed sequences;
            with ``block_table``, ``k_cache`` and ``v_cache`` too, the new keys are written to pages of the cache first.
            ``position_ids`` that start again separate sequences where nothing else does.

    Returns:
        ``(out, None)`` with out ``(B, Sq, Hq, Dv)``; rows of padding are 0.

    Raises:
        UnsupportedError: something that would change the result and that broadhead cannot do.
    """
    _refuse(dropout, kwargs)
    query, key, value = _common_dtype(query, key, value)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    window, chunk = _local_mask(module, sliding_window)
    attention_mask, kind = _read_mask(attention_mask, q, k, window or chunk)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    has_blocks, causal_mask = False, False
    if attention_mask is not None:
        has_blocks, causal_mask = forms.tells(attention_mask, kind)
    causal = causal or causal_mask
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "causal": causal,
        "window_size": _window_size(module, window, causal, q.shape[1], k.shape[1]),
        "attention_chunk": chunk,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
        "deterministic": _asks_deterministic(deterministic),
    }
    if kwargs.get("block_table") is not None:
        return _run_paged(q, k, v, kwargs, options), None
    if attention_mask is not None and kind == "unless packed":
        _assert_plain(attention_mask, given=kwargs.get("cu_seq_lens_q") is not None)
        attention_mask = None
    elif attention_mask is None and kwargs.get("cu_seq_lens_q") is None:
        attention_mask = packed_by_positions(module, kwargs.get("position_ids"), q, k)
        kind = None if attention_mask is None else "packed"
    # Offsets that are given say less than a mask with blocks does, which is made of the positions of the same rows.
    if kwargs.get("cu_seq_lens_q") is not None and not (has_blocks and kind in ("packed", "packed blocks")):
        if has_blocks:
            raise UnsupportedError(
                f"{_FUNCTION}: cu_seq_lens_q and a prefix or images (token_type_ids) need position_ids that start "
                "again with each sequence, so that the tokens of each are known; pass them, or leave cu_seq_lens_q away"
            )
        return _run_given(q, k, v, kwargs, options), None
    if attention_mask is not None and kind == "ranges":
        columns = attention_mask.shape[3]
        has_begin, has_prefix = columns >= forms.BEGIN_COLUMNS, columns >= forms.PREFIX_COLUMNS
        return _run_ranges(q, k, v, attention_mask, has_begin, has_prefix, options), None
    if attention_mask is not None and kind == "blocks":
        return _run_blocks(q, k, v, attention_mask, options), None
    if attention_mask is not None and kind == "gathered":
        return _run_gathered(q, k, v, attention_mask, options), None
    if attention_mask is not None:
        return _run_packed(q, k, v, attention_mask, kind, options), None
    return broadhead.flash_attn_func(q, k, v, num_splits=0, **options), None


def _asks_deterministic(deterministic: bool | None) -> bool:
    """By the rule of transformers' own flash attention: what the layer says, else the variable where it is 1."""
    return os.environ.get("FLASH_ATTENTION_DETERMINISTIC", "0") == "1" if deterministic is None else deterministic


def _refuse(dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise for every request that broadhead cannot honour exactly."""
    if dropout:
        raise UnsupportedError(f"{_FUNCTION}: dropout must be 0, got {dropout}; set config.attention_dropout = 0")
    if kwargs.get("output_attentions"):
        raise UnsupportedError(
            f"{_FUNCTION}: output_attentions=True needs the score matrix, which is never formed; "
            "use attn_implementation='eager'"
        )
    for name, meaning in _UNSUPPORTED_KWARGS.items():
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"{_FUNCTION}: {name} ({meaning}) is not supported; use attn_implementation='sdpa'")


def _common_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give all three the autocast dtype, or the lowest of theirs: norms kept in fp32 upcast q and k only."""
    if query.dtype == key.dtype == value.dtype and query.dtype != torch.float32:
        return query, key, value
    kind = query.device.type
    dtype = query.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    elif not query.dtype == key.dtype == value.dtype:
        dtype = min((query.dtype, key.dtype, value.dtype), key=lambda d: torch.finfo(d).bits)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _local_mask(module: torch.nn.Module, sliding_window: Any) -> tuple[int | None, int]:
    """``(window, chunk)`` of a layer. Layers that do not pass their window have it in the config, by layer type."""
    config: Any = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    kind = layer_types[index] if layer_types and index is not None and index < len(layer_types) else None
    if sliding_window is _UNSET:
        sliding_window = getattr(module, "sliding_window", None)
        if sliding_window is None and kind == "sliding_attention":
            sliding_window = config.sliding_window
    chunk = 0
    if kind == "chunked_attention":
        chunk = int(getattr(config, "attention_chunk_size", 0) or 0)
    return (int(sliding_window) if sliding_window else None), chunk


def _window_size(
    module: torch.nn.Module, window: int | None, causal: bool, seqlen_q: int, seqlen_k: int
) -> tuple[int, int]:
    """broadhead's ``window_size`` for a layer's window."""
    if window is None:
        return (-1, -1)
    if causal:
        return (window - 1, 0)  # transformers counts the query's own key in the window
    if seqlen_q != seqlen_k:
        raise UnsupportedError(
            f"{_FUNCTION}: a bidirectional window needs as many queries as keys, got {seqlen_q} and {seqlen_k}; "
            "use attn_implementation='sdpa'"
        )
    # Bidirectional masks keep |i - j| <= config.sliding_window; what layers pass is that or that plus one.
    distance = getattr(getattr(module, "config", None), "sliding_window", None)
    distance = window - 1 if distance is None else int(distance)
    return (distance, distance)


def _read_mask(mask: Any, q: Tensor, k: Tensor, local_size: int | None) -> tuple[Tensor | None, str | None]:
    """The mask and which form of `forms` it is. A plain padding mask, bool ``(B, tokens)``, is brought into one."""
    if mask is None:
        return None, None
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.dtype == torch.bool and mask.shape[1] <= k.shape[1]:
        real = torch.nn.functional.pad(mask, (0, k.shape[1] - mask.shape[1]))
        if local_size:
            keys = forms.find_keys(real)
            torn = keys.holes & (keys.end - keys.begin > local_size)
            torch._assert_async(~torn.any(), f"{_FUNCTION}: padding between tokens would count as part of a window")
        return forms.make_gathered(real, mask.shape[1]), "gathered"
    kind = forms.kind_of(mask, q.shape[0], k.shape[1])
    if kind is None:
        got = f"shape {tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(
            f"{_FUNCTION}: attention_mask must be a 2-D padding mask, or what the mask function made of one, got {got};"
            " pass the 2-D mask and let the model build its own, or use attn_implementation='sdpa'"
        )
    return mask, kind


def _assert_plain(mask: Tensor, given: bool) -> None:
    """Assert on the device what traced code took for granted of the unless-packed form; given: offsets came as well."""
    torch._assert_async(
        ~mask[..., 1].any(),
        f"{_FUNCTION}: compiled code cannot find a prefix (token_type_ids) by itself; pass attention_mask too, or make "
        "the masks outside of what is compiled, as generate does",
    )
    if not given:
        torch._assert_async(
            ~mask[..., 0].any(),
            f"{_FUNCTION}: compiled code cannot find packed sequences in position_ids; pass cu_seq_lens_q, "
            "cu_seq_lens_k, max_length_q and max_length_k, as DataCollatorWithFlattening(return_flash_attn_kwargs=True)"
            " gives them",
        )


def _run_ranges(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, has_begin: bool, has_prefix: bool, options: dict[str, Any]
) -> Tensor:
    """Rows whose live keys lie together: attention by lengths, over the tensors as they are."""
    seqlen_q = q.shape[1]
    # Columns are contiguous as the mask function makes them; what passes masks on may have changed that.
    end, dead, begin, prefix = (mask[:, 0, 0, i].contiguous() for i in range(4))
    # One query of a row of padding sees no key or keys that nobody asks for: it needs no length.
    used = (seqlen_q - dead).clamp(min=0) if seqlen_q > 1 else None
    out, _ = broadhead.mha_fwd(
        q,
        k,
        v,
        seqused_q=used,
        seqused_k=end,
        leftpad_k=begin if has_begin else None,
        prefix_lens=prefix if has_prefix else None,
        **options,
    )
    return out if used is None else _zero_dead(out, used)


def _run_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
    """A causal mask, and queries that see ranges of keys besides."""
    rows = forms.block_rows(mask)
    if forms.has_ranges(mask):
        ranges = forms.ranges_in(mask, q.shape[1])
        options = {**options, "query_ranges": ranges, "ranges_in_window": rows.in_window}
    if not rows.has_end:
        return broadhead.flash_attn_func(q, k, v, num_splits=0, **options)
    return _run_ranges(q, k, v, mask, rows.has_begin, False, options)


def _run_gathered(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
    """Rows with padding between live keys: bring the live keys, and the live queries, to the front."""
    seqlen_q, num_keys = q.shape[1], k.shape[1]
    order, count = mask[:, 0, 0, :num_keys], mask[:, 0, 0, num_keys]
    k, v = _rows(k, order), _rows(v, order)
    options = {**options, "seqused_k": count.contiguous()}
    positional = options["causal"] or options["window_size"] != (-1, -1)
    # A single query, or one without a position, sees all live keys: it may stay where it is.
    if seqlen_q == 1 or not positional:
        return broadhead.mha_fwd(q, k, v, **options)[0]
    inverse, query_end = mask[:, 1, 0, :num_keys], mask[:, 1, 0, num_keys]
    places = query_end[:, None] - seqlen_q + torch.arange(seqlen_q, device=q.device)
    live = inverse.gather(1, places.long().clamp(0, num_keys - 1)) < count[:, None]
    order_q = torch.argsort(~live, dim=1, stable=True)
    used = live.sum(1, dtype=torch.int32)
    out, _ = broadhead.mha_fwd(_rows(q, order_q), k, v, seqused_q=used, **options)
    return _rows(_zero_dead(out, used), torch.argsort(order_q, dim=1))


def _run_packed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, kind: str | None, options: dict[str, Any]) -> Tensor:
    """Rows that hold several sequences each, found by the mask function; q may be the last queries of each row."""
    seqlen_q, num_keys = q.shape[1], k.shape[1]
    cu_seqlens_k = mask[0, 0, 0]
    if kind == "packed blocks":
        cu_seqlens_k, ranges = forms.split_packed_blocks(mask, q.shape[0], num_keys)
        in_window = forms.block_rows(mask).in_window
        ranges = ranges[:, -seqlen_q:].reshape(-1, 2)
        options = {**options, "query_ranges": ranges, "ranges_in_window": in_window}
    cu_seqlens_q = cu_seqlens_k
    if seqlen_q != num_keys:
        row, place = cu_seqlens_k // num_keys, cu_seqlens_k % num_keys
        cu_seqlens_q = row * seqlen_q + (place - (num_keys - seqlen_q)).clamp(min=0)
    longest = forms.longest_of(mask, num_keys)
    if mask.shape[1] == forms.PACKED_PREFIX_ROWS:
        options = {**options, "prefix_lens": mask[0, 3, 0, :-1]}
    return _run_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, min(longest, seqlen_q), longest, options)


def _run_given(q: Tensor, k: Tensor, v: Tensor, kwargs: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """Packed sequences whose offsets the caller gives; a length that is no int is bounded by what is there."""
    longest = [kwargs.get("max_length_q"), kwargs.get("max_length_k")]
    bounds = [q.shape[0] * q.shape[1], k.shape[0] * k.shape[1]]
    max_q, max_k = (
        bound if given is None or isinstance(given, Tensor) else int(given)
        for given, bound in zip(longest, bounds, strict=True)
    )
    cu_q, cu_k = kwargs["cu_seq_lens_q"].to(torch.int32), kwargs["cu_seq_lens_k"].to(torch.int32)
    return _run_varlen(q, k, v, cu_q, cu_k, max_q, max_k, options)


def _run_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: dict[str, Any],
) -> Tensor:
    """Flatten the rows and let the offsets separate them."""
    batch, length = q.shape[:2]
    out = broadhead.flash_attn_varlen_func(
        q.reshape(-1, *q.shape[2:]),
        k.reshape(-1, *k.shape[2:]),
        v.reshape(-1, *v.shape[2:]),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        **options,
    )
    return out.view(batch, length, *out.shape[1:])


def _run_paged(q: Tensor, k: Tensor, v: Tensor, kwargs: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """Continuous batching, one new token a sequence: write its key to a page of the cache, and attend over the pages.

    transformers' cache gives ``block_table`` int32 ``(B, pages)``, ``k_cache`` and ``v_cache``
    ``(pages, page_size, Hkv, D)``, and ``cu_seq_lens_k``, which counts the new tokens.
    """
    cu_seqlens_k = kwargs["cu_seq_lens_k"]
    q, k, v = (x.reshape(-1, 1, *x.shape[2:]) for x in (q, k, v))
    batch = q.shape[0]
    cached = cu_seqlens_k[1 : batch + 1] - cu_seqlens_k[:batch] - 1
    out = broadhead.flash_attn_with_kvcache(
        q,
        kwargs["k_cache"],
        kwargs["v_cache"],
        k,
        v,
        cache_seqlens=cached.clamp(min=0).to(torch.int32),
        page_table=kwargs["block_table"],
        **options,
    )
    return out.transpose(0, 1)


def _zero_dead(out: Tensor, used: Tensor) -> Tensor:
    """``out`` ``(B, Sq, H, D)`` with 0 in the rows from ``used`` on, which attention leaves unwritten."""
    live = torch.arange(out.shape[1], device=out.device) < used[:, None]
    return torch.where(live[:, :, None, None], out, torch.zeros((), dtype=out.dtype, device=out.device))


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """Rows ``order`` ``(B, S)`` of ``x`` ``(B, S, H, D)``."""
    return x.gather(1, order.long()[:, :, None, None].expand(-1, -1, *x.shape[2:]))
