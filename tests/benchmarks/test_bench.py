"""The benchmark command: names, counts, records, tables, and that a wrong result posts no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import broadhead
import pytest
import torch
from broadhead_bench import accuracy, cases, cases_prefill, cli, inputs, plot, records, summary, timing
from broadhead_bench.measure_inference import MAX_LOGITS_ERROR
from broadhead_bench.measure_model import MAX_STEP_ERROR
from broadhead_bench.peers import broadhead_api, registry

FIELDS = {
    *("area", "case", "impl", "kernel", "value", "unit", "seconds", "rel_error"),
    *("peak_bytes", "device", "versions", "command", "date"),
}
#: Areas of training, whose peers are others.
LAYERS = ("training", "prefix-lm")


def test_case_names() -> None:
    names = {area: [case.name for case in cases.cases_of(area)] for area in cases.AREAS}
    assert "fwd B2 S8192 H16 Hkv16 D128 causal" in names["forward"]
    assert "fwd B1 S8192 H32 Hkv4 D512 full" in names["forward"]
    assert "bwd B2 S8192 H4 Hkv4 D512 causal" in names["backward"]
    assert "bwd B1 S8192 H32 Hkv4 D512 full" in names["backward"]
    assert "layer B1 S8192 H32 Hkv16 D256 window1024" in names["training"]
    assert "step S16384 hidden2560 D256 window1024 D512 causal" in names["training"]
    assert "plm B4 S4096 H10 Hkv10 D128 prefix2048" in names["prefix-lm"]
    assert "dec B128 ctx8192 H8 Hkv1 D128 page64" in names["decode"]
    assert "dec B1 ctx65536 H32 Hkv4 D512 page128" in names["decode"]
    assert "host decode+metadata" in names["host"]
    assert "fwd B2 S8192 H16 Hkv16 D192/128 causal" in names["forward"]
    assert "chunk B1 Sq2048 Sk34816 H16 Hkv2 D256 page16" in names["chunked"]
    assert "paged B2 S8192 H16 Hkv8 D128 page1" in names["paged"]
    assert "win B1 S16384 H32 Hkv16 D256 window1024" in names["window"]
    assert "fp8 B2 S8192 H8 Hkv8 D256 causal" in names["fp8"]
    assert "fwd+bwd S16384 H32 Hkv16 D256 window1024 images8x256 in window" in names["masks"]
    assert "chunk Sq2048 Sk18432 H16 Hkv2 D256 page64 e4m3 images4x256" in names["masks"]
    assert "tree B16 q64 ctx8192 H32 Hkv8 D128 page64" in names["masks"]
    assert "fwd B2 S4096 H16 Hkv16 D80 full" in names["odd"]
    assert "fwd B2 S4096 H12 Hkv12 D160 causal" in names["odd"]
    assert "varlen N2 T8192 H16 Hkv16 D72 full" in names["odd-varlen"]
    assert "paged B2 S4096 H12 Hkv12 D160 page64" in names["odd-paged"]
    assert "paged B2 S4096 H16 Hkv16 D80 page64 full" in names["odd-paged"]
    assert {area: len(names[area]) for area in cases.AREAS} == {
        "forward": 18,
        "odd": 18,
        "odd-varlen": 3,
        "odd-paged": 3,
        "chunked": 12,
        "varlen": 3,
        "paged": 12,
        "window": 2,
        "fp8": 4,
        "masks": 16,
        "backward": 16,
        "backward-sweep": 60,
        "training": 4,
        "prefix-lm": 5,
        "decode": 14,
        "decode-pages": 9,
        "decode-mixed": 8,
        "decode-mtp": 20,
        "decode-fp8": 7,
        "decode-mla": 6,
        "decode-invariant": 8,
        "cascade": 12,
        "append": 6,
        "latency": 6,
        "host": 4,
        "model": 3,
        "landscape": 200,
    }
    for area, of_area in names.items():
        assert len(set(of_area)) == len(of_area), area


def test_counts() -> None:
    full = cases.DenseCase("forward", 2, 8192, 16, 16, 128, False)
    assert full.flops == 2 * 2 * 16 * 8192 * 8192 * 256
    assert full._replace(causal=True).flops == full.flops / 2
    assert full._replace(area="backward").flops == full.flops * 2.5
    wide = full._replace(head_dim=192, value_dim=128)
    assert wide.flops == 2 * 2 * 16 * 8192 * 8192 * (192 + 128)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(7, 7), (3, 11), (1, 5)])
@pytest.mark.parametrize("window", [None, 1, 4, 9, 100])
def test_visible_pairs(seqlen_q: int, seqlen_k: int, window: int | None) -> None:
    distance = torch.arange(seqlen_k - seqlen_q, seqlen_k)[:, None] - torch.arange(seqlen_k)[None, :]
    visible = (distance >= 0) & (distance < (window or seqlen_k))
    assert cases_prefill.causal_pairs(seqlen_q, seqlen_k, window) == visible.sum()


def test_counts_without_a_causal_mask() -> None:
    packed = cases.VarlenCase((3, 5), 2, 1, 72, causal=False)
    assert packed.flops == 4 * 2 * 72 * (9 + 25)
    assert packed._replace(causal=True).flops == 4 * 2 * 72 * (6 + 15)
    paged = cases.PagedCase("odd-paged", 2, 3, 7, 4, 2, 80, 16, causal=False)
    assert paged.flops == 4 * 2 * 4 * 80 * 21


def test_ragged_lengths_are_seeded() -> None:
    (lengths,) = {case.seqlens for case in cases.cases_of("varlen")}
    assert len(lengths) == 32
    assert min(lengths) >= 128
    assert max(lengths) <= 16384
    assert lengths[:3] == cases.ragged_lengths(32, 128, 16384)[:3]
    assert lengths != cases.ragged_lengths(32, 128, 16384, seed=1)
    # Uniform logarithms: about half of the lengths are below the geometric mean, 1448.
    assert 8 <= sum(n < 1448 for n in lengths) <= 24


def test_turns_are_even() -> None:
    order = timing.spread_turns([3, 12, 0, 6])
    assert [order.count(i) for i in range(4)] == [3, 12, 0, 6]
    # Spread over the whole run: the rarest one has a turn in each third of the frequent one's.
    places = [i for i, turn in enumerate(order) if turn == 0]
    assert all(low <= place < low + 7 for place, low in zip(places, (0, 7, 14)))


@pytest.mark.parametrize("area", cases.AREAS)
def test_quick_on_cpu(area: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    if area in ("training", "model"):
        pytest.importorskip("transformers")
    arguments = [area, "--quick", "--device", "cpu", "--budget", "0.01", "--out", str(out), "--seed", "3"]
    assert cli.main(arguments) == cli.OK
    written = json.loads(out.read_text())
    names = {case.name for case in cases.cases_of(area, on_cpu=True, seed=3)}
    measured: dict[str, set[str]] = {}
    for record in written:
        measured.setdefault(record["impl"], set()).add(record["case"])
    expected = {
        "broadhead": True,
        "broadhead-det": area in cases_prefill.BACKWARD_AREAS,
        "baseline": area in broadhead_api.Baseline.areas,
        "sdpa": area in (*LAYERS, "model"),
    }
    assert measured == {impl: names for impl, there in expected.items() if there}
    for record in written:
        assert set(record) == FIELDS | ({"seed", "flops", "bytes"} if area == "landscape" else set())
        assert record["peak_bytes"] is None, "there is no device whose memory could be asked"
        assert record["kernel"] is None  # the fallback is no row
        assert record["value"] > 0 and record["seconds"] > 0
        assert record["unit"] == records.UNITS[area]
        own = {"step": MAX_STEP_ERROR, "prefill": MAX_LOGITS_ERROR, "generate": MAX_LOGITS_ERROR}
        assert record["rel_error"] < own.get(record["case"].split()[0], accuracy.MAX_ERROR[area])
        assert record["versions"]["torch"] == torch.__version__
        assert str(tmp_path) not in record["command"]
    printed = capsys.readouterr().out
    assert ("skip fa3: " in printed) == (area not in ("decode-invariant", "masks", *LAYERS))
    log, _, tables = printed.partition(f"\n{area}, {records.UNITS[area]}\n")
    assert all(name in log and name in tables for name in names)
    # Of peers SDPA alone runs here; else baselines, and the default beside what is deterministic, are compared with.
    assert ("bars met" in printed) == (
        area in ("paged", "window", "fp8", "masks", *cases_prefill.BACKWARD_AREAS, *LAYERS)
    )


def test_what_an_older_version_lacks_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An older version of broadhead may be installed. What it cannot do is told, and nothing breaks."""
    monkeypatch.delattr(broadhead, "flash_attn_with_shared_prefix")
    out = tmp_path / "results.json"
    arguments = ["cascade", "--quick", "--device", "cpu", "--budget", "0.001", "--out", str(out)]
    assert cli.main(arguments) == cli.OK
    assert {r["impl"] for r in json.loads(out.read_text())} == {"baseline"}
    printed = capsys.readouterr().out
    for case in cases.cases_of("cascade", on_cpu=True):
        assert f"skip broadhead, {case.name}: this version has no flash_attn_with_shared_prefix" in printed


