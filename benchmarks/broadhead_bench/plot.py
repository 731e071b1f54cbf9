"""Draws result records as grouped bars, panels by area."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from broadhead_bench.landscape import ratios
from broadhead_bench.records import IMPLEMENTATIONS, UNITS

#: One colour an implementation in every figure (Okabe and Ito's palette, told apart by colour-blind readers).
COLOURS = {
    "broadhead": "#d55e00",
    "broadhead-det": "#a04000",
    "broadhead-sm80": "#f5b78a",
    "broadhead-sm80-fwd": "#f5b78a",
    "broadhead-best": "#a04000",
    "baseline": "#000000",
    "fa2": "#999999",
    "fa3": "#0072b2",
    "fa4": "#56b4e9",
    "ffpa": "#cc79a7",
    "cudnn": "#009e73",
    "memeff": "#e69f00",
    "sdpa": "#666666",
    "flex": "#7a68a6",
    "flashinfer": "#f0e442",
}
#: Of the areas where not all is bf16.
DTYPES = {"fp8": "e4m3, baseline bf16", "decode-fp8": "K and V e4m3, baseline bf16"}
#: Longest line of a case's label below the axis, in characters.
LABEL_WIDTH = 12
#: An area with more cases than this takes several panels, so that the numbers above the bars stay readable.
CASES_PER_PANEL = 10


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Write a figure of ``records``; of several results of one case and implementation the last counts.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is nothing to draw.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "--plot needs matplotlib; install it with: pip install -r benchmarks/requirements.txt"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    if records and all(r["area"] == "landscape" for r in records):
        figure = draw_landscape(pyplot, records)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
        return
    areas = [area for area in UNITS if area != "landscape" and any(r["area"] == area for r in records)]
    if not areas:
        raise ValueError("there are no records to plot")
    panels = []
    for area in areas:
        of_area = [r for r in records if r["area"] == area]
        cases = list(dict.fromkeys(r["case"] for r in of_area))
        count = -(-len(cases) // CASES_PER_PANEL)
        size = -(-len(cases) // count)
        panels += [(area, cases[i : i + size], of_area) for i in range(0, len(cases), size)]
    widest = max(len(cases) for _, cases, _ in panels)
    figure, grid = pyplot.subplots(
        len(panels), 1, figsize=(max(9.0, 1.3 * widest + 2), 4 * len(panels)), squeeze=False, layout="constrained"
    )
    for panel, axes in zip(panels, grid[:, 0]):
        _draw_panel(axes, *panel)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_panel(axes: Any, area: str, cases: list[str], records: list[dict[str, Any]]) -> None:
    values = {(r["case"], r["impl"]): r["value"] for r in records}
    # Those of this panel: matplotlib gives a bar that is not there a colour of its own.
    impls = [name for name in IMPLEMENTATIONS if any((case, name) in values for case in cases)]
    width = 0.84 / len(impls)
    for index, impl in enumerate(impls):
        present = [(i, values[case, impl]) for i, case in enumerate(cases) if (case, impl) in values]
        places = [i + (index - (len(impls) - 1) / 2) * width for i, _ in present]
        bars = axes.bar(places, [v for _, v in present], width, label=impl, color=COLOURS[impl])
        axes.bar_label(bars, fmt="%.3g" if UNITS[area] == "us" else "%.0f", fontsize=6, rotation=90, padding=2)
    labels = [textwrap.fill(case.split(" ", 1)[-1], LABEL_WIDTH, break_on_hyphens=False) for case in cases]
    axes.set_xticks(range(len(cases)), labels, fontsize=7)
    axes.set_ylabel(UNITS[area] + (" (lower is better)" if UNITS[area] == "us" else ""))
    axes.margins(y=0.15)
    dtype = DTYPES.get(area, "bf16")
    axes.set_title(f"{area}, {records[-1]['device']}, {dtype}", fontsize=10, loc="left")
    # Above the bars on the right, where no bar can be behind it.
    axes.legend(
        ncols=len(impls), fontsize=7, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2
    )
    axes.set_xlim(-0.6, len(cases) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)


def draw_landscape(pyplot: Any, records: list[dict[str, Any]]) -> Any:
    """A figure of points, one a case: how many times as fast as the best peer, over the operations of the case."""
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    found = ratios(records)
    for kind in dict.fromkeys(ratio.kind for ratio in found):
        mine = [ratio for ratio in found if ratio.kind == kind]
        axes.scatter([ratio.flops for ratio in mine], [ratio.value for ratio in mine], s=14, alpha=0.8, label=kind)
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.axhline(1.0, color="#000000", linewidth=0.8)
    axes.set_xlabel("floating-point operations of the call")
    axes.set_ylabel("speed, of the best peer")
    axes.set_title(f"landscape, {records[-1]['device']}", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
