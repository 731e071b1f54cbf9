"""The plots of the pages are drawn from the result files, and stale ones are found."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
draw_performance = load_script("scripts/draw_performance.py")
SVG = "{http://www.w3.org/2000/svg}"


def test_the_plots_are_those_of_the_results() -> None:
    assert draw_performance.main(["--check"]) == 0


@pytest.mark.parametrize("plot", draw_performance.PLOTS, ids=lambda plot: plot.name)
def test_bars_are_as_long_as_the_numbers(plot: draw_performance.Plot) -> None:  # type: ignore[name-defined]
    """Read back from the picture: the lengths have the ratio of the values, and every number stands there."""
    records = json.loads((ROOT / "benchmarks/results" / plot.results).read_text(encoding="utf-8"))
    expected = [
        next(r["value"] for r in records if (r["case"], r["impl"]) == (case, impl) and r["value"] is not None)
        for case in plot.cases.values()
        for impl in plot.implementations
        if any((r["case"], r["impl"]) == (case, impl) and r["value"] is not None for r in records)
    ]
    root = ElementTree.fromstring(draw_performance.draw(plot))
    bars = [float(rect.get("width", "0")) for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    assert len(bars) == len(expected) >= 4
    for bar, value in zip(bars, expected, strict=True):
        assert bar / max(bars) == pytest.approx(value / max(expected), abs=2e-3)
    words = [(text.text or "").replace(" ", "") for text in root.iter(f"{SVG}text")]
    assert all(f"{value:.1f}" in words or f"{value:.0f}" in words for value in expected)


def test_a_stale_and_a_missing_plot_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = ["--images", str(tmp_path)]
    assert draw_performance.main(["--check", *images]) == 1 and "prefill.svg" in capsys.readouterr().err
    assert draw_performance.main(images) == 0 and draw_performance.main(["--check", *images]) == 0
    stale = tmp_path / "decode.svg"
    stale.write_text(re.sub(r'width="[\d.]+" height="15"', 'width="1" height="15"', stale.read_text()))
    assert draw_performance.main(["--check", *images]) == 1
    assert capsys.readouterr().err.startswith("decode.svg out of date")


def test_every_plot_stands_on_a_page() -> None:
    pages = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/performance.md"))
    for plot in draw_performance.PLOTS:
        assert f"images/{plot.name}.svg)" in pages
