#!/usr/bin/env python3
"""Draws the plots of README.md and docs/performance.md (docs/images/*.svg) from the files of benchmarks/results.

``draw_performance.py`` writes them; with ``--check`` it only says whether they are what the result files say. A plot
has a group of bars for each case and a bar for each implementation that has a number. It follows the reader's light or
dark scheme by itself. Nothing outside the standard library is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS, IMAGES = ROOT / "benchmarks/results", ROOT / "docs/images"

#: Of each implementation its name in the legend and its colours, on light and on dark.
IMPLEMENTATIONS = {
    "broadhead": ("broadhead", "#0b6b63", "#4cc4b6"),
    "broadhead-det": ("deterministic", "#7db8b2", "#2b7d75"),
    "fa3": ("FlashAttention-3", "#8d99ae", "#7d889c"),
    "fa4": ("FlashAttention-4", "#b5651d", "#d08a4a"),
    "ffpa": ("FFPA", "#7a5195", "#a883c4"),
    "cudnn": ("cuDNN", "#c9ccd3", "#565c68"),
    "flashinfer": ("FlashInfer", "#58508d", "#8d86c9"),
    "sdpa": ("SDPA of PyTorch", "#c9ccd3", "#6b7280"),
}


class Plot(NamedTuple):
    name: str  # of the file in docs/images
    title: str
    unit: str
    results: str  # the file in benchmarks/results
    cases: dict[str, str]  # the label of a group -> the case
    implementations: tuple[str, ...]
    less_is_better: bool = False


PLOTS = (
    Plot(
        "prefill",
        "Prefill on an H200: 8192 tokens, bf16, no mask",
        "TFLOP/s",
        "h200-hopper-prefill.json",
        {
            "head_dim 64, 32 heads": "fwd B2 S8192 H32 Hkv32 D64 full",
            "head_dim 128, 16 heads": "fwd B2 S8192 H16 Hkv16 D128 full",
            "head_dim 256, 16/2 heads": "fwd B1 S8192 H16 Hkv2 D256 full",
            "head_dim 512, 32/4 heads": "fwd B1 S8192 H32 Hkv4 D512 full",
        },
        ("broadhead", "fa3", "cudnn", "ffpa"),
    ),
    Plot(
        "training",
        "Training step of a small model shaped like Gemma 4, on an H200",
        "tokens/s",
        "h200-training.json",
        {
            "4096 tokens": "step S4096 hidden2560 D256 window1024 D512 causal",
            "16384 tokens": "step S16384 hidden2560 D256 window1024 D512 causal",
        },
        ("broadhead", "sdpa"),
    ),
    Plot(
        "backward",
        "Backward on an H200: 8192 tokens, bf16, causal",
        "TFLOP/s",
        "h200-backward.json",
        {
            "head_dim 64, 32 heads": "bwd B2 S8192 H32 Hkv32 D64 causal",
            "head_dim 128, 32/8 heads": "bwd B1 S8192 H32 Hkv8 D128 causal",
            "head_dim 192, 12 heads": "bwd B2 S8192 H12 Hkv12 D192 causal",
            "head_dim 256, 16/2 heads": "bwd B1 S8192 H16 Hkv2 D256 causal",
            "head_dim 512, 32/4 heads": "bwd B1 S8192 H32 Hkv4 D512 causal",
        },
        ("broadhead", "broadhead-det", "fa4", "cudnn", "ffpa"),
    ),
    Plot(
        "decode",
        "Paged decode on an H200: pages of 64, bf16",
        "GB/s of K and V",
        "h200-decode.json",
        {
            "head_dim 128, 32/8 heads, 16 x 8192": "dec B16 ctx8192 H32 Hkv8 D128 page64",
            "head_dim 128, 32/8 heads, 1 x 65536": "dec B1 ctx65536 H32 Hkv8 D128 page64",
            "head_dim 256, 16/2 heads, 64 x 8192": "dec B64 ctx8192 H16 Hkv2 D256 page64",
            "head_dim 512, 32/4 heads, 16 x 8192": "dec B16 ctx8192 H32 Hkv4 D512 page64",
        },
        ("broadhead", "fa3", "fa4", "flashinfer"),
    ),
    Plot(
        "host",
        "Host time of one eager call; less is better",
        "us",
        "h200-host.json",
        {
            "paged decode with metadata": "host decode+metadata",
            "the same with append and rotary": "host append+rotary",
            "dense": "host dense",
        },
        ("broadhead", "fa3"),
        less_is_better=True,
    ),
)

WIDTH, LABELS, NUMBERS = 780, 262, 74  # of the picture, of the labels at its left, of the numbers behind the bars
BAR, GAP, GROUP_GAP, HEAD, FOOT = 15, 3, 14, 64, 30
LEGEND = 150  # from one name of the legend to the next


def values_of(plot: Plot) -> dict[tuple[str, str], float]:
    """The first value of each case and implementation of the plot's file."""
    found: dict[tuple[str, str], float] = {}
    for record in json.loads((RESULTS / plot.results).read_text(encoding="utf-8")):
        if record["value"] is not None:
            found.setdefault((record["case"], record["impl"]), record["value"])
    return found


