"""flash_attn_combine: merges the results of splits of the keys by their log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..call import validation as check
from ..call.layout import contiguous, refuse_strided
from ..call.plain import has_tangent, mark_written, plain, refuse_transformed, resolved, runs_as_operator
from ..call.validation import FLOAT_DTYPES
from ..errors import InvalidArgumentError, InvalidTypeError, UnsupportedError
from ..plan.device import describe
from ..reference.merge import merge_parts
from ..run.combine import kernel_obstacle, launch
from ..run.fallback import settle_operation


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge the results of splits of the keys.

    Args:
        out_partial: fp32 ``(splits, B, S, H, Dv)`` or ``(splits, T, H, Dv)``, each split normalised by its own sum;
            copied where the last dimension is not contiguous.
        lse_partial: fp32 ``(splits, B, S, H)`` or ``(splits, T, H)``, natural log; -inf where a split saw no key.
        out: ``(B, S, H, Dv)`` or ``(T, H, Dv)``, written and returned if given.
        out_dtype: dtype of a new output; None: fp32.
        backend: as for flash_attn_func; where the kernel does not take the call torch ops merge.

    Returns:
        ``(out, softmax_lse)``, softmax_lse fp32 of shape ``lse_partial.shape[1:]``, natural log.

    Raises:
        InvalidArgumentError: an argument has a wrong value, shape or device; the text names it.
        InvalidTypeError: an argument has a wrong type or dtype; the text names it.
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
    out_partial = contiguous(check.check_floating(function, "out_partial", out_partial))
    lse_partial = check.check_floating(function, "lse_partial", lse_partial)
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
        out = check.check_out(function, out, shape, dtype, out_partial.device)
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
        obstacle = kernel_obstacle(out_partial, lse_partial, out, dtype)
        if obstacle is None:
            result = out_partial.new_empty(shape, dtype=dtype) if out is None else out
            lse = launch(out_partial, lse_partial, result)
            mark_written(out)
            return result if given is None else given, lse
        settle_operation(function, "combine", describe(out_partial.device), backend, obstacle)
    merged, lse = merge_parts(out_partial, lse_partial)
    if out is None:
        return merged.to(dtype), lse
    out.copy_(merged)
    return (out if given is None else given), lse
