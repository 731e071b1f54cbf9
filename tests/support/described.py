"""Problems, devices and builds described by hand: what dispatch decides on, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
from broadhead.call.problem import AttentionProblem
from broadhead.capabilities import SMEM_BY_CAPABILITY
from broadhead.costs import Cost
from broadhead.plan import cost, dispatch
from broadhead.plan.device import DeviceDescription
from broadhead.plan.dispatch import resolve
from broadhead.plan.native import BuildDescription, FamilyBuild
from broadhead.plan.schedule import Schedule
from broadhead.support import ROWS, KernelRow

ALL_ARCHS = ("80", "86", "89", "90a", "100", "120")
#: What a problem changes to be causal.
CAUSAL = {"window_right": 0, "features": ("causal", "gqa", "lse")}


def build_of(*archs: str, without: tuple[str, ...] = (), cuda: tuple[int, ...] = (13, 0)) -> BuildDescription:
    """A build of every row but ``without`` for ``archs``: the Hopper kernels only for 90a."""
    held = {"sm80": archs, "sm90": tuple(arch for arch in archs if arch == "90a")}
    return BuildDescription(
        True,
        tuple(
            FamilyBuild(
                name, archs, cuda, frozenset(row.id for row in ROWS if row.family == name and row.id not in without)
            )
            for name, archs in held.items()
            if archs
        ),
        (),
    )


def without_family(name: str) -> BuildDescription:
    return FULL._replace(families=tuple(family for family in FULL.families if family.name != name))


FULL = build_of(*ALL_ARCHS)


def problem(**changes: Any) -> AttentionProblem:
    values: dict[str, Any] = {
        "direction": "forward", "dtype": "bf16", "batch": 2, "seqlen_q": 1024, "seqlen_k": 1024, "num_heads_q": 8,
        "num_heads_kv": 2, "head_dim": 128, "head_dim_v": None, "page_size": 0, "window_left": -1, "window_right": -1,
        "attention_chunk": 0, "features": ("gqa", "lse"), "num_splits": 0, "pack_gqa": None, "has_metadata": False,
        "sm_margin": 0, "obstacles": (), "kv_dtype": "", "tokens_per_split": 0, "shared_tokens": 0,
        "mean_q": 0, "mean_k": 0,
    }  # fmt: skip
    assert changes.keys() <= values.keys()
    values.update(changes)
    if values["head_dim_v"] is None:
        values["head_dim_v"] = values["head_dim"]
    return AttentionProblem._make(values[name] for name in AttentionProblem._fields)


def forget_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan is known, and what this test decides is forgotten after it."""
    monkeypatch.setattr(dispatch, "_decided", dispatch.Decisions())


def hand_in_costs(monkeypatch: pytest.MonkeyPatch, costs: dict[str, Cost]) -> None:
    """From now on kernels cost that, by the rows' name, and nobody measured others. ``{}``: the first row runs."""
    monkeypatch.setattr(cost, "COSTS", costs)
    forget_plans(monkeypatch)


def h200(**changes: Any) -> DeviceDescription:
    known = DeviceDescription("cuda", "NVIDIA H200", (9, 0), SMEM_BY_CAPABILITY[9, 0], 132, 50 << 20, (13, 0))
    return known._replace(**changes)


def schedule(
    device: DeviceDescription | None = None, build: BuildDescription | None = None, **changes: Any
) -> tuple[Schedule, KernelRow]:
    plan = resolve(problem(**changes), device or h200(), build or FULL)
    assert plan.schedule is not None and plan.row is not None
    return plan.schedule, plan.row
