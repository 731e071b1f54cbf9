"""flash_attn_combine: merges the results of splits of the keys by their log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import native
from . import validation as check
from .device import common_kernel_obstacle, describe
from .errors import InvalidArgumentError, InvalidTypeError, UnsupportedError
from .fallback_notice import settle_operation
from .layout import contiguous, refuse_strided
from .metadata import CURRENT_STREAM
from .plain import has_tangent, is_autocast, mark_written, plain, refuse_transformed, resolved, runs_as_operator
from .problem import needs_gradients
from .validation import FLOAT_DTYPES

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

NO_BACKWARD = "an input requires grad, and it has no backward"


def merge_parts(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """``outs`` (n, ..., Dv) weighted by ``lses`` (n, ...): the merged output and LSE. Empty parts count for nothing."""
    if is_autocast(outs):
        with torch.autocast(outs.device.type, enabled=False):
            return merge_parts(outs, lses)
    absent = lses == float("-inf")
    empty = absent.all(dim=0)
    # Where every part is empty the sum has no logarithm, and its gradient would be NaN.
    summed = lses.masked_fill(empty, 0.0)
    lse = torch.logsumexp(summed, dim=0)
    weights = torch.exp(summed - lse)
    # A part without keys may hold anything, NaN included.
    parts = outs.masked_fill(absent.unsqueeze(-1), 0.0)
    return (weights.unsqueeze(-1) * parts).sum(dim=0), lse.masked_fill(empty, float("-inf"))


def check_floating(function: str, name: str, value: object) -> Tensor:
    tensor = check.check_tensor(function, name, value, "a floating-point tensor")
    if tensor.dtype not in FLOAT_DTYPES:
        raise InvalidTypeError(f"{function}: {name} must be bf16, fp16, fp32 or fp64, got {tensor.dtype}")
    return tensor


def check_out(function: str, out: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    tensor = check.check_tensor(function, "out", out, f"a {dtype} tensor of shape {shape}")
    if tensor.dtype != dtype:
        raise InvalidTypeError(f"{function}: out must have dtype {dtype}, got {tensor.dtype}")
    check.check_shape(function, "out", tensor, shape, "that of one part")
    check.check_device(function, "out", tensor, device)
    return tensor


def _kernel_obstacle(out_partial: Tensor, lse_partial: Tensor, out: Tensor | None, dtype: torch.dtype) -> str | None:
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


def _launch(out_partial: Tensor, lse_partial: Tensor, result: Tensor) -> Tensor:
    """Combine into ``result`` in one launch for every MAX_SPLITS parts and one for what these give; returns the LSE."""
    module = native.extension()
    assert module is not None
    splits, (heads, head_dim_v) = out_partial.shape[0], out_partial.shape[-2:]
    if splits > check.MAX_SPLITS:
        # The kernel keeps a weight for each part in shared memory: merge the parts of parts, exact but for rounding.
        groups = list(range(0, splits, check.MAX_SPLITS))
        out_partial_groups = out_partial.new_empty((len(groups), *out_partial.shape[1:]))
        lses = [
            _launch(out_partial[i : i + check.MAX_SPLITS], lse_partial[i : i + check.MAX_SPLITS], group)
            for i, group in zip(groups, out_partial_groups, strict=True)
        ]
        return _launch(out_partial_groups, torch.stack(lses), result)
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


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge the results of splits of the keys: ``(out, softmax_lse)``.

    Args:
        out_partial: fp32 ``(splits, B, S, H, Dv)`` or ``(splits, T, H, Dv)``, each split normalised by its own sum;
            copied where the last dimension is not contiguous.
        lse_partial: fp32 ``(splits, B, S, H)`` or ``(splits, T, H)``, natural log; -inf: the split saw no key.
        out: written if given, ``(B, S, H, Dv)`` or ``(T, H, Dv)``; out_dtype: of a new output, fp32 by default.
        backend: as for flash_attn_func; where the kernel does not take the call torch ops merge.

    Returns:
        out, and softmax_lse fp32 of shape ``lse_partial.shape[1:]``.

    Raises:
        InvalidArgumentError, InvalidTypeError: an argument is wrong; the text names it.
        UnsupportedError: the kernel does not take the call, and backend="cuda" or BROADHEAD_STRICT=1 asks for it.
    """
    function = "flash_attn_combine"
    check.check_backend(function, backend)
    given = out
    # Torch ops know every mode, derivative and transform.
    by_torch = runs_as_operator(out_partial, lse_partial, out) or has_tangent(out_partial, lse_partial)
    if not by_torch:
        out_partial = plain(function, "out_partial", out_partial)
        lse_partial = plain(function, "lse_partial", lse_partial)
        out = plain(function, "out", out, written=True)
    elif out is not None and not is_dynamo_compiling():
        refuse_transformed(function, "out=", out_partial, lse_partial, out)
        resolved(function, "out", out, written=True)
    out_partial = contiguous(check_floating(function, "out_partial", out_partial))
    lse_partial = check_floating(function, "lse_partial", lse_partial)
    if out_partial.dim() not in (4, 5) or out_partial.shape[0] < 1:
        raise InvalidArgumentError(
            f"{function}: out_partial must be (splits, batch, seqlen, heads, head_dim_v) or (splits, total, heads,"
            f" head_dim_v) with splits >= 1, got {tuple(out_partial.shape)}"
        )
    check.check_shape(function, "lse_partial", lse_partial, out_partial.shape[:-1], "out_partial.shape[:-1]")
    if lse_partial.device != out_partial.device:
        raise InvalidArgumentError(
            f"{function}: lse_partial must be on the device of out_partial, {out_partial.device}, got"
            f" {lse_partial.device}"
        )
    shape = tuple(out_partial.shape[1:])
    if out is not None:
        dtype = out.dtype if out_dtype is None and isinstance(out, Tensor) else (out_dtype or out_partial.dtype)
        out = check_out(function, out, shape, dtype, out_partial.device)
        refuse_strided(function, "out", out)
    else:
        dtype = out_dtype or out_partial.dtype
    if dtype not in FLOAT_DTYPES:
        raise InvalidTypeError(f"{function}: out_dtype must be bf16, fp16, fp32 or fp64, got {dtype}")

    if by_torch and backend == "cuda":
        raise UnsupportedError(
            f"{function}: the combine kernel does not take this call: it is traced, or a tensor is a subclass or"
            " transformed; leave backend unset"
        )
    if out_partial.numel() > 0 and backend != "torch" and not by_torch:
        obstacle = _kernel_obstacle(out_partial, lse_partial, out, dtype)
        if obstacle is None:
            result = out_partial.new_empty(shape, dtype=dtype) if out is None else out
            lse = _launch(out_partial, lse_partial, result)
            mark_written(out)
            return result if given is None else given, lse
        settle_operation(function, "combine", describe(out_partial.device), backend, obstacle)
    merged, lse = merge_parts(out_partial, lse_partial)
    if out is None:
        return merged.to(dtype), lse
    out.copy_(merged)
    return (out if given is None else given), lse
