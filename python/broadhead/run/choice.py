"""What a call runs on: the plan of its kernel, or the torch reference and the call as that takes it."""

from __future__ import annotations

import torch

from .. import reference
from ..call.arguments import AttentionArgs
from ..call.check import CheckedCall
from ..call.problem import AttentionProblem
from ..plan.device import DeviceDescription, describe
from ..plan.dispatch import Plan, refusal_text, resolve
from .fallback import ASKED_FOR_TORCH, settle_fallback, state


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


def _cuda_refusal(function: str, problem: AttentionProblem, device: DeviceDescription, plan: Plan) -> str:
    if device.type not in ("cuda", "hip"):
        return (
            f"{function}: backend='cuda' needs tensors on an NVIDIA CUDA device, got tensors on {device.type};"
            " move them with .cuda(), or leave backend unset to run on the torch fallback"
        )
    return refusal_text(function, problem, device, plan)


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
        query_ranges=args.query_ranges,
        ranges_in_window=bool(args.ranges_in_window),
        causal_by_sequence=args.causal_by_sequence,
        tree_mask=args.tree_mask,
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
