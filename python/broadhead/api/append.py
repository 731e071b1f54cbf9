"""One append of new keys as the public functions ask for it: validated once, then run by kernel or torch ops."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from ..call import validation as check
from ..call import values
from ..call.arguments import AttentionArgs
from ..call.inputs import changed, read_tensors
from ..call.layout import contiguous, refuse_strided
from ..call.masking import normalize_window
from ..call.names import shown_name
from ..call.plain import (
    plain,
    plain_fields,
    refuse_tangents,
    refuse_transformed,
    resolved,
    resolved_fields,
    runs_as_operator,
)
from ..call.problem import needs_gradients
from ..errors import InvalidArgumentError, InvalidTypeError, UnsupportedError
from ..ops import sharding
from ..plan.device import describe
from ..run import known
from ..run.append import Append, kernel_obstacle, remember_append, run_append
from ..run.fallback import settle_operation
from ..run.forward import check_only
from .forward import run_forward


class NewKeys(NamedTuple):
    """The arguments of an append that attention itself does not take, under the names of flash_attn_with_kvcache."""

    k: Any
    v: Any
    cu_seqlens_k_new: Any
    rotary_cos: Any
    rotary_sin: Any
    rotary_seqlens: Any
    rotary_interleaved: Any


def run_appending(
    function: str, call: tuple[Any, ...], new: tuple[Any, ...], need_lse: bool = True
) -> tuple[Tensor, Any]:
    """``(out, softmax_lse)`` of a call that writes new keys into its cache first, and rotates them and q.

    ``call`` holds the fields of AttentionArgs, ``new`` those of NewKeys: plain tuples, as for run_forward.
    Nothing is written unless the attention that follows is accepted too.
    """
    if is_dynamo_compiling():
        args = AttentionArgs(*call)
        return run_forward(function, _behind(args, *_append_by_operator(function, args, NewKeys(*new))))
    result = known.run_known_append(function, need_lse, call, new)
    if result is not None:
        return result
    given, fresh = AttentionArgs(*call), NewKeys(*new)
    if runs_as_operator(*given, *fresh):
        refuse_tangents(function, *given, *fresh)
        refuse_transformed(function, "appending to a cache", *given, *fresh)
        args = resolved_fields(function, given, written=("k", "v", "out"))
        appended = _append_by_operator(function, args, _resolved_new(function, fresh))
        return run_forward(function, _behind(given, *appended), need_lse)
    args = plain_fields(function, given, written=("k", "v", "out"))
    args, fresh = _readable(function, args, _plain_new(function, fresh))
    result = None
    if any(a is not b for a, b in zip((*args, *fresh), (*given, *new), strict=True)):
        result = known.run_known_append(function, need_lse, args, fresh)
    if result is None:
        result = _run_new(function, args, fresh, need_lse)
    return result if given.out is None else (given.out, result[1])


def _run_new(function: str, args: AttentionArgs, new: NewKeys, need_lse: bool) -> tuple[Tensor, Any]:
    """A call that is not known, on plain memory: validated, then append and attention one after the other."""
    attention_on_kernel = _validate(function, args, new)
    append = _describe(args, new, _causal_or_local(function, args))
    obstacle = kernel_obstacle(append)
    if attention_on_kernel and obstacle is not None:
        _refuse_or_warn(function, obstacle, args)
    q, lengths = run_append(append, args.backend)
    attention = _behind(args, args.q if q is None else q, lengths)
    result = run_forward(function, attention, need_lse)
    if attention_on_kernel and obstacle is None:
        remember_append(append.causal_or_local, args, new, attention)
    return result


def _behind(args: AttentionArgs, q: Any, lengths: Any) -> AttentionArgs:
    """The attention of a call behind its append. Over pages cu_seqlens_k only says lengths, and those are given."""
    cu_seqlens_k = args.cu_seqlens_k if args.page_table is None else None
    return changed(args, {"q": q, "seqused_k": lengths, "cu_seqlens_k": cu_seqlens_k})


def _plain_new(function: str, new: NewKeys) -> NewKeys:
    """The new keys and what belongs to them as plain memory."""
    names = dict(zip(("k", "v"), _names(function)[1], strict=True))
    refuse_tangents(function, *new)
    return NewKeys(*(plain(function, names.get(name, name), value) for name, value in new._asdict().items()))


def _resolved_new(function: str, new: NewKeys) -> NewKeys:
    names = dict(zip(("k", "v"), _names(function)[1], strict=True))
    return NewKeys(*(resolved(function, names.get(name, name), value) for name, value in new._asdict().items()))


def _readable(function: str, args: AttentionArgs, new: NewKeys) -> tuple[AttentionArgs, NewKeys]:
    """The arguments with scalars out of their tensors and copies of strided tensors; the same objects without any."""
    ready = read_tensors(function, args)
    for name, cache in zip(_names(function)[0], (args.k, args.v), strict=True):
        if ready.page_table is None:  # else read_tensors knows that they are caches
            refuse_strided(function, name, cache)
    # One by one: torch.compile of older torch does not trace slices of a named tuple.
    given = (new.k, new.v, new.cu_seqlens_k_new, new.rotary_cos, new.rotary_sin, new.rotary_seqlens)
    tensors = [contiguous(tensor) for tensor in given]
    interleaved = new.rotary_interleaved
    if type(interleaved) is not bool:
        interleaved = check.check_bool(function, "rotary_interleaved", interleaved)
    if interleaved is new.rotary_interleaved and all(a is b for a, b in zip(tensors, given)):
        return ready, new
    k, v, cu_seqlens_k_new, cos, sin, seqlens = tensors
    return ready, NewKeys(k, v, cu_seqlens_k_new, cos, sin, seqlens, interleaved)


def _append_by_operator(function: str, args: AttentionArgs, new: NewKeys) -> tuple[Any, Any]:
    """The append through its operator; traceable, so it validates only what a schema needs."""
    sharding.prepare(*args, *new)
    args, new = _readable(function, args, new)
    if is_compiling():
        _check_given(function, args, new)
        _check_no_gradient(function, args, new)
        if new.rotary_cos is not None:
            _check_rotary_rows(function, args.k, args.page_table, new.rotary_cos)
    else:
        _validate(function, args, new)
    call = _describe(args, new, _causal_or_local(function, args))
    q, lengths = torch.ops.broadhead.append_kv(
        call.k_cache, call.v_cache, call.k_new, call.v_new, call.cache_seqlens, call.page_table, call.cache_batch_idx,
        call.cu_seqlens_k_new, call.rotary_cos, call.rotary_sin, call.rotary_seqlens, call.rotary_interleaved, call.q,
        call.cu_seqlens_q, call.causal_or_local, call.k_descale, call.v_descale,
    )  # fmt: skip
    return args.q if call.q is None else q, lengths


def _describe(args: AttentionArgs, new: NewKeys, causal_or_local: bool) -> Append:
    return Append(
        args.k, args.v, new.k, new.v, args.seqused_k, None if new.rotary_cos is None else args.q, new.rotary_cos,
        new.rotary_sin, new.rotary_seqlens, args.cu_seqlens_q, new.cu_seqlens_k_new, args.page_table,
        args.kv_batch_idx, args.k_descale, args.v_descale, new.rotary_interleaved, causal_or_local,
    )  # fmt: skip


def _causal_or_local(function: str, args: AttentionArgs) -> bool:
    """Whether query i is at the position of new key i. Causality by sequence is causality here."""
    left, right = normalize_window(args.window_size, args.causal, function)
    return left >= 0 or right >= 0 or args.causal_by_sequence is not None


def _refuse_or_warn(function: str, obstacle: str, args: AttentionArgs) -> None:
    """Attention runs on a kernel, the append before it would not: as for attention, that is no secret."""
    settle_operation(function, "append", describe(args.q.device), args.backend, obstacle)


def _validate(function: str, args: AttentionArgs, new: NewKeys) -> bool:
    """Check everything that the append and the attention behind it read; whether a kernel will run the attention."""
    attention = args if args.page_table is None else args._replace(cu_seqlens_k=None)
    with check.clamped():  # its lengths are those before the append; values.check_append knows those after it
        attention_on_kernel = check_only(function, attention)
    if args.page_table is not None and args.cu_seqlens_k is not None:
        check.check_int32(function, "cu_seqlens_k", args.cu_seqlens_k, (None,), args.q.device, "(batch + 1,)")
    _check_given(function, args, new)
    _check_append(
        function, args.q, args.k, args.v, new.k, new.v, new.rotary_cos, new.rotary_sin, args.seqused_k,
        args.kv_batch_idx, args.page_table, args.cu_seqlens_q, new.cu_seqlens_k_new, new.rotary_seqlens,
        new.rotary_interleaved,
    )  # fmt: skip
    _check_no_gradient(function, args, new)
    batch = args.q.shape[0] if args.cu_seqlens_q is None else args.cu_seqlens_q.shape[0] - 1
    values.check_append(
        function, attention, new, batch, lambda name: shown_name(function, name), _names(function)[1][0]
    )
    return attention_on_kernel


def _check_given(function: str, args: AttentionArgs, new: NewKeys) -> None:
    if new.k is None or new.v is None:
        names = _names(function)[1]
        missing = " and ".join(name for name, value in zip(names, (new.k, new.v), strict=True) if value is None)
        raise InvalidArgumentError(
            f"{function}: {missing} must be given when new keys are appended or rotary_cos/rotary_sin are given, got"
            " None"
        )
    if (new.rotary_cos is None) != (new.rotary_sin is None):
        raise InvalidArgumentError(f"{function}: rotary_cos and rotary_sin must be given together, got one of them")
    if args.seqused_k is None:
        lengths = "cache_seqlens" if function == "flash_attn_with_kvcache" else "seqused_k"
        given = " and ".join(_names(function)[1])
        raise InvalidArgumentError(f"{function}: {lengths} must be given with {given}, got None")


def _check_no_gradient(function: str, args: AttentionArgs, new: NewKeys) -> None:
    if needs_gradients(args.q, new.k, new.v, args.k, args.v, args.sinks, args.qv):
        raise UnsupportedError(
            f"{function}: appending k and v to a cache has no gradient, and an input requires grad; call it under"
            " torch.no_grad()"
        )


def _names(function: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """What a function calls the caches and the new keys and values."""
    if function == "flash_attn_with_kvcache":
        return ("k_cache", "v_cache"), ("k", "v")
    return ("k", "v"), ("k_new", "v_new")


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
    cache_names, (name_k, name_v) = _names(function)
    for name, cache, new_name, new in zip(cache_names, (k_cache, v_cache), (name_k, name_v), (k, v), strict=True):
        check.check_attention_tensor(function, name, cache, (4,), layout)
        check.check_attention_tensor(function, new_name, new, (3,) if packed else (4,), layout_new)
        for each, tensor in ((name, cache), (new_name, new)):
            check.check_device(function, each, tensor, device)
        if new.dtype != cache.dtype and not (cache.dtype == torch.float8_e4m3fn and new.dtype in check.FLOAT_DTYPES):
            narrower = ", or bf16 or fp16, which become float8" if cache.dtype == torch.float8_e4m3fn else ""
            raise InvalidTypeError(
                f"{function}: {new_name} must have the dtype of {name}, {cache.dtype}{narrower}, got {new.dtype}"
            )
        if new.dtype != q.dtype and q.dtype not in check.FLOAT8_DTYPES:
            raise InvalidTypeError(
                f"{function}: {new_name} must have the dtype of q, {q.dtype}, got {new.dtype}; the append rounds to the"
                f" dtype of {name}, {cache.dtype}"
            )
        if cache.shape[-2:] != new.shape[-2:]:
            raise InvalidArgumentError(
                f"{function}: {new_name} must have the heads and head_dim of {name}, {tuple(cache.shape[-2:])}, got"
                f" {tuple(new.shape[-2:])}"
            )
    if k.dtype != v.dtype:
        raise InvalidTypeError(f"{function}: {name_v} must have the dtype of {name_k}, {k.dtype}, got {v.dtype}")
    if k.shape[:-1] != v.shape[:-1]:
        raise InvalidArgumentError(
            f"{function}: {name_v} must agree with {name_k} but for the last dimension, got {name_k} {tuple(k.shape)}"
            f" and {name_v} {tuple(v.shape)}"
        )
    if k_cache.shape[:-1] != v_cache.shape[:-1]:
        raise InvalidArgumentError(
            f"{function}: {cache_names[1]} must agree with {cache_names[0]} but for the last dimension, got"
            f" {cache_names[0]} {tuple(k_cache.shape)} and {cache_names[1]} {tuple(v_cache.shape)}"
        )
    if packed:
        check.check_int32(function, "cu_seqlens_k_new", cu_seqlens_k_new, (batch + 1,), device, "(batch + 1,)")
        check.check_cu_seqlens_on_cpu(function, "cu_seqlens_k_new", cu_seqlens_k_new, k.shape[0])
    elif k.shape[0] != batch:
        raise InvalidArgumentError(f"{function}: {name_k} must have the batch of q, {batch}, got {k.shape[0]}")
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
        _check_rotary(function, q, k, rotary_cos, rotary_sin)
        _check_rotary_rows(function, k_cache, page_table, rotary_cos)


def _check_rotary_rows(function: str, k_cache: Tensor, page_table: Tensor | None, rotary_cos: Tensor) -> None:
    """A row of the table for every key that the cache can hold: none is rotated by the angles of another position."""
    capacity = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    if rotary_cos.shape[0] < capacity:
        length = "rows of the cache" if page_table is None else "page_table.size(1) * page_size"
        raise InvalidArgumentError(
            f"{function}: rotary_cos and rotary_sin must have a row for each position of the cache, {capacity}"
            f" ({length}), got {rotary_cos.shape[0]}"
        )


def _check_rotary(function: str, q: Tensor, k: Tensor, rotary_cos: Any, rotary_sin: Any) -> None:
    name_k, _ = _names(function)[1]
    if q.dtype in check.FLOAT8_DTYPES and k.dtype != q.dtype:
        raise UnsupportedError(
            f"{function}: rotary_cos and rotary_sin turn q and {name_k} of one dtype, got q of {q.dtype} and {name_k}"
            f" of {k.dtype}; pass both in 8 bits, or both in bf16 or fp16"
        )
    check.check_same_dtype(function, name_k, k, q.dtype)
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
