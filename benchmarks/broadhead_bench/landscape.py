"""What the landscape says: how fast broadhead is beside the best peer, where it is worst, and whether rows fit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from broadhead_bench.bars import best_peer

#: A row that is faster than the chosen one by more is a fault of the table.
ROW_TOLERANCE = 0.97
WORST = 10
#: Of an H200, about, to say what bounds a case: 16-bit operations, bytes of memory, and the least time of a launch.
FLOPS_PER_SECOND, BYTES_PER_SECOND, LAUNCH_SECONDS = 7.5e14, 4.2e12, 4e-6


class Ratio(NamedTuple):
    """One case: the time of ``rival`` over that of ``impl``."""

    case: str
    value: float
    rival: str
    kernel: str | None
    seconds: float
    flops: float
    bytes: float

    @property
    def kind(self) -> str:
        return self.case.split()[1]

    @property
    def bound(self) -> str:
        """Which of the least times of the case is the longest."""
        least = {
            "math": self.flops / FLOPS_PER_SECOND,
            "memory": self.bytes / BYTES_PER_SECOND,
            "launch": LAUNCH_SECONDS,
        }
        return max(least, key=lambda name: least[name])


def by_case(records: Iterable[dict[str, Any]]) -> dict[tuple[int, str], dict[str, dict[str, Any]]]:
    """Records of the landscape by seed and case, then by implementation."""
    cases: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}
    for record in records:
        if record["area"] == "landscape":
            cases.setdefault((record["seed"], record["case"]), {})[record["impl"]] = record
    return cases


def ratios(records: Iterable[dict[str, Any]], impl: str = "broadhead", rival: str | None = None) -> list[Ratio]:
    """Of each case that both have a result of. ``rival`` None: the fastest peer."""
    found = []
    for (_, case), results in by_case(records).items():
        times = {name: record["seconds"] for name, record in results.items()}
        other = rival or best_peer("landscape", times)
        if impl in results and other in results:
            own = results[impl]
            value = times[other] / times[impl]
            found.append(Ratio(case, value, other, own["kernel"], times[impl], own["flops"], own["bytes"]))
    return found


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")


def percentile(values: list[float], percent: float) -> float:
    """The value that so many percent are below."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else float("nan")


def report(records: list[dict[str, Any]]) -> list[str]:
    """Lines: what the ratios of all cases, of each kind and of each kernel come to, the worst cases, and what the table
    chose badly."""
    found = ratios(records)
    fused = [ratio for ratio in found if ratio.rival != "memeff"]
    portable = ratios(records, "broadhead-sm80-fwd", "fa2")
    groups: dict[str, list[Ratio]] = {"all": fused}
    for ratio in fused:
        groups.setdefault(ratio.kind, []).append(ratio)
        groups.setdefault(f"bound by {ratio.bound}", []).append(ratio)
    groups["torch's memory-efficient attention, where nobody else runs"] = [r for r in found if r.rival == "memeff"]
    groups["portable kernels of prefill, beside fa2"] = portable
    lines = [_distribution(name, members) for name, members in groups.items() if members]
    lines += _by_kernel(fused)
    lines += _worst("worst cases", fused)
    lines += _worst("worst of the portable kernels", portable)
    return lines + _misfits(records)


def _distribution(name: str, members: list[Ratio]) -> str:
    values = [ratio.value for ratio in members]
    level = sum(value >= 1.0 for value in values)
    return (
        f"{name}: {len(values)} cases, geometric mean {geomean(values):.3f}, tenth percentile "
        f"{percentile(values, 10):.3f}, fifth {percentile(values, 5):.3f}, worst {min(values):.3f}, "
        f"{100 * level / len(values):.0f} % at 1.0 or above"
    )


def _by_kernel(found: list[Ratio]) -> list[str]:
    """A line for each kernel that ran, the slowest beside its peers first."""
    kernels: dict[str, list[Ratio]] = {}
    for ratio in found:
        kernels.setdefault(str(ratio.kernel), []).append(ratio)
    worst_first = sorted(kernels, key=lambda kernel: geomean([ratio.value for ratio in kernels[kernel]]))
    return [_distribution(f"kernel {kernel}", kernels[kernel]) for kernel in worst_first]


def _worst(title: str, found: list[Ratio]) -> list[str]:
    if not found:
        return []
    lines = [f"{title}: ratio, us, TFLOP/s, GB/s, what bounds it, rival, kernel"]
    for ratio in sorted(found, key=lambda ratio: ratio.value)[:WORST]:
        rates = f"{ratio.flops / ratio.seconds / 1e12:6.1f} {ratio.bytes / ratio.seconds / 1e9:6.0f}"
        lines.append(
            f"  {ratio.value:.3f} {ratio.seconds * 1e6:9.1f} {rates} {ratio.bound:6} {ratio.rival:5} {ratio.kernel}  "
            f"{ratio.case}"
        )
    return lines


def _misfits(records: list[dict[str, Any]]) -> list[str]:
    lines = []
    judged = 0
    for (_, case), results in by_case(records).items():
        if "broadhead" in results and "broadhead-best" in results:
            judged += 1
            chosen, best = results["broadhead"], results["broadhead-best"]
            share = best["seconds"] / chosen["seconds"]
            if share < ROW_TOLERANCE and chosen["kernel"] != best["kernel"]:
                lines.append(f"  {share:.3f} {chosen['kernel']} ran, {best['kernel']} is faster  {case}")
    return [f"rows: {len(lines)} of {judged} cases have a row that is faster than the chosen one by 3 %"] * (
        judged > 0
    ) + sorted(lines)
