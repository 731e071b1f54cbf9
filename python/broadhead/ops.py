"""The torch.library operators `broadhead::*`: what torch.compile, export, FakeTensor and DTensor see of the package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import metadata
from . import validation as check
from .append_launch import Append, run_append
from .backward import run_backward
from .errors import UnsupportedError
from .forward import run_forward
from .inputs import plain_scalars, read_tensors
from .masking import normalize_window
from .merge_states import run_merge
from .problem import AttentionArgs, needs_gradients, out_dtype, refuse_float8_gradient
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
_NUM_DIFFERENTIABLE = 5  # q, k, v, qv, sinks come first
_NUM_INPUTS = _INPUTS.count(",") + 1


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
    out, lse = run_forward(function, args)
    return _canonical(out), _canonical(lse)


@mha_fwd.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    return _fake_outputs(_arguments(*inputs)[1])


@torch.library.custom_op(
    "broadhead::mha_bwd",
    mutates_args=(),
    schema=(
        f"(Tensor? dout, Tensor? dlse, Tensor? out, Tensor? softmax_lse, {_INPUTS})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
@clamped()
def mha_bwd(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor | None, softmax_lse: Tensor | None, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    function, args = _arguments(*inputs)
    args = args._replace(backend="torch", scheduler_metadata=None)
    gradients = run_backward(function, dout, dlse, args, out=out, softmax_lse=softmax_lse)
    return tuple(  # type: ignore[return-value]
        args.q.new_empty(0) if gradient is None else _canonical(gradient) for gradient in gradients
    )


@mha_bwd.register_fake
def _(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor | None, softmax_lse: Tensor | None, *inputs: Any
) -> tuple[Tensor, ...]:
    q = inputs[0]
    return tuple(
        q.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in inputs[:_NUM_DIFFERENTIABLE]
    )


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    # The LSE is fp32. Gradients of fp64 are to be exact: there, both are computed again.
    results = (None, None) if inputs[0].dtype == torch.float64 else output
    saved = (*results, *inputs)
    ctx.is_tensor = [isinstance(value, Tensor) for value in saved]
    ctx.others = [None if isinstance(value, Tensor) else value for value in saved]
    ctx.save_for_backward(*[value for value in saved if isinstance(value, Tensor)])


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    tensors = iter(ctx.saved_tensors)
    saved = [next(tensors) if tensor else other for tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)]
    inputs = saved[2:]
    rest: list[None] = [None] * (_NUM_INPUTS - _NUM_DIFFERENTIABLE)
    if dout is None and dlse is None:
        return (*[None] * _NUM_DIFFERENTIABLE, *rest)
    gradients = torch.ops.broadhead.mha_bwd(
        None if dout is None else dout.contiguous(), None if dlse is None else dlse.contiguous(), *saved
    )
    first = [
        gradient if value is not None and needed else None
        for gradient, value, needed in zip(gradients, inputs, ctx.needs_input_grad, strict=False)
    ]
    return (*first, *rest)


mha_fwd.register_autograd(_differentiate, setup_context=_save_inputs)


@torch.library.custom_op(
    "broadhead::mha_fwd_out", mutates_args=("out",), schema=f"({_INPUTS}, Tensor(a!) out) -> Tensor"
)
@clamped()
def mha_fwd_out(*inputs_and_out: Any) -> Tensor:
    function, args = _arguments(*inputs_and_out[:-1])
    return _canonical(run_forward(function, args._replace(out=inputs_and_out[-1]))[1])


@mha_fwd_out.register_fake
def _(*inputs_and_out: Any) -> Tensor:
    return _fake_outputs(_arguments(*inputs_and_out[:-1])[1])[1]


def call_forward(function: str, args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """run_forward through the operators; traceable, so it validates only what a schema needs."""
    args = plain_scalars(function, read_tensors(function, args))
    cu_seqlens_k, seqused_k = args.cu_seqlens_k, args.seqused_k
    if args.page_table is not None and cu_seqlens_k is not None:
        seqused_k = cu_seqlens_k[1:] - cu_seqlens_k[:-1] if seqused_k is None else seqused_k
        cu_seqlens_k = None
    window_left, window_right = normalize_window(args.window_size, args.causal, function)
    backend = args.backend
    if needs_gradients(args.q, args.k, args.v, args.qv, args.sinks):
        refuse_float8_gradient(function, args.q.dtype, args.k.dtype)
        if args.out is not None:
            raise UnsupportedError(f"{function}: out= has no gradient; leave out away, or call under torch.no_grad()")
        if backend == "cuda":
            raise UnsupportedError(
                f"{function}: backend='cuda' has no backward kernel in this release, and an input requires grad;"
                " leave backend unset, or call under torch.no_grad()"
            )
        backend = "torch"
    inputs = (
        args.q, args.k, args.v, args.qv, args.sinks, args.cu_seqlens_q, cu_seqlens_k, args.seqused_q, seqused_k,
        args.max_seqlen_q, args.max_seqlen_k, args.page_table, args.kv_batch_idx, args.leftpad_k, args.q_descale,
        args.k_descale, args.v_descale, args.softmax_scale, args.causal, window_left, window_right,
        args.attention_chunk, args.softcap, args.scheduler_metadata, args.num_splits, args.pack_gqa, args.sm_margin,
        args.prefix_lens, args.tokens_per_split, backend, function,
    )  # fmt: skip
    if args.out is None:
        return torch.ops.broadhead.mha_fwd(*inputs)
    return args.out, torch.ops.broadhead.mha_fwd_out(*inputs, args.out)


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
    turned, lengths = run_append(
        Append(
            k_cache, v_cache, k_new, v_new, cache_seqlens, None if rotary_cos is None else q, rotary_cos, rotary_sin,
            rotary_seqlens, cu_seqlens_q, cu_seqlens_k_new, page_table, cache_batch_idx, k_descale, v_descale,
            rotary_interleaved, causal_or_local,
        ),
        function="append_kv",
    )  # fmt: skip
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
    out, lse = run_merge(out_a, lse_a, out_b, lse_b, None, backend)
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
    return _canonical(run_merge(out_a, lse_a, out_b, lse_b, out, backend)[1])


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
    return metadata.get_scheduler_metadata(
        batch_size,
        max_seqlen_q,
        max_seqlen_k,
        num_heads_q,
        num_heads_kv,
        headdim,
        cache_seqlens,
        qkv_dtype=qkv_dtype,
        headdim_v=headdim_v,
        cu_seqlens_q=cu_seqlens_q,
        cache_leftpad=cache_leftpad,
        page_size=page_size,
        max_seqlen_k_new=max_seqlen_k_new,
        causal=causal,
        window_size=(window_left, window_right),
        attention_chunk=attention_chunk,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
        out=out,
        page_table=page_table,
        has_qv=has_qv,
        kv_dtype=kv_dtype,
        tokens_per_split=tokens_per_split,
    )


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
