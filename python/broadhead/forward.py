"""Runs one forward call: finds its launch by shape, or validates and decides, then the kernel or the torch fallback."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import native, reference
from . import validation as check
from .cuda_backend import Launch, launch_forward, make_launch
from .device import DeviceDescription, describe
from .dispatch import Plan, refusal_text, resolve
from .errors import UnsupportedError
from .fallback_notice import is_strict, state, warn_fallback
from .metadata import check_buffer, check_identity
from .problem import AttentionArgs, AttentionProblem, CheckedCall, check_forward, out_dtype, tensor_signature

#: Launches of calls that were validated, by everything that validation and dispatch looked at.
_launches: dict[tuple[Any, ...], Launch] = {}
_MAX_LAUNCHES = 8192
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)

is_grad_enabled = torch.is_grad_enabled


def _signature_in_python(*tensors: Any) -> tuple[Any, ...] | None:
    """As _C.signature, for torch versions without the DLPack exchange API: the first five also by alignment."""
    return tuple(
        None if t is None else (*tensor_signature(t), t.data_ptr() & 15 if i < 5 else 0) for i, t in enumerate(tensors)
    )


def _find_signature(*tensors: Any) -> Any:
    """Bound on first use: the compiled signature where it works on these tensors, else the Python one."""
    global _signature
    compiled = getattr(native.extension(), "signature", None)
    _signature = compiled if compiled is not None and compiled(*tensors) is not None else _signature_in_python
    return _signature(*tensors)


_signature: Any = _find_signature


class KnownCall:
    """A call that its caller finds by a key of its own: run_forward leaves its Launch here for the next time."""

    __slots__ = ("launch",)

    def __init__(self) -> None:
        self.launch: Launch | None = None


def signature_of(*tensors: Any) -> Any:
    """What validation reads of tensors, as a part of a key: the first five also by alignment. None: it can not be."""
    return _signature(*tensors)


def clear_launches() -> None:
    """Forget every decision; for tests that change the device or the build."""
    _launches.clear()


def runs_as_operator(tensor: Any) -> bool:
    """Whether a call on ``tensor`` goes through the operators: it is traced, or a subclass overrides them."""
    return is_compiling() or (type(tensor) not in _PLAIN_TENSORS and isinstance(tensor, Tensor))


def run_forward(
    function: str,
    q: Any,
    k: Any,
    v: Any,
    qv: Any = None,
    out: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    page_table: Any = None,
    kv_batch_idx: Any = None,
    leftpad_k: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    softmax_scale: Any = None,
    causal: Any = False,
    window_size: Any = (-1, -1),
    attention_chunk: Any = 0,
    softcap: Any = 0.0,
    scheduler_metadata: Any = None,
    num_splits: Any = 0,
    pack_gqa: Any = None,
    sm_margin: Any = 0,
    sinks: Any = None,
    prefix_lens: Any = None,
    backend: Any = None,
    tokens_per_split: Any = 0,
    need_lse: bool = True,
    known: KnownCall | None = None,
) -> tuple[Tensor, Any]:
    """``(out, softmax_lse)`` of a call under canonical names; ``function`` names the public function in errors.

    Without ``need_lse`` softmax_lse may be None: a kernel then neither allocates nor writes it. ``known`` belongs to
    calls that agree in everything that a Launch depends on.
    """
    if runs_as_operator(q):
        from . import ops

        return ops.call_forward(
            function, q, k, v, qv, out, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k,
            page_table, kv_batch_idx, leftpad_k, q_descale, k_descale, v_descale, softmax_scale, causal, window_size,
            attention_chunk, softcap, scheduler_metadata, num_splits, pack_gqa, sm_margin, sinks, prefix_lens, backend,
            tokens_per_split,
        )  # fmt: skip
    if page_table is not None and cu_seqlens_k is not None:
        seqused_k, cu_seqlens_k = _lengths_of_paged(function, q, cu_seqlens_k, seqused_k), None
    if type(window_size) is list:
        window_size = tuple(window_size)

    key: tuple[Any, ...] | None = None
    launch = None if known is None else known.launch
    try:
        if (
            launch is None
            and q.is_cuda
            and not (
                is_grad_enabled()
                and (
                    q.requires_grad
                    or k.requires_grad
                    or v.requires_grad
                    or (sinks is not None and sinks.requires_grad)
                    or (qv is not None and qv.requires_grad)
                )
            )
        ):
            signature = _signature(
                q, k, v, out, qv, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table, kv_batch_idx, leftpad_k,
                sinks, prefix_lens, scheduler_metadata, q_descale, k_descale, v_descale,
            )  # fmt: skip
            if signature is not None:
                key = (
                    signature, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, attention_chunk, softcap,
                    num_splits, pack_gqa, sm_margin, backend, tokens_per_split,
                )  # fmt: skip
                launch = _launches.get(key)
    except (AttributeError, TypeError):
        key = None  # not tensors, or unhashable values: validation names them
    if launch is not None:
        if known is not None:
            known.launch = launch
        state.last = launch.dispatch
        return launch_forward(
            function, launch, q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, kv_batch_idx,
            page_table, prefix_lens, sinks, scheduler_metadata, qv, q_descale, k_descale, v_descale, need_lse,
        )  # fmt: skip
    args = AttentionArgs(
        q, k, v, qv, out, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, page_table,
        kv_batch_idx, leftpad_k, q_descale, k_descale, v_descale, softmax_scale, causal, window_size, attention_chunk,
        softcap, scheduler_metadata, num_splits, pack_gqa, sm_margin, sinks, prefix_lens, backend, tokens_per_split,
    )  # fmt: skip
    return _decide_and_run(function, args, key, need_lse)


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
        state.last = ("torch", None, "backend='torch' was asked for")
        return None
    description = describe(device)
    plan = resolve(problem, description)
    if plan.row is not None:
        return plan
    if backend == "cuda":
        raise UnsupportedError(_cuda_refusal(function, problem, description, plan))
    if device.type == "cuda":
        if is_strict():
            raise UnsupportedError("BROADHEAD_STRICT=1: " + _cuda_refusal(function, problem, description, plan))
        warn_fallback(function, description.label(), plan.reason)
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
    return select(function, problem, args.q.device, backend) is not None


def _cuda_refusal(function: str, problem: AttentionProblem, device: DeviceDescription, plan: Plan) -> str:
    if device.type not in ("cuda", "hip"):
        return (
            f"{function}: backend='cuda' needs tensors on an NVIDIA CUDA device, got tensors on {device.type};"
            " move them with .cuda(), or leave backend unset to run on the torch fallback"
        )
    return refusal_text(function, problem, device, plan)


def _decide_and_run(
    function: str, args: AttentionArgs, key: tuple[Any, ...] | None, need_lse: bool
) -> tuple[Tensor, Any]:
    backend = check.check_backend(function, args.backend)
    call = check_forward(function, args)
    problem = call.problem
    device = args.q.device
    if args.scheduler_metadata is not None:
        check_buffer(function, "scheduler_metadata", args.scheduler_metadata, problem.batch, device)
    plan = select(function, problem, device, backend)
    if plan is None:
        if args.scheduler_metadata is not None:
            config = resolve(problem, describe(device)).metadata_config
            check_identity(
                function, args.scheduler_metadata, config, problem.page_size, problem.seqlen_k, problem.num_splits
            )
        return _run_reference(args, call)
    if call.total_q == 0 or problem.batch == 0:
        assert plan.row is not None
        state.last = ("cuda", plan.row.id, "no query: nothing was launched")
        return _empty_result(args, call)
    launch = make_launch(args, call, plan)
    if key is not None:
        if len(_launches) >= _MAX_LAUNCHES:
            _launches.clear()
        _launches[key] = launch
    state.last = launch.dispatch
    return launch_forward(
        function, launch, args.q, args.k, args.v, args.out, args.cu_seqlens_q, args.cu_seqlens_k, args.seqused_q,
        args.seqused_k, args.leftpad_k, args.kv_batch_idx, args.page_table, args.prefix_lens, args.sinks,
        args.scheduler_metadata, args.qv, args.q_descale, args.k_descale, args.v_descale, need_lse,
    )  # fmt: skip


def _empty_result(args: AttentionArgs, call: CheckedCall) -> tuple[Tensor, Tensor]:
    """No query: nothing to launch."""
    q, problem = args.q, call.problem
    shape = (*q.shape[:-1], problem.head_dim_v)
    out = q.new_zeros(shape, dtype=out_dtype(q.dtype)) if args.out is None else args.out
    heads = problem.num_heads_q
    lse_shape = (heads, q.shape[0]) if args.cu_seqlens_q is not None else (q.shape[0], heads, q.shape[1])
    return out, q.new_full(lse_shape, float("-inf"), dtype=torch.float32)


def _run_reference(args: AttentionArgs, call: CheckedCall) -> tuple[Tensor, Tensor]:
    problem = call.problem
    return reference.attention(
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
        out=args.out,
    )
