"""Times of rows, and the costs that are fitted to them, on a CPU: made-up times instead of a GPU's."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import broadhead
import numpy as np
import pytest
import torch
from broadhead import costs, support
from broadhead.call.problem import AttentionProblem
from broadhead.costs import Cost
from broadhead.plan import cost
from broadhead.plan.schedule import plan_schedule
from broadhead.run import forward
from broadhead_bench import fit, row_times
from broadhead_bench.cases_landscape import LandscapeCase, landscape_cases
from broadhead_bench.inputs_landscape import landscape_inputs
from broadhead_bench.peers.broadhead_api import Broadhead
from described import FULL, h200, hand_in_costs

from scripts import load_script

CPU = torch.device("cpu")
ROWS = {row.id: row for row in support.ROWS}
CASES = [
    LandscapeCase(0, "dense", (6, 6), (6, 6), 4, 2, 64, 64, True),
    LandscapeCase(1, "dense", (6,), (40,), 2, 2, 24, 16, False, dtype="fp16"),
    LandscapeCase(2, "varlen", (5, 1, 60), (9, 30, 60), 4, 1, 128, 128, True, 20),
    LandscapeCase(3, "chunk", (3, 3), (40, 7), 4, 2, 16, 16, True, 9, True, "bf16", 8),
    LandscapeCase(4, "paged", (33, 33), (33, 33), 4, 2, 64, 64, True, None, False, "bf16", 16),
    LandscapeCase(5, "decode", (1, 1), (33, 20), 4, 2, 32, 32, True, None, False, "e4m3", 16),
    LandscapeCase(6, "decode", (2, 2), (100, 3), 8, 2, 128, 128, True, None, False, "bf16", 64),
]


# --- the fit ----------------------------------------------------------------------------------------------------------


def test_least_squares_finds_what_was_hidden(rng: random.Random) -> None:
    for _ in range(20):
        matrix = np.array([[rng.random() for _ in range(6)] for _ in range(30)])
        hidden = np.array([rng.choice((0.0, rng.random() * 10)) for _ in range(6)])
        np.testing.assert_allclose(fit.least_squares(matrix, matrix @ hidden), hidden, atol=1e-8)


def test_least_squares_gives_no_negative_number(rng: random.Random) -> None:
    """And none of many others without one comes closer."""
    draws = np.random.default_rng(rng.randrange(2**32))
    negative = 0
    for _ in range(20):
        matrix, wanted = draws.random((12, 4)), draws.normal(size=12)
        negative += bool((np.linalg.lstsq(matrix, wanted, rcond=None)[0] < 0).any())
        found = fit.least_squares(matrix, wanted)
        assert (found >= 0).all()
        distance = np.linalg.norm(matrix @ found - wanted)
        others = np.concatenate(
            [draws.exponential(size=(500, 4)), np.maximum(0, found + draws.normal(size=(500, 4)) / 9)]
        )
        assert (np.linalg.norm(others @ matrix.T - wanted, axis=1) >= distance - 1e-9).all()
    assert negative > 5, "the unbounded solutions would not do"


def test_least_squares_of_a_column_that_nothing_needs() -> None:
    matrix = np.array([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 2, 0, 0]])
    np.testing.assert_allclose(fit.least_squares(matrix, np.array([3.0, 5, 7])), [3, 2, 0, 0], atol=1e-9)


def synthetic(hidden: dict[str, Cost], noise: float, rng: random.Random) -> list[fit.Timed]:
    """Cases of the landscape, timed by costs that are known."""
    timed = []
    for case in landscape_cases(rng.randrange(10**6), 300):
        problem = fit.problem_of(case)
        us = {}
        for row in support.ROWS:
            fits = row.head_dim >= case.head_dim and row.head_dim_v >= case.head_dim_v and row.dtype == problem.dtype
            if row.name in hidden and fits and row.direction == "forward" and not row.kv_dtype:
                asked = fit.as_measured(problem, row)
                terms = cost.terms(asked, row, plan_schedule(asked, row, h200()), h200())
                time = sum(a * b for a, b in zip(hidden[row.name], terms, strict=True))
                us[row.id] = time * rng.uniform(1 - noise, 1 + noise)
        timed.append(fit.Timed(problem, us, case.name))
    return timed


HIDDEN = {
    "sm90_fwd_d128": Cost(9.0, 14.0, 4.0, 5.0, 1.5, 1.0),
    "sm80_fwd_d128_m32": Cost(6.0, 9.0, 0.0, 3.0, 1.7, 1.0),
    "sm80_fwd_decode_d256": Cost(15.0, 0.0, 2.0, 6.0, 0.25),
    "sm80_fwd_d512": Cost(0.0, 10.0, 0.0, 9.0, 5.0, 6.0),
}


def test_a_fit_recovers_the_costs_of_made_up_times(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing draws them to those of other kernels. A decode kernel's chain is as long in every call."""
    monkeypatch.setattr(fit, "PULL", 0.0)
    found = fit.fit(synthetic(HIDDEN, 0.0, rng), h200())
    assert set(found) == set(HIDDEN)
    for name, numbers in HIDDEN.items():
        fitted = found[name]
        if "decode" in name:
            fitted = fitted._replace(launch=fitted.launch + fitted.chain, chain=0.0)
        assert tuple(fitted) == pytest.approx(tuple(numbers), rel=0.02, abs=0.02), name


