"""Runs one forward call: as one like it ran before, or validates and decides, then the kernel or the torch fallback."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..call import validation as check
from ..call.arguments import AttentionArgs
from ..call.check import CheckedCall, check_forward
from ..call.inputs import read_tensors
from ..call.plain import plain_fields
from ..call.problem import AttentionProblem, out_dtype
from ..plan.device import DeviceDescription, describe
from ..plan.dispatch import Plan, refusal_text, resolve
from .cuda_backend import find_run_known, make_launch, run_new
from .fallback import ASKED_FOR_TORCH, settle_fallback, state
from .metadata import check_buffer, check_identity


def run(function: str, args: AttentionArgs) -> tuple[Tensor, Any]:
    """``(out, softmax_lse)`` of a call; ``function`` names the public function in errors."""
    result = find_run_known()(function, True, args)
    return run_plain(function, args, True) if result is None else result


def run_plain(function: str, given: AttentionArgs, need_lse: bool) -> tuple[Tensor, Any]:
    """A call that is not known, on arguments that no mode or subclass has a say in."""
    args = read_tensors(function, plain_fields(function, given, written=("out",)))
    if args.page_table is not None and args.cu_seqlens_k is not None:
        lengths = _lengths_of_paged(function, args.q, args.cu_seqlens_k, args.seqused_k)
        args = args._replace(seqused_k=lengths, cu_seqlens_k=None)
    if args is not given:
        result = find_run_known()(function, need_lse, args)
        if result is not None:
            return _as_given(result, given)
    return _as_given(_decide_and_run(function, args, need_lse), given)


def _as_given(result: tuple[Tensor, Any], given: AttentionArgs) -> tuple[Tensor, Any]:
    """The result with the very object that was given as out."""
    return result if given.out is None else (given.out, result[1])


def _lengths_of_paged(function: str, q: Any, cu_seqlens_k: Any, seqused_k: Any) -> Any:
    """With a page table cu_seqlens_k indexes no tokens: its differences are the lengths, unless seqused_k says them."""
    check.check_tensor(function, "q", q, "a tensor")
    cu = check.check_int32(function, "cu_seqlens_k", cu_seqlens_k, (None,), q.device, "(batch + 1,)")
    return cu[1:] - cu[:-1] if seqused_k is None else seqused_k


def select(function: str, problem: AttentionProblem, device: torch.device, backend: str | None) -> Plan | None:
    """The plan to run, or None for the torch fallback; warns about a fallback on a CUDA device.

    Raises:
        UnsupportedError: ``backend="cuda"`` or BROADHEAD_STRICT=1 asks for a kernel, and there is none.
    """
    if backend == "torch":
        state.last = ("torch", None, ASKED_FOR_TORCH)
        return None
    description = describe(device)
    plan = resolve(problem, description)
    if plan.row is not None:
        return plan
    settle_fallback(
        function, description, backend, plan.reason, lambda: _cuda_refusal(function, problem, description, plan)
    )
    state.last = ("torch", None, plan.reason)
    return None


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


def metadata_identity(function: str, args: AttentionArgs) -> tuple[Any, ...]:
    """What scheduler metadata of a call must have been made for: the last arguments of check_identity."""
    return _identity_of(check_forward(function, args).problem, args.q.device)


def _identity_of(problem: AttentionProblem, device: torch.device) -> tuple[Any, ...]:
    config = resolve(problem, describe(device)).metadata_config
    return config, problem.page_size, problem.seqlen_k, problem.num_splits


def _cuda_refusal(function: str, problem: AttentionProblem, device: DeviceDescription, plan: Plan) -> str:
    if device.type not in ("cuda", "hip"):
        return (
            f"{function}: backend='cuda' needs tensors on an NVIDIA CUDA device, got tensors on {device.type};"
            " move them with .cuda(), or leave backend unset to run on the torch fallback"
        )
    return refusal_text(function, problem, device, plan)


def _decide_and_run(function: str, args: AttentionArgs, need_lse: bool) -> tuple[Tensor, Any]:
    backend = check.check_backend(function, args.backend)
    call = check_forward(function, args)
    problem = call.problem
    device = args.q.device
    if args.scheduler_metadata is not None:
        check_buffer(function, "scheduler_metadata", args.scheduler_metadata, problem.batch, device)
    plan = select(function, problem, device, backend)
    if plan is None:
        if args.scheduler_metadata is not None:
            check_identity(function, args.scheduler_metadata, *_identity_of(problem, device))
        return _run_reference(args, call)
    if call.total_q == 0 or problem.batch == 0:
        assert plan.row is not None
        state.last = ("cuda", plan.row.id, "no query: nothing was launched")
        return _empty_result(args, call)
    return run_new(make_launch(args, call, plan), function, need_lse, args)


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


def describe_call(args: AttentionArgs, call: CheckedCall) -> reference.Call:
    """A validated call as the torch fallback takes it."""
    problem = call.problem
    return reference.describe(
        args.q,
        args.k,
        args.v,
        qv=args.qv,
        softmax_scale=call.softmax_scale,
        window_left=problem.window_left,
        window_right=problem.window_right,
        attention_chunk=problem.attention_chunk,
        softcap=call.softcap,
        sinks=args.sinks,
        prefix_lens=args.prefix_lens,
        cu_seqlens_q=args.cu_seqlens_q,
        cu_seqlens_k=args.cu_seqlens_k,
        max_seqlen_q=problem.seqlen_q,
        max_seqlen_k=problem.seqlen_k,
        seqused_q=args.seqused_q,
        seqused_k=args.seqused_k,
        leftpad_k=args.leftpad_k,
        kv_batch_idx=args.kv_batch_idx,
        page_table=args.page_table,
        q_descale=args.q_descale,
        k_descale=args.k_descale,
        v_descale=args.v_descale,
    )
