"""What explain() answers, in parts: where a call runs, what to do if no kernel does, and why others refuse it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..call.layout import is_strided
from ..call.problem import AttentionProblem, backward_of
from ..capabilities import arch_for, execution_note
from ..plan.device import DeviceDescription
from ..plan.dispatch import Plan, refusals, resolve
from ..plan.native import BuildDescription, build_help
from ..plan.refusal import Refusal, dtypes_text
from ..support import ROWS

#: Kernels that a line of refusals names.
_MAX_SHOWN = 2
#: What stands in the way of a kernel, as headings; what is mended most easily comes first.
HEADINGS = {
    "build": "refused by this build",
    "device": "refused by the device",
    "arguments": "refused by the arguments",
}


class Reason(NamedTuple):
    """One reason with the kernels that have it."""

    by: str  # a key of HEADINGS
    kernels: tuple[str, ...]  # empty: every kernel
    text: str

    def who(self) -> str:
        """The kernels in words, of many the first."""
        if not self.kernels:
            return "every kernel"
        more = f" and {len(self.kernels) - _MAX_SHOWN} more" if len(self.kernels) > _MAX_SHOWN else ""
        return ", ".join(self.kernels[:_MAX_SHOWN]) + more


class Explanation(NamedTuple):
    """The answer about one call."""

    backend: str  # "cuda", "torch", or "refused": the call is an error
    kernel: str | None  # the row of the table that runs
    answer: str  # where the call runs, and why there
    remedy: str  # what to do to have a kernel; empty where one runs
    facts: tuple[tuple[str, str], ...]  # what else there is to know: names and texts
    reasons: tuple[Reason, ...]

    def grouped(self) -> dict[str, list[Reason]]:
        """The reasons below their headings, in the order of HEADINGS."""
        by_heading = {
            heading: [reason for reason in self.reasons if reason.by == by] for by, heading in HEADINGS.items()
        }
        return {heading: reasons for heading, reasons in by_heading.items() if reasons}

    def text(self) -> str:
        """Lines: the answer first."""
        lines = [f"runs on: {self.answer}"]
        if self.remedy:
            lines.append(f"what to do: {self.remedy}")
        lines += [f"{name}: {text}" for name, text in self.facts]
        for heading, reasons in self.grouped().items():
            lines.append(f"{heading}:")
            lines += [f"  {reason.who()}: {reason.text}" for reason in reasons]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The same as values that JSON has."""
        facts: dict[str, Any] = {}
        for name, text in self.facts:
            facts.setdefault(name, []).append(text)
        return {
            "backend": self.backend,
            "kernel": self.kernel,
            "answer": self.answer,
            "remedy": self.remedy or None,
            **{name: texts[0] if len(texts) == 1 else texts for name, texts in facts.items()},
            "refusals": [
                {"by": reason.by, "kernels": list(reason.kernels) or "all", "reason": reason.text}
                for reason in self.reasons
            ],
        }


def explanation(
    problem: AttentionProblem,
    plan: Plan,
    device: DeviceDescription,
    build: BuildDescription,
    tensors: dict[str, Any],
) -> Explanation:
    """The answer about a problem.

    Args:
        plan: of the problem, on the device, with the build.
        tensors: of the call, by name, as far as they were given: "q", "k", "v" and "qv".
    """
    copied, refused = _copies(tensors, bool(problem.page_size))
    refused += problem.obstacles
    # The words of build_help go into the remedy, once.
    help_text = "" if device.capability is None else f"; {build_help(arch_for(device.capability))}"

    def short(text: str) -> str:
        return text.replace(help_text, "") if help_text else text

    facts = []
    backend, kernel = "torch", None
    if refused:
        backend, answer = "refused", f"nothing, the call is refused: {'; '.join(refused)}"
    elif plan.row is not None:
        backend, kernel, answer = "cuda", plan.row.id, f"cuda, kernel {short(plan.reason)}"
        note = "" if device.capability is None else execution_note(device.capability)
        facts += [("note", note)] if note else []
        facts.append(("plan", _plan_text(problem, plan)))
    else:
        answer = f"the torch fallback, because {short(plan.reason)}"
    reasons = _by_reason(refusals(problem, device, build), problem.direction, short)
    if "gradients" in problem.features:
        backward = resolve(backward_of(problem), device, build)
        text = f"cuda, kernel {short(backward.reason)}"
        if backward.row is None:
            text = f"the torch fallback, because {short(backward.reason)}"
        facts.append(("gradients", text))
    facts += [("asked", _asked_text(problem)), ("device", device.label())]
    facts += [("copied", text) for text in copied]
    remedy = ""
    if refused:
        remedy = "change what the answer names: the call raises InvalidArgumentError"
    elif plan.row is None:
        remedy = _remedy(plan, device, reasons)
    elif help_text and help_text in plan.reason:
        remedy = f"this runs; to have the better kernel {help_text.removeprefix('; ')}"
    return Explanation(backend, kernel, answer, remedy, tuple(facts), reasons)


