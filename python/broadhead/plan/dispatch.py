"""Chooses the kernel of a problem: a row of the table, or every row's reason for refusing, and the scheduling plan."""

from __future__ import annotations

import functools
import sys
import zlib
from collections.abc import Callable
from typing import NamedTuple

from ..call.problem import AttentionProblem, backward_of, canonical_right
from ..support import ROWS, KernelRow
from .candidates import Able, Candidates, order_of
from .device import DeviceDescription
from .fastest import Choice, decides_by_cost, fastest, own_schedule, representative
from .native import BuildDescription, build_description
from .refusal import (
    Kind,
    Refusal,
    device_reason,
    head_dims_text,
    kind_of,
    nothing_computes,
    request_refusal,
    row_refusals,
    short_rows,
)
from .schedule import Schedule, plan_schedule

#: Sequences of a backward call: the last dimension of a grid.
MAX_BACKWARD_BATCH = 65535
#: Plans that are remembered, and choices between rows.
MAX_PLANS = 512
#: Kinds of problems that are remembered, and orders of their rows.
MAX_KINDS = 256


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


#: Plans a problem, as resolve does.
Decide = Callable[[AttentionProblem, DeviceDescription, BuildDescription], Plan]


def _gradient_refusals(
    problem: AttentionProblem, device: DeviceDescription, build: BuildDescription, decide: Decide
) -> list[Refusal]:
    """Why no kernel computes the gradients of a forward problem, if it asks for them."""
    if "gradients" not in problem.features:
        return []
    if device.type != "cuda":
        return []
    plan = decide(backward_of(problem), device, build)
    if plan.row is not None:
        return []
    kernel = "deterministic CUDA kernel" if "deterministic" in problem.features else "CUDA kernel"
    reason = f"an input requires grad, and no {kernel} differentiates: {plan.reason}"
    return [Refusal("", reason, "build" if plan.left_out else "arguments")]


def _general_refusals(
    problem: AttentionProblem, device: DeviceDescription, build: BuildDescription, decide: Decide
) -> list[Refusal]:
    """Reasons that hold for every row. ``decide``: plans gradients."""
    found = []
    if device.type != "cuda":
        text = f"the tensors are on a {device.type} device; kernels run on NVIDIA CUDA devices"
        found.append(Refusal("", text, "device"))
    if problem.direction == "backward" and problem.batch > MAX_BACKWARD_BATCH:
        text = f"backward kernels take up to {MAX_BACKWARD_BATCH} sequences, not {problem.batch}"
        found.append(Refusal("", text, "arguments"))
    found += _gradient_refusals(problem, device, build, decide)
    return found + [Refusal("", text, "arguments") for text in (*short_rows(problem), *problem.obstacles)]


class Decisions:
    """Plans by problem, and what problems share of how they are decided. It is called as ``resolve`` is.

    A plan takes about 2 KB with its key. Calls that kernels run are found in the table of known calls
    (csrc/bindings/call_table.h) before anybody asks for a plan: these serve the fallback and gradients, and what is
    shared serves callers whose lengths differ in each call. Whoever replaces ROWS or the costs calls ``cache_clear``.
    """

    def __init__(self) -> None:
        self._plans = functools.lru_cache(maxsize=MAX_PLANS)(self._decide)
        self._able = functools.lru_cache(maxsize=MAX_KINDS)(_able)
        self._candidates = functools.lru_cache(maxsize=MAX_KINDS)(Candidates)
        self._choices = functools.lru_cache(maxsize=MAX_PLANS)(_choose)

    def __call__(self, problem: AttentionProblem, device: DeviceDescription, build: BuildDescription) -> Plan:
        return self._plans(problem, device, build)

    def cache_clear(self) -> None:
        """Forget everything: the table or the costs have changed."""
        for cache in (self._plans, self._able, self._candidates, self._choices):
            cache.cache_clear()

    def _decide(self, problem: AttentionProblem, device: DeviceDescription, build: BuildDescription) -> Plan:
        general = _general_refusals(problem, device, build, self)
        if general:
            return _no_plan(problem, "; ".join(refusal.reason for refusal in general), False)
        able = self._able(kind_of(problem), device, build)
        candidates = self._candidates(able, order_of(problem))
        held, missing = candidates.held, candidates.missing
        if not held:
            found = device_reason(device, able.rows, problem) if able.rows else nothing_computes(problem, ROWS)
            return _no_plan(problem, missing or found, bool(missing))
        first = held[0]
        schedule = plan_schedule(problem, first, device)
        # Metadata is for the first row alone: whichever runs, and whatever else either call knows, they agree on it.
        tag, config = metadata_identity(problem, first, schedule.pack_gqa)
        row, whole = first, False
        if decides_by_cost(problem, device, held):
            row, whole = self._choices(representative(problem), device, candidates)
        why = f"the first {first.phase} row for {head_dims_text(problem)}"
        if row is not first:
            schedule = own_schedule(problem, row, device)
            why = f"takes less time than {first.id}, {why}"
        if whole:
            schedule = schedule._replace(num_splits=1)
        why = f"{row.id}: {why}"
        if missing:
            why += f" that this build holds: {missing}"
        if problem.shared_tokens:
            why += "; the shared prefix in the same launch"
        return Plan(row, schedule, tag, config, sys.intern(why), False, first)


def _able(kind: Kind, device: DeviceDescription, build: BuildDescription) -> Able:
    return Able(kind, ROWS, device, build)


def _choose(problem: AttentionProblem, device: DeviceDescription, candidates: Candidates) -> Choice:
    return fastest(problem, device, candidates.held)


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
    kind = kind_of(problem)
    found = _general_refusals(problem, device, build, _decided)
    for row in ROWS:
        reason = request_refusal(row, kind)
        if reason:
            found.append(Refusal(row.id, reason, "arguments"))
        elif device.type == "cuda":
            found += row_refusals(row, device, build)
    return tuple(found)


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


_decided = Decisions()


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
