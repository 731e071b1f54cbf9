"""Runs a checked merge of two attention results: by the kernel where it takes the call, else on torch ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call.layout import contiguous
from ..call.plain import plain
from ..call.validation import INT32_MAX
from ..plan.device import common_kernel_obstacle, describe
from ..reference.merge import merge_parts
from . import known
from .cuda_backend import allocation, connected_module
from .fallback import ASKED_FOR_TORCH, Dispatch, settle_operation, state

FUNCTION = "merge_attn_states"

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

BY_KERNEL: Dispatch = ("cuda", "merge_states", "one launch of the merge kernel")


def plain_states(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, out: Any) -> tuple[Any, Any, Any, Any, Any]:
    """The arguments of a merge as plain memory."""
    return map_states(plain, out_a, lse_a, out_b, lse_b, out)


def map_states(change: Any, out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, out: Any) -> tuple[Any, Any, Any, Any, Any]:
    """``change`` of each argument of a merge."""
    states = (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b))
    a, lse_of_a, b, lse_of_b = (change(FUNCTION, name, value) for name, value in states)
    return a, lse_of_a, b, lse_of_b, change(FUNCTION, "out", out, written=True)


def run_merge(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor | None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """A checked merge that needs no gradient."""
    out_a, out_b = contiguous(out_a), contiguous(out_b)
    obstacle = ASKED_FOR_TORCH if backend == "torch" else kernel_obstacle(out_a, lse_a, out_b, lse_b, out)
    if obstacle is None:
        return launch(out_a, lse_a, out_b, lse_b, out)
    return fall_back(obstacle, backend, out_a, lse_a, out_b, lse_b, out)


def fall_back(obstacle: str, backend: str | None, *states: Any) -> tuple[Tensor, Tensor]:
    settle_operation(FUNCTION, "merge", describe(states[0].device), backend, obstacle)
    state.merge = ("torch", None, obstacle)
    return run_torch(*states)


def kernel_obstacle(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor | None) -> str | None:
    """Why the kernel can not run a checked merge; None: it can."""
    obstacle = common_kernel_obstacle(out_a.device)
    if obstacle is not None:
        return obstacle
    if out_a.dtype not in _KERNEL_DTYPES or lse_a.dtype != torch.float32 or lse_b.dtype != torch.float32:
        return f"no kernel merges {out_a.dtype} with lse of {lse_a.dtype} and {lse_b.dtype}"
    for name, tensor in (("out_a", out_a), ("out_b", out_b), ("out", out)):
        if tensor is not None and tensor.stride(-1) != 1:
            return f"{name} has strides {tensor.stride()}; the kernel takes a contiguous last dimension"
    if out is not None and any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride())):
        return f"out holds elements more than once, it has strides {out.stride()}"
    if lse_a.numel() > INT32_MAX or out_a.shape[-1] == 0:
        return f"no kernel merges results of shape {tuple(out_a.shape)}"
    return None


def launch(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """A merge by the kernel: as one like it before, or as the first of its kind."""
    result = known.run_known_merge(out_a, lse_a, out_b, lse_b, out)
    if result is not None:
        state.merge = BY_KERNEL
        return result
    new_out = allocation(out_a, tuple(out_a.shape), out_a.dtype, None)
    new_lse = allocation(lse_a, tuple(lse_a.shape), lse_a.dtype, None)
    result = connected_module().run_new_merge(out_a.get_device(), new_out, new_lse, out_a, lse_a, out_b, lse_b, out)
    state.merge = BY_KERNEL
    return result


def run_torch(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    if torch.is_autocast_enabled(out_a.device.type):
        with torch.autocast(out_a.device.type, enabled=False):
            return run_torch(out_a, lse_a, out_b, lse_b, out)
    compute = torch.float64 if out_a.dtype == torch.float64 else torch.float32
    lses = torch.stack((lse_a, lse_b)).to(compute)
    merged, lse = merge_parts(torch.stack((out_a, out_b)).to(compute), lses.transpose(-1, -2))
    lse = lse.transpose(-1, -2).to(lse_a.dtype).contiguous()
    return merged.to(out_a.dtype) if out is None else out.copy_(merged), lse