def _asked_text(problem: AttentionProblem) -> str:
    return (
        f"{problem.direction}, head_dim {problem.head_dim}, head_dim_v {problem.head_dim_v},"
        f" dtype {dtypes_text(problem.dtype, problem.kv_dtype)},"
        f" {problem.num_heads_q} query and {problem.num_heads_kv} key heads,"
        f" features: {', '.join(problem.features)}"
        + (f", tokens_per_split {problem.tokens_per_split}" if problem.tokens_per_split else "")
    )


def _plan_text(problem: AttentionProblem, plan: Plan) -> str:
    schedule = plan.schedule
    assert schedule is not None
    splits = f"{schedule.num_splits} splits"
    if schedule.tokens_per_split:
        splits = f"a split of every {schedule.tokens_per_split} keys"
    return (
        f"{splits}, GQA {'packed' if schedule.pack_gqa else 'not packed'},"
        f" {schedule.m_blocks} query tiles x {schedule.heads_in_grid} heads x {problem.batch} sequences"
    )


def _remedy(plan: Plan, device: DeviceDescription, reasons: tuple[Reason, ...]) -> str:
    """What to do where no kernel runs the call."""
    general = {reason.by for reason in reasons if not reason.kernels}
    if device.type != "cuda" or device.capability is None:
        found = (
            "use a CUDA device; `broadhead info` says why there is none, and device='9.0' asks about another machine"
        )
    elif plan.left_out or "build" in general:
        found = build_help(arch_for(device.capability))
    elif general or not any(reason.by == "device" for reason in reasons):
        found = "change what the answer names to have a kernel"
    else:
        found = "use a device that the answer names"
    return f"{found}. The fallback is right, and slow; backend='cuda' or BROADHEAD_STRICT=1 makes it an error"


def _copies(tensors: dict[str, Any], paged: bool) -> tuple[list[str], list[str]]:
    """-> (which tensors of the call are copied before it runs, which are refused), each with the reason"""
    copied, refused = [], []
    for name, tensor in tensors.items():
        if is_strided(tensor):
            layout = f"its last dimension is not contiguous, it has strides {tensor.stride()}"
            if paged and name in ("k", "v"):
                refused.append(f"{name} is a cache, which is never copied: {layout}")
            else:
                copied.append(f"{name}, in every call: {layout}; a cache would be refused")
    return copied, refused


def _by_reason(found: tuple[Refusal, ...], direction: str, short: Callable[[str], str]) -> tuple[Reason, ...]:
    """Refusals of one reason together. Nobody asks why a kernel of the other direction does not run."""
    others = {row.id for row in ROWS if row.direction != direction}
    rows: dict[tuple[str, str], list[str]] = {}
    for refusal in found:
        if refusal.row_id in others:
            continue
        kernels = rows.setdefault((refusal.by, short(refusal.reason)), [])
        if refusal.row_id:
            kernels.append(refusal.row_id)
    return tuple(Reason(by, tuple(kernels), text) for (by, text), kernels in rows.items())
