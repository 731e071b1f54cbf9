"""What the choice by estimated time keeps away from: calls, devices and kernels whose first row stays."""

from __future__ import annotations

from typing import Any

import pytest
from broadhead import costs
from broadhead.capabilities import CAPABILITIES
from broadhead.costs import Cost
from broadhead.plan.device import hypothetical
from broadhead.plan.dispatch import resolve
from broadhead.support import ROWS, KernelRow
from described import FULL, h200, hand_in_costs, problem

BY_ID = {row.id: row for row in ROWS}
FREE = Cost(0)


def row_of(**changes: Any) -> KernelRow:
    row = resolve(problem(**changes), h200(), FULL).row
    assert row is not None
    return row


def test_calls_that_leave_multiprocessors_free_run_on_the_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A portable prefill kernel fills all of them."""
    hand_in_costs(monkeypatch, {"sm90_fwd_d128": Cost(100), "sm80_fwd_d128_m64": FREE})
    assert row_of().name == "sm80_fwd_d128_m64"
    assert row_of(sm_margin=16).name == "sm90_fwd_d128"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_costs_decide_on_the_device_that_was_measured(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = h200() if capability == costs.MEASURED else hypothetical(capability)
    hand_in_costs(monkeypatch, {row.name: Cost(100) for row in ROWS} | {"sm80_fwd_d128_m64": FREE})
    plan = resolve(problem(), device, FULL)
    assert plan.row is not None
    assert (plan.row.stem == "sm80_fwd_d128_m64") == (capability == costs.MEASURED) == (plan.row is not plan.first)


def test_the_same_tile_with_more_columns_is_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BY_ID["sm90_fwd_d192_v128_bf16"].tile == BY_ID["sm90_fwd_d128_bf16"].tile
    hand_in_costs(monkeypatch, {"sm90_fwd_d128": Cost(100), "sm90_fwd_d192_v128": FREE})
    assert row_of().name == "sm90_fwd_d128"


@pytest.mark.parametrize(
    "page_size, features, stays",
    [(1, (), True), (4, (), True), (16, ("leftpad",), True), (16, (), False), (0, (), False)],
)
def test_e4m3_rows_that_gather_by_one_warp_take_no_place(
    page_size: int, features: tuple[str, ...], stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_in_costs(monkeypatch, {"sm90_fwd_d128_e4m3": Cost(100), "sm90_fwd_d128_m64_e4m3": FREE})
    paged = ("paged", "seqused") if page_size else ()
    row = row_of(dtype="float8_e4m3fn", page_size=page_size, features=("gqa", "lse", "descale", *paged, *features))
    assert row.name == ("sm90_fwd_d128_e4m3" if stays else "sm90_fwd_d128_m64_e4m3")