def test_a_kernel_of_few_times_costs_what_is_usual(rng: random.Random) -> None:
    """Where they say nothing else: of calls of one tile they do not tell what many tiles take."""
    usual = Cost(6.0, 9.0, 1.0, 3.0, 1.7, 1.0)
    names = ("sm80_fwd_d64_m32", "sm80_fwd_d128_m32", "sm80_fwd_d256_m32")
    timed = synthetic(dict.fromkeys(names, usual), 0.05, rng)
    few = "sm80_fwd_d128_m32"
    for index, x in enumerate(timed):
        timed[index] = x._replace(us={row: time for row, time in x.us.items() if ROWS[row].name != few})
    asked = fit.problem_of(CASES[0])._replace(head_dim=128, head_dim_v=128, num_splits=1)
    timed += [fit.Timed(asked, {"sm80_fwd_d128_m32_bf16": 7.1}, "")] * fit.FEWEST
    found = fit.fit(timed, h200())[few]
    assert found.tile == pytest.approx(3.0, rel=0.2) and found.merge > 0, "as of the other two"
    assert 0.5 < found.block / 1.7 < 2 and found.launch + found.chain == pytest.approx(7.0, abs=0.3)


def test_prefill_kernels_are_measured_without_metadata() -> None:
    """Undivided where they would take the place of a decode kernel."""
    step, drafts = fit.problem_of(CASES[6]), fit.problem_of(CASES[6])._replace(seqlen_q=16)
    assert step.has_metadata and step.is_decode and not drafts.is_decode
    prefill, decode = ROWS["sm80_fwd_d128_bf16"], ROWS["sm80_fwd_decode_d128_bf16"]
    assert fit.as_measured(step, decode) == step and fit.as_measured(drafts, decode) == drafts
    assert fit.as_measured(step, prefill) == step._replace(has_metadata=False, num_splits=1)
    assert fit.as_measured(drafts, prefill) == drafts._replace(has_metadata=False)


def test_noise_moves_estimates_little(rng: random.Random) -> None:
    timed = synthetic(HIDDEN, 0.2, rng)
    found = fit.fit(timed, h200())
    ratios = []
    for problem, us, _ in timed:
        for row_id, time in us.items():
            row = ROWS[row_id]
            asked = fit.as_measured(problem, row)
            terms = cost.terms(asked, row, plan_schedule(asked, row, h200()), h200())
            ratios.append(sum(a * b for a, b in zip(found[row.name], terms, strict=True)) / time)
    assert 0.9 < sorted(ratios)[len(ratios) // 2] < 1.1
    assert sum(0.6 < ratio < 1.6 for ratio in ratios) > 0.95 * len(ratios)


def test_a_kernel_of_few_times_has_no_cost(rng: random.Random) -> None:
    timed = [x for x in synthetic(HIDDEN, 0.0, rng) if any(ROWS[row].name == "sm90_fwd_d128" for row in x.us)]
    few = [x._replace(us={"sm90_fwd_d128_bf16": 9.0}) for x in timed if x.problem.dtype == "bf16"][: fit.FEWEST]
    assert set(fit.fit(few, h200())) == {"sm90_fwd_d128"} and fit.fit(few[:-1], h200()) == {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.split()[1] + case.dtype)
def test_cases_are_the_problems_that_dispatch_sees(case: LandscapeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[AttentionProblem] = []

    def noted(*arguments: Any) -> Any:
        call = check_forward(*arguments)
        seen.append(call.problem)
        return call

    check_forward = forward.check_forward
    monkeypatch.setattr(forward, "check_forward", noted)
    Broadhead().landscape(case, landscape_inputs(case, CPU))()
    assert len(seen) == 1
    described = fit.problem_of(case)
    assert sorted(described.features) == sorted(seen[0].features)
    assert described._replace(features=()) == seen[0]._replace(features=(), obstacles=())


# --- the files --------------------------------------------------------------------------------------------------------


def times_file(path: Path, seed: int, records: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"run": {"device": "NVIDIA H200"}, "cases": [{"seed": seed, **x} for x in records]}))
    return path


