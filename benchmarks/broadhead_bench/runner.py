"""Runs the cases of an area: checks each implementation against fp32, times those that are right, makes records."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import broadhead
import torch

from broadhead_bench.cases import Case, cases_of
from broadhead_bench.cases_decode import DECODE_AREAS
from broadhead_bench.cases_landscape import LandscapeCase, default_count, landscape_cases
from broadhead_bench.measure import task_of
from broadhead_bench.peers.base import Peer, Skip
from broadhead_bench.peers.registry import all_peers
from broadhead_bench.records import OWN, RunInfo, make_record
from broadhead_bench.task import Measurement, Prepared

#: Seconds a measurement. A decode step repeats to within a percent in a CUDA graph, and there are many cases; in a
#: sweep many cases make up for a noisy one; masks stand beside the same call without them, in turns.
BUDGET, SHORT_BUDGET, LANDSCAPE_BUDGET = 0.5, 0.2, 0.05
SHORT_AREAS = (*DECODE_AREAS, "backward-sweep", "masks")


class Options(NamedTuple):
    """What to run: names of implementations, a text that case names contain, seconds a measurement."""

    device: torch.device
    implementations: tuple[str, ...] = ()  # empty: all
    case_filter: str = ""
    budget: float | None = None  # None: what suits the area
    seed: int = 0  # of the cases that are drawn
    most_cases: int | None = None  # of each area; None: all
    kinds: tuple[str, ...] = ()  # of the landscape; empty: all
    numbers: tuple[int, ...] = ()  # of cases of the landscape; empty: all

    def budget_of(self, area: str) -> float:
        """Seconds a measurement."""
        if area == "landscape":
            return self.budget or LANDSCAPE_BUDGET
        return self.budget or (SHORT_BUDGET if area in SHORT_AREAS else BUDGET)

    def cases_of(self, area: str) -> list[Case]:
        """The selected cases of an area."""
        on_cpu = self.device.type == "cpu"
        cases: list[Case]
        if area == "landscape":
            behind = max(self.numbers, default=-1) + 1
            drawn = landscape_cases(self.seed, self.most_cases or max(behind, default_count(on_cpu)), on_cpu)
            cases = [
                case
                for case in drawn
                if (not self.kinds or case.kind in self.kinds) and (not self.numbers or case.number in self.numbers)
            ]
        else:
            cases = cases_of(area, on_cpu, self.seed)
        return [case for case in cases if self.case_filter in case.name][: self.most_cases]


@dataclass
class Outcome:
    """Records and complaints of a run. ``broken`` counts what must not happen: broadhead wrong or raising."""

    records: list[dict[str, Any]] = field(default_factory=list)
    broken: int = 0


def run_area(
    area: str, options: Options, run: RunInfo, log: Callable[[str], None], on_record: Callable[[dict[str, Any]], None]
) -> Outcome:
    """Run every selected case with every available implementation.

    Args:
        area: one of cases.AREAS.
        log: gets one line for whatever is skipped or measured.
        on_record: gets each record at once, so that an interrupted run keeps what it has.
    """
    outcome = Outcome()
    wanted = [p for p in all_peers() if not options.implementations or p.name in options.implementations]
    available = []
    for peer in (p for p in wanted if area in p.areas):
        reason = peer.why_unavailable(options.device)
        if reason is None:
            available.append(peer)
        else:
            log(f"skip {peer.name}: {reason}")
    cases = options.cases_of(area)
    if not cases:
        log(f"no case of {area} is selected by --case {options.case_filter!r}, --kinds and --only")
    for case in cases:
        for peer, measured in _measure_case(area, case, available, options):
            if isinstance(measured, Exception):
                if peer.name in OWN and not isinstance(measured, (Skip, broadhead.UnsupportedError)):
                    outcome.broken += 1
                log(f"skip {peer.name}, {case.name}: {_one_line(measured)}")
                continue
            prepared = measured.prepared
            record = make_record(
                run,
                area,
                case.name,
                peer.name,
                measured.value,
                measured.seconds,
                prepared.error,
                prepared.kernel,
                prepared.versions,
                prepared.peak_bytes,
                _details(case, options),
            )
            outcome.records.append(record)
            on_record(record)
            log(
                f"{case.name}  {peer.name}  {record['value']:g} {record['unit']}  rel_error {record['rel_error']:.1e}"
                + (f"  {record['kernel']}" if record["kernel"] else "")
                + (f"  +{record['peak_bytes'] / 2**20:.1f} MiB" if record["peak_bytes"] is not None else "")
            )
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    return outcome


def _details(case: Case, options: Options) -> dict[str, Any] | None:
    """What a record keeps of a drawn case besides its name."""
    if not isinstance(case, LandscapeCase):
        return None
    return {"seed": options.seed, "flops": case.flops, "bytes": case.bytes}


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0][:300] if lines else ""
    return text if isinstance(error, Skip) else f"{type(error).__name__}: {text}"


def _measure_case(
    area: str, case: Case, peers: list[Peer], options: Options
) -> Iterator[tuple[Peer, Measurement | Exception]]:
    """Measure one case with each peer on the same inputs."""
    torch.manual_seed(0)
    try:
        task = task_of(case, options.device)
    except Skip as error:  # nobody can be measured
        yield from ((peer, error) for peer in peers)
        return
    right: list[Prepared] = []
    for peer in peers:
        try:
            with torch.no_grad(), warnings.catch_warnings(), peer.context():
                warnings.simplefilter("ignore")
                prepared = task.prepare(peer)
            if not prepared.error <= task.max_error:  # also when it is NaN
                error_text = f"relative error {prepared.error:.3g} > {task.max_error:g}"
                raise ArithmeticError(f"wrong result: {error_text}, not timed")
            right.append(prepared)
        except Exception as error:  # a peer may fail in any way; the runner decides what it means
            yield peer, error
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times = task.time(right, options.budget_of(area))
    for prepared, seconds in zip(right, times):
        if isinstance(seconds, Exception):
            yield prepared.peer, seconds
        else:
            yield prepared.peer, Measurement(task.value(prepared, seconds), seconds, prepared)
