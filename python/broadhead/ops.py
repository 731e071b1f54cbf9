"""The torch.library operators `broadhead::*`: what torch.compile, export, FakeTensor and DTensor see of the package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import metadata, transforms
from . import validation as check
from .append_launch import Append, run_append
from .backward import run_backward_below
from .errors import UnsupportedError
from .forward import run_below
from .inputs import plain_scalars, read_tensors
from .masking import normalize_window
from .merge_states import plain_states, run_merge
from .plain import is_transformed, plain_fields, refuse_tangents, refuse_transformed, resolved, resolved_fields
from .problem import AttentionArgs, check_forward, needs_gradients, out_dtype, refuse_float8_gradient
from .validation import clamped

# The arguments that mha_fwd, mha_fwd_out and mha_bwd share, in one order.
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? qv, Tensor? sinks, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " Tensor? seqused_q, Tensor? seqused_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, Tensor? page_table,"
    " Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale,"
    " float? softmax_scale, bool causal, SymInt window_left, SymInt window_right, SymInt attention_chunk,"
    " float softcap, Tensor? scheduler_metadata, SymInt num_splits, bool? pack_gqa, SymInt sm_margin,"
    " Tensor? prefix_lens, SymInt tokens_per_split,"
    " str? backend, str function"
)
# What mha_bwd takes besides: the gradients of out and softmax_lse, and these themselves.
_OUTPUTS = "Tensor? dout, Tensor? dlse, Tensor? out, Tensor? softmax_lse"
_NUM_DIFFERENTIABLE = 5  # q, k, v, qv, sinks come first


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    page_table: Tensor | None,
    kv_batch_idx: Tensor | None,
    leftpad_k: Tensor | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_left: int,
    window_right: int,
    attention_chunk: int,
    softcap: float,
    scheduler_metadata: Tensor | None,
    num_splits: int,
    pack_gqa: bool | None,
    sm_margin: int,
    prefix_lens: Tensor | None,
    tokens_per_split: int,
    backend: str | None,
    function: str,
) -> tuple[str, AttentionArgs]:
    """An operator's arguments as those of run_forward."""
    return function, AttentionArgs(
        q, k, v, qv, None, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, page_table,
        kv_batch_idx, leftpad_k, q_descale, k_descale, v_descale, softmax_scale, causal, (window_left, window_right),
        attention_chunk, softcap, scheduler_metadata, num_splits, pack_gqa, sm_margin, sinks, prefix_lens, backend,
        tokens_per_split,
    )  # fmt: skip


def _canonical(x: Tensor) -> Tensor:
    """``x`` with the strides of a new tensor, also where a size is 1: what the fake implementations promise."""
    return x.contiguous().view(-1).view(x.shape)


