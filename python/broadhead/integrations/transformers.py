"""Registers broadhead as an attention implementation of Hugging Face transformers, for models on its interface.

    import broadhead.integrations.transformers as broadhead_transformers

    broadhead_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="broadhead")

Padded batches run as packed sequences (varlen), so that no query is spent on padding. What cannot be expressed exactly
(a custom 4-D mask, dropout, a position bias) is refused by name: it never runs with another mask than the model's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import broadhead
from broadhead.errors import UnsupportedError

_FUNCTION = "broadhead.integrations.transformers"
#: Keyword arguments of a layer that change its attention and that no broadhead call expresses.
_UNSUPPORTED_KWARGS = {
    "position_bias": "an additive position bias",
    "cache": "the continuous-batching cache (attn_implementation='paged|broadhead')",
    "alibi": "ALiBi slopes",
    "head_mask": "a head mask",
}
_UNSET: Any = object()


def register(name: str = "broadhead") -> None:
    """Make ``attn_implementation=name`` available to transformers: the attention function and its mask function.

    Args:
        name: how models ask for it.

    Raises:
        ImportError: transformers is missing, or older than the interface that this uses.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

        if "q_offset" not in inspect.signature(masking_utils.flash_attention_mask).parameters:
            raise ImportError("its mask functions take no q_offset")
    except ImportError as error:
        raise ImportError(
            f"{_FUNCTION}.register: a newer transformers is needed ({error}); install it with: "
            "pip install 'transformers>=5.17'"
        ) from error
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Describe a layer's mask to `attention_forward`: which keys are real.

    The causal, windowed or chunked part is not in it: the layer says that by ``is_causal`` and ``sliding_window``.

    Args:
        batch_size, q_length, kv_length: the shape of the attention.
        q_offset, kv_offset: positions of the first query and of the first key.
        mask_function: the index-based mask of the model.
        attention_mask: bool ``(batch_size, seen tokens)``, False where a token is padding.
        use_vmap: transformers sets it when the model gave its own mask function.
        local_size: the window or the chunk of a local layer.

    Returns:
        None when every key is real, or bool ``(batch_size, L)`` with ``L <= kv_length``: keys past L are unused slots
        of a static cache, and the queries are its last ``q_length`` columns.

    Raises:
        UnsupportedError: the model adds its own pattern to the mask.
    """
    if use_vmap:
        raise UnsupportedError(
            f"{_FUNCTION}: the model adds its own function to the attention mask; accepted are causal, sliding-window, "
            "chunked, bidirectional and padding masks; use attn_implementation='sdpa' for this model"
        )
    bidirectional = "allow_is_bidirectional_skip" in kwargs
    if not bidirectional:
        _check_blocks(mask_function, q_length)
    if local_size is not None and not bidirectional and kv_length + kv_offset > local_size and kv_offset:
        _check_chunks(mask_function, local_size)

    used = kv_length
    if not bidirectional:
        used = min(kv_length, int(q_offset) + q_length - kv_offset)
    if attention_mask is not None:
        if attention_mask.shape[-1] < kv_offset + used:
            used = min(used, attention_mask.shape[-1])
            attention_mask = attention_mask[:, -used:]
        else:
            attention_mask = attention_mask[:, kv_offset : kv_offset + used]
        if bool(attention_mask.all()):
            attention_mask = None
    if attention_mask is None and used < kv_length:
        device = kwargs.get("device", "cpu")
        attention_mask = torch.ones((batch_size, used), dtype=torch.bool, device=device)
    return attention_mask


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface.

    Args:
        module: the layer; its ``is_causal`` and config are read.
        query: ``(B, Hq, Sq, D)``; key, value: ``(B, Hkv, Sk, D)`` and ``(B, Hkv, Sk, Dv)``.
        attention_mask: what `attention_mask` returned.
        scaling: softmax scale, default ``D ** -0.5``.
        sliding_window: keys a query sees, itself included.
        softcap: tanh cap of the scores.
        s_aux: ``(Hq,)`` attention sinks.

    Returns:
        ``(out, None)`` with out ``(B, Sq, Hq, Dv)``.

    Raises:
        UnsupportedError: something that would change the result and that broadhead cannot do.
    """
    _refuse(attention_mask, dropout, kwargs)
    query, key, value = _common_dtype(query, key, value)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    window, chunk = _local_mask(module, sliding_window)
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "causal": causal,
        "window_size": _window_size(module, window, causal, q.shape[1], k.shape[1]),
        "attention_chunk": chunk,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
    }
    packed = _packed_lengths(q, k, attention_mask, kwargs)
    if packed is not None:
        out = _run_packed(q, k, v, packed, options)
    elif attention_mask is not None:
        out = _run_padded(q, k, v, attention_mask, options)
    else:
        out = broadhead.flash_attn_func(q, k, v, **options)
    return out, None