def test_reading_leaves_out_what_was_wrong_or_is_no_row(tmp_path: Path) -> None:
    first, second = landscape_cases(7, 2)
    us = {"sm90_fwd_d128_bf16": 5.0, "sm80_fwd_d128_bf16": 6.0, "sm70_fwd_gone_bf16": 1.0}
    path = times_file(
        tmp_path / "a.json",
        7,
        [
            {"case": first.name, "us": us, "wrong": {"sm80_fwd_d128_bf16": 0.5}},
            {"case": second.name, "us": us, "wrong": {}},
        ],
    )
    found = fit.read([path])
    assert [x.name for x in found] == [first.name, second.name]
    assert found[0].us == {"sm90_fwd_d128_bf16": 5.0} and set(found[1].us) == {*found[0].us, "sm80_fwd_d128_bf16"}
    assert found[1].problem == fit.problem_of(second)


def imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("costs_of_a_test", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_what_is_written_is_what_was_fitted(tmp_path: Path) -> None:
    """The table alone is another one; who writes the present numbers changes nothing but the note of their source."""
    path, source = tmp_path / "costs.py", Path(costs.__file__).read_text(encoding="utf-8")
    path.write_text(source, encoding="utf-8")
    numbers = {"sm80_fwd_d64": Cost(1.25, 0.0, 1e-3, 123.456), "sm90_fwd_d64": Cost(2.0, 3.0, 4.0, 5.0, 6.0, 7.0)}
    fit.write(numbers, path, "some.json")
    written = imported(path).COSTS
    assert written == numbers
    text = path.read_text(encoding="utf-8")
    assert "#: Fitted to some.json.\n" in text and text.split("#: Fitted to")[0] == source.split("#: Fitted to")[0]
    fit.write(costs.COSTS, path, "others.json")
    assert imported(path).COSTS == costs.COSTS
    assert path.read_text(encoding="utf-8").partition("COSTS:")[2] == source.partition("COSTS:")[2]


def test_the_choice_is_judged_by_the_fastest_row(monkeypatch: pytest.MonkeyPatch) -> None:
    case = LandscapeCase(0, "dense", (1024,), (1024,), 8, 8, 128, 128, False)
    us = {"sm90_fwd_d128_bf16": 30.0, "sm80_fwd_d128_bf16": 20.0}
    timed = [fit.Timed(fit.problem_of(case), us, "a case"), fit.Timed(fit.problem_of(CASES[0]), {}, "not timed")]
    hand_in_costs(monkeypatch, {})
    text = fit.judge(timed, h200(), FULL)
    assert text.startswith("1 cases, the chosen row takes 1.500 of the fastest one's time in the mean")
    assert text.endswith("1.50 at worst (a case: sm90_fwd_d128_bf16, sm80_fwd_d128_bf16 is the fastest)")
    hand_in_costs(monkeypatch, {"sm90_fwd_d128": Cost(30), "sm80_fwd_d128": Cost(20)})
    assert "takes 1.000 of" in fit.judge(timed, h200(), FULL)


def test_what_was_measured_divided_does_not_judge_what_runs_undivided(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = [fit.Timed(fit.problem_of(LandscapeCase(0, "dense", (64,), (8192,), 2, 2, 128, 128, False)), {}, "")]
    hand_in_costs(monkeypatch, {"sm90_fwd_d128": Cost(30)})
    assert fit.chosen(timed, h200(), FULL) == ["sm90_fwd_d128_bf16"]
    hand_in_costs(monkeypatch, {"sm90_fwd_d128": Cost(30, merge=10)})
    assert fit.chosen(timed, h200(), FULL) == [""]


def test_the_build_that_was_measured_holds_every_row() -> None:
    device, build = fit.described({"device": "NVIDIA H200"})
    assert device.capability == (9, 0) and device.name == "NVIDIA H200"
    assert {row for family in build.families for row in family.kernels} == set(ROWS)


def test_the_program_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("benchmarks/fit_costs.py")
    cases = landscape_cases(7, 120)
    records = [{"case": case.name, "us": {"sm90_fwd_d512_bf16": 9.0 + case.number}, "wrong": {}} for case in cases]
    path, target = times_file(tmp_path / "times.json", 7, records), tmp_path / "costs.py"
    target.write_text(Path(costs.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(script, "COSTS", target)
    monkeypatch.setattr(sys, "argv", ["fit_costs.py", str(path), "--judge", str(path)])
    before = dict(costs.COSTS)
    try:
        assert script.main() == 0
    finally:
        costs.COSTS.clear()
        costs.COSTS.update(before)
    assert set(imported(target).COSTS) == {"sm90_fwd_d512"}
    assert "Fitted to times.json." in target.read_text(encoding="utf-8")
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told] == ["first row of the table", "by cost", "by cost, other seeds"]


# --- the times --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_id", ["sm80_fwd_decode_d128_bf16", "sm80_fwd_d128_m32_bf16", "sm90_fwd_d128_bf16"])
def test_a_step_runs_as_it_would_in_place_of_its_first_row(row_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode kernels with metadata, divided as they find best; others without it, undivided."""
    case, seen = CASES[-1], []
    monkeypatch.setattr(Broadhead, "_backend", None)
    monkeypatch.setattr(row_times._Divided, "_backend", None)
    monkeypatch.setattr(broadhead, "flash_attn_with_kvcache", lambda *tensors, **options: seen.append(options))
    row_times._forced(ROWS[row_id], case, landscape_inputs(case, CPU))()
    (options,) = seen
    is_decode = "decode" in row_id
    assert ("scheduler_metadata" in options) == is_decode and options["num_splits"] == (0 if is_decode else 1)


class Event:
    """An event that a call takes its number of milliseconds to come to."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        self.at = Event.now

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_times_are_medians_in_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    takes = [5.0, 0.25, 0.2, 0.3, 0.25, 9.0, 0.25]
    assert len(takes) == row_times.RUNS
    flushed = []

    def call() -> None:
        assert len(flushed) == row_times.RUNS - len(takes) + 1, "the L2 is flushed before each call"
        Event.now += takes.pop()

    assert row_times._microseconds(call, lambda: flushed.append(1)) == pytest.approx(250.0)


def test_the_program_that_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Short cases of all seeds in turns; what is wrong is told, and not fitted to."""
    script = load_script("benchmarks/time_rows.py")
    timed = []

    def time_rows(seed: int, case: LandscapeCase, device: torch.device, flush: object) -> row_times.RowTimes:
        timed.append((seed, case.number))
        wrong = {"sm80_fwd_d512_bf16": 0.5} if case.number == 0 and seed == 3 else {}
        return row_times.RowTimes(seed, case.name, {"sm90_fwd_d512_bf16": 7.5, "sm80_fwd_d512_bf16": 8.0}, wrong)

    info = row_times.describe_run(CPU, ["--seeds", "3", "4"])
    monkeypatch.setattr(row_times, "time_rows", time_rows)
    monkeypatch.setattr(row_times.timing, "L2Flusher", lambda device: lambda: None)
    monkeypatch.setattr(row_times, "describe_run", lambda device, arguments: info)
    monkeypatch.setattr(row_times, "LONGEST", 1e9)
    out = tmp_path / "rows.json"
    options = ["--seeds", "3", "4", "--cases", "5", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["time_rows.py", *options])
    assert script.main() == 1, "a result was wrong"
    assert timed == [(seed, number) for number in range(5) for seed in (3, 4)]
    told = capsys.readouterr().out
    assert f"wrong: sm80_fwd_d512_bf16 0.5 {landscape_cases(3, 1)[0].name}\n" in told
    assert "10 cases, 20 times, 1 wrong results" in told
    run = json.loads(out.read_text())["run"]
    assert "time_rows.py" in run["command"] and "run.py" not in run["command"].replace("time_rows.py", "")
    found = fit.read([out])
    assert len(found) == 10 and sum(len(x.us) for x in found) == 19

    timed.clear()
    monkeypatch.setattr(row_times, "LONGEST", 2e-6)
    monkeypatch.setattr(sys, "argv", ["time_rows.py", *options, "--cases", "60"])
    script.main()
    assert 0 < len(timed) < 120, "long cases are left out"
    timed.clear()
    monkeypatch.setattr(sys, "argv", ["time_rows.py", *options, "--budget", "-1"])
    assert script.main() == 0 and not timed, "the budget is spent"
