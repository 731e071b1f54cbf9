"""What both examples share: optional packages, two loss curves, whether they agree, and their plot."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

#: Exit status: right; the loss did not fall, or the curves part; the example can not run.
OK, FAILED, CANNOT_RUN = 0, 1, 2
#: The last loss is the mean over this part of the steps.
LAST_PART = 0.1
#: By how much the loss has to fall, as a part of the first one.
LEAST_FALL = 0.1
#: The steps whose losses are compared closely.
EARLY_STEPS = 10
#: How far the last losses may lie apart, as a part of the loss.
END_TOLERANCE = 0.03


class CannotRunError(Exception):
    """Something that the user has to mend first; the text says what."""


class Verdict(NamedTuple):
    ok: bool
    text: str


def need_packages(*names: str) -> None:
    """Raise CannotRunError with the command that installs what is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotRunError(
            f"this example needs {', '.join(names)}, and these are not installed: {', '.join(missing)}. "
            f"Install them with: pip install {' '.join(missing)}"
        )


def last_loss(losses: list[float]) -> float:
    """The mean of the last steps."""
    count = max(1, round(LAST_PART * len(losses)))
    return sum(losses[-count:]) / count


def gap_between(losses: list[float], expected: list[float]) -> float:
    """The mean distance of two curves, as a part of the mean of the second one."""
    return sum(abs(a - b) for a, b in zip(losses, expected, strict=True)) / sum(expected)


def judge(curves: dict[str, list[float]], tolerance: float) -> list[Verdict]:
    """Whether the loss of each curve falls, and whether the two curves agree. A NaN is no fall and no agreement.

    Training amplifies rounding, so the first steps are compared closely, and the end as one compares two seeds.

    Args:
        curves: two of them, by name.
        tolerance: of the first steps, as a part of the loss.
    """
    verdicts = []
    for name, losses in curves.items():
        first, last = losses[0], last_loss(losses)
        falls = last < (1 - LEAST_FALL) * first
        verdicts.append(Verdict(falls, f"{name}: the loss went from {first:.4f} to {last:.4f}"))
    (name, losses), (other, expected) = curves.items()
    both = f"{name} and {other}"
    early = gap_between(losses[:EARLY_STEPS], expected[:EARLY_STEPS])
    end = abs(last_loss(losses) - last_loss(expected)) / last_loss(expected)
    verdicts.append(
        Verdict(
            early <= tolerance,
            f"{both}: the first {min(EARLY_STEPS, len(losses))} losses differ by {early:.1e} of their size, accepted: "
            f"{tolerance:.0e}",
        )
    )
    verdicts.append(
        Verdict(end <= END_TOLERANCE, f"{both}: the last losses differ by {end:.1e}, accepted: {END_TOLERANCE:.0e}")
    )
    return verdicts


def plot(curves: dict[str, list[float]], title: str, path: Path) -> None:
    """Both curves in one picture, the second one dashed over the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for (name, losses), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot(range(1, len(losses) + 1), losses, style, label=f"{name}: {last_loss(losses):.4f} at the end")
    axes.set(xlabel="step", ylabel="loss (nats a byte)", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def report(curves: dict[str, list[float]], tolerance: float, title: str, path: Path) -> int:
    """Draw the curves, print the verdicts, and return the exit status."""
    plot(curves, title, path)
    print(f"loss curve: {path}")
    verdicts = judge(curves, tolerance)
    for verdict in verdicts:
        print(f"{'ok  ' if verdict.ok else 'FAIL'} {verdict.text}")
    return OK if all(verdict.ok for verdict in verdicts) else FAILED
