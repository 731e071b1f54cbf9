"""Command line of the benchmarks: options, result file, tables, plot."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from broadhead.bench.cases import AREAS
from broadhead.bench.records import IMPLEMENTATIONS, UNITS, describe_run, read_records, write_records
from broadhead.bench.runner import Options, run_area
from broadhead.bench.summary import COLUMNS, summarize

#: Exit status: everything measured is right; broadhead was wrong or raised; the options make no sense here.
OK, BROKEN, BAD_USAGE = 0, 1, 2

QUICK_BUDGET = 0.1


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m broadhead.bench",
        description="Times broadhead and the peers that are installed, after checking each result against fp32.",
    )
    parser.add_argument("areas", nargs="+", choices=AREAS, metavar="area", help=f"one or more of {', '.join(AREAS)}")
    parser.add_argument(
        "--impl", default="", metavar="NAMES", help=f"only these, separated by commas: {', '.join(IMPLEMENTATIONS)}"
    )
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains TEXT: D512")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the records to this JSON file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw this run's records as grouped bars")
    parser.add_argument("--quick", action="store_true", help="short measurements; on a CPU: tiny shapes")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="seconds a measurement, default 0.5")
    parser.add_argument("--device", default=None, help="default: cuda if there is one")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks.

    Args:
        arguments: the command line, default that of the process.

    Returns:
        OK, BROKEN or BAD_USAGE.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parsed = build_parser().parse_args(arguments)
    try:
        options = _options(parsed)
        previous = read_records(parsed.out) if parsed.out else []
    except ValueError as error:
        print(f"broadhead.bench: {error}", file=sys.stderr)
        return BAD_USAGE
    run = describe_run(options.device, arguments)
    print(f"{run.device}, torch {run.versions['torch']}, {options.budget:g} s a measurement", flush=True)

    records: list[dict[str, Any]] = []
    broken = 0

    def keep(record: dict[str, Any]) -> None:
        records.append(record)
        if parsed.out:
            write_records(parsed.out, previous + records)

    for area in parsed.areas:
        broken += run_area(area, options, run, lambda line: print(line, flush=True), keep).broken
    print_table(records)
    print_summary(records)
    if parsed.plot and records:
        from broadhead.bench.plot import plot

        try:
            plot(records, parsed.plot)
        except ImportError as error:
            print(f"broadhead.bench: {error}", file=sys.stderr)
            return BAD_USAGE
    if broken:
        print(f"broadhead.bench: broadhead failed in {broken} case(s), see the lines above", file=sys.stderr)
    return BROKEN if broken else OK


def _options(parsed: argparse.Namespace) -> Options:
    """Check the options. Raises ValueError naming the option."""
    implementations = tuple(name for name in parsed.impl.split(",") if name)
    unknown = sorted(set(implementations) - set(IMPLEMENTATIONS))
    if unknown:
        raise ValueError(f"--impl: unknown {', '.join(unknown)}; accepted are {', '.join(IMPLEMENTATIONS)}")
    device = torch.device(parsed.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no CUDA device")
    if device.type == "cpu" and not parsed.quick:
        raise ValueError("there is no CUDA device; --quick runs tiny shapes through the torch fallback on the CPU")
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device must be cuda or cpu, got {device}")
    budget = parsed.budget if parsed.budget is not None else (QUICK_BUDGET if parsed.quick else 0.5)
    if not budget > 0:
        raise ValueError(f"--budget must be positive, got {budget}")
    return Options(device, implementations, parsed.case, budget)


def print_table(records: list[dict[str, Any]]) -> None:
    """One table an area: a row a case, a column an implementation."""
    for area in AREAS:
        rows = [r for r in records if r["area"] == area]
        if not rows:
            continue
        impls = [name for name in IMPLEMENTATIONS if any(r["impl"] == name for r in rows)]
        cases = list(dict.fromkeys(r["case"] for r in rows))
        values = {(r["case"], r["impl"]): r["value"] for r in rows}
        body = [[case, *(_number(values.get((case, impl))) for impl in impls)] for case in cases]
        _print(f"{area}, {rows[0]['unit']}", ["case", *impls], body)


def print_summary(records: list[dict[str, Any]]) -> None:
    """One table an area: broadhead beside the best peer or its own baseline, the ratio, and the bar."""
    rows = summarize(records)
    for area in AREAS:
        body = [row.cells() for row in rows if row.area == area]
        if body:
            _print(f"{area}, {UNITS[area]}: against the bars", list(COLUMNS), body)
    missed = [row.case for row in rows if row.met is False]
    judged = sum(row.met is not None for row in rows)
    if judged:
        print(f"{judged - len(missed)} of {judged} bars met" + (f"; not: {', '.join(missed)}" if missed else ""))


def _print(title: str, columns: list[str], body: list[list[str]]) -> None:
    """A table; plain text where rich is missing."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        for line in [columns, *body]:
            print("  ".join(f"{cell:<44}" if i == 0 else f"{cell:>12}" for i, cell in enumerate(line)))
        return
    table = Table(title=title, title_justify="left")
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    for line in body:
        table.add_row(*line)
    Console(width=max(100, 50 + 15 * len(columns))).print(table)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