def test_out_appends_and_plot_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, figure = tmp_path / "results.json", tmp_path / "results.png"
    arguments = [
        "forward",
        "--quick",
        "--device",
        "cpu",
        "--budget",
        "0.001",
        "--case",
        "D64 causal",
        "--out",
        str(out),
    ]
    assert cli.main(arguments) == cli.OK
    assert cli.main([*arguments, "--plot", str(figure)]) == cli.OK
    assert len(json.loads(out.read_text())) == 2
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_panel_lists_what_it_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matplotlib gives a bar that is not there a colour of its own, and the list would show that."""
    figures = pytest.importorskip("matplotlib.figure")
    listed = []

    def keep(figure: Any, *_: Any, **__: Any) -> None:
        listed.extend([text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes)

    monkeypatch.setattr(figures.Figure, "savefig", keep)
    record = {"area": "forward", "value": 1.0, "device": "a GPU"}
    records = [{**record, "case": f"fwd {i}", "impl": "broadhead"} for i in range(plot.CASES_PER_PANEL + 2)]
    plot.plot([*records, {**record, "case": "fwd 0", "impl": "fa2"}], tmp_path / "figure.png")
    assert listed == [["broadhead", "fa2"], ["broadhead"]]


def test_wrong_result_posts_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = broadhead.flash_attn_func
    monkeypatch.setattr(broadhead, "flash_attn_func", lambda *a, **k: right(*a, **k) * 1.05)
    out = tmp_path / "results.json"
    assert cli.main(["forward", "--quick", "--device", "cpu", "--out", str(out)]) == cli.BROKEN
    assert not out.exists()
    assert "wrong result" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--impl", "fa9", "--quick"], "--impl"),
        (["--device", "cpu"], "--quick"),
        (["--budget", "0", "--quick"], "--budget"),
    ],
)
def test_bad_options_are_named(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["forward", *arguments]) == cli.BAD_USAGE
    assert text in capsys.readouterr().err


def test_foreign_result_file_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    out.write_text('{"mine": 1}')
    assert cli.main(["forward", "--quick", "--device", "cpu", "--out", str(out)]) == cli.BAD_USAGE
    assert out.read_text() == '{"mine": 1}'
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("causal", [False, True])
def test_errors_are_measured(causal: bool) -> None:
    """The reference agrees with torch in fp64, and sees a single wrong head."""
    case = cases.DenseCase("forward", 1, 40, 4, 2, 16, causal)
    q, k, v = (torch.randn(1, 40, heads, 16, dtype=torch.float64) for heads in (4, 2, 2))
    query, key, value = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    out = out.transpose(1, 2)
    assert accuracy.forward_error(case, q, k, v, out) < 1e-5
    wrong = out.clone()
    wrong[:, :, 1] *= 1.1
    assert accuracy.forward_error(case, q, k, v, wrong) > 1e-2
    wrong[0, 0, 0, 0] = float("nan")
    assert not accuracy.forward_error(case, q, k, v, wrong) <= 1e-2


def test_interleaved_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake device clock: medians without the flush, every call after a flush, and a failure that stays alone."""
    clock, log = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def work(name: str, milliseconds: float) -> None:
        log.append(name)
        clock[0] += milliseconds

    def failing() -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("sync"))
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0.0)
    first, broken, second = timing.time_interleaved(
        [lambda: work("a", 2.0), failing, lambda: work("b", 3.0)], lambda: work("flush", 100.0), budget=1e-9
    )
    assert (first, second) == (pytest.approx(2e-3), pytest.approx(3e-3))
    assert isinstance(broken, RuntimeError)
    timed = log[len(log) - 1 - 4 * timing.MIN_REPETITIONS : -1]
    assert timed[::2] == ["flush"] * (2 * timing.MIN_REPETITIONS)
    # Each round has both, and neither always comes first.
    rounds = ["".join(timed[i + 1 : i + 4 : 2]) for i in range(0, len(timed), 4)]
    assert set(rounds) == {"ab", "ba"}