def _fake_outputs(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    q = args.q
    out = q.new_empty((*q.shape[:-1], args.v.shape[-1]), dtype=out_dtype(q.dtype))
    rows = (q.shape[-2], q.shape[0]) if args.cu_seqlens_q is not None else (q.shape[0], q.shape[-2], q.shape[1])
    return out, q.new_empty(rows, dtype=torch.float32)


# --- mha_fwd and its gradient ----------------------------------------------------------------------------------------


@torch.library.custom_op("broadhead::mha_fwd", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
@clamped()
def mha_fwd(*inputs: Any) -> tuple[Tensor, Tensor]:
    function, args = _arguments(*inputs)
    out, lse = run_below(function, args)
    return _canonical(out), _canonical(lse)


@mha_fwd.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    return _fake_outputs(_arguments(*inputs)[1])


@torch.library.custom_op(
    "broadhead::mha_bwd",
    mutates_args=(),
    schema=f"({_OUTPUTS}, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@clamped()
def mha_bwd(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor | None, softmax_lse: Tensor | None, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, qv and sinks; empty where the input was not given."""
    function, args = _arguments(*inputs)
    args = args._replace(backend="torch", scheduler_metadata=None)
    gradients = run_backward_below(function, (dout, dlse, out, softmax_lse), args)
    return tuple(  # type: ignore[return-value]
        args.q.new_empty(0) if gradient is None else _canonical(gradient) for gradient in gradients
    )


@mha_bwd.register_fake
def _(dout: Any, dlse: Any, out: Any, softmax_lse: Any, *inputs: Any) -> tuple[Tensor, ...]:
    q = inputs[0]
    return tuple(
        q.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in inputs[:_NUM_DIFFERENTIABLE]
    )


mha_bwd.register_autograd(transforms.refuse_second_derivative)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    return transforms.differentiate(torch.ops.broadhead.mha_bwd, ctx, dout, dlse)


mha_fwd.register_autograd(_differentiate, setup_context=transforms.Forward.setup_context)


@torch.library.custom_op(
    "broadhead::mha_fwd_out", mutates_args=("out",), schema=f"({_INPUTS}, Tensor(a!) out) -> Tensor"
)
@clamped()
def mha_fwd_out(*inputs_and_out: Any) -> Tensor:
    function, args = _arguments(*inputs_and_out[:-1])
    return _canonical(run_below(function, args._replace(out=inputs_and_out[-1]))[1])


@mha_fwd_out.register_fake
def _(*inputs_and_out: Any) -> Tensor:
    return _fake_outputs(_arguments(*inputs_and_out[:-1])[1])[1]


def _operator_inputs(function: str, args: AttentionArgs, backend: str | None) -> tuple[Any, ...]:
    """The arguments of an operator, of those of run_forward."""
    cu_seqlens_k, seqused_k = args.cu_seqlens_k, args.seqused_k
    if args.page_table is not None and cu_seqlens_k is not None:
        seqused_k = cu_seqlens_k[1:] - cu_seqlens_k[:-1] if seqused_k is None else seqused_k
        cu_seqlens_k = None
    window_left, window_right = normalize_window(args.window_size, args.causal, function)
    return (
        args.q, args.k, args.v, args.qv, args.sinks, args.cu_seqlens_q, cu_seqlens_k, args.seqused_q, seqused_k,
        args.max_seqlen_q, args.max_seqlen_k, args.page_table, args.kv_batch_idx, args.leftpad_k, args.q_descale,
        args.k_descale, args.v_descale, args.softmax_scale, args.causal, window_left, window_right,
        args.attention_chunk, args.softcap, args.scheduler_metadata, args.num_splits, args.pack_gqa, args.sm_margin,
        args.prefix_lens, args.tokens_per_split, backend, function,
    )  # fmt: skip


def call_forward(function: str, args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """run_forward through the operators; traceable, so it validates only what a schema needs."""
    args = plain_scalars(function, read_tensors(function, args))
    backend = args.backend
    if not is_compiling():
        refuse_tangents(function, *args)
        args = resolved_fields(function, args, written=("out",))
        if any(isinstance(x, Tensor) and x.device.type == "meta" for x in args):
            check_forward(function, args)  # nothing behind this will
    if needs_gradients(args.q, args.k, args.v, args.qv, args.sinks, args.out):
        refuse_float8_gradient(function, args.q.dtype, args.k.dtype)
        if args.out is not None:
            raise UnsupportedError(f"{function}: out= has no gradient; leave out away, or call under torch.no_grad()")
        if backend == "cuda":
            raise UnsupportedError(
                f"{function}: backend='cuda' has no backward kernel in this release, and an input requires grad;"
                " leave backend unset, or call under torch.no_grad()"
            )
        backend = "torch"
    inputs = _operator_inputs(function, args, backend)
    if not is_compiling() and is_transformed(*args):
        if args.out is not None:
            refuse_transformed(function, "out=", *args)
        if not any(torch._is_functional_tensor(x) for x in args if isinstance(x, Tensor)):
            return transforms.Forward.apply(*inputs)
    if args.out is None:
        return torch.ops.broadhead.mha_fwd(*inputs)
    return args.out, torch.ops.broadhead.mha_fwd_out(*inputs, args.out)


def call_backward(
    function: str, outputs: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None], args: AttentionArgs
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """run_backward through the operators; traceable, so it validates only what a schema needs."""
    args = plain_scalars(function, read_tensors(function, args))
    if args.backend == "cuda":
        raise UnsupportedError(
            f"{function}: backend='cuda' has no backward kernel in this release; leave backend unset"
        )
    if not is_compiling():
        refuse_tangents(function, *outputs, *args)
        args = resolved_fields(function, args)
        dout, dlse, out, softmax_lse = outputs
        outputs = (
            resolved(function, "dout", dout),
            resolved(function, "dlse", dlse),
            resolved(function, "out", out),
            resolved(function, "softmax_lse", softmax_lse),
        )
        if any(isinstance(x, Tensor) and x.device.type == "meta" for x in (*outputs, *args)):
            check_forward(function, args)  # nothing behind this will
    inputs = _operator_inputs(function, args, args.backend)
    # The result has no derivative: like that of an eager call, it is a leaf.
    with torch.no_grad():
        if not is_compiling() and is_transformed(*outputs, *args):
            found = transforms.Backward.apply(*outputs, *inputs)
        else:
            found = torch.ops.broadhead.mha_bwd(*outputs, *inputs)
    dq, dk, dv, dqv, dsinks = found
    return dq, dk, dv, None if args.qv is None else dqv, None if args.sinks is None else dsinks


# --- append_kv -------------------------------------------------------------------------------------------------------

_APPEND = (
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k_new, Tensor v_new, Tensor cache_seqlens, Tensor? page_table,"
    " Tensor? cache_batch_idx, Tensor? cu_seqlens_k_new, Tensor? rotary_cos, Tensor? rotary_sin,"
    " Tensor? rotary_seqlens, bool rotary_interleaved, Tensor? q=None, Tensor? cu_seqlens_q=None,"
    " bool causal_or_local=False, Tensor? k_descale=None, Tensor? v_descale=None) -> (Tensor, Tensor)"
)


@torch.library.custom_op("broadhead::append_kv", mutates_args=("k_cache", "v_cache"), schema=_APPEND)
def append(
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_seqlens: Tensor | None,
    rotary_interleaved: bool,
    q: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    causal_or_local: bool = False,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(q rotated, empty without q; lengths after the append)``."""
    call = Append(
        k_cache, v_cache, k_new, v_new, cache_seqlens, None if rotary_cos is None else q, rotary_cos, rotary_sin,
        rotary_seqlens, cu_seqlens_q, cu_seqlens_k_new, page_table, cache_batch_idx, k_descale, v_descale,
        rotary_interleaved, causal_or_local,
    )  # fmt: skip
    call = plain_fields("append_kv", call, written=("k_cache", "v_cache"))
    turned, lengths = run_append(call, function="append_kv")
    return k_new.new_empty(0) if turned is None else _canonical(turned), lengths


@append.register_fake
def _(
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_seqlens: Tensor | None,
    rotary_interleaved: bool,
    q: Tensor | None = None,
    *others: Any,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    turned = k_new.new_empty(0) if q is None or rotary_cos is None else q.new_empty(q.shape)
    return turned, cache_seqlens.new_empty(cache_seqlens.shape)


# --- merge_attn_states -----------------------------------------------------------------------------------------------

_STATES = "Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b"
_BACKEND = "str? backend=None"


@torch.library.custom_op(
    "broadhead::merge_states", mutates_args=(), schema=f"({_STATES}, {_BACKEND}) -> (Tensor, Tensor)"
)
def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    out, lse = run_merge(*plain_states(out_a, lse_a, out_b, lse_b, None), backend)
    return _canonical(out), _canonical(lse)


@merge_states.register_fake
def _(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


@torch.library.custom_op(
    "broadhead::merge_states_out", mutates_args=("out",), schema=f"({_STATES}, Tensor(a!) out, {_BACKEND}) -> Tensor"
)
def merge_states_out(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, backend: str | None = None
) -> Tensor:
    return _canonical(run_merge(*plain_states(out_a, lse_a, out_b, lse_b, out), backend)[1])


@merge_states_out.register_fake
def _(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, backend: str | None = None) -> Tensor:
    return lse_a.new_empty(lse_a.shape)


# --- get_scheduler_metadata ------------------------------------------------------------------------------------------

_METADATA = (
    "Tensor cache_seqlens, SymInt batch_size, SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt num_heads_q,"
    " SymInt num_heads_kv, SymInt headdim, SymInt headdim_v, ScalarType qkv_dtype, Tensor? cu_seqlens_q,"
    " Tensor? cache_leftpad, SymInt? page_size, SymInt max_seqlen_k_new, bool causal, SymInt window_left,"
    " SymInt window_right, SymInt attention_chunk, SymInt num_splits, bool? pack_gqa, SymInt sm_margin,"
    " Tensor? page_table, bool? has_qv, ScalarType? kv_dtype, SymInt tokens_per_split"
)


@clamped()
def _metadata(out: Tensor | None, inputs: tuple[Any, ...]) -> Tensor:
    (
        cache_seqlens, batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, headdim_v, qkv_dtype,
        cu_seqlens_q, cache_leftpad, page_size, max_seqlen_k_new, causal, window_left, window_right, attention_chunk,
        num_splits, pack_gqa, sm_margin, page_table, has_qv, kv_dtype, tokens_per_split,
    ) = inputs  # fmt: skip
    numbers = (
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, headdim_v, qkv_dtype, page_size,
        max_seqlen_k_new, causal, (window_left, window_right), attention_chunk, num_splits, pack_gqa, sm_margin, has_qv,
        kv_dtype, tokens_per_split,
    )  # fmt: skip
    return metadata.compute((cache_seqlens, cu_seqlens_q, cache_leftpad, out, page_table), numbers, below=True)


@torch.library.custom_op("broadhead::get_scheduler_metadata", mutates_args=(), schema=f"({_METADATA}) -> Tensor")
def get_scheduler_metadata(*inputs: Any) -> Tensor:
    return _metadata(None, inputs)


@get_scheduler_metadata.register_fake
def _(cache_seqlens: Tensor, batch_size: int, *rest: Any) -> Tensor:
    return cache_seqlens.new_empty(metadata.metadata_size(batch_size))


@torch.library.custom_op(
    "broadhead::get_scheduler_metadata_out", mutates_args=("out",), schema=f"({_METADATA}, Tensor(a!) out) -> ()"
)
def get_scheduler_metadata_out(*inputs_and_out: Any) -> None:
    _metadata(inputs_and_out[-1], inputs_and_out[:-1])


@get_scheduler_metadata_out.register_fake
def _(*inputs_and_out: Any) -> None:
    return None


def call_get_scheduler_metadata(
    batch_size: Any, max_seqlen_q: Any, max_seqlen_k: Any, num_heads_q: Any, num_heads_kv: Any, headdim: Any,
    cache_seqlens: Any, qkv_dtype: Any, headdim_v: Any, cu_seqlens_q: Any, cache_leftpad: Any, page_size: Any,
    max_seqlen_k_new: Any, causal: Any, window_size: Any, attention_chunk: Any, num_splits: Any, pack_gqa: Any,
    sm_margin: Any, out: Any, page_table: Any, has_qv: Any, kv_dtype: Any, tokens_per_split: Any,
) -> Tensor:  # fmt: skip
    """get_scheduler_metadata through the operators; traceable."""
    causal = check.check_bool(metadata.FUNCTION, "causal", causal)
    window_left, window_right = normalize_window(window_size, causal, metadata.FUNCTION)
    attention_chunk = 0 if attention_chunk is None else attention_chunk
    inputs = (
        cache_seqlens, batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim,
        headdim if headdim_v is None else headdim_v, qkv_dtype, cu_seqlens_q, cache_leftpad, page_size,
        max_seqlen_k_new, causal, window_left, window_right, attention_chunk, num_splits, pack_gqa, sm_margin,
        page_table, has_qv, kv_dtype, tokens_per_split,
    )  # fmt: skip
    if out is None:
        return torch.ops.broadhead.get_scheduler_metadata(*inputs)
    torch.ops.broadhead.get_scheduler_metadata_out(*inputs, out)
    return out
