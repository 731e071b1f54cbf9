"""Fits the costs of kernels to the times of rows, and says how good the choice by them would be.

A cost has six numbers, none of them negative (``broadhead/plan/cost.py``). They are fitted to the logarithm of the
times, in steps of a weighted least-squares problem, so that short and long calls count alike.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from broadhead import costs, support
from broadhead.call.problem import AttentionProblem
from broadhead.capabilities import SMEM_BY_CAPABILITY
from broadhead.plan import dispatch
from broadhead.plan.cost import terms
from broadhead.plan.device import DeviceDescription
from broadhead.plan.fastest import needs_decode_kernel
from broadhead.plan.native import BuildDescription, FamilyBuild
from broadhead.plan.schedule import plan_schedule

from broadhead_bench.cases_landscape import LandscapeCase, landscape_cases
from broadhead_bench.inputs_landscape import TORCH_DTYPES
from broadhead_bench.landscape import geomean, percentile

ROWS = {row.id: row for row in support.ROWS}
#: Times of a kernel that a fit needs, and of one that says what is usual for kernels of its kind.
FEWEST, ENOUGH = 5, 12
#: How much what is usual counts: a number that is twice as large costs the fit as much as a time that is off by this.
PULL = 0.3
#: Columns times keys of a usual n_block.
BLOCK_SIZE = 128 * 256
STEPS = 8
#: Cases of a seed that are drawn to find one by its name.
MOST_CASES = 400


class Timed(NamedTuple):
    """A case, and the microseconds of each row that computes it."""

    problem: AttentionProblem
    us: dict[str, float]
    name: str


def read(paths: Iterable[Path]) -> list[Timed]:
    """Files of ``time_rows.py``."""
    found, cases = [], {}
    for path in paths:
        for record in json.loads(path.read_text(encoding="utf-8"))["cases"]:
            seed = record["seed"]
            if seed not in cases:
                cases[seed] = {case.name: case for case in landscape_cases(seed, MOST_CASES)}
            us = {name: time for name, time in record["us"].items() if name in ROWS and name not in record["wrong"]}
            found.append(Timed(problem_of(cases[seed][record["case"]]), us, record["case"]))
    return found


def problem_of(case: LandscapeCase) -> AttentionProblem:
    """What dispatch sees of a case."""
    packed = case.kind == "varlen"
    longest = max(case.seqlens_k)
    return AttentionProblem(
        dtype=TORCH_DTYPES[case.dtype],
        batch=case.batch,
        seqlen_q=max(case.seqlens_q),
        seqlen_k=-(-longest // case.page_size) * case.page_size if case.page_size else longest,
        num_heads_q=case.num_heads_q,
        num_heads_kv=case.num_heads_kv,
        head_dim=case.head_dim,
        head_dim_v=case.head_dim_v,
        page_size=case.page_size,
        window=(case.window_size[0], 0 if case.causal else -1),
        has_metadata=case.kind == "decode",
        varlen=packed,
        seqused=case.page_size > 0,
        sinks=case.sinks,
        descale=case.dtype == "e4m3",
        total_q=sum(case.seqlens_q) if packed else 0,
        total_k=sum(case.seqlens_k) if packed else 0,
    )


def fit(timed: list[Timed], device: DeviceDescription) -> dict[str, costs.Cost]:
    """The cost of each kernel that has times enough, by the rows' name."""
    by_name: dict[str, list[tuple[tuple[float, ...], float]]] = defaultdict(list)
    kinds: dict[str, list[str]] = defaultdict(list)
    sizes: dict[str, Any] = {}
    for problem, us, _ in timed:
        for row_id, time in us.items():
            row = ROWS[row_id]
            asked = as_measured(problem, row)
            by_name[row.name].append((terms(asked, row, plan_schedule(asked, row, device), device), time))
            sizes[row.name], kind = _sizes(row), f"{row.family} {row.phase} {row.kv_element_bytes}"
            if row.name not in kinds[kind]:
                kinds[kind].append(row.name)
    fitted = {}
    for names in kinds.values():
        alone = [_fit_one(by_name[name]) / sizes[name] for name in names if len(by_name[name]) >= ENOUGH]
        usual = np.median(alone, axis=0) if alone else None
        for name in names:
            if len(by_name[name]) >= FEWEST:
                numbers = _fit_one(by_name[name], None if usual is None else usual * sizes[name])
                fitted[name] = costs.Cost(*(round(float(number), 3) for number in numbers))
    return dict(sorted(fitted.items()))


def as_measured(problem: AttentionProblem, row: support.KernelRow) -> AttentionProblem:
    """The problem as ``time_rows.py`` runs it on a row: prefill kernels run without metadata."""
    if row.phase == "decode":
        return problem
    problem = problem._replace(has_metadata=False)
    return problem._replace(num_splits=1) if needs_decode_kernel(problem) else problem