def test_masked_errors_see_wrong_masks() -> None:
    """A window one key too wide, a chunk aligned to the wrong end and a sequence that sees its neighbour are wrong."""
    device = torch.device("cpu")
    dense = cases.DenseCase("window", 1, 64, 4, 2, 16, True, window=8)
    q, k, v, _ = inputs.dense_inputs(dense, device)
    for width, right in ((7, True), (8, False)):
        out = broadhead.flash_attn_func(q, k, v, causal=True, window_size=(width, 0))
        assert (accuracy.forward_error(dense, q, k, v, out) <= accuracy.MAX_ERROR["window"]) == right

    chunk = cases.PagedCase("chunked", 2, 9, 50, 4, 2, 16, 16)
    paged = inputs.paged_inputs(chunk, device)
    keys, values = paged.gathered(chunk.context)
    for causal in (True, False):
        out = broadhead.flash_attn_func(paged.q, keys, values, causal=causal)
        assert (accuracy.paged_error(chunk, paged, out) <= accuracy.MAX_ERROR["chunked"]) == causal

    packed = cases.VarlenCase((5, 30, 17), 4, 2, 16)
    varlen = inputs.varlen_inputs(packed, device)
    offsets = varlen.cu_seqlens
    for wrong in (0, 1):
        shifted = offsets + torch.tensor([0, wrong, 0, 0], dtype=torch.int32)
        out = broadhead.flash_attn_varlen_func(varlen.q, varlen.k, varlen.v, shifted, shifted, 30, 30, causal=True)
        assert (accuracy.varlen_error(packed, varlen, out) <= accuracy.MAX_ERROR["varlen"]) == (not wrong)


