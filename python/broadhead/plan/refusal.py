"""Why rows of the table do not run a problem, in words: by what a call asks, the device, and this build."""

from __future__ import annotations

from typing import NamedTuple

from ..call.problem import ALIGNMENT_BYTES, DQ_SUM_ROWS, AttentionProblem, canonical_right
from ..capabilities import arch_for, capability_text
from ..support import ELEMENT_BYTES, EXTRA_FEATURES, FEATURES, KernelRow
from .device import DeviceDescription
from .native import BuildDescription, build_help


class Refusal(NamedTuple):
    """Why a row, or every row (``row_id`` empty), does not run a problem."""

    row_id: str
    reason: str
    by: str  # what stands in the way: the "arguments" of the call, the "device", or this "build"


def dtypes_text(dtype: str, kv_dtype: str) -> str:
    """The dtypes of a row or a problem in words: that of k and v only where it is another."""
    return f"{dtype} over {kv_dtype} k and v" if kv_dtype else dtype


def _capability_text(capability: tuple[int, int] | None) -> str:
    return "none" if capability is None else capability_text(capability)


class Kind(NamedTuple):
    """What of a problem decides which rows compute it: the same for nearly all lengths, batches and heads."""

    direction: str
    dtype: str
    kv_dtype: str
    head_dim: int
    head_dim_v: int
    needed: tuple[str, ...]  # features that a row must list
    shares_keys: bool  # all sequences share some
    short_sequences: bool  # of gradients


def kind_of(problem: AttentionProblem) -> Kind:
    """The kind of a problem."""
    return Kind(
        problem.direction,
        problem.dtype,
        problem.kv_dtype,
        problem.head_dim,
        problem.head_dim_v,
        _needed_features(problem),
        problem.shared_tokens > 0,
        "short_sequences" in problem.features,
    )


def _needed_features(problem: AttentionProblem) -> tuple[str, ...]:
    """What a row must list to compute the problem."""
    needed = [name for name in problem.features if name in FEATURES] + list(extras_of(problem))
    if canonical_right(problem.seqlen_q, problem.window_right) < 0 and "causal" in needed:
        needed.remove("causal")  # one query sees every key: metadata made with and without causal has one kernel
    return tuple(needed)


def request_refusal(row: KernelRow, kind: Kind) -> str:
    """Why the row's kernel does not compute the problem on any device ("" if it does)."""
    if row.direction != kind.direction:
        return f"is a {row.direction} kernel"
    if kind.shares_keys and row.phase != "decode":
        return "reads no keys that all sequences share"
    if (row.dtype, row.kv_dtype) != (kind.dtype, kind.kv_dtype):
        asked = dtypes_text(kind.dtype, kind.kv_dtype)
        return f"takes dtype {dtypes_text(row.dtype, row.kv_dtype)}, not {asked}"
    if row.head_dim < kind.head_dim:
        return f"takes head_dim up to {row.head_dim}, not {kind.head_dim}"
    if row.head_dim_v < kind.head_dim_v:
        return f"takes head_dim_v up to {row.head_dim_v}, not {kind.head_dim_v}"
    missing = [name for name in kind.needed if name not in row.features]
    if missing:
        return f"lacks {', '.join(missing)}"
    short = row.direction == "backward" and kind.short_sequences
    if short and "deterministic" not in row.features:
        return f"sums dq in fp32 for {DQ_SUM_ROWS} queries of each sequence at least: too much memory for short ones"
    absent = [name for name in row.requires if name not in kind.needed]
    return f"needs {', '.join(absent)}" if absent else ""


def device_refusal(row: KernelRow, device: DeviceDescription) -> str:
    """Why the row's kernel does not run on the device ("" if it does)."""
    if not row.runs_on(device.capability):
        known = ", ".join(map(_capability_text, row.capabilities))
        return f"runs on compute capability {known}, not {_capability_text(device.capability)}"
    if row.smem_limit > device.smem_per_block:
        return f"needs up to {row.smem_limit} bytes of shared memory a block; the device has {device.smem_per_block}"
    return ""