def _refuse(attention_mask: Any, dropout: float, kwargs: dict[str, Any]) -> None:
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
    if attention_mask is not None and (attention_mask.dim() != 2 or attention_mask.dtype != torch.bool):
        raise UnsupportedError(
            f"{_FUNCTION}: attention_mask must be a 2-D padding mask, got shape {tuple(attention_mask.shape)} "
            f"{attention_mask.dtype}; pass the 2-D mask and let the model build its own, or use "
            "attn_implementation='sdpa'"
        )


def _check_blocks(mask_function: Callable[..., Any] | None, q_length: int) -> None:
    """Refuse masks that let a query see later keys (blocks of image tokens)."""
    name = getattr(mask_function, "__qualname__", "")
    if q_length > 1 and name.startswith("or_masks"):
        raise UnsupportedError(
            f"{_FUNCTION}: the model joins a second pattern to its causal mask (blocks of tokens that see each other); "
            "use attn_implementation='sdpa'"
        )


def _check_chunks(mask_function: Callable[..., Any] | None, size: int) -> None:
    """Refuse chunks over a cache that dropped its oldest keys: chunk borders are absolute positions, which are lost."""
    if mask_function is None:
        return
    # A window of `size` lets every query see its size-1 predecessors; a chunk lets at most one in `size`.
    first = torch.tensor(0)
    if not all(bool(mask_function(first, first, first + size + i, first + i + 1)) for i in range(2)):
        raise UnsupportedError(
            f"{_FUNCTION}: chunked attention past one chunk ({size}) needs a cache that keeps all keys; "
            "use cache_implementation='dynamic_full' or attn_implementation='sdpa'"
        )


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


def _packed_lengths(
    q: Tensor, k: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, int, int] | None:
    """``(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)`` if the rows hold several sequences each."""
    if kwargs.get("cu_seq_lens_q") is not None:
        cu_q, cu_k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
        max_q = kwargs.get("max_length_q") or int(cu_q.diff().max())
        max_k = kwargs.get("max_length_k") or int(cu_k.diff().max())
        return cu_q.to(torch.int32), cu_k.to(torch.int32), int(max_q), int(max_k)
    positions = kwargs.get("position_ids")
    if positions is None or attention_mask is not None or q.shape[1] < 2 or q.shape[1] != k.shape[1]:
        return None
    if positions.dim() != 2 or positions.shape[1] != q.shape[1]:
        return None
    # A position that does not follow its predecessor starts a sequence: transformers' rule for packed rows.
    starts = positions.diff(dim=1) != 1
    if not bool(starts.any()):
        return None
    batch, length = q.shape[:2]
    starts = torch.nn.functional.pad(starts.expand(batch, -1), (1, 0), value=True)
    cu = torch.nonzero(starts.flatten()).flatten().to(torch.int32)
    cu = torch.cat([cu, cu.new_full((1,), batch * length)])
    longest = int(cu.diff().max())
    return cu, cu, longest, longest


def _run_packed(
    q: Tensor, k: Tensor, v: Tensor, packed: tuple[Tensor, Tensor, int, int], options: dict[str, Any]
) -> Tensor:
    """Rows that hold several sequences each: flatten and let cu_seqlens separate them."""
    batch, length = q.shape[:2]
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = packed
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


def _run_padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
    """Rows with padding: drop it, run packed, put the outputs back; outputs of padding are 0."""
    batch, seqlen_q = q.shape[:2]
    used = mask.shape[1]
    k, v = k[:, :used], v[:, :used]
    positional = options["causal"] or options["window_size"] != (-1, -1)
    if positional and seqlen_q > used:
        raise UnsupportedError(
            f"{_FUNCTION}: {seqlen_q} queries but only {used} keys in the padding mask; it must cover all tokens"
        )
    # Without positions every query row may stay: no mask tells the padding among the queries of a cross attention.
    live = mask[:, used - seqlen_q :] if positional else mask.new_ones((batch, seqlen_q))
    rows_q = torch.nonzero(live.flatten()).flatten()
    rows_k = torch.nonzero(mask.flatten()).flatten()
    out_packed = broadhead.flash_attn_varlen_func(
        q.reshape(batch * seqlen_q, *q.shape[2:])[rows_q],
        k.reshape(batch * used, *k.shape[2:])[rows_k],
        v.reshape(batch * used, *v.shape[2:])[rows_k],
        _cu_seqlens(live),
        _cu_seqlens(mask),
        seqlen_q,
        used,
        **options,
    )
    out = out_packed.new_zeros((batch * seqlen_q, *out_packed.shape[1:]))
    return out.index_copy(0, rows_q, out_packed).view(batch, seqlen_q, *out.shape[1:])


def _cu_seqlens(mask: Tensor) -> Tensor:
    """int32 ``(B + 1,)`` running sums of the live columns of each row."""
    lengths = mask.sum(dim=1, dtype=torch.int32)
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