def number(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}".replace(",", " ")


def text(x: float, y: float, words: str, classes: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{classes}">{escape(words)}</text>'


def legend(plot: Plot) -> list[str]:
    lines, x = [], 16.0
    for impl in plot.implementations:
        name = IMPLEMENTATIONS[impl][0]
        lines.append(f'<rect x="{x:g}" y="36" width="11" height="11" rx="2" class="{impl}"/>')
        lines.append(text(x + 16, 46, name))
        x += LEGEND
    return lines


def style(plot: Plot) -> str:
    light = "".join(f".{impl}{{fill:{IMPLEMENTATIONS[impl][1]}}}" for impl in plot.implementations)
    dark = "".join(f".{impl}{{fill:{IMPLEMENTATIONS[impl][2]}}}" for impl in plot.implementations)
    return (
        "text{font:13px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:#24292f}"
        ".title{font-weight:600;font-size:15px}.small{font-size:11px;fill:#57606a}.ours{font-weight:600}"
        f".paper{{fill:#ffffff;stroke:#d0d7de}}{light}"
        "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9198a1}"
        f".paper{{fill:#0d1117;stroke:#30363d}}{dark}}}"
    )


def draw(plot: Plot) -> str:
    """The picture.

    Raises:
        SystemExit: the result file lacks broadhead's number of a case.
    """
    values, body, y = values_of(plot), [], float(HEAD)
    drawn = [(case, impl) for case in plot.cases.values() for impl in plot.implementations]
    scale = (WIDTH - LABELS - NUMBERS - 16) / max(values.get(key, 0) for key in drawn)
    for label, case in plot.cases.items():
        if (case, "broadhead") not in values:
            raise SystemExit(f"draw_performance.py: {plot.results} has no number of broadhead for {case!r}")
        bars = [(impl, values[case, impl]) for impl in plot.implementations if (case, impl) in values]
        height = len(bars) * (BAR + GAP) - GAP
        body.append(text(LABELS - 10, y + height / 2 + 4.5, label, anchor="end"))
        for impl, value in bars:
            body.append(
                f'<rect x="{LABELS}" y="{y:g}" width="{value * scale:.1f}" height="{BAR}" rx="2" class="{impl}">'
                f"<title>{escape(IMPLEMENTATIONS[impl][0])}: {number(value)} {escape(plot.unit)}</title></rect>"
            )
            kind = "ours" if impl == "broadhead" else ""
            body.append(text(LABELS + value * scale + 6, y + 12, number(value), kind))
            y += BAR + GAP
        y += GROUP_GAP
    height = y + FOOT - GROUP_GAP
    described = f"{plot.title}, in {plot.unit}. The numbers are in the tables of docs/performance.md."
    source = f"{plot.unit}{', less is better' if plot.less_is_better else ''}; from benchmarks/results/{plot.results}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}"'
            f' height="{height:g}" role="img" aria-label="{escape(described)}">',
            "<!-- Written by scripts/draw_performance.py. -->",
            f"<style>{style(plot)}</style>",
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="6" class="paper"/>',
            text(16, 24, plot.title, "title"),
            *legend(plot),
            *body,
            text(WIDTH - 12, height - 10, source, "small", "end"),
            "</svg>",
            "",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The plots of the documentation.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a plot is out of date")
    parser.add_argument("--images", type=Path, default=IMAGES, help="the folder of the plots")
    arguments = parser.parse_args(argv)
    stale = []
    for plot in PLOTS:
        path, drawn = arguments.images / f"{plot.name}.svg", draw(plot)
        if not path.exists() or path.read_text(encoding="utf-8") != drawn:
            stale.append(path.name)
            if not arguments.check:
                path.write_text(drawn, encoding="utf-8")
    if arguments.check and stale:
        print(f"{', '.join(stale)} out of date: run python3 scripts/draw_performance.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
