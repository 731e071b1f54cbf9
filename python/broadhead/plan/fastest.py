"""Which of the rows that compute a problem takes the least time: the first one unless another is clearly faster."""

from __future__ import annotations

from typing import NamedTuple

from ..call.problem import AttentionProblem
from ..costs import MEASURED
from ..support import KernelRow
from ..tiles import Fp8Tile
from .cost import estimate, least
from .device import DeviceDescription
from .schedule import Schedule, plan_schedule

#: Features of calls whose sequences differ in length, or may: the host does not know the lengths.
LENGTHS_ON_DEVICE = ("leftpad", "paged", "seqused", "varlen")
#: A row takes the place of the first one if the estimate of its time is below this share. Estimates err by a fifth.
CLEARLY_FASTER = 0.95
#: Microseconds of the first row above which it keeps its place: costs are fitted to shorter calls, where what a call
#: and a tile cost besides the products counts. Of long ones they tell too little.
LONGEST_BY_COST = 2000.0

#: Pages of multiples of so many tokens are brought by TMA where nothing pads them (csrc/tma/launch.cuh, make_maps).
TMA_PAGE_STEP = 8


class Choice(NamedTuple):
    """The row that takes the least time."""

    row: KernelRow
    whole: bool  # that time is one of undivided keys; never with metadata, which plans the splits


def representative(problem: AttentionProblem) -> AttentionProblem:
    """The problem whose times stand for those of a few others: a caller whose lengths differ in each call waits for one
    choice in many calls. Its lengths are rounded up to four bits behind the first one: by a sixteenth at most."""
    return problem._replace(
        batch=_rounded_up(problem.batch), seqlen_q=_rounded_up(problem.seqlen_q), seqlen_k=_rounded_up(problem.seqlen_k)
    )


def _rounded_up(length: int) -> int:
    drop = max(0, length.bit_length() - 5)
    return -(-length >> drop) << drop


def fastest(problem: AttentionProblem, device: DeviceDescription, rows: tuple[KernelRow, ...]) -> Choice:
    """The row that takes the least time, about: the first one unless another is clearly faster. Of problems for which
    ``decides_by_cost`` holds.

    A prefill kernel that would divide keys may be faster without: it needs no second kernel that merges results.
    """
    first_schedule = plan_schedule(problem, rows[0], device)
    bound = estimate(problem, rows[0], first_schedule, device)
    if bound is None or bound > LONGEST_BY_COST:
        return Choice(rows[0], False)
    best = Choice(rows[0], _is_whole(problem, first_schedule))
    bound *= CLEARLY_FASTER
    for row in rows:
        if row is rows[0]:
            schedule = first_schedule
        elif row.tile == rows[0].tile or least(row) >= bound or _gathers_slowly(problem, row):
            continue  # more columns in the same tile take no less time; nor does a schedule, to be made in vain
        else:
            schedule = own_schedule(problem, row, device)
            time = estimate(problem, row, schedule, device)
            if time is not None and time < bound:
                best, bound = Choice(row, _is_whole(problem, schedule)), time
        if schedule.num_splits > 1 and not problem.has_metadata:
            time = estimate(problem, row, schedule._replace(num_splits=1), device)
            if time is not None and time < bound:
                best, bound = Choice(row, True), time
    return best


def _is_whole(problem: AttentionProblem, schedule: Schedule) -> bool:
    return schedule.num_splits == 1 and not problem.has_metadata


def decides_by_cost(problem: AttentionProblem, device: DeviceDescription, rows: tuple[KernelRow, ...]) -> bool:
    """Whether another row than the first one may run, or the first one undivided. Of calls that say how their keys are
    divided, and whose results must not depend on the batch, the first row runs."""
    return len(rows) > 1 and device.capability == MEASURED and _may_run_on_any(problem)


def own_schedule(problem: AttentionProblem, row: KernelRow, device: DeviceDescription) -> Schedule:
    """The schedule of a row in place of the first one. Decode kernels divide keys by the lengths that they read
    themselves, with metadata and without."""
    return plan_schedule(problem if row.phase == "decode" else undivided(problem), row, device)


def undivided(problem: AttentionProblem) -> AttentionProblem:
    """The problem as a row in place of the first one takes it: metadata plans the splits of the first row alone, and
    equal splits of lengths that the host does not know may leave all keys to one of them."""
    return problem._replace(num_splits=1) if problem.has_metadata or needs_decode_kernel(problem) else problem


def _gathers_slowly(problem: AttentionProblem, row: KernelRow) -> bool:
    """Whether one warp copies all keys row by row: e4m3 Hopper kernels, over pages that TMA can not bring.
    PERF(H200, 39 sequences of 8k to 56k tokens, pages of 1): 2060 us, FlashAttention-3 834."""
    gathers = problem.page_size % TMA_PAGE_STEP != 0 or "leftpad" in problem.features
    return isinstance(row.tile, Fp8Tile) and gathers


def _may_run_on_any(problem: AttentionProblem) -> bool:
    """Whether the call leaves open how its keys are divided, and how many multiprocessors it takes: of the portable
    prefill kernels none leaves some free."""
    asked = problem.tokens_per_split or problem.shared_tokens or problem.num_splits > 1 or problem.sm_margin
    return problem.direction == "forward" and not asked and "qv" not in problem.features


def needs_decode_kernel(problem: AttentionProblem) -> bool:
    """Whether the keys are to be divided as only decode kernels do: at multiples of tokens_per_split; or evenly over
    the device by lengths that are known there alone, without metadata made from them."""
    if not problem.is_decode:
        return False
    unplanned = not problem.has_metadata and any(name in problem.features for name in LENGTHS_ON_DEVICE)
    return problem.tokens_per_split > 0 or unplanned
