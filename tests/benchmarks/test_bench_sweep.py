"""The drawn backward cases of the benchmarks, and what the results of training are compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from broadhead_bench import accuracy, cases, cases_backward, cli, summary

PACKED = cases.VarlenCase((5, 40, 17), 4, 2, 16, area="backward-sweep")


def test_the_sweep_is_seeded_and_covers_what_it_should() -> None:
    assert cases.cases_of("backward-sweep", seed=7) == cases.cases_of("backward-sweep", seed=7)
    assert cases.cases_of("backward-sweep", seed=7) != cases.cases_of("backward-sweep", seed=8)
    groups, masks, lengths, packed = set(), set(), set(), 0
    for seed in range(20):
        drawn = cases_backward.sweep_cases(seed)
        assert sorted(case.head_dim for case in drawn) == list(range(40, 513, 8))
        assert len({case.name for case in drawn}) == 60
        for case in drawn:
            groups.add(case.num_heads_q / case.num_heads_kv)
            masks.add(case.name.rstrip("0123456789").split()[-1])
            mine = case.seqlens if isinstance(case, cases.VarlenCase) else (case.seqlen,)
            lengths |= set(mine)
            packed += isinstance(case, cases.VarlenCase)
            assert case.flops <= cases_backward.SWEEP_FLOPS[1]
            assert case.window is None or (case.causal and 1 < case.window <= max(mine))
    assert groups == set(cases_backward.SWEEP_GROUPS)
    assert masks == set(cases_backward.SWEEP_MASKS)
    assert min(lengths) >= 128 and max(lengths) <= 32768
    assert min(lengths) < 200 and max(lengths) > 25000
    assert 200 < packed < 400


def test_the_seed_is_told_and_repeats_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["backward-sweep", "--quick", "--device", "cpu", "--budget", "0.001", "--impl", "broadhead"]
    found = []
    for extra in ([], []):
        out = tmp_path / f"{len(found)}.json"
        assert cli.main([*arguments, "--cases", "2", "--out", str(out), *extra]) == cli.OK
        written = json.loads(out.read_text())
        (seed,) = {record["command"].split("--seed ")[1] for record in written}
        assert f"backward-sweep: --seed {seed}\n" in capsys.readouterr().out
        found.append((seed, [record["case"] for record in written]))
    assert found[0] != found[1], "each run draws anew"
    seed, names = found[0]
    again = tmp_path / "again.json"
    assert cli.main([*arguments, "--cases", "2", "--out", str(again), "--seed", seed]) == cli.OK
    assert [record["case"] for record in json.loads(again.read_text())] == names
    assert len(names) == 2


def test_counts_of_gradients() -> None:
    assert PACKED.flops == 2.5 * 4 * 4 * 16 * (15 + 820 + 153)
    assert PACKED._replace(window=1).flops == 2.5 * 4 * 4 * 16 * 62
    assert PACKED._replace(area="varlen").flops == PACKED.flops / 2.5
    assert cases.DenseCase("backward-sweep", 1, 8, 2, 1, 16, False).flops == 2.5 * 4 * 2 * 64 * 16


def test_no_case_is_no_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["backward", "--quick", "--device", "cpu", "--cases", "0"]) == cli.BAD_USAGE
    assert "--cases" in capsys.readouterr().err


def _results(area: str, case: str, **values: float) -> list[dict[str, Any]]:
    names = {name: name.replace("_", "-") for name in values}
    return [{"area": area, "case": case, "impl": names[n], "value": v, "seconds": 1e-3} for n, v in values.items()]


def test_variants_have_rivals_and_bars_of_their_own() -> None:
    results = _results("backward", "bwd D128", broadhead=100, broadhead_det=74, broadhead_sm80=60, fa2=50, fa4=90)
    rows = {row.impl: row for row in summary.summarize(results)}
    assert {impl: (row.rival, row.met) for impl, row in rows.items()} == {
        "broadhead": ("fa4", True),
        "broadhead-det": ("broadhead", False),
        "broadhead-sm80": ("fa2", True),
    }
    assert rows["broadhead-det"].label == "broadhead-det, bwd D128"
    columns, (line,) = summary.table(results, "backward")
    assert line[columns.index("ratio")] == "1.111 fa4"
    layer = _results("training", "layer D512 causal", broadhead=30, sdpa=10, ffpa=26, fa2=5)
    assert [(row.rival, row.met) for row in summary.summarize(layer)] == [("sdpa", True), ("ffpa", False)]


def test_means_and_the_worst_are_told() -> None:
    results = _results("backward-sweep", "bwd a D40", broadhead=200, fa2=100, memeff=50, broadhead_det=150)
    results += _results("backward-sweep", "bwd b D512", broadhead=40, ffpa=50, fa4=80, broadhead_det=30)
    assert summary.means(results, "backward-sweep") == [
        "broadhead to the best peer: 2 cases, geometric mean 1.000 (bar >= 1: yes), worst 0.500 (bwd b D512)",
        "broadhead-det to broadhead: 2 cases, geometric mean 0.750, worst 0.750 (bwd a D40)",
    ]
    assert summary.means(_results("decode", "dec D64", broadhead=1, fa3=2), "decode") == []
    assert accuracy.MAX_ERROR["backward-sweep"] == 2e-2
