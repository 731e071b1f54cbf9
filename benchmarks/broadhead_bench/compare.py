"""Compares two installations of broadhead, row by row of the table and by the host's time of a call, on one device.

Each installation runs in a process of its own, started with it on PYTHONPATH. The two take turns, a few runs each, so
that clocks and power favour neither; the L2 is emptied before each run. A row that looks slower is measured again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from broadhead_bench.result_file import write_records

WORKER = Path(__file__).with_name("compare_worker.py")
#: Runs of a side in one turn, and rounds of turns. A slower row is measured again with as many rounds more.
RUNS, ROUNDS, REPEATS = 10, 8, 3
#: How much slower a row may be, and how many microseconds a call of the host.
TOLERANCE, HOST_TOLERANCE_US = 1.01, 0.5
HOST_KINDS = ("dense", "varlen", "decode", "append")
HOST_BATCHES, HOST_ROUNDS = 8, 20
OK, SLOWER, BAD_USAGE = 0, 1, 2


class WorkerError(RuntimeError):
    """A side answered a line with an error, or not at all."""


class Worker:
    """A process that measures one installation."""

    def __init__(self, name: str, path: Path, device: str) -> None:
        self.name = name
        environment = {**os.environ, "PYTHONPATH": str(path)}
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.about: dict[str, str] = self.ask("start", device=device)
        found = Path(self.about["file"]).resolve()
        if path.resolve() not in found.parents:
            raise WorkerError(f"--{name} {path}: that folder holds no package broadhead; {found} was imported")

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send one line and wait for its answer.

        Raises:
            WorkerError: the side could not do it.
        """
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self.name}: the process ended ({process.wait()}) at {do!r}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.name}: {reply['error']}")
        return reply["answer"]

    def stop(self) -> None:
        """End the process."""
        process = self._process
        assert process.stdin is not None
        try:
            process.stdin.write('{"do": "quit"}\n')
            process.stdin.close()
        except BrokenPipeError:
            pass
        process.wait()


class Compared(NamedTuple):
    """One call on both sides; seconds are medians."""

    row: str
    call: str
    base: float
    new: float
    samples: int  # of each side

    @property
    def ratio(self) -> float:
        """Above 1: the new side is slower."""
        return self.new / self.base


def calls_of_row(row: dict[str, Any], on_gpu: bool = True) -> dict[str, dict[str, Any]]:
    """The calls that a row is compared on, by name: a long and a short one, dense and over pages, in a window.

    Of a backward row they are of its gradients, dense.
    """
    wide = max(row["head_dim"], row["head_dim_v"]) > 256
    requires = row.get("requires", [])
    common = {
        **{name: row[name] for name in ("phase", "dtype", "head_dim", "head_dim_v")},
        "kv_dtype": row.get("kv_dtype", ""),
        "qv": "qv" in requires,
        "causal": True,
        "window": (1024, 0) if "window" in requires else (-1, -1),
        "backward": row.get("direction", "forward") == "backward",
    }
    if not on_gpu:
        tiny = {"batch": 1, "seqlen_q": 16, "seqlen_k": 24, "page_size": 8, "heads_q": 2, "heads_kv": 1}
        return {"short": {**common, **tiny}}
    if row["phase"] == "decode" or "qv" in requires:
        heads = {"heads_q": row["tile_m"] if row["phase"] == "decode" else 32, "heads_kv": 1}
        steps = {
            "long": {"batch": 64, "seqlen_q": 1, "seqlen_k": 8192, "page_size": 64},
            "short": {"batch": 8, "seqlen_q": 1, "seqlen_k": 500, "page_size": 16},
        }
        return {name: {**common, **step, **heads} for name, step in steps.items()}
    heads = {"heads_q": 8, "heads_kv": 2} if wide else {"heads_q": 16, "heads_kv": 4}
    steps = {
        "long": {"batch": 2, "seqlen_q": 4096, "seqlen_k": 4096, "page_size": 0},
        "pages": {"batch": 1, "seqlen_q": 2048, "seqlen_k": 8192, "page_size": 16},
        "short": {"batch": 8, "seqlen_q": 300, "seqlen_k": 300, "page_size": 64},
    }
    if common["backward"]:
        steps = {"long": steps["long"], "short": {**steps["short"], "page_size": 0}}
    calls = {name: {**common, **step, **heads} for name, step in steps.items()}
    # Away from the ends of a window's mask the code is that of the long call.
    return {**calls, "window": {**calls["long"], "window": (512, 0)}}


def take_turns(base: Worker, new: Worker, rounds: int, do: str, **arguments: Any) -> tuple[list[float], list[float]]:
    """Ask both sides the same, turn by turn, each first in every second round; all seconds of each."""
    samples: dict[str, list[float]] = {base.name: [], new.name: []}
    for turn in range(rounds):
        for side in (base, new) if turn % 2 == 0 else (new, base):
            samples[side.name] += side.ask(do, **arguments)
    return samples[base.name], samples[new.name]


def compare_row(
    base: Worker, new: Worker, row: str, name: str, call: dict[str, Any], tolerance: float, rounds: int = ROUNDS
) -> Compared:
    """Measure a call that forces ``row``; up to REPEATS times as long while the new side looks slower."""
    for side in (base, new):
        side.ask("prepare", row=row, call=call)
    old_seconds: list[float] = []
    new_seconds: list[float] = []
    for _ in range(REPEATS):
        more = take_turns(base, new, rounds, "time", runs=RUNS)
        old_seconds += more[0]
        new_seconds += more[1]
        result = Compared(row, name, statistics.median(old_seconds), statistics.median(new_seconds), len(new_seconds))
        if result.ratio <= tolerance:
            break
    return result


