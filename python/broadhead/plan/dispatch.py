"""Chooses the kernel of a problem: a row of the table, or every row's reason for refusing, and the scheduling plan."""

from __future__ import annotations

import functools
import sys
import zlib
from typing import NamedTuple

from ..call.problem import ALIGNMENT_BYTES, DQ_SUM_ROWS, AttentionProblem, backward_of, canonical_right
from ..capabilities import arch_for, capability_text
from ..support import ELEMENT_BYTES, EXTRA_FEATURES, FEATURES, ROWS, KernelRow
from .device import DeviceDescription
from .fastest import fastest, needs_decode_kernel
from .native import BuildDescription, build_description, build_help
from .schedule import Schedule, plan_schedule

#: Sequences of a backward call: the last dimension of a grid.
MAX_BACKWARD_BATCH = 65535

#: head_dim above which a tile is chosen for the rows of a shared prefix as well. Below, tiles of 16 rows that find it
#: in the L2 beat those of 32. PERF(H200, 4 sequences sharing 8k, us with 16 and 32 rows: 32/8 heads of 128 26.5, 30.9;
#: 16/2 of 256 23.3, 26.5; 32/4 of 512 55.0, 49.3)
SHARED_TILES_ABOVE = 256


class Refusal(NamedTuple):
    """Why a row, or every row (``row_id`` empty), does not run a problem."""

    row_id: str
    reason: str
    by: str  # what stands in the way: the "arguments" of the call, the "device", or this "build"


class MetadataConfig(NamedTuple):
    """What scheduler metadata was made for, by the names of the public arguments; the forward call must agree."""

    batch_size: int
    max_seqlen_q: int
    num_heads_q: int
    num_heads_kv: int
    headdim: int
    headdim_v: int
    qkv_dtype: str
    kv_dtype: str
    window_left: int
    window_right: int
    attention_chunk: int
    tokens_per_split: int
    pack_gqa: bool
    has_qv: bool
    kernel: str


class Plan(NamedTuple):
    """The decision for one problem on one device with one build."""

    row: KernelRow | None  # None: no kernel runs it
    schedule: Schedule | None  # None with row
    metadata_tag: int  # non-zero
    metadata_config: MetadataConfig
    reason: str  # why row is None, else why it was chosen; one text for all plans that it holds for
    left_out: bool  # a kernel exists, but this build leaves it out or can not load it
    first: KernelRow | None = None  # the best by the table; row is another where that takes less time


def _preference(row: KernelRow, problem: AttentionProblem) -> int:
    """What decides between the phases; of the rows that serve a problem those with the lowest number come first.

    It depends on nothing but what get_scheduler_metadata knows as well, and on has_metadata.
    """
    if row.by_cost:
        return 4
    if row.phase == "decode":
        return 1
    if row.max_rows and problem.query_rows > row.max_rows:
        return 3
    return 0 if problem.query_rows >= row.min_rows and not needs_decode_kernel(problem) else 2


