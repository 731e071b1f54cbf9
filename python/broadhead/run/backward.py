"""Runs the gradients of a call, from out and softmax_lse as they are given: a kernel, else the torch reference."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..call import validation as check
from ..call.arguments import AttentionArgs
from ..call.check import CheckedCall, check_forward
from ..call.inputs import read_tensors
from ..call.plain import plain, plain_fields, refuse_tangents
from ..call.problem import (
    AttentionProblem,
    asks_deterministic,
    backward_of,
    gradient_features,
    out_dtype,
    refuse_float8_gradient,
)
from ..errors import InvalidArgumentError, InvalidTypeError
from ..plan.device import describe
from ..plan.dispatch import Plan, resolve
from .choice import describe_call, select
from .cuda_backend import launch_backward, make_launch, run_new
from .fallback import state


class Gradients(NamedTuple):
    """Gradients of one call; None where the input was not given."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dqv: Tensor | None
    dsinks: Tensor | None


def _check(function: str, args: AttentionArgs, deterministic: bool) -> tuple[CheckedCall, AttentionProblem]:
    """The call whose gradients are asked for, and their problem."""
    with torch.no_grad():
        call = check_forward(function, args._replace(out=None))
    return call, backward_of(call.problem, gradient_features(deterministic, call.problem.batch, call.total_q))


def gradient_plan(function: str, args: AttentionArgs, deterministic: bool) -> Plan | None:
    """The plan of the gradients of a call, or None: torch computes them. There is no warning for that here.

    Args:
        deterministic: as for run_backward.

    Raises:
        UnsupportedError: ``backend="cuda"`` asks for a kernel, and there is none.
    """
    _, problem = _check(function, args, deterministic)
    if args.backend == "cuda":
        return select(function, problem, args.q.device, "cuda")
    plan = resolve(problem, describe(args.q.device))
    return None if plan.row is None else plan


def run_backward_below(
    function: str, outputs: tuple[Any, Any, Any, Any], args: AttentionArgs, deterministic: bool
) -> Gradients:
    """run_backward of ``(dout, dlse, out, softmax_lse)`` on arguments that no mode or subclass has a say in."""
    refuse_tangents(function, *outputs)
    dout, dlse, out, softmax_lse = (
        plain(function, name, value)
        for name, value in zip(("dout", "dlse", "out", "softmax_lse"), outputs, strict=True)
    )
    args = read_tensors(function, plain_fields(function, args))
    return run_backward(function, dout, dlse, args, out=out, softmax_lse=softmax_lse, deterministic=deterministic)


def run_backward(
    function: str,
    dout: Any,
    dlse: Any,
    args: AttentionArgs,
    *,
    out: Any = None,
    softmax_lse: Any = None,
    deterministic: bool = False,
) -> Gradients:
    """Gradients of ``out`` and ``softmax_lse`` with respect to q, k, v, qv and sinks. Rows that nobody owns get 0.

    Args:
        out, softmax_lse: results of the call, or of one that its keys are a part of; None: they are computed.
        deterministic: every sum in an order that is the same in every run. The torch reference always adds so.
            ``torch.use_deterministic_algorithms`` asks for it as well.
    """
    backend = check.check_backend(function, args.backend)
    with torch.no_grad():
        call, problem = _check(function, args, deterministic)
        refuse_float8_gradient(function, args.q.dtype, args.k.dtype)
        _check_results(function, dout, dlse, out, softmax_lse, args, call)
        plan = select(function, problem, args.q.device, backend)
        if plan is None or call.total_q == 0 or call.problem.batch == 0 or args.k.numel() == 0:
            if plan is not None and plan.row is not None:
                state.last = ("cuda", plan.row.id, "no query or no key: nothing was launched")
            return Gradients(*reference.gradients(describe_call(args, call), dout, dlse, out, softmax_lse))
        if out is None or softmax_lse is None:
            found = _forward(function, args, call)
            out, softmax_lse = (found[i] if x is None else x for i, x in enumerate((out, softmax_lse)))
        given = (dout, dlse, out, softmax_lse)
        dq, dk, dv, dsinks = launch_backward(args, call, plan, given, asks_deterministic(deterministic))
        return Gradients(dq, dk, dv, None, dsinks)


def _forward(function: str, args: AttentionArgs, call: CheckedCall) -> tuple[Any, Any]:
    """``(out, softmax_lse)`` of the call, by a kernel if there is one."""
    plan = resolve(call.problem, describe(args.q.device))
    if plan.row is None or call.total_q == 0 or call.problem.batch == 0:
        return reference.run(describe_call(args, call), None)
    return run_new(make_launch(args, call, plan), function, True, args)


def _check_results(
    function: str, dout: Any, dlse: Any, out: Any, softmax_lse: Any, args: AttentionArgs, call: CheckedCall
) -> None:
    """The gradients that come in, and the results that they are of."""
    q = args.q
    if dout is None and dlse is None:
        raise InvalidArgumentError(f"{function}: dout must be a tensor of the shape of out, got None")
    heads = call.problem.num_heads_q
    shape = (*q.shape[:-1], call.problem.head_dim_v)
    for name, value in (("dout", dout), ("out", out)):
        if value is not None:
            tensor = check.check_tensor(function, name, value, f"a tensor of shape {shape}")
            check.check_shape(function, name, tensor, shape, "q.shape[:-1] + (head_dim_v,)")
            check.check_device(function, name, tensor, q.device)
            check.check_same_dtype(function, name, tensor, out_dtype(q.dtype))
    rows = (heads, q.shape[0]) if args.cu_seqlens_q is not None else (q.shape[0], heads, q.shape[1])
    for name, value in (("dlse", dlse), ("softmax_lse", softmax_lse)):
        if value is not None:
            tensor = check.check_tensor(function, name, value, f"a tensor of shape {rows}")
            check.check_shape(function, name, tensor, rows, "(batch, heads_q, seqlen_q) or (heads_q, total_q)")
            check.check_device(function, name, tensor, q.device)
            if tensor.dtype not in (torch.float32, torch.float64):
                raise InvalidTypeError(f"{function}: {name} must be fp32 or fp64, got {tensor.dtype}")
