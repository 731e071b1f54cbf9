"""The landscape of random cases: what is drawn, how it is checked, and what is said of the results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from broadhead import support
from broadhead.plan import dispatch
from broadhead_bench import cases, cli, landscape
from broadhead_bench.accuracy import attention
from broadhead_bench.cases_landscape import (
    CASES,
    CPU_CASES,
    DTYPES,
    KINDS,
    LONGEST,
    MOST_BYTES,
    MOST_FLOPS,
    PAGED_KINDS,
    LandscapeCase,
    landscape_cases,
)
from broadhead_bench.inputs_landscape import landscape_inputs
from broadhead_bench.measure_landscape import LandscapeTask
from broadhead_bench.peers.broadhead_api import Broadhead
from broadhead_bench.peers.broadhead_rows import ForcedRow, candidates
from broadhead_bench.runner import Options

CPU = torch.device("cpu")


def test_a_seed_draws_the_same_cases_and_more_of_them() -> None:
    assert landscape_cases(5, 40) == landscape_cases(5, 60)[:40]
    assert landscape_cases(5, 40) != landscape_cases(6, 40)
    assert len(cases.cases_of("landscape", seed=1)) == CASES
    assert len(cases.cases_of("landscape", on_cpu=True, seed=1)) == CPU_CASES


def test_a_part_of_a_seed_is_selected_from_the_same_cases() -> None:
    options = Options(torch.device("cuda"), seed=9)
    drawn = landscape_cases(9, CASES)
    assert options.cases_of("landscape") == drawn
    assert options._replace(most_cases=7).cases_of("landscape") == drawn[:7]
    steps = options._replace(kinds=("decode", "chunk")).cases_of("landscape")
    assert steps == [case for case in drawn if case.kind in ("decode", "chunk")]
    far = CASES + 30
    picked = options._replace(numbers=(far, 3)).cases_of("landscape")
    assert picked == [drawn[3], landscape_cases(9, far + 1)[far]]
    kind = drawn[3].kind
    assert options._replace(numbers=(3,), kinds=tuple(set(KINDS) - {kind})).cases_of("landscape") == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["landscape", "--kinds", "decode,paging"], "--kinds: unknown paging; accepted are dense, varlen"),
        (["landscape", "--only", "3,x"], "--only takes numbers of cases, separated by commas, got '3,x'"),
        (["landscape", "--only", "12", "--cases", "12"], "--only 12 is not among the first 12 cases"),
        (["forward", "--only", "3"], "which is not among the areas"),
    ],
)
def test_selections_that_make_no_sense(options: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*options, "--quick", "--device", "cpu"]) == cli.BAD_USAGE
    assert text in capsys.readouterr().err


def test_the_cases_are_spread_over_what_calls_are_made_of() -> None:
    drawn = [case for seed in range(8) for case in landscape_cases(seed, 200)]
    assert {case.kind for case in drawn} == set(KINDS)
    assert {case.dtype for case in drawn} == set(DTYPES)
    assert {case.head_dim for case in drawn} >= set(range(40, 513, 8))
    assert max(case.batch for case in drawn) > 400 and min(case.batch for case in drawn) == 1
    assert max(max(case.seqlens_k) for case in drawn) > LONGEST // 2
    assert max(case.num_heads_q for case in drawn) > 48
    assert {case.num_heads_q // case.num_heads_kv for case in drawn} >= {1, 2, 5, 7, 16}
    share = len(drawn) / 100
    assert 5 * share < sum(case.compiled for case in drawn) < 15 * share
    assert 10 * share < sum(case.window is not None for case in drawn) < 30 * share
    assert any(case.sinks for case in drawn) and any(case.head_dim_v != case.head_dim for case in drawn)
    assert any(case.kind == "dense" and not case.is_self_attention for case in drawn)
    assert any(case.kind == "varlen" and not case.is_self_attention for case in drawn)
    for case in drawn:
        assert case.flops <= MOST_FLOPS and case.bytes <= MOST_BYTES
        assert bool(case.page_size) == (case.kind in PAGED_KINDS)
        assert case.num_heads_q % case.num_heads_kv == 0 and case.num_heads_q <= 64
        assert case.dtype != "e4m3" or case.head_dim % 16 == 0
        assert case.window is None or (case.causal and case.window < max(case.seqlens_k))
        assert not case.causal or all(q <= k for q, k in zip(case.seqlens_q, case.seqlens_k))
    names = {(case.name) for case in landscape_cases(0, 200)}
    assert len(names) == 200


def test_the_reference_is_the_formula() -> None:
    """Against sums written out, with a mask and a sink."""
    q, k, v = torch.randn(2, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 6)
    visible = torch.tensor([[True, True, False], [True, True, True]])
    sinks = torch.randn(4)
    out = attention(q, k, v, visible, sinks)
    for row in range(2):
        for head in range(4):
            seen = [j for j in range(3) if visible[row, j]]
            weights = [math.exp(float(q[row, head] @ k[j, head // 2]) / math.sqrt(8)) for j in seen]
            total = sum(weights) + math.exp(float(sinks[head]))
            want = sum((w / total * v[j, head // 2] for w, j in zip(weights, seen)), torch.zeros(6))
            torch.testing.assert_close(out[row, head], want)


PAGED = LandscapeCase(0, "chunk", (3, 3), (40, 7), 4, 2, 16, 16, True, 9, True, "bf16", 8)
PACKED = LandscapeCase(1, "varlen", (5, 1), (9, 30), 4, 1, 16, 16, False, None, False, "fp16")
FP8 = LandscapeCase(2, "decode", (1, 1), (33, 20), 4, 2, 32, 32, True, None, False, "e4m3", 16)
DENSE = LandscapeCase(3, "dense", (6,), (6,), 2, 2, 24, 16, True)


@pytest.mark.parametrize("case", [PAGED, PACKED, FP8, DENSE], ids=lambda case: case.kind)
def test_a_right_call_passes_and_a_wrong_one_does_not(case: LandscapeCase) -> None:
    peer = Broadhead()
    assert peer.why_unavailable(CPU) is None
    task = LandscapeTask(case, CPU)
    item = task.prepare(peer)
    assert item.error <= task.max_error
    out = item.calls[0]()
    out[..., 0] += 0.5
    assert task.error(out) > task.max_error


def test_sequences_are_cut_out_of_pages_and_packs() -> None:
    inputs = landscape_inputs(PAGED, CPU)
    assert inputs.page_table is not None
    q, k, v = inputs.of_sequence(PAGED, 0)
    assert q.shape == (3, 4, 16) and k.shape == v.shape == (40, 2, 16)
    assert torch.equal(k[8:16], inputs.k[inputs.page_table[0, 1].item()].float())
    packed = landscape_inputs(PACKED, CPU)
    q, k, _ = packed.of_sequence(PACKED, 1)
    assert torch.equal(q, packed.q[5:6].float()) and torch.equal(k, packed.k[9:39].float())


def test_counts() -> None:
    assert PACKED.flops == 2.0 * 4 * 32 * (5 * 9 + 30)
    assert DENSE.flops == 2.0 * 2 * 40 * 21
    assert FP8.bytes == 4 * 2 * (32 + 2 * 32) + 2 * 64 * 53
    assert PAGED.name == "000 chunk B2 Sq3 Sk7-40 H4 Hkv2 D16 window9 bf16 sinks page8"


def _records(**times: dict[str, float]) -> list[dict[str, Any]]:
    """Of cases by name, seconds of each implementation."""
    return [
        {
            "area": "landscape", "case": f"{case} dense B1 x", "impl": impl.replace("_", "-"), "seconds": seconds,
            "value": seconds * 1e6, "kernel": f"row_of_{impl}", "seed": 1, "flops": 1e9, "bytes": 1e6,
        }
        for case, results in times.items()
        for impl, seconds in results.items()
    ]  # fmt: skip


def test_the_report() -> None:
    records = _records(
        a={"broadhead": 1.0, "fa3": 2.0, "cudnn": 1.5, "broadhead_best": 0.9},
        b={"broadhead": 2.0, "fa2": 1.0, "broadhead_sm80_fwd": 0.5, "broadhead_best": 1.99},
        c={"broadhead": 1.0, "memeff": 8.0},
        d={"broadhead": 1.0},
        e={"broadhead": 1.0, "fa3": 1.0, "memeff": 0.1},
    )
    found = {ratio.case[0]: (ratio.value, ratio.rival) for ratio in landscape.ratios(records)}
    assert found == {"a": (1.5, "cudnn"), "b": (0.5, "fa2"), "c": (8.0, "memeff"), "e": (1.0, "fa3")}
    lines = landscape.report(records)
    assert lines[0].startswith(f"all: 3 cases, geometric mean {0.75 ** (1 / 3):.3f}, tenth percentile 0.500")
    assert lines[0].endswith("fifth 0.500, worst 0.500, 67 % at 1.0 or above")
    ran = [line for line in lines if line.startswith("kernel ")]
    assert len(ran) == 1 and ran[0].startswith("kernel row_of_broadhead: 3 cases, geometric mean 0.909")
    assert any("where nobody else runs: 1 cases, geometric mean 8.000" in line for line in lines)
    assert any("beside fa2: 1 cases, geometric mean 2.000" in line for line in lines)
    assert "  0.900 row_of_broadhead ran, row_of_broadhead_best is faster  a dense B1 x" in lines
    assert "rows: 1 of 2 cases have a row that is faster than the chosen one by 3 %" in lines
    worst = lines[next(i for i, line in enumerate(lines) if line.startswith("worst cases")) + 1]
    assert worst.split()[0] == "0.500" and worst.endswith("b dense B1 x")
    assert landscape.percentile([3.0, 1.0, 2.0], 0) == 1.0 and math.isnan(landscape.percentile([], 5))


def test_what_bounds_a_case() -> None:
    bounds = {
        landscape.Ratio("", 1.0, "", None, 1.0, flops, size).bound: (flops, size)
        for flops, size in ((1e12, 1e6), (1e6, 1e9), (1e6, 1e3))
    }
    assert bounds == {"math": (1e12, 1e6), "memory": (1e6, 1e9), "launch": (1e6, 1e3)}


def test_rows_that_may_compute_a_case() -> None:
    rows = candidates(DENSE._replace(head_dim=80, head_dim_v=80), (9, 0))
    assert rows and all(80 <= row.head_dim <= 160 and row.direction == "forward" for row in rows)
    assert {row.phase for row in rows} == {"prefill", "decode"}
    assert all(row in support.ROWS and not row.kv_dtype for row in rows)


def test_a_run_keeps_seed_and_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, arguments = tmp_path / "l.json", ["landscape", "--quick", "--device", "cpu", "--budget", "0.001"]
    assert cli.main([*arguments, "--seed", "4", "--cases", "3", "--impl", "broadhead", "--out", str(out)]) == cli.OK
    records = json.loads(out.read_text())
    expected = landscape_cases(4, 3, on_cpu=True)
    assert [(r["case"], r["seed"], r["flops"], r["bytes"]) for r in records] == [
        (case.name, 4, case.flops, case.bytes) for case in expected
    ]
    assert "landscape: --seed 4\n" in capsys.readouterr().out


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from broadhead_bench.plot import plot

    records = [{**r, "device": "GPU"} for r in _records(a={"broadhead": 1.0, "fa3": 2.0}, b={"broadhead": 1.0})]
    plot(records, tmp_path / "l.png")
    assert (tmp_path / "l.png").stat().st_size > 1000


def test_a_forced_row_is_alone_when_metadata_is_made_and_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metadata that was planned for another row is refused."""
    everything, row = dispatch.ROWS, next(row for row in support.ROWS if row.phase == "decode")
    seen = []

    def landscape_of(self: Broadhead, case: LandscapeCase, inputs: object) -> Any:
        seen.append(dispatch.ROWS)
        return lambda: seen.append(dispatch.ROWS)

    monkeypatch.setattr(Broadhead, "landscape", landscape_of)
    call = ForcedRow().forced((row,), FP8, landscape_inputs(FP8, CPU))
    assert seen == [(row,)] and dispatch.ROWS is everything
    call()
    assert seen == [(row,), (row,)] and dispatch.ROWS is everything


def test_kernels_are_reported_slowest_first() -> None:
    records = _records(
        a={"broadhead": 2.0, "fa3": 1.0}, b={"broadhead": 1.0, "fa3": 3.0}, c={"broadhead": 1.0, "fa3": 3.0}
    )
    for record, kernel in zip((r for r in records if r["impl"] == "broadhead"), ("slow", "fast", "fast")):
        record["kernel"] = kernel
    ran = [line for line in landscape.report(records) if line.startswith("kernel ")]
    assert [line[: line.index(",")] for line in ran] == ["kernel slow: 1 cases", "kernel fast: 2 cases"]
    assert "geometric mean 0.500" in ran[0] and ran[1].endswith("100 % at 1.0 or above")
