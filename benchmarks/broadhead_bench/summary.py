"""Compares broadhead's results with the best peer or its own baseline, and with the bars they should meet."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from broadhead_bench.cases import ODD_AREAS
from broadhead_bench.records import IMPLEMENTATIONS, UNITS

#: Beside whom a result stands, and the ratio it should reach.
BAR_UP_TO_256 = ("best peer", 0.97)
BAR_ABOVE_256 = ("ffpa", 1.05)
BAR_PAGED = ("baseline", 0.93)
BAR_FP8 = ("baseline", 1.4)
#: Of fa3, which pads such head_dims, by head_dim.
BARS_ODD = {72: 1.0, 80: 1.0, 160: 0.9}
#: Time over the time that the visible operations would take at the causal rate.
BAR_WINDOW = 1.15

#: Areas whose bars are stated; of the others only the ratio is shown.
PEER_AREAS = ("forward", "chunked", "varlen")
#: Areas that compare with `baseline` by the time of the same step, whatever each of the two reads.
STEP_AREAS = ("decode-fp8", "decode-invariant", "cascade", "append")


class Row(NamedTuple):
    """One case: our number, whom it is compared with, the ratio, and the bar if there is one."""

    area: str
    case: str
    value: float
    seconds: float
    rival: str | None
    rival_value: float | None
    ratio: float | None
    bar: str
    met: bool | None  # None: no bar, or nobody to compare with


def summarize(records: list[dict[str, Any]]) -> list[Row]:
    """One row for each case that broadhead has a result of; of several results of one kind the last counts."""
    return [_row(area, case, results) for (area, case), results in _by_case(records).items() if "broadhead" in results]


def table(records: list[dict[str, Any]], area: str) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of an area: each case with every implementation's number, our time where the numbers are
    rates, the ratio to the rival, and the bar where there is one."""
    cases = {case: results for (of, case), results in _by_case(records).items() if of == area}
    rows = {row.case: row for row in summarize(records) if row.area == area}
    impls = [name for name in IMPLEMENTATIONS if any(name in results for results in cases.values())]
    timed = UNITS[area] != "us"
    barred = any(row.bar for row in rows.values())
    columns = ["case", *impls, *(["our us"] if timed else []), "ratio", *(["bar", "met"] if barred else [])]
    body = []
    for case, results in cases.items():
        line = [case, *(_number(results[impl]["value"]) if impl in results else "-" for impl in impls)]
        row = rows.get(case)
        if timed:
            line.append("-" if row is None else _number(row.seconds * 1e6))
        line.append("-" if row is None or row.ratio is None else f"{row.ratio:.3f} {row.rival}")
        if barred:
            met = None if row is None else row.met
            line += [row.bar if row else "-", "-" if met is None else ("yes" if met else "NO")]
        body.append(line)
    return columns, body


def _by_case(records: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for record in records:
        cases.setdefault((record["area"], record["case"]), {})[record["impl"]] = record
    return cases


def _row(area: str, case: str, results: dict[str, dict[str, Any]]) -> Row:
    own = results["broadhead"]["value"]
    seconds = results["broadhead"].get("seconds", float("nan"))
    values = {impl: record["value"] for impl, record in results.items() if impl != "broadhead"}
    rival, least, most = _rival(area, case, values)
    theirs = values.get(rival) if rival else None
    if rival is None or theirs is None:
        return Row(area, case, own, seconds, None, None, None, _text(least, most), None)
    if area in STEP_AREAS:
        ratio = results[rival]["seconds"] / seconds
    else:
        ratio = theirs / own if area == "window" or UNITS[area] == "us" else own / theirs
    met = None
    if least is not None:
        met = ratio >= least
    elif most is not None:
        met = ratio <= most
    return Row(area, case, own, seconds, rival, theirs, ratio, _text(least, most), met)


def _rival(area: str, case: str, values: dict[str, float]) -> tuple[str | None, float | None, float | None]:
    """Whom to compare with, and the least or the most that the ratio may be."""
    if area in STEP_AREAS:
        return "baseline", None, None
    if area == "window":
        return "baseline", None, BAR_WINDOW
    if area in ODD_AREAS:
        return ("fa3", BARS_ODD.get(head_dim(case)), None)
    if area in ("paged", "fp8"):
        return (*(BAR_PAGED if area == "paged" else BAR_FP8), None)
    peers = {impl: value for impl, value in values.items() if impl != "baseline"}
    best = (min if UNITS[area] == "us" else max)(peers, key=lambda impl: peers[impl], default=None)
    if area not in PEER_AREAS:
        return best, None, None
    if head_dim(case) > 256:
        return (BAR_ABOVE_256[0] if "ffpa" in peers else best), BAR_ABOVE_256[1], None
    return best, BAR_UP_TO_256[1], None


def _text(least: float | None, most: float | None) -> str:
    if least is not None:
        return f">= {least:g}"
    return "" if most is None else f"<= {most:g}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def head_dim(case: str) -> int:
    """The head_dim in the name of a case; 0 where it has none."""
    found = re.search(r" D(\d+)", case)
    return int(found[1]) if found else 0
