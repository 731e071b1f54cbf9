"""merge_attn_states: merges two attention results of the same queries over disjoint keys, by kernel or torch ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import native
from .combine import NO_BACKWARD, check_floating, check_out, merge_parts
from .device import common_kernel_obstacle, describe
from .errors import InvalidArgumentError, InvalidTypeError, UnsupportedError
from .fallback_notice import ASKED_FOR_TORCH, Dispatch, settle_operation, state
from .layout import contiguous, refuse_strided
from .metadata import CURRENT_STREAM
from .plain import has_tangent, is_transformed, mark_written, plain, refuse_transformed, resolved, runs_as_operator
from .problem import needs_gradients
from .signature import signature_of
from .validation import INT32_MAX, check_backend, check_shape

FUNCTION = "merge_attn_states"

NO_TANGENT = "an input is transformed or has a forward-mode tangent, which it does not propagate"

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

BY_KERNEL: Dispatch = ("cuda", "merge_states", "one launch of the merge kernel")

#: Calls that were validated and that the kernel takes, by everything that validation looked at.
_known: set[Any] = set()
_MAX_KNOWN = 8192


def merge_attn_states(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    out: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge two attention results of the same queries over disjoint keys: ``(out, softmax_lse)``. Differentiable.

    Args:
        out_a, out_b: ``(B, S, H, Dv)`` or ``(T, H, Dv)``, of one dtype; copied where the last dimension is not
            contiguous.
        lse_a, lse_b: fp32 ``(B, H, S)`` or ``(H, T)``, natural log; -inf where a part saw no key.
        out: written if given, of the shape and dtype of out_a; may be out_a or out_b itself.
        backend: as for flash_attn_func; without a kernel, or where a gradient is asked for, torch ops merge.

    Returns:
        out, and softmax_lse of the shape of lse_a.

    Raises:
        InvalidArgumentError, InvalidTypeError: an argument is wrong; the text names it.
        UnsupportedError: the kernel does not take the call, and backend="cuda" or BROADHEAD_STRICT=1 asks for it.
    """
    if is_dynamo_compiling():
        return _merge_by_operator(out_a, lse_a, out_b, lse_b, out, backend)
    key = None
    try:
        if backend != "torch" and out_a.is_cuda and not needs_gradients(out_a, lse_a, out_b, lse_b, out):
            key = signature_of(out_a, out_b, out, lse_a, lse_b)
            if key in _known:
                return _launch(out_a, lse_a, out_b, lse_b, out)
    except AttributeError:
        key = None  # not tensors: validation names them
    if runs_as_operator(out_a, lse_a, out_b, lse_b, out):
        return _merge_by_operator(out_a, lse_a, out_b, lse_b, out, backend)
    _check(out_a, lse_a, out_b, lse_b, out, backend)
    out_a, lse_a, out_b, lse_b, out = plain_states(out_a, lse_a, out_b, lse_b, out)
    if has_tangent(out_a, lse_a, out_b, lse_b):
        return _fall_back(NO_TANGENT, backend, out_a, lse_a, out_b, lse_b, out)
    if needs_gradients(out_a, lse_a, out_b, lse_b, out):
        return _fall_back(NO_BACKWARD, backend, out_a, lse_a, out_b, lse_b, out)
    if key is not None and kernel_obstacle(out_a, lse_a, out_b, lse_b, out) is None:
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        _known.add(key)
    return run_merge(out_a, lse_a, out_b, lse_b, out, backend)


