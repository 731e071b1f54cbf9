"""_validate_head_dims: whether this installation has kernels for given head dims on a device."""

from __future__ import annotations

from typing import Any

import torch

from ..call.problem import DTYPE_NAMES, AttentionProblem
from ..call.validation import describe_value
from ..capabilities import CAPABILITIES, is_later
from ..plan.device import DeviceDescription, default_device, hypothetical
from ..plan.dispatch import resolve
from ..plan.native import BuildDescription, build_description
from ..support import is_native

#: A call of many queries: a prefill kernel, whatever the row of the table.
_SEQLEN = 4096


def _validate_head_dims(
    head_dim: int,
    head_dim_v: int,
    compute_capability: int | tuple[int, int] | None = None,
    alignment: int = 8,
    *,
    direction: str = "forward",
    native: bool = False,
    dtype: torch.dtype | None = None,
    build: BuildDescription | None = None,
) -> None:
    """Assert that kernels of this installation run dense attention of the head dims.

    Args:
        head_dim: columns of q and k.
        head_dim_v: columns of v.
        compute_capability: a major version, or (major, minor). Where the current CUDA device has it, the question is
            about that device; else about a device of that capability, and for a major version about all that are known.
            None: the current CUDA device.
        alignment: both head dims must be multiples of it.
        direction: "forward" or "backward".
        native: only a kernel that is written for the architecture counts, not the portable ones, which run on every
            architecture since 8.0: they are native to 8.x and 12.x, and slow on 9.0 and 10.x.
        dtype: of q, k and v; None: bf16 and fp16, both.
        build: the kernels to look at; None for those of this installation.

    Raises:
        AssertionError: with the reason, as FlashAttention-4's function of this name does.
    """
    _require(direction in ("forward", "backward"), f"direction must be 'forward' or 'backward', got {direction!r}")
    for name, size in (("head_dim", head_dim), ("head_dim_v", head_dim_v)):
        is_int = isinstance(size, int) and not isinstance(size, bool)
        _require(
            is_int and size > 0 and size % alignment == 0,
            f"{name} must be a positive multiple of {alignment}, got {describe_value(size)}",
        )
    _require(
        dtype is None or dtype in DTYPE_NAMES,
        f"dtype must be None or one of {', '.join(map(str, DTYPE_NAMES))}, got {dtype!r}",
    )
    build = build_description() if build is None else build
    for device in _devices(compute_capability):
        for each in (torch.bfloat16, torch.float16) if dtype is None else (dtype,):
            name = DTYPE_NAMES[each]
            plan = resolve(_dense(head_dim, head_dim_v, each, direction), device, build)
            asked = f"head_dim {head_dim}, head_dim_v {head_dim_v}, {name}, {direction}, on {device.label()}"
            _require(plan.row is not None, f"no kernel of this installation runs {asked}: {plan.reason}")
            if native and plan.first is not None and device.capability is not None:
                _require(
                    is_native(plan.first, device.capability),
                    f"no kernel written for compute capability {'.'.join(map(str, device.capability))} runs {asked};"
                    f" the portable kernel {plan.first.id} does",
                )


def _require(condition: bool, reason: str) -> None:
    # Not an assert statement: python -O must not turn a refusal into an agreement.
    if not condition:
        raise AssertionError(reason)


def _devices(compute_capability: Any) -> tuple[DeviceDescription, ...]:
    here = default_device()
    if compute_capability is None:
        _require(here.type == "cuda", "compute_capability must be given where there is no CUDA device, got None")
        return (here,)
    wanted = (compute_capability,) if isinstance(compute_capability, int) else compute_capability
    _require(
        isinstance(wanted, tuple) and len(wanted) in (1, 2) and all(type(part) is int for part in wanted),
        f"compute_capability must be a major version or (major, minor), got {describe_value(compute_capability)}",
    )
    if here.type == "cuda" and here.capability is not None and here.capability[: len(wanted)] == wanted:
        return (here,)
    known = tuple(hypothetical(capability) for capability in CAPABILITIES if capability[: len(wanted)] == wanted)
    if not known and len(wanted) == 2:
        capability = (wanted[0], wanted[-1])
        known = (hypothetical(capability),) if is_later(capability) else ()
    _require(bool(known), f"no kernel for compute capability {'.'.join(map(str, wanted))}")
    return known


def _dense(head_dim: int, head_dim_v: int, dtype: torch.dtype, direction: str) -> AttentionProblem:
    """One sequence of many queries without a mask."""
    return AttentionProblem(
        direction=direction,
        dtype=dtype,
        batch=1,
        seqlen_q=_SEQLEN,
        seqlen_k=_SEQLEN,
        num_heads_q=1,
        num_heads_kv=1,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        num_splits=1,
    )
