"""flash_attn_combine: merges the results of splits of the keys by their log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from . import validation as check
from .errors import InvalidArgumentError, InvalidTypeError
from .metadata import CURRENT_STREAM
from .plain import has_tangent, mark_written, plain, runs_as_operator
from .problem import needs_gradients
from .validation import FLOAT_DTYPES

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def merge_parts(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """``outs`` (n, ..., Dv) weighted by ``lses`` (n, ...): the merged output and LSE. Empty parts count for nothing."""
    lse = torch.logsumexp(lses, dim=0)
    empty = lse == float("-inf")
    weights = torch.exp(lses - lse.masked_fill(empty, 0.0))
    # A part without keys may hold anything, NaN included.
    parts = outs.masked_fill((lses == float("-inf")).unsqueeze(-1), 0.0)
    return (weights.unsqueeze(-1) * parts).sum(dim=0), lse


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


def _vectors_fit(out_partial: Tensor) -> bool:
    """Whether the kernel's 16-byte loads of fp32 are aligned everywhere and end with the rows."""
    strides = (stride for size, stride in zip(out_partial.shape, out_partial.stride()) if size > 1)
    return (
        out_partial.shape[-1] % 4 == 0
        and out_partial.data_ptr() % 16 == 0
        and all(stride % 4 == 0 for stride in strides if stride != 1)
    )


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Merge the results of splits of the keys: ``(out, softmax_lse)``.

    Args:
        out_partial: fp32 ``(splits, B, S, H, Dv)`` or ``(splits, T, H, Dv)``, each split normalised by its own sum.
        lse_partial: fp32 ``(splits, B, S, H)`` or ``(splits, T, H)``, natural log; -inf: the split saw no key.
        out: written if given, ``(B, S, H, Dv)`` or ``(T, H, Dv)``; out_dtype: of a new output, fp32 by default.

    Returns:
        out, and softmax_lse fp32 of shape ``lse_partial.shape[1:]``.

    Raises:
        InvalidArgumentError, InvalidTypeError: an argument is wrong; the text names it.
    """
    function = "flash_attn_combine"
    given = out
    # Torch ops know every mode, derivative and transform.
    by_torch = runs_as_operator(out_partial, lse_partial, out) or has_tangent(out_partial, lse_partial)
    if not by_torch:
        out_partial = plain(function, "out_partial", out_partial)
        lse_partial = plain(function, "lse_partial", lse_partial)
        out = plain(function, "out", out, written=True)
    out_partial = check_floating(function, "out_partial", out_partial)
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
    else:
        dtype = out_dtype or out_partial.dtype
    if dtype not in FLOAT_DTYPES:
        raise InvalidTypeError(f"{function}: out_dtype must be bf16, fp16, fp32 or fp64, got {dtype}")

    module = native.extension()
    on_kernel = (
        not by_torch
        and module is not None
        and hasattr(module, "combine")
        and out_partial.device.type == "cuda"
        and bool(native.build_description().families)
        and out_partial.dtype == lse_partial.dtype == torch.float32
        and dtype in _KERNEL_DTYPES
        and out_partial.stride(-1) == 1
        and out_partial.numel() > 0
        and out_partial.shape[0] <= check.MAX_SPLITS
        and _vectors_fit(out_partial)
        and (out is None or out.data_ptr() % 16 == 0)
        and not needs_gradients(out_partial, lse_partial, out)
        and (out is None or out.is_contiguous())
    )
    if on_kernel:
        assert module is not None
        splits, heads, head_dim_v = out_partial.shape[0], shape[-2], shape[-1]
        result = out_partial.new_empty(shape, dtype=dtype) if out is None else out
        lse = lse_partial.new_empty(shape[:-1])
        with torch.cuda.device(out_partial.device):
            module.combine(
                out_partial.reshape(splits, -1, heads, head_dim_v),
                lse_partial.reshape(splits, -1, heads),
                result.view(-1, heads, head_dim_v),
                lse.view(-1, heads),
                CURRENT_STREAM,
            )
        mark_written(out)
        return result if given is None else given, lse
    merged, lse = merge_parts(out_partial, lse_partial)
    if out is None:
        return merged.to(dtype), lse
    out.copy_(merged)
    return (out if given is None else given), lse