def _merge_by_operator(
    out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, out: Any, backend: str | None
) -> tuple[Tensor, Tensor]:
    """merge_attn_states through the operators; torch ops know every derivative and transform."""
    _check(out_a, lse_a, out_b, lse_b, out, backend)
    eager = not is_dynamo_compiling()
    if eager:
        out_a, lse_a, out_b, lse_b, out = _map_states(resolved, out_a, lse_a, out_b, lse_b, out)
    states = (out_a, lse_a, out_b, lse_b)
    if eager and out is not None:
        refuse_transformed(FUNCTION, "out=", *states, out)
    has_no_kernel = NO_BACKWARD if needs_gradients(*states, out) else None
    if eager and (is_transformed(*states) or has_tangent(*states)):
        has_no_kernel = NO_TANGENT
    if has_no_kernel is not None:
        if backend == "cuda":
            raise UnsupportedError(f"{FUNCTION}: the merge kernel does not take this call: {has_no_kernel}")
        return _run_torch(*states, out)
    if out is None:
        return torch.ops.broadhead.merge_states(*states, backend)
    return out, torch.ops.broadhead.merge_states_out(*states, out, backend)


def plain_states(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, out: Any) -> tuple[Any, Any, Any, Any, Any]:
    """The arguments of a merge as plain memory."""
    return _map_states(plain, out_a, lse_a, out_b, lse_b, out)


def _map_states(
    change: Any, out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, out: Any
) -> tuple[Any, Any, Any, Any, Any]:
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
        return _launch(out_a, lse_a, out_b, lse_b, out)
    return _fall_back(obstacle, backend, out_a, lse_a, out_b, lse_b, out)


def _fall_back(obstacle: str, backend: str | None, *states: Any) -> tuple[Tensor, Tensor]:
    settle_operation(FUNCTION, "merge", describe(states[0].device), backend, obstacle)
    state.merge = ("torch", None, obstacle)
    return _run_torch(*states)


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


def _launch(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    if out_a.get_device() != torch.cuda.current_device():
        with torch.cuda.device(out_a.device):
            return _launch(out_a, lse_a, out_b, lse_b, out)
    given = out
    if out is None:
        out = out_a.new_empty(out_a.shape)
    lse = lse_a.new_empty(lse_a.shape)
    module = native.extension()
    assert module is not None
    module.merge_states(out_a, lse_a, out_b, lse_b, out, lse, CURRENT_STREAM)
    if given is not None:
        mark_written(given)
    state.merge = BY_KERNEL
    return out, lse


def _run_torch(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    if torch.is_autocast_enabled(out_a.device.type):
        with torch.autocast(out_a.device.type, enabled=False):
            return _run_torch(out_a, lse_a, out_b, lse_b, out)
    compute = torch.float64 if out_a.dtype == torch.float64 else torch.float32
    lses = torch.stack((lse_a, lse_b)).to(compute)
    merged, lse = merge_parts(torch.stack((out_a, out_b)).to(compute), lses.transpose(-1, -2))
    lse = lse.transpose(-1, -2).to(lse_a.dtype).contiguous()
    return merged.to(out_a.dtype) if out is None else out.copy_(merged), lse


def _check(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, out: Any, backend: Any) -> None:
    function = FUNCTION
    check_backend(function, backend)
    out_a = check_floating(function, "out_a", out_a)
    out_b = check_floating(function, "out_b", out_b)
    if out_a.dim() not in (3, 4):
        raise InvalidArgumentError(
            f"{function}: out_a must be (batch, seqlen, heads, head_dim_v) or (total, heads, head_dim_v), got"
            f" {tuple(out_a.shape)}"
        )
    check_shape(function, "out_b", out_b, out_a.shape, "that of out_a")
    if out_b.dtype != out_a.dtype:
        raise InvalidTypeError(f"{function}: out_b must have the dtype of out_a, {out_a.dtype}, got {out_b.dtype}")
    expected = (*out_a.shape[:-3], out_a.shape[-2], out_a.shape[-3])
    for name, value in (("lse_a", lse_a), ("lse_b", lse_b)):
        lse = check_floating(function, name, value)
        check_shape(function, name, lse, expected, "(batch, heads, seqlen) or (heads, total)")
    for name, value in (("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        if value.device != out_a.device:
            raise InvalidArgumentError(
                f"{function}: {name} must be on the device of out_a, {out_a.device}, got {value.device}"
            )
    if out is not None:
        check_out(function, out, tuple(out_a.shape), out_a.dtype, out_a.device)
        refuse_strided(function, "out", out)
