"""merge_attn_states: merges two attention results of the same queries over disjoint keys, by kernel or torch ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..call import validation as check
from ..call.layout import refuse_strided
from ..call.plain import has_tangent, is_transformed, refuse_transformed, resolved, runs_as_operator
from ..call.problem import needs_gradients
from ..errors import InvalidArgumentError, InvalidTypeError, UnsupportedError
from ..ops import sharding
from ..run import known
from ..run.combine import NO_BACKWARD
from ..run.fallback import state
from ..run.merge import BY_KERNEL, FUNCTION, fall_back, map_states, plain_states, run_merge, run_torch

NO_TANGENT = "an input is transformed or has a forward-mode tangent, which it does not propagate"


def merge_attn_states(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    out: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge two attention results of the same queries over disjoint keys. Differentiable.

    Args:
        out_a: ``(B, S, H, Dv)`` or ``(T, H, Dv)``; copied where the last dimension is not contiguous.
        lse_a: fp32 ``(B, H, S)`` or ``(H, T)``, natural log; -inf where a row saw no key.
        out_b: as out_a, of the same dtype.
        lse_b: as lse_a.
        out: of the shape and dtype of out_a, written and returned if given; may be out_a or out_b itself.
        backend: as for flash_attn_func; without a kernel, or where a gradient is asked for, torch ops merge.

    Returns:
        ``(out, softmax_lse)``, softmax_lse fp32 of the shape of lse_a, natural log.

    Raises:
        InvalidArgumentError: an argument has a wrong value, shape or device; the text names it.
        InvalidTypeError: an argument has a wrong type or dtype; the text names it.
        UnsupportedError: the kernel does not take the call, and backend="cuda" or BROADHEAD_STRICT=1 asks for it.
    """
    if is_dynamo_compiling():
        return _merge_by_operator(out_a, lse_a, out_b, lse_b, out, backend)
    if backend in (None, "cuda"):
        result = known.run_known_merge(out_a, lse_a, out_b, lse_b, out)
        if result is not None:
            state.merge = BY_KERNEL
            return result
    if runs_as_operator(out_a, lse_a, out_b, lse_b, out):
        return _merge_by_operator(out_a, lse_a, out_b, lse_b, out, backend)
    _check(out_a, lse_a, out_b, lse_b, out, backend)
    out_a, lse_a, out_b, lse_b, out = plain_states(out_a, lse_a, out_b, lse_b, out)
    if has_tangent(out_a, lse_a, out_b, lse_b):
        return fall_back(NO_TANGENT, backend, out_a, lse_a, out_b, lse_b, out)
    if needs_gradients(out_a, lse_a, out_b, lse_b, out):
        return fall_back(NO_BACKWARD, backend, out_a, lse_a, out_b, lse_b, out)
    return run_merge(out_a, lse_a, out_b, lse_b, out, backend)


def _merge_by_operator(
    out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, out: Any, backend: str | None
) -> tuple[Tensor, Tensor]:
    """merge_attn_states through the operators; torch ops know every derivative and transform."""
    sharding.prepare(out_a, lse_a, out_b, lse_b, out)
    _check(out_a, lse_a, out_b, lse_b, out, backend)
    eager = not is_dynamo_compiling()
    if eager:
        out_a, lse_a, out_b, lse_b, out = map_states(resolved, out_a, lse_a, out_b, lse_b, out)
    states = (out_a, lse_a, out_b, lse_b)
    if eager and out is not None:
        refuse_transformed(FUNCTION, "out=", *states, out)
    has_no_kernel = NO_BACKWARD if needs_gradients(*states, out) else None
    if eager and (is_transformed(*states) or has_tangent(*states)):
        has_no_kernel = NO_TANGENT
    if has_no_kernel is not None:
        if backend == "cuda":
            raise UnsupportedError(f"{FUNCTION}: the merge kernel does not take this call: {has_no_kernel}")
        return run_torch(*states, out)
    if out is None:
        return torch.ops.broadhead.merge_states(*states, backend)
    return out, torch.ops.broadhead.merge_states_out(*states, out, backend)


def _check(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, out: Any, backend: Any) -> None:
    function = FUNCTION
    check.check_backend(function, backend)
    out_a = check.check_floating(function, "out_a", out_a)
    out_b = check.check_floating(function, "out_b", out_b)
    if out_a.dim() not in (3, 4):
        raise InvalidArgumentError(
            f"{function}: out_a must be (batch, seqlen, heads, head_dim_v) or (total, heads, head_dim_v), got"
            f" {tuple(out_a.shape)}"
        )
    check.check_shape(function, "out_b", out_b, out_a.shape, "that of out_a")
    if out_b.dtype != out_a.dtype:
        raise InvalidTypeError(f"{function}: out_b must have the dtype of out_a, {out_a.dtype}, got {out_b.dtype}")
    expected = (*out_a.shape[:-3], out_a.shape[-2], out_a.shape[-3])
    for name, value in (("lse_a", lse_a), ("lse_b", lse_b)):
        lse = check.check_floating(function, name, value)
        check.check_shape(function, name, lse, expected, "(batch, heads, seqlen) or (heads, total)")
    for name, value in (("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        if value.device != out_a.device:
            raise InvalidArgumentError(
                f"{function}: {name} must be on the device of out_a, {out_a.device}, got {value.device}"
            )
    if out is not None:
        check.check_out(function, out, tuple(out_a.shape), out_a.dtype, out_a.device)
        refuse_strided(function, "out", out)