def _tile_fit(row: KernelRow, problem: AttentionProblem) -> tuple[int, int]:
    """Orders rows that are alike but for their tiles: the preferred phase comes first, then the least padded columns of
    both products, then this, then the table's order. Decode: the fewest tiles, then the smallest."""
    if row.phase != "decode":
        return 0, 0
    rows = problem.query_rows
    if max(problem.head_dim, problem.head_dim_v) > SHARED_TILES_ABOVE:
        rows = max(rows, problem.shared_rows)
    return -(-rows // row.tile.tile_m), row.tile.tile_m


def dtypes_text(dtype: str, kv_dtype: str) -> str:
    """The dtypes of a row or a problem in words: that of k and v only where it is another."""
    return f"{dtype} over {kv_dtype} k and v" if kv_dtype else dtype


def _capability_text(capability: tuple[int, int] | None) -> str:
    return "none" if capability is None else capability_text(capability)


def _needed_features(problem: AttentionProblem) -> tuple[str, ...]:
    """What a row must list to compute the problem."""
    needed = [name for name in problem.features if name in FEATURES] + list(_extras(problem))
    if canonical_right(problem.seqlen_q, problem.window_right) < 0 and "causal" in needed:
        needed.remove("causal")  # one query sees every key: metadata made with and without causal has one kernel
    return tuple(needed)


def _request_refusal(row: KernelRow, problem: AttentionProblem, needed: tuple[str, ...]) -> str:
    """Why the row's kernel does not compute the problem on any device ("" if it does)."""
    if row.direction != problem.direction:
        return f"is a {row.direction} kernel"
    if problem.shared_tokens and row.phase != "decode":
        return "reads no keys that all sequences share"
    if (row.dtype, row.kv_dtype) != (problem.dtype, problem.kv_dtype):
        asked = dtypes_text(problem.dtype, problem.kv_dtype)
        return f"takes dtype {dtypes_text(row.dtype, row.kv_dtype)}, not {asked}"
    if row.head_dim < problem.head_dim:
        return f"takes head_dim up to {row.head_dim}, not {problem.head_dim}"
    if row.head_dim_v < problem.head_dim_v:
        return f"takes head_dim_v up to {row.head_dim_v}, not {problem.head_dim_v}"
    missing = [name for name in needed if name not in row.features]
    if missing:
        return f"lacks {', '.join(missing)}"
    short = row.direction == "backward" and "short_sequences" in problem.features
    if short and "deterministic" not in row.features:
        return f"sums dq in fp32 for {DQ_SUM_ROWS} queries of each sequence at least: too much memory for short ones"
    absent = [name for name in row.requires if name not in needed]
    return f"needs {', '.join(absent)}" if absent else ""


def _device_refusal(row: KernelRow, device: DeviceDescription) -> str:
    """Why the row's kernel does not run on the device ("" if it does)."""
    if not row.runs_on(device.capability):
        known = ", ".join(map(_capability_text, row.capabilities))
        return f"runs on compute capability {known}, not {_capability_text(device.capability)}"
    if row.smem_limit > device.smem_per_block:
        return f"needs up to {row.smem_limit} bytes of shared memory a block; the device has {device.smem_per_block}"
    return ""


def _build_refusal(row: KernelRow, device: DeviceDescription, build: BuildDescription) -> str:
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


def _gradient_refusals(problem: AttentionProblem, device: DeviceDescription, build: BuildDescription) -> list[Refusal]:
    """Why no kernel computes the gradients of a forward problem, if it asks for them."""
    if "gradients" not in problem.features:
        return []
    if device.type != "cuda":
        return []
    plan = resolve(backward_of(problem), device, build)
    if plan.row is not None:
        return []
    kernel = "deterministic CUDA kernel" if "deterministic" in problem.features else "CUDA kernel"
    reason = f"an input requires grad, and no {kernel} differentiates: {plan.reason}"
    return [Refusal("", reason, "build" if plan.left_out else "arguments")]


def _general_refusals(problem: AttentionProblem, device: DeviceDescription, build: BuildDescription) -> list[Refusal]:
    """Reasons that hold for every row."""
    found = []
    if device.type != "cuda":
        text = f"the tensors are on a {device.type} device; kernels run on NVIDIA CUDA devices"
        found.append(Refusal("", text, "device"))
    if problem.direction == "backward" and problem.batch > MAX_BACKWARD_BATCH:
        text = f"backward kernels take up to {MAX_BACKWARD_BATCH} sequences, not {problem.batch}"
        found.append(Refusal("", text, "arguments"))
    found += _gradient_refusals(problem, device, build)
    return found + [Refusal("", text, "arguments") for text in (*_short_rows(problem), *problem.obstacles)]


def _short_rows(problem: AttentionProblem) -> list[str]:
    """Head dims whose elements do not fill what kernels move at a time: 8 columns of 16 bits, 16 of 8 bits."""
    dtypes = dtypes_text(problem.dtype, problem.kv_dtype)
    columns = ALIGNMENT_BYTES // ELEMENT_BYTES.get(problem.kv_dtype or problem.dtype, ALIGNMENT_BYTES)
    return [
        f"kernels take {name} in multiples of {columns} with dtype {dtypes}, not {size}"
        for name, size in (("head_dim", problem.head_dim), ("head_dim_v", problem.head_dim_v))
        if size % columns
    ]


def _nothing_computes(problem: AttentionProblem) -> str:
    """The first property of the problem that no row has."""
    rows = [row for row in ROWS if row.direction == problem.direction]
    if not rows:
        return f"this release has no CUDA {problem.direction} kernel"
    dtypes = sorted({dtypes_text(row.dtype, row.kv_dtype) for row in rows})
    rows = [row for row in rows if (row.dtype, row.kv_dtype) == (problem.dtype, problem.kv_dtype)]
    if not rows:
        asked = dtypes_text(problem.dtype, problem.kv_dtype)
        return f"dtype {asked} has no CUDA kernel; kernels take {', '.join(dtypes)}"
    extras = _extras(problem)
    kind = _kind(problem)
    rows = [row for row in rows if all(feature in row.features for feature in extras)]
    if not rows:
        return f"there is no {kind}"
    for name, size, largest in (
        ("head_dim", problem.head_dim, max(row.head_dim for row in rows)),
        ("head_dim_v", problem.head_dim_v, max(row.head_dim_v for row in rows)),
    ):
        if size > largest:
            return f"{name} {size} exceeds {largest}, the largest of any {kind}"
    return f"no CUDA kernel combines {', '.join(problem.features)} at {_head_dims(problem)}"


def _extras(problem: AttentionProblem) -> tuple[str, ...]:
    """What the problem asks that only some kernels do. Sums in an order are asked of its gradients alone."""
    unasked = ("deterministic",) if problem.direction == "forward" else ()
    return tuple(name for name in problem.features if name in EXTRA_FEATURES and name not in unasked)


def _kind(problem: AttentionProblem) -> str:
    """The kernels that a problem can be for, in words."""
    extras = _extras(problem)
    dtypes = dtypes_text(problem.dtype, problem.kv_dtype)
    return f"CUDA kernel for {dtypes}" + (f" with {' and '.join(extras)}" if extras else "")


def _head_dims(problem: AttentionProblem) -> str:
    text = f"head_dim {problem.head_dim}"
    return text if problem.head_dim == problem.head_dim_v else f"{text}, head_dim_v {problem.head_dim_v}"


def _rows_of(problem: AttentionProblem) -> list[KernelRow]:
    """The rows of the problem's direction and dtypes."""
    global _rows_by_dtypes
    if _rows_by_dtypes[0] is not ROWS:  # at first, and where a test hands in others
        by_dtypes: dict[tuple[str, str, str], list[KernelRow]] = {}
        for row in ROWS:
            by_dtypes.setdefault((row.direction, row.dtype, row.kv_dtype), []).append(row)
        _rows_by_dtypes = (ROWS, by_dtypes)
    return _rows_by_dtypes[1].get((problem.direction, problem.dtype, problem.kv_dtype), [])


_rows_by_dtypes: tuple[tuple[KernelRow, ...], dict[tuple[str, str, str], list[KernelRow]]] = ((), {})


def _decide(problem: AttentionProblem, device: DeviceDescription, build: BuildDescription) -> Plan:
    general = _general_refusals(problem, device, build)
    if general:
        return _no_plan(problem, "; ".join(refusal.reason for refusal in general), False)
    needed = _needed_features(problem)
    able = [row for row in _rows_of(problem) if not _request_refusal(row, problem, needed)]
    running = sorted(
        (row for row in able if not _device_refusal(row, device)),
        key=lambda row: (_preference(row, problem), row.head_dim + row.head_dim_v, _tile_fit(row, problem)),
    )
    left_out: dict[str, str] = {}  # why the build has not what would be better: reason -> the best such kernel
    held: list[KernelRow] = []
    for row in running:
        reason = _build_refusal(row, device, build)
        if not reason:
            held.append(row)
        elif not held and not row.by_cost:
            left_out.setdefault(reason, row.id)
    missing = "; ".join(f"kernel {row_id} {reason}" for reason, row_id in left_out.items())
    if not held:
        why = missing or (_device_reason(device, able, problem) if able else _nothing_computes(problem))
        return _no_plan(problem, why, bool(missing))
    first = held[0]
    first_schedule = plan_schedule(problem, first, device)
    # Metadata is for the first row alone: whichever runs, and whatever else either call knows, they agree on it.
    tag, config = metadata_identity(problem, first, first_schedule.pack_gqa)
    chosen, schedule = fastest(problem, device, held, first_schedule)
    if chosen is first:
        why = f"{chosen.id}: the first {chosen.phase} row for {_head_dims(problem)}"
    else:
        why = f"{chosen.id}: takes less time than {first.id}, the first {first.phase} row for {_head_dims(problem)}"
    if missing:
        why += f" that this build holds: {missing}"
    if problem.shared_tokens:
        why += "; the shared prefix in the same launch"
    return Plan(chosen, schedule, tag, config, sys.intern(why), False, first)


def _no_plan(problem: AttentionProblem, reason: str, left_out: bool) -> Plan:
    tag, config = metadata_identity(problem, None, False)
    return Plan(None, None, tag, config, sys.intern(reason), left_out)


def refusals(
    problem: AttentionProblem, device: DeviceDescription, build: BuildDescription | None = None
) -> tuple[Refusal, ...]:
    """Why each row that does not serve ``problem`` refuses it. Plans do not keep these texts: there is one a row.

    Args:
        build: as for resolve.
    """
    build = build_description() if build is None else build
    needed = _needed_features(problem)
    found = _general_refusals(problem, device, build)
    for row in ROWS:
        reason = _request_refusal(row, problem, needed)
        if reason:
            found.append(Refusal(row.id, reason, "arguments"))
        elif device.type == "cuda":
            found += row_refusals(row, device, build)
    return tuple(found)


def row_refusals(row: KernelRow, device: DeviceDescription, build: BuildDescription) -> list[Refusal]:
    """Why a row runs no call at all on a CUDA device with what this installation holds; empty: it does run some."""
    reason = _device_refusal(row, device)
    if reason:
        return [Refusal(row.id, reason, "device")]
    reason = _build_refusal(row, device, build)
    return [Refusal(row.id, reason, "build")] if reason else []


def _device_reason(device: DeviceDescription, able: list[KernelRow], problem: AttentionProblem) -> str:
    """Kernels compute the problem, but none on this device."""
    there = [row for row in able if row.runs_on(device.capability)]
    if not there:
        capabilities = sorted({capability for row in able for capability in row.capabilities})
        known = ", ".join(map(_capability_text, capabilities))
        return f"no {_kind(problem)} on compute capability {_capability_text(device.capability)}; there are for {known}"
    smallest = min(row.smem_limit for row in there)
    return f"every CUDA kernel needs {smallest} bytes of shared memory a block; the device has {device.smem_per_block}"


def metadata_identity(problem: AttentionProblem, row: KernelRow | None, pack_gqa: bool) -> tuple[int, MetadataConfig]:
    """-> (the non-zero 31-bit tag that the device compares, the record that the host compares)"""
    decode = row is not None and row.phase == "decode"
    config = MetadataConfig(
        batch_size=problem.batch,
        max_seqlen_q=problem.seqlen_q,
        num_heads_q=problem.num_heads_q,
        num_heads_kv=problem.num_heads_kv,
        headdim=problem.head_dim,
        headdim_v=problem.head_dim_v,
        qkv_dtype=problem.dtype,
        kv_dtype=problem.kv_dtype or problem.dtype,
        window_left=problem.window_left,
        window_right=canonical_right(problem.seqlen_q, problem.window_right),
        attention_chunk=problem.attention_chunk,
        tokens_per_split=problem.tokens_per_split,
        pack_gqa=pack_gqa,
        has_qv="qv" in problem.features,
        # Decode kernels plan for themselves: metadata made for one serves all of them.
        kernel="decode" if decode else row.id if row else "",
    )
    # The device's tag leaves the lengths out: split counts planned for other lengths are only less balanced.
    text = repr((*config._replace(max_seqlen_q=0), row.tile if row and not decode else ()))
    return (zlib.crc32(text.encode()) & 0x7FFFFFFF) or 1, config


#: A plan takes about 2 KB with its key, and about 0.3 ms to make again. Calls that kernels run are found in the table
#: of known calls (csrc/bindings/call_table.h) before anybody asks for a plan: these serve the fallback and gradients.
MAX_PLANS = 512
_decided = functools.lru_cache(maxsize=MAX_PLANS)(_decide)


def resolve(problem: AttentionProblem, device: DeviceDescription, build: BuildDescription | None = None) -> Plan:
    """The plan of ``problem`` on ``device``: the same for mha_fwd and get_scheduler_metadata.

    Args:
        build: what the installation holds; None for this one. Tests hand in their own.
    """
    return _decided(problem, device, build_description() if build is None else build)


def refusal_text(function: str, problem: AttentionProblem, device: DeviceDescription, plan: Plan) -> str:
    """The text of an UnsupportedError: what was asked, why it can not run, what to do."""
    asked = f"head_dim={problem.head_dim}, head_dim_v={problem.head_dim_v}, dtype={problem.dtype}"
    if problem.kv_dtype:
        asked += f", kv_dtype={problem.kv_dtype}"
    if problem.page_size:
        asked += f", page_size={problem.page_size}"
    if problem.tokens_per_split:
        asked += f", tokens_per_split={problem.tokens_per_split}"
    asked += f", features: {', '.join(problem.features)}"
    if plan.left_out:
        head = "this build leaves the CUDA kernel out"
    else:
        head = f"no CUDA kernel for this {problem.direction} call"
    return (
        f"{function}: {head}: {plan.reason}. Asked: {asked}. Device: {device.label()}."
        " Remedy: leave backend and BROADHEAD_STRICT unset to run on the torch fallback"
        + ("; `broadhead info` shows what this installation holds" if plan.left_out else "")
    )