def test_e4m3_inputs_are_scaled() -> None:
    case = cases.DenseCase("fp8", 2, 32, 4, 2, 16, True)
    torch.manual_seed(0)
    made = inputs.fp8_inputs(case, torch.device("cpu"))
    torch.manual_seed(0)
    original = inputs.dense_inputs(case, torch.device("cpu"))
    assert made.k_descale.shape == (2, 2)
    for values, wide, source in zip(made[:3], made.widened(), original):
        assert values.dtype == torch.float8_e4m3fn
        assert values.float().abs().max() == inputs.E4M3_MAX
        assert accuracy.relative_error(wide, source) < 4e-2
    out = broadhead.flash_attn_func(*made[:3], causal=True)  # without the scales
    assert accuracy.forward_error(case, *made.widened(), out) > accuracy.MAX_ERROR["fp8"]


def _results(area: str, case: str, **values: float) -> list[dict[str, object]]:
    return [{"area": area, "case": case, "impl": name, "value": v, "seconds": 1e-3} for name, v in values.items()]


@pytest.mark.parametrize(
    ("area", "case", "values", "rival", "ratio", "met"),
    [
        ("forward", "fwd D128", {"broadhead": 97, "fa3": 100, "fa2": 50}, "fa3", 0.97, True),
        ("forward", "fwd D128", {"broadhead": 96, "fa3": 100}, "fa3", 0.96, False),
        ("varlen", "varlen D512", {"broadhead": 106, "ffpa": 100, "flashinfer": 200}, "ffpa", 1.06, True),
        ("chunked", "chunk D512", {"broadhead": 104, "ffpa": 100}, "ffpa", 1.04, False),
        ("paged", "paged D128", {"broadhead": 93, "baseline": 100, "fa3": 200}, "baseline", 0.93, True),
        ("window", "win D128", {"broadhead": 100, "baseline": 116, "fa3": 50}, "baseline", 1.16, False),
        ("fp8", "fp8 D128", {"broadhead": 140, "baseline": 100}, "baseline", 1.4, True),
        ("decode", "dec D128", {"broadhead": 100, "fa3": 200}, "fa3", 0.5, None),
        ("host", "host dense", {"broadhead": 10, "fa3": 30, "fa4": 20}, "fa4", 2.0, None),
        (
            "masks",
            "fwd D256 window1024 images8x256",
            {"broadhead": 110, "baseline": 100, "flex": 90},
            "baseline",
            1.1,
            True,
        ),
        ("forward", "fwd D128", {"broadhead": 96}, None, None, None),
        ("backward", "bwd D128", {"broadhead": 96, "fa4": 100, "broadhead-sm80": 200}, "fa4", 0.96, True),
        ("backward", "bwd D192", {"broadhead": 114, "fa4": 100, "fa2": 50}, "fa4", 1.14, False),
        ("backward", "bwd D512", {"broadhead": 140, "ffpa": 100, "memeff": 120}, "ffpa", 1.4, True),
        ("backward-sweep", "bwd D512", {"broadhead": 74, "ffpa": 90, "memeff": 100}, "memeff", 0.74, False),
        ("training", "layer D256 window1024", {"broadhead": 30, "sdpa": 10, "fa2": 28}, "sdpa", 3.0, True),
        ("training", "step S16384 D256", {"broadhead": 24, "sdpa": 10}, "sdpa", 2.4, False),
        ("prefix-lm", "plm D128", {"broadhead": 10, "baseline": 15, "sdpa": 5}, "baseline", 1.5, True),
    ],
)
def test_summary_states_the_bars(
    area: str, case: str, values: dict[str, float], rival: str | None, ratio: float | None, met: bool | None
) -> None:
    results = _results(area, case, **values)
    row, *_ = summary.summarize(results)
    assert (row.rival, row.met) == (rival, met)
    assert row.ratio == (None if ratio is None else pytest.approx(ratio))
    columns, (line,) = summary.table(results, area)
    assert len(line) == len(columns)
    assert line[columns.index("ratio")] == ("-" if ratio is None else f"{ratio:.3f} {rival}")
    assert ("met" in columns) == bool(row.bar)
    assert row.bar == "" or line[columns.index("met")] == {True: "yes", False: "NO", None: "-"}[met]


def test_tables_show_what_broadhead_lacks() -> None:
    results = _results("decode", "dec one D64", fa3=10.0) + _results("decode", "dec two D64", broadhead=1234.5, fa3=11)
    columns, lines = summary.table(results, "decode")
    assert columns == ["case", "broadhead", "fa3", "our us", "ratio"]
    assert lines == [
        ["dec one D64", "-", "10", "-", "-"],
        ["dec two D64", "1234", "11", "1000", "112.227 fa3"],
    ]
    assert summary.table(results, "host")[1] == []


def test_every_implementation_has_an_adapter() -> None:
    assert tuple(peer.name for peer in registry.all_peers()) == records.IMPLEMENTATIONS
