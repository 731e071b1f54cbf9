"""The CUDA backend: turns a validated call into a _C.Launch; the compiled module runs all calls of its kind by it."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..call.arguments import AttentionArgs
from ..call.check import CheckedCall
from ..call.plain import count_dispatch_modes, is_plain_type
from ..call.problem import ALIGNMENT_BYTES, out_dtype
from ..errors import KernelError
from ..plan import native
from ..plan.dispatch import Plan
from .fallback import state
from .metadata_records import check_identity, filled, remember

CURRENT_STREAM = -1  # the binding takes torch's current stream


def make_launch(args: AttentionArgs, call: CheckedCall, plan: Plan) -> Any:
    """The _C.Launch of a validated call for which ``plan`` has a row: what repeats from call to call of its kind."""
    assert plan.row is not None and plan.schedule is not None
    problem, q = call.problem, args.q
    heads = problem.num_heads_q
    # Rows exist that no sequence may own: outputs allocated here are cleared first.
    clear = args.seqused_q is not None
    lse_shape = (heads, q.shape[0]) if args.cu_seqlens_q is not None else (q.shape[0], heads, q.shape[1])
    return connected_module().Launch(
        call=call,
        plan=plan,
        device=q.device.index,
        out=allocation(q, (*q.shape[:-1], problem.head_dim_v), out_dtype(q.dtype), 0.0 if clear else None),
        lse=allocation(q, lse_shape, torch.float32, float("-inf") if clear else None),
        identity=(plan.metadata_config, problem.page_size, problem.seqlen_k, problem.num_splits),
        dispatch=("cuda", plan.row.id, plan.reason),
    )


def launch_backward(
    args: AttentionArgs, call: CheckedCall, plan: Plan, outputs: tuple[Any, Any, Any, Any], deterministic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(dq, dk, dv, dsinks)`` by the kernel of ``plan``, from ``(dout, dlse, out, softmax_lse)``."""
    assert plan.row is not None and plan.schedule is not None
    dout, dlse, out, softmax_lse = outputs
    if dout is None:
        dout = torch.zeros_like(out)
    # Rows that no sequence may own are cleared; kernels leave them alone.
    new_q, new_k = (
        torch.empty_like if cu_seqlens is None and seqused is None else torch.zeros_like
        for cu_seqlens, seqused in ((args.cu_seqlens_q, args.seqused_q), (args.cu_seqlens_k, args.seqused_k))
    )
    dense = torch.contiguous_format
    dq = new_q(args.q, memory_format=dense)
    dk, dv = (new_k(x, memory_format=dense) for x in (args.k, args.v))
    dsinks = None if args.sinks is None else torch.empty_like(args.sinks, dtype=torch.float32)
    state.last = ("cuda", plan.row.id, plan.reason)
    launch = connected_module().BackwardLaunch(
        call=call, plan=plan, device=args.q.device.index, deterministic=deterministic
    )
    given = args._replace(out=_movable(out), scheduler_metadata=None)
    lse, lse_gradient = _rows_last(softmax_lse), None if dlse is None else _rows_last(dlse)
    connected_module().run_backward(launch, given, _movable(dout), lse, lse_gradient, dq, dk, dv, dsinks)
    return dq, dk, dv, dsinks if dsinks is None else dsinks.to(args.sinks.dtype)


def _movable(x: Tensor) -> Tensor:
    """``x``, or a copy where kernels, which move 16 bytes at a time, would not take its strides or its address."""
    step = ALIGNMENT_BYTES // x.element_size()
    rows = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    fits = x.stride(-1) == 1 and x.data_ptr() % ALIGNMENT_BYTES == 0
    if fits and all(stride > 0 and stride % step == 0 for stride in rows):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _rows_last(lse: Tensor) -> Tensor:
    """A log-sum-exp, or its gradient, in fp32 with the rows of a head side by side."""
    return lse.float() if lse.stride(-1) == 1 else lse.float().contiguous()


def allocation(q: Tensor, shape: tuple[int, ...], dtype: torch.dtype, fill: float | None) -> tuple[Any, ...]:
    """A function that makes a contiguous tensor on the device of ``q``, and its arguments; None: it is given q.

    The cheapest of torch's: empty and new_empty, which look for a shape among more kinds of arguments, take twice as
    long as empty_strided and empty_like (1.3, 0.85 and 0.7 us on a CPU).
    """
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    options = {"dtype": dtype, "device": q.device}
    if fill is not None:
        return torch.full, (shape, fill), options
    if (q.shape, q.stride(), q.dtype) == (shape, strides, dtype):
        return torch.empty_like, None, None
    return torch.empty_strided, (shape, strides), options


def connected_module() -> ModuleType:
    """The compiled module, once it has what its calls need of Python."""
    global _connected
    module = native.extension()
    if module is None:
        raise KernelError("broadhead: the compiled module broadhead._C is not installed")
    if _connected is not module:
        module.connect(
            records=filled,
            check_identity=check_identity,
            exchange_device=torch.cuda._exchange_device,
            restore_device=torch.cuda._maybe_exchange_device,
            is_grad_enabled=torch.is_grad_enabled,
            state=state,
            is_plain_type=is_plain_type,
            is_negative=torch.Tensor.is_neg,
            count_modes=count_dispatch_modes,
            forward_ad=vars(forward_ad),
            increment_version=torch._C._increment_version,
            empty_like=torch.empty_like,
            dtype=torch.dtype,
            remember_metadata=remember,
        )
        _connected = module
    return module


_connected: ModuleType | None = None


def run_new(launch: Any, function: str, need_lse: bool, args: AttentionArgs) -> tuple[Tensor, Tensor | None]:
    """Run the first call of a kind, for which ``launch`` was made: _C.run_known runs those that follow."""
    return connected_module().run_new(launch, function, need_lse, args)


def run_new_shared(
    launch: Any, function: str, need_lse: bool, args: AttentionArgs, page_table: Tensor, length: int
) -> tuple[Tensor, Tensor | None]:
    """As run_new, over ``length`` keys that all sequences share."""
    return connected_module().run_new_shared(launch, function, need_lse, args, page_table, length)


def forget_calls() -> None:
    """Forget every decision; for tests that change the device or the build."""
    if native.extension() is not None:
        connected_module().forget_calls()
