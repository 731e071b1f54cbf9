"""flash_attn_with_kvcache: decode and chunked prefill over a cache, after appending new keys to it if asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import append_kv
from . import validation as check
from .errors import InvalidArgumentError, InvalidTypeError, UnsupportedError
from .forward import check_only, run_forward
from .masking import normalize_window
from .problem import AttentionArgs, needs_gradients


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    sinks: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
    block_table: Tensor | None = None,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    q_v: Tensor | None = None,
    return_attn_probs: bool = False,
    tokens_per_split: int = 0,
) -> Any:
    """Attention of new queries over a KV cache.

    Args:
        q: ``(B, Sq, Hq, D)``, or ``(T, Hq, D)`` with cu_seqlens_q (int32 ``(B + 1,)``) and max_seqlen_q.
        k_cache, v_cache: ``(B, S, Hkv, D | Dv)``, or ``(num_pages, page_size, Hkv, D | Dv)`` with page_table, int32
            ``(B, max_pages)``; any page_size >= 1, any strides with a contiguous last dimension. Of the dtype of q, or
            float8_e4m3fn under bf16 or fp16 q, with factors k_descale, v_descale, fp32 ``(B, Hkv)``.
        k, v: ``(B, S_new, Hkv, D | Dv)``, or ``(T_new, Hkv, D | Dv)`` with cu_seqlens_k_new (int32 ``(B + 1,)``):
            written to the cache from row ``cache_seqlens`` on, before attention. Of the dtype of q: a cache of
            float8_e4m3fn under bf16 or fp16 q takes them divided by k_descale, v_descale, what exceeds +-448 as +-448.
            cu_seqlens_k_new without k and v is ignored.
        rotary_cos, rotary_sin: ``(positions, rotary_dim / 2)``: rotate q and k; only with k and v.
        cache_seqlens: an int for all sequences or int32 ``(B,)``: cached keys before the append; None: the whole cache.
        cache_batch_idx: int32 ``(B,)``: row of the cache or page table of each sequence. cache_leftpad: int32 ``(B,)``:
            the keys of a sequence are cache rows ``[cache_leftpad, cache_seqlens)``.
        tokens_per_split: batch-invariant mode: the keys of every sequence are cut at multiples of this many, itself a
            multiple of 64; 0: off. On one kind of device the kernels then give a sequence bitwise the same result
            whatever else is in the batch, in all calls of the same max_seqlen_q, heads, head dims, dtypes, page size
            and tokens_per_split. It costs balance: splits no longer follow from what fills the device, so that a few
            sequences, or short ones, may leave it partly idle, and small pieces of long sequences are much to merge.
            Calls of more query rows than decode kernels take are not cut. num_splits must be 0, or 1 for no cut
            either. The torch fallback ignores it.
        The other arguments: as for flash_attn_func; scheduler_metadata as get_scheduler_metadata returns it.

    Returns:
        out, of the shape of q with Dv and the dtype of q (bf16 for float8); with return_softmax_lse also softmax_lse,
        fp32, natural log, ``(B, Hq, Sq)`` or ``(Hq, T)``.

    Raises:
        InvalidArgumentError, InvalidTypeError: an argument is wrong; the text names it.
        UnsupportedError: no kernel runs the call and falling back was forbidden; appending to a cache under autograd.
    """
    if block_table is not None:
        page_table = check.pick_synonym(  # type: ignore[assignment]
            "flash_attn_with_kvcache", "page_table", page_table, "block_table", block_table
        )
    if s_aux is not None or learnable_sink is not None:
        sinks = check.pick_sinks("flash_attn_with_kvcache", sinks, s_aux, learnable_sink)
    if q_v is not None:
        qv = check.pick_synonym("flash_attn_with_kvcache", "qv", qv, "q_v", q_v)  # type: ignore[assignment]
    if cache_seqlens is not None and not isinstance(cache_seqlens, Tensor):
        cache_seqlens = _lengths_tensor("flash_attn_with_kvcache", q, cu_seqlens_q, cache_seqlens)
    if k is not None or v is not None or rotary_cos is not None or rotary_sin is not None:
        if not is_compiling():
            check_only(
                "flash_attn_with_kvcache",
                AttentionArgs(
                    q, k_cache, v_cache, qv, out, cu_seqlens_q, None, None, cache_seqlens, max_seqlen_q, None,
                    page_table, cache_batch_idx, cache_leftpad, q_descale, k_descale, v_descale, softmax_scale, causal,
                    window_size, attention_chunk, softcap, scheduler_metadata, num_splits, pack_gqa, sm_margin, sinks,
                    prefix_lens, backend, tokens_per_split,
                ),
            )  # fmt: skip
        q, cache_seqlens = append_new_keys(
            "flash_attn_with_kvcache", q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens,
            cache_batch_idx, page_table, cu_seqlens_q, cu_seqlens_k_new, rotary_seqlens, rotary_interleaved, causal,
            window_size, sinks, qv, k_descale, v_descale,
        )  # fmt: skip
    need_lse = return_softmax_lse or return_attn_probs
    result = run_forward(
        "flash_attn_with_kvcache", q, k_cache, v_cache, qv, out, cu_seqlens_q, None, None, cache_seqlens, max_seqlen_q,
        None, page_table, cache_batch_idx, cache_leftpad, q_descale, k_descale, v_descale, softmax_scale, causal,
        window_size, attention_chunk, softcap, scheduler_metadata, num_splits, pack_gqa, sm_margin, sinks, prefix_lens,
        backend, tokens_per_split, need_lse,
    )  # fmt: skip
    return result if need_lse else result[0]


def _lengths_tensor(function: str, q: Any, cu_seqlens_q: Any, length: Any) -> Tensor:
    """One cache length for all sequences, as a tensor on the device of q."""
    if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
        raise InvalidTypeError(
            f"{function}: cache_seqlens must be an int or an int32 tensor of shape (batch,), got"
            f" {check.describe_value(length)}"
        )
    if not is_compiling():
        check.check_int(function, "cache_seqlens", length)
    check.check_tensor(function, "q", q, "a tensor")
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    fill_value: Any = length
    return torch.full((batch,), fill_value, dtype=torch.int32, device=q.device)


def append_new_keys(
    function: str,
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any,
    v: Any,
    rotary_cos: Any,
    rotary_sin: Any,
    cache_seqlens: Any,
    cache_batch_idx: Any,
    page_table: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k_new: Any,
    rotary_seqlens: Any,
    rotary_interleaved: Any,
    causal: Any,
    window_size: Any,
    sinks: Any = None,
    qv: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
) -> tuple[Any, Any]:
    """Write k and v into the cache and rotate q; ``(q, lengths after the append)``. Validates what it reads."""
    if k is None or v is None:
        name = "k and v" if k is None and v is None else ("k" if k is None else "v")
        raise InvalidArgumentError(
            f"{function}: {name} must be given when new keys are appended or rotary_cos/rotary_sin are given, got None"
        )
    if (rotary_cos is None) != (rotary_sin is None):
        raise InvalidArgumentError(f"{function}: rotary_cos and rotary_sin must be given together, got one of them")
    if cache_seqlens is None:
        raise InvalidArgumentError(f"{function}: cache_seqlens must be given with k and v, got None")
    compiling = is_compiling()
    if not compiling:
        _check_append(
            function, q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, page_table,
            cu_seqlens_q, cu_seqlens_k_new, rotary_seqlens, rotary_interleaved, k_descale, v_descale,
        )  # fmt: skip
    if needs_gradients(q, k, v, k_cache, v_cache, sinks, qv):
        raise UnsupportedError(
            f"{function}: appending k and v to a cache has no gradient, and an input requires grad; call it under"
            " torch.no_grad()"
        )
    left, right = normalize_window(window_size, causal, function)
    if rotary_cos is not None:
        q = append_kv.apply_rotary_q(
            q,
            rotary_cos,
            rotary_sin,
            cache_seqlens=cache_seqlens,
            rotary_seqlens=rotary_seqlens,
            cu_seqlens_q=cu_seqlens_q,
            causal_or_local=left >= 0 or right >= 0,
            rotary_interleaved=rotary_interleaved,
        )
    if compiling:
        torch.ops.broadhead.append_kv(
            k_cache, v_cache, k, v, cache_seqlens, page_table, cache_batch_idx, cu_seqlens_k_new, rotary_cos,
            rotary_sin, rotary_seqlens, rotary_interleaved, k_descale, v_descale,
        )  # fmt: skip
    else:
        append_kv.append(
            k_cache,
            v_cache,
            k,
            v,
            cache_seqlens=cache_seqlens,
            page_table=page_table,
            cache_batch_idx=cache_batch_idx,
            cu_seqlens_k_new=cu_seqlens_k_new,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            rotary_seqlens=rotary_seqlens,
            rotary_interleaved=rotary_interleaved,
            k_descale=k_descale,
            v_descale=v_descale,
        )
    new = k.shape[1] if cu_seqlens_k_new is None else cu_seqlens_k_new[1:] - cu_seqlens_k_new[:-1]
    return q, cache_seqlens + new


def _check_append(
    function: str,
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any,
    v: Any,
    rotary_cos: Any,
    rotary_sin: Any,
    cache_seqlens: Any,
    cache_batch_idx: Any,
    page_table: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k_new: Any,
    rotary_seqlens: Any,
    rotary_interleaved: Any,
    k_descale: Any,
    v_descale: Any,
) -> None:
    """Everything that the append reads, before it writes anything."""
    q = check.check_tensor(function, "q", q, "a tensor (batch, seqlen_q, heads, head_dim)")
    device = q.device
    if cu_seqlens_q is not None:
        check.check_int32(function, "cu_seqlens_q", cu_seqlens_q, (None,), device, "(batch + 1,)")
        check.check_attention_tensor(function, "q", q, (3,), "(total_q, heads, head_dim) with cu_seqlens_q")
        batch = cu_seqlens_q.shape[0] - 1
    else:
        check.check_attention_tensor(function, "q", q, (4,), "(batch, seqlen_q, heads, head_dim)")
        batch = q.shape[0]
    layout = "(batch, seqlen, heads_kv, head_dim), or (num_pages, page_size, heads_kv, head_dim) with page_table"
    packed = cu_seqlens_k_new is not None
    layout_new = "(batch, new, heads_kv, head_dim)"
    if packed:
        layout_new = "(total_new, heads_kv, head_dim) with cu_seqlens_k_new"
    for name, cache, new_name, new in (("k_cache", k_cache, "k", k), ("v_cache", v_cache, "v", v)):
        check.check_attention_tensor(function, name, cache, (4,), layout)
        check.check_attention_tensor(function, new_name, new, (3,) if packed else (4,), layout_new)
        for each, tensor in ((name, cache), (new_name, new)):
            check.check_device(function, each, tensor, device)
        check.check_same_dtype(function, new_name, new, q.dtype)
        if cache.shape[-2:] != new.shape[-2:]:
            raise InvalidArgumentError(
                f"{function}: {new_name} must have the heads and head_dim of {name}, {tuple(cache.shape[-2:])}, got"
                f" {tuple(new.shape[-2:])}"
            )
    check.check_key_dtypes(function, "k_cache", k_cache, "v_cache", v_cache, q.dtype)
    for name, value in (("k_descale", k_descale), ("v_descale", v_descale)):
        if value is not None:
            check.check_descale(function, name, value, batch, k_cache.shape[-2], device)
    if k.shape[:-1] != v.shape[:-1]:
        raise InvalidArgumentError(
            f"{function}: v must agree with k but for the last dimension, got k {tuple(k.shape)} and v {tuple(v.shape)}"
        )
    if k_cache.shape[:-1] != v_cache.shape[:-1]:
        raise InvalidArgumentError(
            f"{function}: v_cache must agree with k_cache but for the last dimension, got k_cache"
            f" {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)}"
        )
    if packed:
        check.check_int32(function, "cu_seqlens_k_new", cu_seqlens_k_new, (batch + 1,), device, "(batch + 1,)")
        check.check_cu_seqlens_on_cpu(function, "cu_seqlens_k_new", cu_seqlens_k_new, k.shape[0])
    elif k.shape[0] != batch:
        raise InvalidArgumentError(f"{function}: k must have the batch of q, {batch}, got {k.shape[0]}")
    for name, value in (("cache_seqlens", cache_seqlens), ("cache_batch_idx", cache_batch_idx)):
        if value is not None:
            check.check_int32(function, name, value, (batch,), device, "(batch,)")
            check.check_lengths_on_cpu(function, name, value)
    if rotary_seqlens is not None:
        check.check_int32(function, "rotary_seqlens", rotary_seqlens, (batch,), device, "(batch,)")
    if page_table is not None:
        rows = batch if cache_batch_idx is None else None
        check.check_int32(function, "page_table", page_table, (rows, None), device, "(batch, max_pages)")
        if k_cache.shape[1] < 1:
            raise InvalidArgumentError(f"{function}: page_size (k_cache.shape[1]) must be >= 1, got 0")
    elif cache_batch_idx is None and k_cache.shape[0] != batch:
        raise InvalidArgumentError(
            f"{function}: k_cache must have the batch of q, {batch}, got {k_cache.shape[0]}; a larger cache needs"
            " cache_batch_idx"
        )
    check.check_bool(function, "rotary_interleaved", rotary_interleaved)
    if rotary_cos is not None:
        _check_rotary(function, q, rotary_cos, rotary_sin)


def _check_rotary(function: str, q: Tensor, rotary_cos: Any, rotary_sin: Any) -> None:
    spelled = "a floating-point tensor of shape (positions, rotary_dim / 2)"
    for name, value in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
        table = check.check_tensor(function, name, value, spelled)
        if not table.is_floating_point():
            raise InvalidTypeError(f"{function}: {name} must be {spelled}, got dtype {table.dtype}")
        if table.dim() != 2 or table.shape[0] < 1 or 2 * table.shape[1] > q.shape[-1]:
            raise InvalidArgumentError(
                f"{function}: {name} must be {spelled} with rotary_dim <= head_dim {q.shape[-1]}, got"
                f" {tuple(table.shape)}"
            )
        check.check_device(function, name, table, q.device)
    if rotary_cos.shape != rotary_sin.shape:
        raise InvalidArgumentError(
            f"{function}: rotary_sin must have the shape of rotary_cos, {tuple(rotary_cos.shape)}, got"
            f" {tuple(rotary_sin.shape)}"
        )
