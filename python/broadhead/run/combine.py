"""Runs a checked flash_attn_combine by its kernel, or says why that does not take the call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call.problem import needs_gradients
from ..call.validation import MAX_SPLITS
from ..plan import native
from ..plan.device import common_kernel_obstacle
from .cuda_backend import CURRENT_STREAM

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

NO_BACKWARD = "an input requires grad, and it has no backward"


def kernel_obstacle(out_partial: Tensor, lse_partial: Tensor, out: Tensor | None, dtype: torch.dtype) -> str | None:
    """Why the kernel can not run a checked call; None: it can."""
    obstacle = common_kernel_obstacle(out_partial.device)
    if obstacle is not None:
        return obstacle
    if needs_gradients(out_partial, lse_partial, out):
        return NO_BACKWARD
    if not out_partial.dtype == lse_partial.dtype == torch.float32 or dtype not in _KERNEL_DTYPES:
        return (
            f"it combines fp32 into fp32, bf16 or fp16, not {out_partial.dtype} with {lse_partial.dtype} into {dtype}"
        )
    strides = [stride for size, stride in zip(out_partial.shape, out_partial.stride()) if size > 1 and stride != 1]
    if (
        out_partial.shape[-1] % 4 != 0
        or (out_partial.shape[-1] > 1 and out_partial.stride(-1) != 1)
        or any(stride % 4 for stride in strides)
    ):
        return (
            "it moves four fp32 at a time, and out_partial does not consist of whole fours: it has shape"
            f" {tuple(out_partial.shape)} and strides {out_partial.stride()}"
        )
    if out_partial.data_ptr() % 16 or (out is not None and out.data_ptr() % 16):
        return "the addresses of out_partial and out must be multiples of 16 bytes"
    if out is not None and not out.is_contiguous():
        return f"out must be contiguous, it has strides {out.stride()}"
    return None


def launch(out_partial: Tensor, lse_partial: Tensor, result: Tensor) -> Tensor:
    """Combine into ``result`` in one launch for every MAX_SPLITS parts and one for what these give; returns the LSE."""
    module = native.extension()
    assert module is not None
    splits, (heads, head_dim_v) = out_partial.shape[0], out_partial.shape[-2:]
    if splits > MAX_SPLITS:
        # The kernel keeps a weight for each part in shared memory: merge the parts of parts, exact but for rounding.
        groups = list(range(0, splits, MAX_SPLITS))
        out_partial_groups = out_partial.new_empty((len(groups), *out_partial.shape[1:]))
        lses = [
            launch(out_partial[i : i + MAX_SPLITS], lse_partial[i : i + MAX_SPLITS], group)
            for i, group in zip(groups, out_partial_groups, strict=True)
        ]
        return launch(out_partial_groups, torch.stack(lses), result)
    lse = lse_partial.new_empty(lse_partial.shape[1:])
    with torch.cuda.device(out_partial.device):
        module.combine(
            out_partial.reshape(splits, -1, heads, head_dim_v),
            lse_partial.reshape(splits, -1, heads),
            result.view(-1, heads, head_dim_v),
            lse.view(-1, heads),
            CURRENT_STREAM,
        )
    return lse
