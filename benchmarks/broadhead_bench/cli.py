"""Command line of the benchmarks: options, result file, tables, plot."""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path
from typing import Any

import torch

from broadhead_bench.cases import AREAS, DRAWN_AREAS, GROUPS
from broadhead_bench.cases_landscape import KINDS
from broadhead_bench.landscape import report
from broadhead_bench.records import IMPLEMENTATIONS, UNITS, describe_run
from broadhead_bench.result_file import read_records, write_records
from broadhead_bench.runner import BUDGET, LANDSCAPE_BUDGET, SHORT_BUDGET, Options, run_area
from broadhead_bench.summary import means, summarize, table

#: Exit status: everything measured is right; broadhead was wrong or raised; the options make no sense here.
OK, BROKEN, BAD_USAGE = 0, 1, 2

QUICK_BUDGET = 0.1


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/run.py",
        description="Times broadhead and the peers that are installed, after checking each result against fp32.",
    )
    groups = "; ".join(f"{name}: {', '.join(areas)}" for name, areas in GROUPS.items())
    parser.add_argument(
        "areas",
        nargs="+",
        choices=(*AREAS, *GROUPS),
        metavar="area",
        help=f"one or more of {', '.join(AREAS)}, or several by one name: {groups}",
    )
    parser.add_argument(
        "--impl", default="", metavar="NAMES", help=f"only these, separated by commas: {', '.join(IMPLEMENTATIONS)}"
    )
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains TEXT: D512")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the records to this JSON file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw this run's records as grouped bars")
    parser.add_argument("--quick", action="store_true", help="short measurements; on a CPU: tiny shapes")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help=f"seconds a measurement, default {BUDGET:g}, of decode, sweeps and masks {SHORT_BUDGET:g}, "
        f"of the landscape {LANDSCAPE_BUDGET:g}",
    )
    parser.add_argument(
        "--cases", type=int, metavar="N", help="only the first N of each area's cases; landscape: so many"
    )
    parser.add_argument(
        "--kinds", default="", metavar="NAMES", help=f"landscape: only these, separated by commas: {', '.join(KINDS)}"
    )
    parser.add_argument(
        "--only", default="", metavar="NUMBERS", help="landscape: only these cases of the seed: 3,17 (names begin so)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help=f"draws {', '.join(DRAWN_AREAS)}; default: a new one, which is told"
    )
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
        print(f"benchmarks/run.py: {error}", file=sys.stderr)
        return BAD_USAGE
    areas = dict.fromkeys(area for name in parsed.areas for area in GROUPS.get(name, (name,)))
    drawn = [area for area in areas if area in DRAWN_AREAS]
    if drawn and parsed.seed is None:
        arguments = [*arguments, "--seed", str(options.seed)]  # so that the command in the records repeats the run
    run = describe_run(options.device, arguments)
    print(f"{run.device}, torch {run.versions['torch']}", flush=True)
    for area in drawn:
        print(f"{area}: --seed {options.seed}", flush=True)

    records: list[dict[str, Any]] = []
    broken = 0

    def keep(record: dict[str, Any]) -> None:
        records.append(record)
        if parsed.out:
            write_records(parsed.out, previous + records)

    for area in areas:
        broken += run_area(area, options, run, lambda line: print(line, flush=True), keep).broken
    print_tables(records)
    if parsed.plot and records:
        from broadhead_bench.plot import plot

        try:
            plot(records, parsed.plot)
        except ImportError as error:
            print(f"benchmarks/run.py: {error}", file=sys.stderr)
            return BAD_USAGE
    if broken:
        print(f"benchmarks/run.py: broadhead failed in {broken} case(s), see the lines above", file=sys.stderr)
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
    budget = QUICK_BUDGET if parsed.budget is None and parsed.quick else parsed.budget
    if budget is not None and not budget > 0:
        raise ValueError(f"--budget must be positive, got {budget}")
    if parsed.cases is not None and parsed.cases < 1:
        raise ValueError(f"--cases must be at least 1, got {parsed.cases}")
    kinds = tuple(name for name in parsed.kinds.split(",") if name)
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"--kinds: unknown {', '.join(unknown)}; accepted are {', '.join(KINDS)}")
    words = tuple(word for word in parsed.only.split(",") if word)
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--only takes numbers of cases, separated by commas, got {parsed.only!r}")
    if (kinds or words) and "landscape" not in parsed.areas:
        raise ValueError("--kinds and --only select cases of the landscape, which is not among the areas")
    numbers = tuple(map(int, words))
    if parsed.cases is not None and numbers and max(numbers) >= parsed.cases:
        raise ValueError(f"--only {max(numbers)} is not among the first {parsed.cases} cases (--cases)")
    seed = secrets.randbelow(10**9) if parsed.seed is None else parsed.seed
    return Options(device, implementations, parsed.case, budget, seed, parsed.cases, kinds, numbers)


def print_tables(records: list[dict[str, Any]]) -> None:
    """One table an area: a row a case, a column an implementation, the ratio to the rival; then which bars are met."""
    for area in AREAS:
        columns, body = table(records, area)
        if not body:
            continue
        print(f"\n{area}, {UNITS[area]}")
        widths = [max(map(len, cells)) for cells in zip(columns, *body)]
        for words in (columns, *body):
            cells = [
                f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
                for i, (cell, width) in enumerate(zip(words, widths))
            ]
            print("  ".join(cells))
        for line in means(records, area) + (report(records) if area == "landscape" else []):
            print(line)
    rows = summarize(records)
    missed = [row.label for row in rows if row.met is False]
    judged = sum(row.met is not None for row in rows)
    if judged:
        print(f"{judged - len(missed)} of {judged} bars met" + (f"; not: {', '.join(missed)}" if missed else ""))
