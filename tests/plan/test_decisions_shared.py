"""What problems share of how they are decided: callers whose lengths differ in each call wait for little of it."""

from __future__ import annotations

import random
from typing import Any

import pytest
from broadhead.plan import cost, dispatch
from broadhead.plan.candidates import MOST_COUNTED_ROWS, order_of
from broadhead.plan.dispatch import Plan, resolve
from broadhead.plan.fastest import fastest, representative
from broadhead.plan.refusal import kind_of
from broadhead.plan.schedule import plan_schedule
from broadhead.support import ROWS, KernelRow
from described import FULL, forget_plans, h200, problem

FORWARD = [row for row in ROWS if row.direction == "forward"]


def decide(**changes: Any) -> Plan:
    return resolve(problem(**changes), h200(), FULL)


@pytest.fixture
def worked_out(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often rows were asked and their times estimated, from nothing on."""
    counts = {"able": 0, "fastest": 0}

    def count(name: str, function: Any) -> Any:
        def counting(*arguments: Any) -> Any:
            counts[name] += 1
            return function(*arguments)

        return counting

    monkeypatch.setattr(dispatch, "Able", count("able", dispatch.Able))
    monkeypatch.setattr(dispatch, "fastest", count("fastest", dispatch.fastest))
    forget_plans(monkeypatch)
    return counts


def test_a_cache_that_grows(worked_out: dict[str, int]) -> None:
    """A thousand steps of generation ask the rows once, and choose between them once in 64 steps."""
    for seqlen_k in range(1024, 2048):
        decide(seqlen_q=1, seqlen_k=seqlen_k)
    assert worked_out == {"able": 1, "fastest": 17}


@pytest.mark.parametrize("num_heads_kv", [2, 8])
def test_prompts_of_any_length(num_heads_kv: int, worked_out: dict[str, int]) -> None:
    """Lengths up to 32 have a choice each, longer ones 16 for each power of two. Each count of query rows below
    MOST_COUNTED_ROWS orders rows by itself, and so has a choice of its own."""
    for length in range(1, 8192, 3):
        decide(seqlen_q=length, seqlen_k=length, num_heads_kv=num_heads_kv, features=("gqa", "lse", "varlen"))
    assert worked_out["able"] == 1 and worked_out["fastest"] <= 32 + 16 * 8 + MOST_COUNTED_ROWS


def test_kinds_apart(worked_out: dict[str, int]) -> None:
    """What decides which rows compute a problem is a kind of its own."""
    kinds: list[dict[str, Any]] = [
        {}, {"head_dim": 64}, {"head_dim_v": 64}, {"dtype": "fp16"}, {"features": ("gqa", "lse", "softcap")},
        {"direction": "backward"}, {"direction": "backward", "features": ("gqa", "lse", "short_sequences")},
        {"kv_dtype": "float8_e4m3fn"}, {"seqlen_q": 1, "shared_tokens": 4},
    ]  # fmt: skip
    for kind in (*kinds, *kinds):
        decide(**kind)
    assert worked_out["able"] == len({kind_of(problem(**kind)) for kind in kinds}) == len(kinds)


def test_one_query_needs_no_causal_mask() -> None:
    causal = {"window_right": 0, "features": ("causal", "gqa", "lse")}
    assert kind_of(problem(seqlen_q=1, **causal)) == kind_of(problem(seqlen_q=1))
    assert kind_of(problem(seqlen_q=2, **causal)) != kind_of(problem(seqlen_q=2))


def test_replaced_rows_and_costs_count_once_all_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    decisions = dispatch.Decisions()

    def row_of(seqlen_k: int) -> KernelRow | None:
        return decisions(problem(seqlen_k=seqlen_k), h200(), FULL).row

    row = row_of(1000)
    assert row is not None
    others = tuple(other for other in ROWS if other is not row)
    monkeypatch.setattr(dispatch, "ROWS", others)
    decisions.cache_clear()
    assert row_of(1000) in others
    monkeypatch.setattr(cost, "COSTS", {})
    decisions.cache_clear()
    assert row_of(1000) is decisions(problem(seqlen_k=1001), h200(), FULL).first


# --- lengths that stand for others ------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["batch", "seqlen_q", "seqlen_k"])
def test_lengths_are_rounded_up(field: str) -> None:
    def rounded(length: int) -> int:
        found = getattr(representative(problem(**{field: length})), field)
        assert isinstance(found, int)
        return found

    for length in (*range(600), 1023, 1024, 1025, 65535, 65536, 1_000_003, 2**30 + 1):
        found = rounded(length)
        assert length <= found <= length * 17 / 16 and rounded(found) == found
        if length < 512:  # tiles are filled as before, whatever tile
            for tile in {row.tile.tile_m for row in FORWARD} | {row.tile.tile_n for row in FORWARD}:
                assert tile % 16 or -(-found // tile) == -(-length // tile), (length, tile)
    assert representative(problem())._replace(**{field: 0}) == problem()._replace(**{field: 0}), "nothing else changes"


def test_the_row_is_the_fastest_of_the_problem_that_stands_for_it() -> None:
    rng = random.Random(1)
    for _ in range(300):
        seqlen_q = rng.choice((1, 3, rng.randrange(1, 5000)))
        asked = problem(
            batch=rng.randrange(1, 200), seqlen_q=seqlen_q, seqlen_k=rng.randrange(seqlen_q, 20000),
            head_dim=rng.choice((64, 80, 128, 256, 512)), window_right=(right := rng.choice((-1, 0))),
            features=("causal", "gqa", "lse") if right == 0 else ("gqa", "lse"),
        )  # fmt: skip
        decisions = dispatch.Decisions()
        plan = decisions(asked, h200(), FULL)
        held = decisions._candidates(decisions._able(kind_of(asked), h200(), FULL), order_of(asked)).held
        choice = fastest(representative(asked), h200(), held)
        assert plan.first is held[0] and plan.row is choice.row
        assert plan.schedule is not None and (not choice.whole or plan.schedule.num_splits == 1)
        assert decisions(asked, h200(), FULL) is plan


def test_splits_that_nobody_weighed_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """264 sequences stand for 258: of those the row would divide the keys, of these it is the fastest undivided."""
    forget_plans(monkeypatch)
    asked: dict[str, Any] = {
        "batch": 258, "seqlen_q": 1, "seqlen_k": 8686, "num_heads_q": 1, "num_heads_kv": 1, "head_dim": 64,
        "window_left": 1000, "window_right": 0, "features": ("lse", "window"),
    }  # fmt: skip
    plan = decide(**asked)
    assert plan.row is not None and plan.schedule is not None and plan.row.phase == "prefill"
    assert plan_schedule(problem(**asked), plan.row, h200()).num_splits > 1 == plan.schedule.num_splits


def test_a_representative_keeps_the_phase() -> None:
    for seqlen_q in range(1, 200):
        for heads_kv in (1, 2, 4, 8):
            asked = problem(seqlen_q=seqlen_q, num_heads_kv=heads_kv)
            assert representative(asked).is_decode == asked.is_decode, (seqlen_q, heads_kv)


def test_a_plan_does_not_depend_on_what_was_asked_before(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [{"seqlen_q": 1 + 37 * i % 600, "seqlen_k": 600 + 41 * i, "batch": 1 + i % 40} for i in range(120)]
    forget_plans(monkeypatch)
    there = [decide(**changes) for changes in asked]
    forget_plans(monkeypatch)
    back = [decide(**changes) for changes in reversed(asked)]
    assert there == back[::-1]


# --- the order of rows ------------------------------------------------------------------------------------------------


def test_rows_are_counted_as_far_as_they_order() -> None:
    """Of more rows than are counted no row of the table is preferred otherwise, and no decode tile fits better."""
    for row in FORWARD:
        assert max(row.min_rows, row.max_rows) < MOST_COUNTED_ROWS, row.id
        if row.phase == "decode":
            assert MOST_COUNTED_ROWS % row.tile.tile_m == 0 and row.tile.tile_m * 4 <= MOST_COUNTED_ROWS, row.id


def test_problems_of_many_rows_have_one_order() -> None:
    assert order_of(problem(seqlen_q=200)) == order_of(problem(seqlen_q=20000)) != order_of(problem(seqlen_q=20))


def test_many_rows_are_ordered_as_more_of_them() -> None:
    for rows in (MOST_COUNTED_ROWS, MOST_COUNTED_ROWS + 1, 1000, 4096):
        order = order_of(problem(seqlen_q=rows, num_heads_kv=8))
        exact = order._replace(rows=rows, tile_rows=rows)
        assert sorted(FORWARD, key=order.key) == sorted(FORWARD, key=exact.key), rows
