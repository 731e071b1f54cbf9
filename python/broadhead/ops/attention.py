"""The operators of attention and its gradient: broadhead::mha_fwd, mha_fwd_out, mha_bwd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..call import validation as check
from ..call.arguments import DIFFERENTIABLE, OPERATOR_NAMES, OPERATOR_SCHEMA, WINDOW_SIDES, AttentionArgs
from ..call.check import check_forward
from ..call.inputs import plain_scalars, read_tensors
from ..call.masking import normalize_window
from ..call.plain import (
    is_transformed,
    refuse_second_derivative,
    refuse_tangents,
    refuse_transformed,
    resolved,
    resolved_fields,
)
from ..call.problem import needs_gradients, out_dtype, refuse_float8_gradient, refuse_tree_gradient
from ..errors import UnsupportedError
from ..run.backward import gradient_plan, run_backward_below
from ..run.forward import run, run_differentiable
from . import sharding, transforms
from .canonical import canonical

# What mha_bwd takes besides: the gradients of out and softmax_lse, and these themselves.
_OUTPUTS = "Tensor? dout, Tensor? dlse, Tensor? out, Tensor? softmax_lse"


def to_operator(
    function: str, args: AttentionArgs, deterministic: bool, differentiable: bool = False
) -> tuple[Any, ...]:
    """What the operators take of a call: OPERATOR_NAMES. torch.compile traces it."""
    values = dict(zip(AttentionArgs._fields, args))
    if args.page_table is not None and args.cu_seqlens_k is not None:
        if args.seqused_k is None:
            values["seqused_k"] = args.cu_seqlens_k[1:] - args.cu_seqlens_k[:-1]
        values["cu_seqlens_k"] = None
    values["window_left"], values["window_right"] = normalize_window(args.window_size, args.causal, function)
    values["deterministic"] = deterministic
    values["differentiable"] = differentiable
    values["function"] = function
    return tuple([values[name] for name in OPERATOR_NAMES])


def from_operator(inputs: tuple[Any, ...]) -> tuple[AttentionArgs, bool, bool, str]:
    """``(args, deterministic, differentiable, function)`` of what an operator was given."""
    *call, deterministic, differentiable, function = inputs
    values = dict(zip(OPERATOR_NAMES, call))
    window = tuple(values.pop(side) for side in WINDOW_SIDES)
    return AttentionArgs(window_size=window, **values), deterministic, differentiable, function


def _fake_outputs(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    q = args.q
    out = q.new_empty((*q.shape[:-1], args.v.shape[-1]), dtype=out_dtype(q.dtype))
    rows = (q.shape[-2], q.shape[0]) if args.cu_seqlens_q is not None else (q.shape[0], q.shape[-2], q.shape[1])
    return out, q.new_empty(rows, dtype=torch.float32)


# --- mha_fwd and its gradient ----------------------------------------------------------------------------------------


@torch.library.custom_op("broadhead::mha_fwd", mutates_args=(), schema=f"({OPERATOR_SCHEMA}) -> (Tensor, Tensor)")
@check.clamped()
def mha_fwd(*inputs: Any) -> tuple[Tensor, Tensor]:
    args, deterministic, differentiable, function = from_operator(inputs)
    out, lse = run_differentiable(function, args, deterministic) if differentiable else run(function, args)
    return canonical(out), canonical(lse)


@mha_fwd.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    return _fake_outputs(from_operator(inputs)[0])


@torch.library.custom_op(
    "broadhead::mha_bwd",
    mutates_args=(),
    schema=f"({_OUTPUTS}, {OPERATOR_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@check.clamped()
def mha_bwd(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor | None, softmax_lse: Tensor | None, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, qv and sinks; empty where the input was not given."""
    args, deterministic, _, function = from_operator(inputs)
    args = args._replace(scheduler_metadata=None)
    if args.backend != "torch" and gradient_plan(function, args, deterministic) is None:
        args = args._replace(backend="torch")
    gradients = run_backward_below(function, (dout, dlse, out, softmax_lse), args, deterministic)
    return tuple(  # type: ignore[return-value]
        args.q.new_empty(0) if gradient is None else canonical(gradient) for gradient in gradients
    )


@mha_bwd.register_fake
def _(dout: Any, dlse: Any, out: Any, softmax_lse: Any, *inputs: Any) -> tuple[Tensor, ...]:
    q = inputs[0]
    return tuple(
        q.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in inputs[: len(DIFFERENTIABLE)]
    )


mha_bwd.register_autograd(refuse_second_derivative)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    return transforms.differentiate(torch.ops.broadhead.mha_bwd, ctx, dout, dlse)


mha_fwd.register_autograd(_differentiate, setup_context=transforms.Forward.setup_context)


@torch.library.custom_op(
    "broadhead::mha_fwd_out", mutates_args=("out",), schema=f"({OPERATOR_SCHEMA}, Tensor(a!) out) -> Tensor"
)
@check.clamped()
def mha_fwd_out(*inputs_and_out: Any) -> Tensor:
    args, _, _, function = from_operator(inputs_and_out[:-1])
    return canonical(run(function, args._replace(out=inputs_and_out[-1]))[1])


@mha_fwd_out.register_fake
def _(*inputs_and_out: Any) -> Tensor:
    return _fake_outputs(from_operator(inputs_and_out[:-1])[0])[1]


def call_forward(function: str, args: AttentionArgs, deterministic: bool = False) -> tuple[Tensor, Tensor]:
    """A call through the operators; traceable, so it validates only what a schema needs."""
    sharding.prepare(*args)
    args = plain_scalars(function, read_tensors(function, args))
    if not is_compiling():
        refuse_tangents(function, *args)
        args = resolved_fields(function, args, written=("out",))
        if any(isinstance(x, Tensor) and x.device.type == "meta" for x in args):
            check_forward(function, args)  # nothing behind this will
    differentiable = needs_gradients(args.q, args.k, args.v, args.qv, args.sinks, args.out)
    if differentiable:
        refuse_float8_gradient(function, args.q.dtype, args.k.dtype)
        refuse_tree_gradient(function, args.tree_mask)
        if args.out is not None:
            raise UnsupportedError(f"{function}: out= has no gradient; leave out away, or call under torch.no_grad()")
    inputs = to_operator(function, args, deterministic, differentiable)
    if not is_compiling() and is_transformed(*args):
        if args.out is not None:
            refuse_transformed(function, "out=", *args)
        if not any(torch._is_functional_tensor(x) for x in args if isinstance(x, Tensor)):
            return transforms.Forward.apply(*inputs)
    if args.out is None:
        return torch.ops.broadhead.mha_fwd(*inputs)
    return args.out, torch.ops.broadhead.mha_fwd_out(*inputs, args.out)


def call_backward(
    function: str,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    args: AttentionArgs,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Its gradients through the operators; traceable, so it validates only what a schema needs."""
    sharding.prepare(*outputs, *args)
    args = plain_scalars(function, read_tensors(function, args))
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
    inputs = to_operator(function, args, deterministic)
    # The result has no derivative: like that of an eager call, it is a leaf.
    with torch.no_grad():
        if not is_compiling() and is_transformed(*outputs, *args):
            found = transforms.Backward.apply(*outputs, *inputs)
        else:
            found = torch.ops.broadhead.mha_bwd(*outputs, *inputs)
    dq, dk, dv, dqv, dsinks = found
    return dq, dk, dv, None if args.qv is None else dqv, None if args.sinks is None else dsinks
