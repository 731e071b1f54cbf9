"""Runs one forward call: as one like it ran before, or validates and decides, then the kernel or the torch fallback."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..call import validation as check
from ..call.arguments import DIFFERENTIABLE, AttentionArgs
from ..call.check import CheckedCall, check_forward
from ..call.inputs import read_tensors
from ..call.plain import plain_fields, refuse_second_derivative
from ..call.problem import AttentionProblem, out_dtype
from ..plan.device import describe
from ..plan.dispatch import resolve
from . import known
from .backward import gradient_plan, run_backward
from .choice import describe_call, select
from .cuda_backend import make_launch, run_new
from .fallback import state
from .metadata_records import check_buffer, check_identity


def run(function: str, given: AttentionArgs, need_lse: bool = True, deterministic: bool = False) -> tuple[Tensor, Any]:
    """``(out, softmax_lse)`` of a call, on arguments that no mode or subclass has a say in.

    Args:
        function: the public function, for errors.
        need_lse: without it softmax_lse may be None.
        deterministic: of gradients.
    """
    result = known.run_known(function, need_lse, given)
    if result is not None:
        return result
    args = read_tensors(function, plain_fields(function, given, written=("out",)))
    if args.page_table is not None and args.cu_seqlens_k is not None:
        lengths = _lengths_of_paged(function, args.q, args.cu_seqlens_k, args.seqused_k)
        args = args._replace(seqused_k=lengths, cu_seqlens_k=None)
    if args is not given:
        result = known.run_known(function, need_lse, args)
        if result is not None:
            return _as_given(result, given)
    backend = check.check_backend(function, args.backend)
    call = check_forward(function, args, deterministic)
    problem, device = call.problem, args.q.device
    if args.scheduler_metadata is not None:
        check_buffer(function, "scheduler_metadata", args.scheduler_metadata, problem.batch, device)
    plan = select(function, problem, device, backend)
    if plan is None:
        if args.scheduler_metadata is not None:
            check_identity(function, args.scheduler_metadata, *_identity_of(problem, device))
        result = _run_reference(args, call)
    elif "gradients" in problem.features:
        result = _Attention.apply(function, deterministic, *args)
    elif call.total_q == 0 or problem.batch == 0:
        assert plan.row is not None
        state.last = ("cuda", plan.row.id, "no query: nothing was launched")
        result = _empty_result(args, call)
    else:
        result = run_new(make_launch(args, call, plan), function, need_lse, args)
    return _as_given(result, given)


def run_differentiable(function: str, args: AttentionArgs, deterministic: bool) -> tuple[Tensor, Any]:
    """As run, of a call whose gradients an operator will compute: where no kernel does, torch runs it as well."""
    if args.backend != "torch" and gradient_plan(function, args, deterministic) is None:
        args = args._replace(backend="torch")
    return run(function, args)


def _as_given(result: tuple[Tensor, Any], given: AttentionArgs) -> tuple[Tensor, Any]:
    """The result with the very object that was given as out."""
    return result if given.out is None else (given.out, result[1])


def _lengths_of_paged(function: str, q: Any, cu_seqlens_k: Any, seqused_k: Any) -> Any:
    """With a page table cu_seqlens_k indexes no tokens: its differences are the lengths, unless seqused_k says them."""
    check.check_tensor(function, "q", q, "a tensor")
    cu = check.check_int32(function, "cu_seqlens_k", cu_seqlens_k, (None,), q.device, "(batch + 1,)")
    return cu[1:] - cu[:-1] if seqused_k is None else seqused_k


def check_only(function: str, args: AttentionArgs) -> bool:
    """Raise what the call would raise, before anything is written: for calls that change a cache first.

    Returns whether a kernel will run the call.
    """
    backend = check.check_backend(function, args.backend)
    problem = check_forward(function, args).problem
    if args.scheduler_metadata is not None:
        check_buffer(function, "scheduler_metadata", args.scheduler_metadata, problem.batch, args.q.device)
        check_identity(function, args.scheduler_metadata, *_identity_of(problem, args.q.device))
    return select(function, problem, args.q.device, backend) is not None


def _identity_of(problem: AttentionProblem, device: torch.device) -> tuple[Any, ...]:
    config = resolve(problem, describe(device)).metadata_config
    return config, problem.page_size, problem.seqlen_k, problem.num_splits


def _empty_result(args: AttentionArgs, call: CheckedCall) -> tuple[Tensor, Tensor]:
    """No query: nothing to launch."""
    q, problem = args.q, call.problem
    shape = (*q.shape[:-1], problem.head_dim_v)
    out = q.new_zeros(shape, dtype=out_dtype(q.dtype)) if args.out is None else args.out
    heads = problem.num_heads_q
    lse_shape = (heads, q.shape[0]) if args.cu_seqlens_q is not None else (q.shape[0], heads, q.shape[1])
    return out, q.new_full(lse_shape, float("-inf"), dtype=torch.float32)


def _run_reference(args: AttentionArgs, call: CheckedCall) -> tuple[Tensor, Tensor]:
    return reference.run(describe_call(args, call), args.out)


class _Attention(torch.autograd.Function):
    """``(out, softmax_lse)`` of the fields of AttentionArgs, on kernels in both directions."""

    @staticmethod
    def forward(function: str, deterministic: bool, *fields: Any) -> tuple[Tensor, Tensor]:
        return run(function, AttentionArgs(*fields))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.function, ctx.deterministic, *fields = inputs
        saved = (*output, *fields)
        ctx.others = [None if isinstance(value, Tensor) else value for value in saved]
        ctx.is_tensor = [isinstance(value, Tensor) for value in saved]
        ctx.save_for_backward(*[value for value in saved if isinstance(value, Tensor)])

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        out, lse, *fields = [
            next(tensors) if tensor else other for tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)
        ]
        nothing: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if dout is None and dlse is None:
            return tuple(nothing)
        given = (ctx.function, ctx.deterministic, dout, dlse, out, lse, *fields)
        found = _Gradients.apply(*given) if torch.is_grad_enabled() else _Gradients.forward(*given)
        for name, gradient in zip(DIFFERENTIABLE, found, strict=True):
            position = 2 + AttentionArgs._fields.index(name)
            nothing[position] = gradient if ctx.needs_input_grad[position] else None
        return tuple(nothing)


class _Gradients(torch.autograd.Function):
    """The backward pass as a function of its own, which says that it has no derivative."""

    @staticmethod
    def forward(function: str, deterministic: bool, *given: Any) -> tuple[Tensor | None, ...]:
        dout, dlse, out, lse, *fields = given
        args = AttentionArgs(*fields)._replace(scheduler_metadata=None)
        return run_backward(function, dout, dlse, args, out=out, softmax_lse=lse, deterministic=deterministic)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept: its derivative is refused."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, ...]:
        return refuse_second_derivative()