def _sizes(row: support.KernelRow) -> Any:
    """What the numbers of similar kernels are proportional to: those of an n_block to its columns and keys."""
    block = row.tile.tile_n * (row.head_dim + row.head_dim_v) / BLOCK_SIZE
    return np.array([block if name in ("block", "chain") else 1.0 for name in costs.Cost._fields])


def _fit_one(pairs: list[tuple[tuple[float, ...], float]], usual: Any = None) -> Any:
    """The numbers of a kernel, drawn to those that are usual for its kind where its times say little about them."""
    matrix, times = np.array([x for x, _ in pairs]), np.array([time for _, time in pairs])
    drawn = [] if usual is None else [(index, number) for index, number in enumerate(usual) if number > 0]
    pull, wanted = np.zeros((len(drawn), matrix.shape[1])), np.full(len(drawn), PULL)
    for line, (index, number) in enumerate(drawn):
        pull[line, index] = PULL / number
    weights = 1 / times
    for _ in range(STEPS):
        scaled = np.concatenate([matrix * weights[:, None], pull])
        numbers = least_squares(scaled, np.concatenate([times * weights, wanted]))
        estimates = np.maximum(matrix @ numbers, 1e-3)
        weights = 1 / np.sqrt(estimates * times) / (1 + abs(np.log(estimates / times)))
    return numbers


def least_squares(matrix: Any, wanted: Any) -> Any:
    """The x without a negative number for which ``matrix @ x`` is closest to ``wanted``: of the solutions in which some
    of the numbers are 0 the best one that is allowed."""
    best, distance = np.zeros(matrix.shape[1]), math.inf
    for count in range(1, matrix.shape[1] + 1):
        for free in itertools.combinations(range(matrix.shape[1]), count):
            solved = np.linalg.lstsq(matrix[:, free], wanted, rcond=None)[0]
            off = float(np.linalg.norm(matrix[:, free] @ solved - wanted))
            if (solved >= 0).all() and off < distance:
                best, distance = np.zeros(matrix.shape[1]), off
                best[list(free)] = solved
    return best


def judge(timed: list[Timed], device: DeviceDescription, build: BuildDescription) -> str:
    """How much longer the rows that dispatch chooses take than the fastest ones."""
    shares, worst = [], (0.0, "")
    for (_, us, name), row_id in zip(timed, chosen(timed, device, build), strict=True):
        if row_id not in us:
            continue
        share = us[row_id] / min(us.values())
        shares.append(share)
        worst = max(worst, (share, f"{name}: {row_id}, {min(us, key=lambda row_id: us[row_id])} is the fastest"))
    return (
        f"{len(shares)} cases, the chosen row takes {geomean(shares):.3f} of the fastest one's time in the mean, "
        f"{percentile(shares, 90):.3f} in one case of ten, {percentile(shares, 97):.3f} in three of a hundred, "
        f"{worst[0]:.2f} at worst ({worst[1]})"
    )


def chosen(timed: list[Timed], device: DeviceDescription, build: BuildDescription) -> list[str]:
    """The id of the row that dispatch chooses for each case; "" where it divides keys otherwise than was measured."""
    dispatch._decided.cache_clear()
    found = []
    for problem, _, _ in timed:
        plan = dispatch.resolve(problem, device, build)
        same = False
        if plan.row and plan.schedule:
            measured = plan_schedule(as_measured(problem, plan.row), plan.row, device)
            same = (plan.schedule.num_splits == 1) == (measured.num_splits == 1)
        found.append(plan.row.id if plan.row and same else "")
    dispatch._decided.cache_clear()
    return found


def write(fitted: dict[str, costs.Cost], path: Path, sources: str) -> None:
    """Rewrites the table of ``costs.py``."""
    text = path.read_text(encoding="utf-8")
    head = text[: text.index("#: Fitted to")]
    lines = [f"    {json.dumps(name)}: Cost({', '.join(f'{x:g}' for x in cost)})," for name, cost in fitted.items()]
    body = "\n".join([f"#: Fitted to {sources}.", "COSTS: dict[str, Cost] = {", *lines, "}", ""])
    path.write_text(head + body, encoding="utf-8")


def described(run: dict[str, Any]) -> tuple[DeviceDescription, BuildDescription]:
    """The device that was measured, and a build of all rows."""
    device = DeviceDescription("cuda", run["device"], (9, 0), SMEM_BY_CAPABILITY[9, 0], 132, 50 << 20, None)
    families = tuple(
        FamilyBuild(name, ("90a",), (), frozenset(row.id for row in support.ROWS if row.family == name))
        for name in dict.fromkeys(row.family for row in support.ROWS)
    )
    return device, BuildDescription(True, families, ())
