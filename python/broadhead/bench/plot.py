"""Draws result records as grouped bars, one panel an area."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from broadhead.bench.records import IMPLEMENTATIONS, UNITS

#: One colour an implementation in every figure (Okabe and Ito's palette, told apart by colour-blind readers).
COLOURS = dict(
    zip(IMPLEMENTATIONS, ("#d55e00", "#999999", "#0072b2", "#56b4e9", "#cc79a7", "#009e73", "#e69f00", "#f0e442"))
)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Write a figure of ``records``; of several results of one case and implementation the last counts.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is nothing to draw.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("--plot needs matplotlib; install it with: pip install 'broadhead[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    areas = [area for area in UNITS if any(r["area"] == area for r in records)]
    if not areas:
        raise ValueError("there are no records to plot")
    widest = max(len({r["case"] for r in records if r["area"] == area}) for area in areas)
    figure, panels = pyplot.subplots(
        len(areas), 1, figsize=(max(7.0, 1.1 * widest + 2), 4.4 * len(areas)), squeeze=False, layout="constrained"
    )
    for area, axes in zip(areas, panels[:, 0]):
        _draw_area(axes, area, [r for r in records if r["area"] == area])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_area(axes: Any, area: str, records: list[dict[str, Any]]) -> None:
    values = {(r["case"], r["impl"]): r["value"] for r in records}
    cases = list(dict.fromkeys(r["case"] for r in records))
    impls = [name for name in IMPLEMENTATIONS if any(impl == name for _, impl in values)]
    width = 0.84 / len(impls)
    for index, impl in enumerate(impls):
        present = [(i, values[case, impl]) for i, case in enumerate(cases) if (case, impl) in values]
        places = [i + (index - (len(impls) - 1) / 2) * width for i, _ in present]
        bars = axes.bar(places, [v for _, v in present], width, label=impl, color=COLOURS[impl])
        axes.bar_label(bars, fmt="%.0f", fontsize=6, rotation=90, padding=2)
    labels = [case.split(" ", 1)[-1].replace(" D", "\nD") for case in cases]
    axes.set_xticks(range(len(cases)), labels, fontsize=7)
    axes.set_ylabel(UNITS[area] + (" (lower is better)" if area == "host" else ""))
    axes.margins(y=0.15)
    axes.set_title(f"{area}, {records[-1]['device']}, bf16", fontsize=10)
    axes.legend(ncols=len(impls), fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
