"""Times every row of the table on cases of the landscape, which the costs of ``broadhead/costs.py`` are fitted to.

A call that is planned by metadata runs here as it would in place of its first row: without metadata, undivided.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import broadhead
import torch
from broadhead import support
from broadhead.support import DECODE_MAX_ROWS
from torch import Tensor

from broadhead_bench import timing
from broadhead_bench.cases_landscape import LandscapeCase, landscape_cases
from broadhead_bench.inputs_landscape import LandscapeInputs
from broadhead_bench.landscape import BYTES_PER_SECOND, FLOPS_PER_SECOND
from broadhead_bench.measure_landscape import LandscapeTask
from broadhead_bench.peers.broadhead_api import Broadhead
from broadhead_bench.peers.broadhead_rows import candidates, only
from broadhead_bench.records import describe_run

#: Of each row and case: the median counts.
RUNS = 7
#: The least seconds of a case that is left out: costs need not tell rows apart that run for milliseconds.
LONGEST = 4e-4


class RowTimes(NamedTuple):
    """Microseconds of each row of one case, by the row's id."""

    seed: int
    case: str
    us: dict[str, float]
    wrong: dict[str, float]  # of rows whose result is too far from the reference: the error


def time_rows(seed: int, case: LandscapeCase, device: torch.device, flush: Callable[[], None]) -> RowTimes:
    """Every row that computes the case by itself, each call alone in a CUDA graph with a flushed L2."""
    task = LandscapeTask(case, device)
    found = RowTimes(seed, case.name, {}, {})
    for row in candidates(case, torch.cuda.get_device_capability(device)):
        call = _forced(row, case, task.inputs)
        try:
            error = task.error(call())
            graph = timing.captured(call, device)
        except (broadhead.UnsupportedError, broadhead.InvalidTypeError):
            continue
        if not error <= task.max_error:  # NaN is wrong, too
            found.wrong[row.id] = error
        found.us[row.id] = round(_microseconds(graph, flush), 2)
    return found


def _forced(row: support.KernelRow, case: LandscapeCase, inputs: LandscapeInputs) -> Callable[[], Tensor]:
    planned = case.kind == "decode" and row.phase == "decode"
    measured = case if planned or case.kind != "decode" else case._replace(kind="chunk")
    few = case.page_size > 0 and max(case.seqlens_q) * case.num_heads_q <= DECODE_MAX_ROWS * case.num_heads_kv
    divided = 1 if few and row.phase != "decode" else 0
    with only((row,)):
        call = _Divided(divided).landscape(measured, inputs)

    def run() -> Tensor:
        with only((row,)):
            return call()

    return run


class _Divided(Broadhead):
    """broadhead's kernels with a number of splits; 0: as the schedule finds best."""

    _backend = "cuda"

    def __init__(self, num_splits: int) -> None:
        super().__init__()
        self._num_splits = num_splits

    def landscape_options(self) -> dict[str, Any]:
        return {"num_splits": self._num_splits}


def _microseconds(call: Callable[[], object], flush: Callable[[], None]) -> float:
    events = []
    for _ in range(RUNS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush()
        begin.record()
        call()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) * 1e3


def run(seeds: list[int], count: int, budget: float, out: Path, arguments: list[str]) -> int:
    """Writes the times of ``count`` cases of each seed, as ``budget`` seconds allow; returns how many are wrong."""
    device = torch.device("cuda")
    flush = timing.L2Flusher(device)
    found: list[RowTimes] = []
    end = time.monotonic() + budget
    drawn = [[(seed, case) for case in landscape_cases(seed, count)] for seed in seeds]
    for seed, case in itertools.chain.from_iterable(zip(*drawn, strict=True)):
        if time.monotonic() > end:
            break
        if max(case.flops / FLOPS_PER_SECOND, case.bytes / BYTES_PER_SECOND) <= LONGEST:
            found.append(time_rows(seed, case, device, flush))
    info = describe_run(device, arguments)
    about = info._replace(command=info.command.replace("run.py", "time_rows.py", 1))._asdict()
    lines = ",\n".join(json.dumps(times._asdict()) for times in found)
    out.write_text(f'{{"run": {json.dumps(about)},\n"cases": [\n{lines}\n]}}\n', encoding="utf-8")
    wrong = [(times.case, row, error) for times in found for row, error in times.wrong.items()]
    for case_name, row, error in wrong:
        print(f"wrong: {row} {error:.3g} {case_name}")
    print(f"{len(found)} cases, {sum(len(times.us) for times in found)} times, {len(wrong)} wrong results")
    return len(wrong)