def build_refusal(row: KernelRow, device: DeviceDescription, build: BuildDescription) -> str:
    """Why this installation can not run the row's kernel on the device ("" if it can)."""
    assert device.capability is not None
    arch = arch_for(device.capability)
    if not build.has_module:
        return f"is left out of this build, the CPU package; {build_help(arch)}"
    error = build.load_error(row.family)
    if error:
        return f"is left out: the library of {row.family} kernels did not load: {error}"
    family = build.family(row.family)
    if family is None or row.id not in family.kernels:
        return f"is left out of this build; {build_help(arch)}"
    if not family.covers(device.capability):
        return (
            f"is left out of this build for compute capability {_capability_text(device.capability)}: it was built for"
            f' "{";".join(family.archs)}"; {build_help(arch)}'
        )
    # Machine code runs with every driver of its CUDA major version. PTX is compiled by drivers as new as its compiler.
    by_ptx = family.needs_ptx(device.capability)
    needed = (family.cuda_version[:2] if by_ptx else (*family.cuda_version[:1], 0)) if family.cuda_version else ()
    if needed and device.cuda_version is not None and device.cuda_version < needed:
        found = ".".join(map(str, device.cuda_version))
        asked = f"CUDA {needed[0]}.{needed[1]} or newer{' to compile its PTX' if by_ptx else ''}"
        return f"needs {asked}, the driver serves {found}; update the driver"
    return ""


def row_refusals(row: KernelRow, device: DeviceDescription, build: BuildDescription) -> list[Refusal]:
    """Why a row runs no call at all on a CUDA device with what this installation holds; empty: it does run some."""
    reason = device_refusal(row, device)
    if reason:
        return [Refusal(row.id, reason, "device")]
    reason = build_refusal(row, device, build)
    return [Refusal(row.id, reason, "build")] if reason else []


def short_rows(problem: AttentionProblem) -> list[str]:
    """Head dims whose elements do not fill what kernels move at a time: 8 columns of 16 bits, 16 of 8 bits."""
    dtypes = dtypes_text(problem.dtype, problem.kv_dtype)
    columns = ALIGNMENT_BYTES // ELEMENT_BYTES.get(problem.kv_dtype or problem.dtype, ALIGNMENT_BYTES)
    return [
        f"kernels take {name} in multiples of {columns} with dtype {dtypes}, not {size}"
        for name, size in (("head_dim", problem.head_dim), ("head_dim_v", problem.head_dim_v))
        if size % columns
    ]


def nothing_computes(problem: AttentionProblem, table: tuple[KernelRow, ...]) -> str:
    """The first property of the problem that no row has."""
    rows = [row for row in table if row.direction == problem.direction]
    if not rows:
        return f"this release has no CUDA {problem.direction} kernel"
    dtypes = sorted({dtypes_text(row.dtype, row.kv_dtype) for row in rows})
    rows = [row for row in rows if (row.dtype, row.kv_dtype) == (problem.dtype, problem.kv_dtype)]
    if not rows:
        asked = dtypes_text(problem.dtype, problem.kv_dtype)
        return f"dtype {asked} has no CUDA kernel; kernels take {', '.join(dtypes)}"
    extras = extras_of(problem)
    kind = kernels_for(problem)
    rows = [row for row in rows if all(feature in row.features for feature in extras)]
    if not rows:
        return f"there is no {kind}"
    for name, size, largest in (
        ("head_dim", problem.head_dim, max(row.head_dim for row in rows)),
        ("head_dim_v", problem.head_dim_v, max(row.head_dim_v for row in rows)),
    ):
        if size > largest:
            return f"{name} {size} exceeds {largest}, the largest of any {kind}"
    return f"no CUDA kernel combines {', '.join(problem.features)} at {head_dims_text(problem)}"


def extras_of(problem: AttentionProblem) -> tuple[str, ...]:
    """What the problem asks that only some kernels do. Sums in an order are asked of its gradients alone."""
    unasked = ("deterministic",) if problem.direction == "forward" else ()
    return tuple(name for name in problem.features if name in EXTRA_FEATURES and name not in unasked)


def kernels_for(problem: AttentionProblem) -> str:
    """The kernels that a problem can be for, in words."""
    extras = extras_of(problem)
    dtypes = dtypes_text(problem.dtype, problem.kv_dtype)
    return f"CUDA kernel for {dtypes}" + (f" with {' and '.join(extras)}" if extras else "")


def head_dims_text(problem: AttentionProblem) -> str:
    text = f"head_dim {problem.head_dim}"
    return text if problem.head_dim == problem.head_dim_v else f"{text}, head_dim_v {problem.head_dim_v}"


def device_reason(device: DeviceDescription, able: list[KernelRow], problem: AttentionProblem) -> str:
    """Kernels compute the problem, but none on this device."""
    there = [row for row in able if row.runs_on(device.capability)]
    if not there:
        capabilities = sorted({capability for row in able for capability in row.capabilities})
        known = ", ".join(map(_capability_text, capabilities))
        here = _capability_text(device.capability)
        return f"no {kernels_for(problem)} on compute capability {here}; there are for {known}"
    smallest = min(row.smem_limit for row in there)
    return f"every CUDA kernel needs {smallest} bytes of shared memory a block; the device has {device.smem_per_block}"
