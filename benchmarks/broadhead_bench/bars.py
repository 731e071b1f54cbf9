"""Beside whom each result stands, and the ratio that it should reach."""

from __future__ import annotations

import re
from typing import NamedTuple

from broadhead_bench.cases import ODD_AREAS
from broadhead_bench.cases_prefill import BACKWARD_AREAS
from broadhead_bench.records import OWN, UNITS

BAR_UP_TO_256 = 0.97
#: Of ffpa, where it ran.
BAR_ABOVE_256 = 1.05
#: Of `baseline`.
BAR_PAGED, BAR_FP8, BAR_PREFIX = 0.93, 1.4, 1.5
#: Of fa3, which pads such head_dims, by head_dim.
BARS_ODD = {72: 1.0, 80: 1.0, 160: 0.9}
#: Time over the time that the visible operations would take at the causal rate.
BAR_WINDOW = 1.15
#: Backward passes, of the best peer: up to head_dim 128, up to 256; above, of ffpa. In a sweep each case, and all.
BAR_BACKWARD_128, BAR_BACKWARD_256, BAR_BACKWARD_512 = 0.95, 1.15, 1.4
BAR_SWEEP_WORST, BAR_SWEEP_MEAN = 0.75, 1.0
#: Of the default, of torch's FlashAttention-2 from head_dim 64 to 256.
BAR_DETERMINISTIC, BAR_PORTABLE = 0.75, 1.0
#: A layer in both directions: of torch's SDPA, and of what is made for its layer. A model's step, by its tokens.
BAR_LAYER_SDPA, BAR_LAYER = 3.0, 1.2
BARS_STEP = {4096: 1.5, 16384: 2.5}

#: Time with a mask over the time without it: images in a layer with a window, drafts.
BAR_IMAGES, BAR_TREE = 1.1, 1.1

#: Areas of forward passes that compare with the best peer.
PEER_AREAS = ("forward", "chunked", "varlen")
#: Areas that compare with `baseline` by the time of the same step, whatever each of the two reads.
STEP_AREAS = ("decode-fp8", "decode-invariant", "cascade", "append")


class Comparison(NamedTuple):
    """One implementation beside another, and the least or the most that the ratio may be."""

    impl: str
    rival: str | None
    least: float | None = None
    most: float | None = None


def comparisons(area: str, case: str, values: dict[str, float]) -> list[Comparison]:
    """What a case's results are compared with; that of ``broadhead`` comes first, and is there always.

    Args:
        values: of each implementation that has a result.
    """
    best = best_peer(area, values)
    if area in STEP_AREAS:
        return [Comparison("broadhead", "baseline")]
    if area == "masks":
        bar = BAR_TREE if case.startswith("tree") else BAR_IMAGES if " window" in case else None
        return [Comparison("broadhead", "baseline", most=bar)]
    if area == "window":
        return [Comparison("broadhead", "baseline", most=BAR_WINDOW)]
    if area == "landscape":
        return [Comparison("broadhead", best)]
    if area in ODD_AREAS:
        return [Comparison("broadhead", "fa3", BARS_ODD.get(head_dim(case)))]
    if area in ("paged", "fp8", "prefix-lm"):
        return [Comparison("broadhead", "baseline", {"paged": BAR_PAGED, "fp8": BAR_FP8}.get(area, BAR_PREFIX))]
    if area in BACKWARD_AREAS:
        return _of_backward(area, case, values, best)
    if area == "model":
        others = [Comparison("broadhead", name) for name in ("fa3", "fa2") if name in values]
        return [Comparison("broadhead", "sdpa"), *others]
    if area == "training":
        return _of_training(case, values)
    if area not in PEER_AREAS:
        return [Comparison("broadhead", best)]
    if head_dim(case) > 256:
        return [Comparison("broadhead", "ffpa" if "ffpa" in values else best, BAR_ABOVE_256)]
    return [Comparison("broadhead", best, BAR_UP_TO_256)]


def _of_backward(area: str, case: str, values: dict[str, float], best: str | None) -> list[Comparison]:
    columns = head_dim(case)
    if area == "backward-sweep":
        found = [Comparison("broadhead", best, BAR_SWEEP_WORST)]
    elif columns > 256:
        found = [Comparison("broadhead", "ffpa" if "ffpa" in values else best, BAR_BACKWARD_512)]
    else:
        found = [Comparison("broadhead", best, BAR_BACKWARD_128 if columns <= 128 else BAR_BACKWARD_256)]
    bar = BAR_PORTABLE if area == "backward" and 64 <= columns <= 256 else None
    others = [Comparison("broadhead-det", "broadhead", BAR_DETERMINISTIC), Comparison("broadhead-sm80", "fa2", bar)]
    return found + [each for each in others if each.impl in values and each.rival in values]


def _of_training(case: str, values: dict[str, float]) -> list[Comparison]:
    step = re.match(r"step S(\d+)", case)
    if step:
        return [Comparison("broadhead", "sdpa", BARS_STEP.get(int(step[1])))]
    made_for_it = "fa2" if "window" in case else "ffpa"
    found = [Comparison("broadhead", "sdpa", BAR_LAYER_SDPA)]
    return found + ([Comparison("broadhead", made_for_it, BAR_LAYER)] if made_for_it in values else [])


def best_peer(area: str, values: dict[str, float]) -> str | None:
    """The fastest implementation that is not ours."""
    peers = {impl: value for impl, value in values.items() if impl not in (*OWN, "baseline")}
    if area == "landscape" and len(peers) > 1:
        peers.pop("memeff", None)  # what torch has where nobody else runs
    return (min if UNITS[area] == "us" else max)(peers, key=lambda impl: peers[impl], default=None)


def head_dim(case: str) -> int:
    """The head_dim in the name of a case; 0 where it has none."""
    found = re.search(r" D(\d+)", case)
    return int(found[1]) if found else 0