def compare_kernels(
    base: Worker, new: Worker, device: torch.device, row_filter: str, tolerance: float, rounds: int
) -> tuple[list[Compared], list[str]]:
    """Every row that both sides have, and what could not be compared."""
    mine = {row["id"] for row in new.ask("rows")}
    results, complaints = [], []
    for row in base.ask("rows"):
        if row_filter not in row["id"]:
            continue
        if row["id"] not in mine:
            complaints.append(f"{row['id']}: the new side does not have this row")
            continue
        for name, call in calls_of_row(row, device.type == "cuda").items():
            try:
                result = compare_row(base, new, row["id"], name, call, tolerance, rounds)
            except WorkerError as error:
                complaints.append(f"{row['id']} {name}: {error}")
                continue
            results.append(result)
            times = f"{result.base * 1e6:9.1f} {result.new * 1e6:9.1f}"
            print(f"{result.row:44} {name:6} {times}  {result.ratio:.4f}", flush=True)
    return results, complaints


def compare_host(base: Worker, new: Worker, rounds: int, batches: int = HOST_BATCHES) -> list[Compared]:
    """Microseconds that an eager call keeps the host, with a given out and without."""
    results = []
    for kind in HOST_KINDS:
        for out in (False, True):
            call = {"kind": kind, "out": out}
            seconds = take_turns(base, new, rounds, "host", call=call, batches=batches)
            old, fresh = map(statistics.median, seconds)
            result = Compared("host", f"{kind}, {'given' if out else 'new'} out", old, fresh, len(seconds[0]))
            results.append(result)
            times = f"{old * 1e6:8.2f} {fresh * 1e6:8.2f} us  {(fresh - old) * 1e6:+.2f} us"
            print(f"host {result.call:26} {times}", flush=True)
    return results


def too_slow(results: list[Compared], tolerance: float, host_tolerance_us: float) -> list[Compared]:
    """Those that the new side may not take: rows by their ratio, calls of the host by their difference, which is
    allowed where a given tensor is written alone."""
    slow = []
    for result in results:
        if result.row == "host":
            written = "given out" in result.call or result.call.startswith("append")
            allowed = host_tolerance_us if written else 0.0
            # The clock's own grain, and what a median of thousands of calls moves from run to run.
            if (result.new - result.base) * 1e6 > allowed + 0.02 * result.base * 1e6:
                slow.append(result)
        elif result.ratio > tolerance:
            slow.append(result)
    return slow


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python benchmarks/compare_installations.py", description=description)
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="the folder that holds the old package")
    parser.add_argument("--new", type=Path, required=True, metavar="DIR", help="the folder that holds the new one")
    parser.add_argument("--row", default="", metavar="TEXT", help="only rows whose id contains TEXT")
    parser.add_argument("--only", choices=("kernels", "host"), help="one of the two comparisons")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results to this JSON file")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"turns of each side, default {ROUNDS}")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"largest ratio, default {TOLERANCE:g}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Compare. Returns OK, SLOWER or BAD_USAGE."""
    parsed = build_parser().parse_args(arguments)
    workers: list[Worker] = []
    results: list[Compared] = []
    complaints: list[str] = []
    try:
        for name, path in (("base", parsed.base), ("new", parsed.new)):
            workers.append(Worker(name, path, parsed.device))
            print(f"{name}: broadhead {workers[-1].about['version']}, {workers[-1].about['file']}", flush=True)
        base, new = workers
        if parsed.only != "host":
            device = torch.device(parsed.device)
            results, complaints = compare_kernels(base, new, device, parsed.row, parsed.tolerance, parsed.rounds)
        if parsed.only != "kernels":
            turns = {"rounds": HOST_ROUNDS} if parsed.device != "cpu" else {"rounds": parsed.rounds, "batches": 1}
            results += compare_host(base, new, **turns)
    except WorkerError as error:
        print(f"benchmarks/compare_installations.py: {error}", file=sys.stderr)
        return BAD_USAGE
    finally:
        for worker in workers:
            worker.stop()
    slow = too_slow(results, parsed.tolerance, HOST_TOLERANCE_US)
    if parsed.out:
        _write(parsed.out, results, parsed.device)
    _print_summary(results, slow, complaints)
    return SLOWER if slow or complaints else OK


def _write(path: Path, results: list[Compared], device: str) -> None:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    about = {"device": name, "torch": torch.__version__, "date": date}
    write_records(path, [{**result._asdict(), "ratio": round(result.ratio, 5), **about} for result in results])


def _print_summary(results: list[Compared], slow: list[Compared], complaints: list[str]) -> None:
    rows = [result for result in results if result.row != "host"]
    if rows:
        ratios = sorted(result.ratio for result in rows)
        middle = statistics.median(ratios)
        print(f"\n{len(rows)} calls: new / base {ratios[0]:.4f} to {ratios[-1]:.4f}, median {middle:.4f}; the slowest:")
        for result in sorted(rows, key=lambda result: -result.ratio)[:10]:
            print(f"  {result.ratio:.4f}  {result.row} {result.call}")
    for result in slow:
        print(f"SLOWER: {result.row} {result.call}: {result.base * 1e6:.2f} -> {result.new * 1e6:.2f} us")
    for text in complaints:
        print(f"NOT COMPARED: {text}")
