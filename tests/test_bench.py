"""The benchmark command: names, counts, records, tables, and that a wrong result posts no time."""

from __future__ import annotations

import json
from pathlib import Path

import broadhead
import pytest
import torch
from broadhead.bench import accuracy, cases, cli, peers, records

FIELDS = {"area", "case", "impl", "kernel", "value", "unit", "rel_error", "device", "versions", "command", "date"}


def test_case_names() -> None:
    names = {area: [case.name for case in cases.cases_of(area)] for area in cases.AREAS}
    assert "fwd B2 S8192 H16 Hkv16 D128 causal" in names["forward"]
    assert "fwd B1 S8192 H32 Hkv4 D512 full" in names["forward"]
    assert "bwd B2 S8192 H4 Hkv4 D512 causal" in names["backward"]
    assert "dec B128 ctx8192 H8 Hkv1 D128 page64" in names["decode"]
    assert "dec B1 ctx65536 H32 Hkv4 D512 page128" in names["decode"]
    assert "host decode+metadata" in names["host"]
    assert [len(names[area]) for area in cases.AREAS] == [14, 8, 14, 2]


def test_counts() -> None:
    full = cases.DenseCase("forward", 2, 8192, 16, 16, 128, False)
    assert full.flops == 2 * 2 * 16 * 8192 * 8192 * 256
    assert full._replace(causal=True).flops == full.flops / 2
    assert full._replace(area="backward").flops == full.flops * 2.5
    decode = cases.DecodeCase(16, 8192, 32, 8, 128, 64)
    assert decode.kv_bytes == 16 * 8192 * 8 * 128 * 2 * 2
    assert decode.pages_per_sequence == 128


@pytest.mark.parametrize("area", cases.AREAS)
def test_quick_on_cpu(area: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    arguments = [area, "--quick", "--device", "cpu", "--budget", "0.01", "--out", str(out)]
    assert cli.main(arguments) == cli.OK
    written = json.loads(out.read_text())
    assert {r["case"] for r in written} == {case.name for case in cases.cases_of(area, on_cpu=True)}
    for record in written:
        assert set(record) == FIELDS
        assert record["impl"] == "broadhead"
        assert record["kernel"] is None  # the fallback is no row
        assert record["value"] > 0
        assert record["unit"] == records.UNITS[area]
        assert record["rel_error"] < 1e-2
        assert record["versions"]["torch"] == torch.__version__
        assert str(tmp_path) not in record["command"]
    printed = capsys.readouterr().out
    assert "skip fa3: " in printed
    assert written[0]["case"] in printed


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
    """The references agree with autograd in fp64, and see a single wrong head."""
    case = cases.DenseCase("backward", 1, 40, 4, 2, 16, causal)
    q, k, v, dout = (torch.randn(1, 40, heads, 16, dtype=torch.float64) for heads in (4, 2, 2, 4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    query, key, value = (t.transpose(1, 2) for t in leaves)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    out = out.transpose(1, 2)
    gradients = torch.autograd.grad(out, leaves, dout)
    with torch.no_grad():
        assert accuracy.forward_error(case, q, k, v, out) < 1e-5
        assert accuracy.backward_error(case, q, k, v, dout, gradients) < 1e-5
        wrong = out.clone()
        wrong[:, :, 1] *= 1.1
        assert accuracy.forward_error(case, q, k, v, wrong) > 1e-2
        wrong_dv = gradients[2].clone()
        wrong_dv[0, 3, 1] += 10
        assert accuracy.backward_error(case, q, k, v, dout, (*gradients[:2], wrong_dv)) > 2e-2
        wrong[0, 0, 0, 0] = float("nan")
        assert not accuracy.forward_error(case, q, k, v, wrong) <= 1e-2


def test_every_implementation_has_an_adapter() -> None:
    assert tuple(peer.name for peer in peers.all_peers()) == records.IMPLEMENTATIONS
