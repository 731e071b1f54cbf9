"""Validates an attention call and describes it: shapes, dtypes, strides and masks are read once, tensor data never."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidArgumentError, InvalidTypeError, UnsupportedError
from . import validation as check
from . import values
from .arguments import AttentionArgs
from .mask_values import MaskRule, check_mask_values
from .masking import normalize_chunk, normalize_window
from .names import KVCACHE_FUNCTIONS, shown_name
from .problem import (
    ALIGNMENT_BYTES,
    AttentionProblem,
    gradient_features,
    needs_gradients,
    out_dtype,
    refuse_float8_gradient,
    refuse_tree_gradient,
)


class CheckedCall(NamedTuple):
    """A validated forward call."""

    problem: AttentionProblem
    total_q: int  # query rows of a head over the whole batch
    softmax_scale: float
    softcap: float


def check_forward(function: str, args: AttentionArgs, deterministic: bool = False) -> CheckedCall:
    """Validate ``args`` and describe the call.

    Args:
        deterministic: whether gradients must be the same in every run; asked only of a call that is differentiated.

    Raises:
        InvalidTypeError: a wrong Python type or dtype.
        InvalidArgumentError: a wrong rank, shape, stride, device or value.
    """
    batch, seqlen_q, total_q = _check_queries(function, args)
    seqlen_k, page_size = _check_keys(function, args, batch)
    device = args.q.device
    num_heads_q, head_dim = args.q.shape[-2:]
    num_heads_kv, head_dim_v = args.k.shape[-2], args.v.shape[-1]

    for name in ("seqused_q", "seqused_k", "kv_batch_idx", "leftpad_k", "prefix_lens"):
        value = getattr(args, name)
        if value is not None:
            check.check_int32(function, shown_name(function, name), value, (batch,), device, "(batch,)")
    if args.cu_seqlens_k is not None and args.kv_batch_idx is not None:
        raise InvalidArgumentError(
            f"{function}: kv_batch_idx must be None with packed k (cu_seqlens_k): it selects rows of a cache"
        )

    causal = check.check_bool(function, "causal", args.causal)
    window_left, window_right = normalize_window(args.window_size, causal, function)
    attention_chunk = normalize_chunk(check.check_attention_chunk(function, args.attention_chunk))
    check_mask_values(function, args, batch, seqlen_q, MaskRule(window_left, window_right, attention_chunk))
    softcap = check.check_softcap(function, args.softcap)
    scale_dim = head_dim if args.qv is None else head_dim + head_dim_v
    scale = args.softmax_scale
    scale = scale_dim**-0.5 if scale is None else check.check_number(function, "softmax_scale", scale)
    num_splits = check.check_num_splits(function, args.num_splits)
    tokens_per_split = check.check_tokens_per_split(function, args.tokens_per_split, num_splits)
    pack_gqa = check.check_optional_bool(function, "pack_gqa", args.pack_gqa)
    sm_margin = check.check_int(function, "sm_margin", args.sm_margin)
    _check_extras(function, args, batch, head_dim_v)
    _check_out(function, args, head_dim_v)
    values.check_attention(function, args, batch, seqlen_k, lambda name: shown_name(function, name))

    gradients = needs_gradients(args.q, args.k, args.v, args.qv, args.sinks)
    problem = AttentionProblem(
        dtype=args.q.dtype,
        kv_dtype=args.k.dtype,
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        num_heads_q=num_heads_q,
        num_heads_kv=num_heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        page_size=page_size,
        window=(window_left, window_right),
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        has_metadata=args.scheduler_metadata is not None,
        sm_margin=sm_margin,
        obstacles=_layout_obstacles(args),
        tokens_per_split=tokens_per_split,
        sinks=args.sinks is not None,
        prefix_lens=args.prefix_lens is not None,
        causal_by_sequence=args.causal_by_sequence is not None,
        query_ranges=args.query_ranges is not None,
        tree_mask=args.tree_mask is not None,
        varlen=args.cu_seqlens_q is not None or args.cu_seqlens_k is not None,
        seqused=args.seqused_q is not None or args.seqused_k is not None,
        leftpad=args.leftpad_k is not None,
        batch_idx=args.kv_batch_idx is not None,
        qv=args.qv is not None,
        descale=args.q_descale is not None or args.k_descale is not None or args.v_descale is not None,
        gradients=gradients,
        of_gradients=gradient_features(deterministic, batch, total_q) if gradients else (),
        total_q=total_q if args.cu_seqlens_q is not None else 0,
        total_k=args.k.shape[0] if args.cu_seqlens_k is not None else 0,
    )
    if problem.is_decode and num_splits != 1:
        rows = batch * seqlen_q * num_heads_q
        check.check_cells(function, tokens_per_split, seqlen_k, rows, head_dim_v, page_size)
    if gradients:
        refuse_float8_gradient(function, args.q.dtype, args.k.dtype)
        refuse_tree_gradient(function, args.tree_mask)
    if args.out is not None and (gradients or needs_gradients(args.out)):
        raise UnsupportedError(
            f"{function}: out= has no gradient; leave out away, or call under torch.no_grad() (an input requires grad)"
        )
    return CheckedCall(problem, total_q, scale, softcap)


def _check_queries(function: str, args: AttentionArgs) -> tuple[int, int, int]:
    """-> (batch, seqlen_q, total_q)"""
    varlen = args.cu_seqlens_q is not None
    shown_q, shown_cu = shown_name(function, "q"), shown_name(function, "cu_seqlens_q")
    layout = f"(total_q, heads, head_dim) with {shown_cu}" if varlen else "(batch, seqlen_q, heads, head_dim)"
    q = check.check_attention_tensor(function, shown_q, args.q, (3,) if varlen else (4,), layout)
    if not 1 <= q.shape[-2] <= check.MAX_NUM_HEADS:
        raise InvalidArgumentError(
            f"{function}: {shown_q} must have 1 to {check.MAX_NUM_HEADS} heads, got {q.shape[-2]} (shape"
            f" {tuple(q.shape)})"
        )
    if not varlen:
        return q.shape[0], q.shape[1], q.shape[0] * q.shape[1]
    cu_seqlens_q = check.check_int32(function, shown_cu, args.cu_seqlens_q, (None,), q.device, "(batch + 1,)")
    if cu_seqlens_q.shape[0] < 1:
        raise InvalidArgumentError(f"{function}: {shown_cu} must have batch + 1 >= 1 entries, got 0")
    shown_max = shown_name(function, "max_seqlen_q")
    if args.max_seqlen_q is None:
        raise InvalidArgumentError(f"{function}: {shown_max} must be given with {shown_cu}, got None")
    check.check_cu_seqlens_on_cpu(function, shown_cu, cu_seqlens_q, q.shape[0])
    return cu_seqlens_q.shape[0] - 1, check.check_int(function, shown_max, args.max_seqlen_q), q.shape[0]


def _check_keys(function: str, args: AttentionArgs, batch: int) -> tuple[int, int]:
    """-> (seqlen_k, page_size)"""
    q = args.q
    if args.cu_seqlens_k is not None:
        ranks, layout = (3,), "(total_k, heads_kv, head_dim) with cu_seqlens_k"
    elif args.page_table is not None:
        ranks, layout = (4,), "(num_pages, page_size, heads_kv, head_dim) with page_table"
    else:
        ranks, layout = (4,), "(batch, seqlen_k, heads_kv, head_dim)"
    shown_k, shown_v = shown_name(function, "k"), shown_name(function, "v")
    k = check.check_attention_tensor(function, shown_k, args.k, ranks, layout)
    v = check.check_attention_tensor(function, shown_v, args.v, ranks, layout)
    for name, tensor in ((shown_k, k), (shown_v, v)):
        check.check_device(function, name, tensor, q.device)
    check.check_key_dtypes(function, shown_k, k, shown_v, v, q.dtype)
    if k.shape[:-1] != v.shape[:-1]:
        raise InvalidArgumentError(
            f"{function}: {shown_v} must agree with {shown_k} but for the last dimension, got {shown_k}"
            f" {tuple(k.shape)} and {shown_v} {tuple(v.shape)}"
        )
    if k.shape[-1] != q.shape[-1]:
        raise InvalidArgumentError(
            f"{function}: {shown_k} must have the head_dim of q, {q.shape[-1]}, got {k.shape[-1]} (shape"
            f" {tuple(k.shape)})"
        )
    if k.shape[-2] < 1 or q.shape[-2] % k.shape[-2] != 0:
        raise InvalidArgumentError(
            f"{function}: the heads of q must be a multiple of the heads of {shown_k}, got {q.shape[-2]} and"
            f" {k.shape[-2]}"
        )
    max_seqlen_k = args.max_seqlen_k
    if max_seqlen_k is not None:
        max_seqlen_k = check.check_int(function, shown_name(function, "max_seqlen_k"), max_seqlen_k)
    if args.page_table is not None:
        rows = batch if args.kv_batch_idx is None else None
        spelled = "(batch, max_pages)"
        table = check.check_int32(function, "page_table", args.page_table, (rows, None), q.device, spelled)
        if k.shape[1] < 1:
            raise InvalidArgumentError(f"{function}: page_size (k.shape[1]) must be >= 1, got {k.shape[1]}")
        return check.clamp_seqlen_k(table.shape[1] * k.shape[1]), k.shape[1]
    if args.cu_seqlens_k is not None:
        cu_seqlens_k = check.check_int32(
            function, "cu_seqlens_k", args.cu_seqlens_k, (batch + 1,), q.device, "(batch + 1,)"
        )
        if max_seqlen_k is None:
            raise InvalidArgumentError(f"{function}: max_seqlen_k must be given with cu_seqlens_k, got None")
        check.check_cu_seqlens_on_cpu(function, "cu_seqlens_k", cu_seqlens_k, k.shape[0])
        return check.clamp_seqlen_k(max_seqlen_k), 0
    if k.shape[1] > check.MAX_SEQLEN_K:
        raise InvalidArgumentError(
            f"{function}: {shown_k} must have at most {check.MAX_SEQLEN_K} keys a sequence, got {k.shape[1]} (shape"
            f" {tuple(k.shape)})"
        )
    if args.kv_batch_idx is None and k.shape[0] != batch:
        takes_rows = function == "mha_fwd" or function in KVCACHE_FUNCTIONS
        raise InvalidArgumentError(
            f"{function}: {shown_k} must have the batch of q, {batch}, got {k.shape[0]} (shape {tuple(k.shape)})"
            + (f"; a larger cache needs {shown_name(function, 'kv_batch_idx')}" if takes_rows else "")
        )
    return k.shape[1], 0


def _check_extras(function: str, args: AttentionArgs, batch: int, head_dim_v: int) -> None:
    q = args.q
    num_heads_q, num_heads_kv = q.shape[-2], args.k.shape[-2]
    if args.qv is not None:
        qv = check.check_attention_tensor(function, "qv", args.qv, (q.dim(),), "of the shape of q with head_dim_v")
        check.check_device(function, "qv", qv, q.device)
        check.check_same_dtype(function, "qv", qv, q.dtype)
        check.check_shape(function, "qv", qv, (*q.shape[:-1], head_dim_v), "q.shape[:-1] + (head_dim_v,)")
    if args.sinks is not None:
        sinks = check.check_tensor(function, "sinks", args.sinks, "a tensor of shape (heads_q,)")
        if sinks.dtype not in (torch.float32, out_dtype(q.dtype)):
            of = "out" if q.dtype in check.FLOAT8_DTYPES else "q"
            raise InvalidTypeError(
                f"{function}: sinks must be fp32 or of the dtype of {of}, {out_dtype(q.dtype)}, got {sinks.dtype}"
            )
        check.check_shape(function, "sinks", sinks, (num_heads_q,), "(heads_q,)")
        check.check_device(function, "sinks", sinks, q.device)
        if sinks.shape[0] > 1 and sinks.stride(0) != 1:
            raise InvalidArgumentError(f"{function}: sinks must be contiguous, got strides {sinks.stride()}")
    for name in ("q_descale", "k_descale", "v_descale"):
        value = getattr(args, name)
        if value is not None:
            check.check_descale(function, name, value, batch, num_heads_kv, q.device)
    if args.q_descale is not None and args.k.dtype != q.dtype:
        raise InvalidArgumentError(
            f"{function}: q_descale must be None with {q.dtype} q over {args.k.dtype} k and v, got"
            f" {check.describe_value(args.q_descale)}; it is a factor of float8 q: drop q_descale (k_descale and"
            f" v_descale stay), or pass q as {args.k.dtype}"
        )


def _check_out(function: str, args: AttentionArgs, head_dim_v: int) -> None:
    if args.out is None:
        return
    out = check.check_tensor(function, "out", args.out, "a tensor of the shape of q with head_dim_v")
    if out.dtype != out_dtype(args.q.dtype):
        raise InvalidTypeError(f"{function}: out must have dtype {out_dtype(args.q.dtype)}, got {out.dtype}")
    check.check_shape(function, "out", out, (*args.q.shape[:-1], head_dim_v), "q.shape[:-1] + (head_dim_v,)")
    check.check_device(function, "out", out, args.q.device)
    repeats = any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True))
    if out.stride(-1) != 1 or repeats:
        raise InvalidArgumentError(
            f"{function}: out must be contiguous in its last dimension and hold every element once, got strides"
            f" {out.stride()}"
        )


def _layout_obstacles(args: AttentionArgs) -> tuple[str, ...]:
    """Strides and addresses that kernels, which move 16 bytes at a time, do not take."""
    obstacles = []
    for name in ("q", "k", "v", "out", "qv"):
        tensor = getattr(args, name)
        if not isinstance(tensor, Tensor):
            continue
        step = ALIGNMENT_BYTES // tensor.element_size()
        strides = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
        if any(stride % step for stride in strides):
            obstacles.append(f"the strides of {name}, {tensor.stride()}, are not multiples of {step} elements")
        if any(stride < 0 for stride in strides):
            obstacles.append(f"the strides of {name}, {tensor.stride()}, are negative")
        if tensor.device.type == "cuda" and tensor.data_ptr() % ALIGNMENT_BYTES:
            obstacles.append(f"the address of {name} is not a multiple of {ALIGNMENT_BYTES} bytes")
    return tuple(obstacles)
