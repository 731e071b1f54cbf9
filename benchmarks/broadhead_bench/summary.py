"""Compares results with the best peer, with broadhead's own baseline or default, and with the bars they should meet."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from broadhead_bench.bars import BAR_SWEEP_MEAN, STEP_AREAS, Comparison, comparisons
from broadhead_bench.cases_backward import TRAINING_AREAS
from broadhead_bench.records import IMPLEMENTATIONS, UNITS


class Row(NamedTuple):
    """One result of ours: its number, whom it is compared with, the ratio, and the bar if there is one."""

    area: str
    case: str
    value: float
    seconds: float
    rival: str | None
    rival_value: float | None
    ratio: float | None
    bar: str
    met: bool | None  # None: no bar, or nobody to compare with
    impl: str = "broadhead"

    @property
    def label(self) -> str:
        """What the row is about, where it stands alone."""
        return self.case if self.impl == "broadhead" else f"{self.impl}, {self.case}"


def summarize(records: list[dict[str, Any]]) -> list[Row]:
    """The rows of each case that broadhead has a result of, its own first; of several results of one kind the last
    counts."""
    return [row for (area, case), results in _by_case(records).items() for row in _rows(area, case, results)]


def table(records: list[dict[str, Any]], area: str) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of an area: each case with every implementation's number, our time where the numbers are
    rates, the ratio to the rival, and the bar where there is one."""
    cases = {case: results for (of, case), results in _by_case(records).items() if of == area}
    rows: dict[str, Row] = {}
    for row in summarize(records):
        if row.area == area:
            rows.setdefault(row.case, row)
    impls = [name for name in IMPLEMENTATIONS if any(name in results for results in cases.values())]
    timed = UNITS[area] != "us"
    barred = any(row.bar for row in rows.values())
    columns = ["case", *impls, *(["our us"] if timed else []), "ratio", *(["bar", "met"] if barred else [])]
    body = []
    for case, results in cases.items():
        line = [case, *(_number(results[impl]["value"]) if impl in results else "-" for impl in impls)]
        shown = rows.get(case)
        if timed:
            line.append("-" if shown is None else _number(shown.seconds * 1e6))
        line.append("-" if shown is None or shown.ratio is None else f"{shown.ratio:.3f} {shown.rival}")
        if barred:
            met = None if shown is None else shown.met
            line += [shown.bar if shown else "-", "-" if met is None else ("yes" if met else "NO")]
        body.append(line)
    return columns, body


def means(records: list[dict[str, Any]], area: str) -> list[str]:
    """Lines below the table of an area of training: the geometric mean and the worst of the ratios of each kind."""
    if area not in TRAINING_AREAS:
        return []
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in summarize(records):
        if row.area == area and row.ratio is not None and row.rival is not None:
            rival = "the best peer" if area == "backward-sweep" and row.impl == "broadhead" else row.rival
            kinds.setdefault((row.impl, rival), []).append(row)
    lines = []
    for (impl, rival), rows in kinds.items():
        ratios = {row.case: row.ratio for row in rows if row.ratio is not None}
        mean = math.exp(sum(math.log(ratio) for ratio in ratios.values()) / len(ratios))
        worst = min(ratios, key=lambda case: ratios[case])
        bar = ""
        if rival == "the best peer":
            bar = f" (bar >= {BAR_SWEEP_MEAN:g}: {'yes' if mean >= BAR_SWEEP_MEAN else 'NO'})"
        of_worst = f"worst {ratios[worst]:.3f} ({worst})"
        lines.append(f"{impl} to {rival}: {len(ratios)} cases, geometric mean {mean:.3f}{bar}, {of_worst}")
    return lines


def _by_case(records: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for record in records:
        cases.setdefault((record["area"], record["case"]), {})[record["impl"]] = record
    return cases


def _rows(area: str, case: str, results: dict[str, dict[str, Any]]) -> list[Row]:
    if "broadhead" not in results:
        return []
    values = {impl: record["value"] for impl, record in results.items()}
    return [_row(area, case, results, comparison) for comparison in comparisons(area, case, values)]


def _row(area: str, case: str, results: dict[str, dict[str, Any]], comparison: Comparison) -> Row:
    impl, rival, least, most = comparison
    own = results[impl]["value"]
    seconds = results[impl].get("seconds", float("nan"))
    if rival is None or rival not in results:
        return Row(area, case, own, seconds, None, None, None, _text(least, most), None, impl)
    theirs = results[rival]["value"]
    if area in STEP_AREAS:
        ratio = results[rival]["seconds"] / seconds
    else:
        by_time = area == "window" or (UNITS[area] == "us" and area != "masks")
        ratio = theirs / own if by_time else own / theirs
    met = None
    if least is not None:
        met = ratio >= least
    elif most is not None:
        met = ratio <= most
    return Row(area, case, own, seconds, rival, theirs, ratio, _text(least, most), met, impl)


def _text(least: float | None, most: float | None) -> str:
    if least is not None:
        return f">= {least:g}"
    return "" if most is None else f"<= {most:g}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
