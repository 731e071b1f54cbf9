"""The choice by estimated time: what the estimate follows, who may take the first row's place, and what stays."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from broadhead import costs, support
from broadhead.call.arguments import AttentionArgs
from broadhead.call.check import check_forward
from broadhead.call.metadata_request import describe_request
from broadhead.call.problem import AttentionProblem
from broadhead.costs import Cost
from broadhead.plan import cost
from broadhead.plan.device import hypothetical
from broadhead.plan.dispatch import Plan, resolve
from broadhead.plan.fastest import CLEARLY_FASTER, LONGEST_BY_COST
from broadhead.plan.schedule import plan_schedule
from broadhead.support import CAPABILITIES, ROWS, KernelRow
from described import CAUSAL, FULL, build_of, h200, hand_in_costs, problem, without_family

BF16 = torch.bfloat16
BY_ID = {row.id: row for row in ROWS}
FORWARD = [row for row in ROWS if row.direction == "forward"]
#: A kernel that nothing is faster than, and one that takes as long as a call may whose first row is not alone.
FREE, DEAR = Cost(0), Cost(LONGEST_BY_COST)
#: What a call may be: one whose first row is a Hopper kernel, a decode kernel, and one of 8 bits.
CALLS: dict[str, dict[str, Any]] = {
    "prefill": {"seqlen_q": 1024},
    "decode": {"seqlen_q": 1, "features": ("gqa", "lse", "paged", "seqused"), "page_size": 16},
    "fp8": {"dtype": "float8_e4m3fn", "features": ("descale", "gqa", "lse")},
}


def decide(**changes: Any) -> Plan:
    plan = resolve(problem(**changes), h200(), FULL)
    assert plan.row is not None and plan.schedule is not None, plan.reason
    return plan


def row_of(**changes: Any) -> KernelRow:
    row = decide(**changes).row
    assert row is not None
    return row


def all_dear(**others: Cost) -> dict[str, Cost]:
    """Every forward kernel was measured and found slow, but for others."""
    return {row.name: DEAR for row in FORWARD} | others


# --- what was measured ------------------------------------------------------------------------------------------------


def test_forward_rows_have_costs() -> None:
    """Those of 16 bits and of heads of up to 256. Of others that are seldom drawn nobody takes the place."""
    for row in FORWARD:
        plain = not row.requires and row.kv_element_bytes == 2 and row.head_dim == row.head_dim_v <= 256
        assert row.name in costs.COSTS or not plain or not row.runs_on((9, 0)), row.id
    names = {row.name for row in ROWS}
    for name, numbers in costs.COSTS.items():
        assert name in names, f"{name} is no kernel of the table"
        assert min(numbers) >= 0 and sum(numbers) > 0, name


@pytest.mark.parametrize("seqlen", [1024, 2048, 4096])
def test_no_estimate_is_faster_than_the_tensor_cores(seqlen: int) -> None:
    """Of an H200, where a head fills its tile: 989 TFLOP/s in 16 bits, twice as much in 8; by mma.sync two thirds."""
    for row in FORWARD:
        if row.phase == "decode" or row.name not in costs.COSTS or row.requires:
            continue
        shape = {"batch": 1, "seqlen_q": seqlen, "seqlen_k": seqlen, "num_heads_q": 32, "num_heads_kv": 8}
        asked = problem(dtype=row.dtype, head_dim=row.head_dim, head_dim_v=row.head_dim_v, **shape)
        time = cost.estimate(asked, row, plan_schedule(asked, row, h200()), h200())
        assert time is not None
        rate = 2.0 * seqlen**2 * 32 * (row.head_dim + row.head_dim_v) / time / 1e6
        peak = 989 * 2 / row.kv_element_bytes * (1 if row.family == "sm90" else 2 / 3)
        assert rate < peak, f"{row.name}: {rate:.0f} TFLOP/s"


def test_short_sequences_run_on_small_tiles() -> None:
    """Of 300 sequences of 8 queries and 8 keys a tile of 128 rows would be empty but for 8."""
    for head_dim in (64, 128, 256):
        for heads in (1, 8):
            short = {"batch": 300, "seqlen_q": 8, "seqlen_k": 8, "num_heads_q": heads, "num_heads_kv": heads}
            packed = {"features": ("lse", "varlen"), "mean_q": 8, "mean_k": 8}
            for changes in ({"features": ("lse",)}, packed):
                row = row_of(head_dim=head_dim, **short, **changes)
                assert row.tile.tile_m < 128, (head_dim, heads, row.id)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256, 512])
@pytest.mark.parametrize("mask", [{}, CAUSAL], ids=["full", "causal"])
def test_long_prefill_runs_on_the_first_row(
    mask: dict[str, Any], head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = {"batch": 1, "seqlen_q": 16384, "seqlen_k": 16384, "num_heads_q": 32, "num_heads_kv": 8, **mask}
    by_cost = row_of(head_dim=head_dim, **long)
    hand_in_costs(monkeypatch, {})
    assert by_cost == row_of(head_dim=head_dim, **long) and not by_cost.by_cost


# --- who runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_a_row_that_is_clearly_faster_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = CALLS[name]
    hand_in_costs(monkeypatch, {})
    first = row_of(**changes)
    others = {"prefill": "sm80_fwd_d128_m32", "decode": "sm80_fwd_d128_m64", "fp8": "sm80_fwd_decode_d128_kve4m3"}
    other = others[name]
    for share, runs in ((CLEARLY_FASTER - 0.01, other), (CLEARLY_FASTER + 0.01, first.name), (1.0, first.name)):
        hand_in_costs(monkeypatch, all_dear(**{first.name: Cost(100), other: Cost(100 * share)}))
        plan = decide(**changes)
        assert plan.row is not None and plan.row.name == runs, share
        beside = "takes less time than" if runs == other else "the first"
        assert plan.reason.startswith(f"{plan.row.id}: {beside}")


def test_of_several_the_fastest_runs(monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> None:
    names = ["sm90_fwd_d128_m64", "sm80_fwd_d128_m64", "sm80_fwd_d128_m32", "sm80_fwd_d128", "sm80_fwd_decode_d128_m32"]
    for _ in range(20):
        rng.shuffle(names)
        times = {name: Cost(10.0 + turn) for turn, name in enumerate(names)}
        hand_in_costs(monkeypatch, all_dear(sm90_fwd_d128=Cost(50), **times))
        assert row_of().name == names[0]


def test_long_calls_run_on_the_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are those of shorter ones."""
    for time, runs in ((LONGEST_BY_COST - 1, "sm80_fwd_d128"), (LONGEST_BY_COST + 1, "sm90_fwd_d128")):
        hand_in_costs(monkeypatch, {"sm90_fwd_d128": Cost(time), "sm80_fwd_d128": FREE})
        assert row_of().name == runs


@pytest.mark.parametrize("name", CALLS)
def test_who_was_not_measured_takes_no_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does anybody take that of a first row that was not."""
    changes = CALLS[name]
    hand_in_costs(monkeypatch, {})
    first = row_of(**changes)
    hand_in_costs(monkeypatch, {first.name: DEAR})
    assert row_of(**changes) == first
    hand_in_costs(monkeypatch, {row.name: FREE for row in FORWARD if row.name != first.name})
    assert row_of(**changes) == first


def test_a_row_that_does_not_compute_the_call_does_not_run(monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> None:
    """However fast it is: random costs, and what the table says of the row that runs."""
    for _ in range(40):
        hand_in_costs(monkeypatch, {row.name: Cost(*(rng.random() * 10 for _ in Cost._fields)) for row in FORWARD})
        head_dim, capability = rng.choice((8, 64, 96, 128, 200, 256, 320, 512)), rng.choice(CAPABILITIES)
        features = rng.choice((("lse",), ("causal", "lse"), ("lse", "paged", "seqused"), ("lse", "sinks", "varlen")))
        build = rng.choice((FULL, without_family("sm90"), build_of("80", "90a", "100", "120")))
        asked = problem(
            head_dim=head_dim, seqlen_q=rng.choice((1, 5, 70, 900)), seqlen_k=rng.choice((1, 90, 5000)),
            batch=rng.choice((1, 40)), dtype=rng.choice(("bf16", "fp16")), features=features,
            has_metadata=rng.random() < 0.5,
        )  # fmt: skip
        plan = resolve(asked, hypothetical(capability), build)
        if plan.row is None:
            assert plan.left_out
            continue
        assert plan.row.head_dim >= head_dim and plan.row.dtype == asked.dtype and plan.row.runs_on(capability)
        assert set(features) <= set(plan.row.features) and not plan.row.requires
        family = build.family(plan.row.family)
        assert family is not None and plan.row.id in family.kernels
        assert plan.schedule is not None and plan.schedule.tile_m <= plan.row.tile.tile_m * plan.row.cluster


# --- what is decided without costs ------------------------------------------------------------------------------------

UNCOSTED: dict[str, dict[str, Any]] = {
    "tokens_per_split": {"seqlen_q": 1, "tokens_per_split": 256},
    "tokens_per_split of prefill": {"tokens_per_split": 256},
    "num_splits": {"num_splits": 2},
    "num_splits of decode": {"seqlen_q": 1, "num_splits": 128},
    "shared prefix": {"seqlen_q": 1, "shared_tokens": 16, "features": ("gqa", "lse", "paged")},
    "qv": {"head_dim": 64, "head_dim_v": 512, "features": ("gqa", "lse", "qv")},
    "qv of decode": {"head_dim": 64, "head_dim_v": 512, "seqlen_q": 1, "features": ("gqa", "lse", "qv")},
    "backward": {"direction": "backward"},
}


@pytest.mark.parametrize("name", UNCOSTED)
def test_calls_that_are_decided_without_costs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first row runs though every other one costs nothing."""
    hand_in_costs(monkeypatch, {})
    without = decide(**UNCOSTED[name])
    assert without.row is not None
    hand_in_costs(monkeypatch, {row.name: FREE for row in ROWS} | {without.row.name: DEAR})
    assert decide(**UNCOSTED[name]) == without


def test_other_calls_are_decided_by_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same calls, but for what keeps costs away."""
    for changes in UNCOSTED.values():
        left = {name: x for name, x in changes.items() if name in ("seqlen_q", "head_dim", "head_dim_v")}
        hand_in_costs(monkeypatch, {})
        first = row_of(**left)
        hand_in_costs(monkeypatch, {row.name: FREE for row in ROWS} | {first.name: DEAR})
        assert row_of(**left) != first, left
        assert row_of(**left, num_splits=1) != first, left


# --- metadata ---------------------------------------------------------------------------------------------------------


def random_costs(rng: random.Random) -> dict[str, Cost]:
    spread = rng.choice((1.0, 10.0))
    return {row.name: Cost(*(rng.random() * spread for _ in Cost._fields)) for row in FORWARD if rng.random() < 0.8}


@pytest.mark.parametrize("turn", range(30))
def test_metadata_and_its_call_agree(turn: int, monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> None:
    """On the record and the tag, whatever kernels cost, and whatever lengths each of them knows."""
    hand_in_costs(monkeypatch, random_costs(rng))
    batch, seqlen_q, group = rng.choice((1, 3, 40)), rng.choice((1, 4, 9, 40, 200)), rng.choice((1, 4, 8))
    heads_kv, head_dim, dtype = rng.choice((1, 2)), rng.choice((64, 128, 256)), rng.choice((BF16, torch.float16))
    causal, window = rng.random() < 0.5, rng.choice(((-1, -1), (100, 0)))
    q = torch.zeros(batch, seqlen_q, heads_kv * group, head_dim, dtype=dtype)
    pages = rng.choice((1, 4, 600))
    k = torch.zeros(pages, 64, heads_kv, head_dim, dtype=dtype)
    args = AttentionArgs(
        q, k, k, seqused_k=torch.full((batch,), 9, dtype=torch.int32), causal=causal, window_size=window, num_splits=0,
        page_table=torch.zeros(batch, pages, dtype=torch.int32), scheduler_metadata=torch.zeros(9, dtype=torch.int32),
    )  # fmt: skip
    if rng.random() < 0.3:
        cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32)  # far fewer queries than the longest has
        args = args._replace(q=q.flatten(0, 1)[: max(1, batch)], cu_seqlens_q=cu_seqlens_q, max_seqlen_q=seqlen_q)
    called = resolve(check_forward("mha_fwd", args).problem, h200(), FULL)
    for longest in (1, 64 * pages, 100_000):
        request = describe_request(
            batch, seqlen_q, longest, heads_kv * group, heads_kv, head_dim, None, dtype, 64, 0, causal, window, 0, 0,
            None, 0, None,
        )  # fmt: skip
        planned = resolve(request.problem, h200(), FULL)
        assert called.row is not None and planned.row is not None
        assert (called.metadata_tag, called.metadata_config) == (planned.metadata_tag, planned.metadata_config)


def test_metadata_plans_the_first_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another prefill kernel takes the call undivided; decode kernels divide keys by themselves."""
    few = {"batch": 1, "seqlen_q": 64, "seqlen_k": 65536, "has_metadata": True, "num_heads_q": 2, "num_heads_kv": 2}
    hand_in_costs(monkeypatch, {})
    first = decide(**few)
    assert first.row is not None and first.schedule is not None and first.schedule.num_splits > 1
    for name, splits in (("sm80_fwd_d128_m64", 1), ("sm90_fwd_d128_m64", 1), ("sm80_fwd_decode_d128_m32", 0)):
        hand_in_costs(monkeypatch, all_dear(**{name: FREE}))
        plan = decide(**few)
        assert plan.row is not None and plan.schedule is not None and plan.row.name == name
        assert plan.schedule.num_splits == splits, name
        assert (plan.metadata_tag, plan.metadata_config) == (first.metadata_tag, first.metadata_config)
        unplanned = decide(**{**few, "has_metadata": False})
        assert unplanned.schedule is not None and unplanned.schedule.num_splits != 1, "a call without it is divided"


def test_keys_are_divided_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first row and others run undivided where the merge takes longer than the chain that it shortens."""
    few = {"batch": 1, "seqlen_q": 64, "seqlen_k": 8192, "num_heads_q": 2, "num_heads_kv": 2}
    for name in ("sm90_fwd_d128", "sm80_fwd_d128_m64"):
        for merge, divided in ((1.0, True), (500.0, False)):
            hand_in_costs(monkeypatch, all_dear(**{name: Cost(9, merge=merge, chain=1.0)}))
            plan = decide(**few)
            assert plan.row is not None and plan.schedule is not None and plan.row.name == name
            assert (plan.schedule.num_splits > 1) == divided, (name, merge)
            assert decide(**few, num_splits=7).schedule.num_splits == 7  # type: ignore[union-attr]
            alone = resolve(problem(**few, has_metadata=True), h200(), FULL)
            assert alone.schedule is not None
            assert (alone.schedule.num_splits > 1) == (name == "sm90_fwd_d128"), "metadata plans the first row's splits"


def test_a_decode_row_in_place_of_another_divides_keys_as_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"seqlen_q": 1, "seqlen_k": 8192, "has_metadata": True, "features": ("gqa", "lse", "paged", "seqused")}
    hand_in_costs(monkeypatch, {})
    first = decide(**step)
    hand_in_costs(monkeypatch, all_dear(sm80_fwd_decode_d128_smem99=FREE))
    other = decide(**step)
    assert first.row is not None and other.row is not None and first.row != other.row
    assert first.schedule is not None and other.schedule is not None
    assert first.schedule.num_splits == other.schedule.num_splits == 0


# --- mean lengths -----------------------------------------------------------------------------------------------------


def mean_of(total: int, batch: int) -> int:
    sizes: dict[str, Any] = {"seqlen_q": 10**6, "seqlen_k": 10**6, "num_heads_q": 1, "num_heads_kv": 1, "head_dim": 64}
    made = AttentionProblem(
        dtype=BF16, batch=batch, head_dim_v=64, page_size=0, window=(-1, -1), total_q=total, total_k=total, **sizes
    )
    assert made.mean_q == made.mean_k
    return made.mean_q


def test_mean_lengths_are_rounded(rng: random.Random) -> None:
    """Down, by less than a quarter, to one of four sizes of each power of two: few plans for all steps of an engine."""
    assert [mean_of(total, 1) for total in (0, 1, 7, 8, 9, 15, 16, 100, 1023, 1024)] == [
        0, 1, 7, 8, 8, 14, 16, 96, 896, 1024,
    ]  # fmt: skip
    assert mean_of(100, 0) == 96 and mean_of(5, 9) == 0
    for _ in range(200):
        total, batch = rng.randint(1, 10**7), rng.randint(1, 500)
        mean = total // batch
        assert mean_of(total, batch) <= mean < 1.25 * mean_of(total, batch) or mean == 0
    assert len({mean_of(total, 1) for total in range(1 << 12, 1 << 13)}) == 4


def test_calls_know_the_mean_of_what_is_packed() -> None:
    """Of q and of k, each where it is packed; the gradients have none."""
    q, k = torch.zeros(96, 4, 64, dtype=BF16), torch.zeros(160, 2, 64, dtype=BF16)
    cu = torch.tensor([0, 8, 96], dtype=torch.int32)
    packed = AttentionArgs(q, k, k, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=88, max_seqlen_k=88)
    asked = check_forward("mha_fwd", packed).problem
    assert (asked.mean_q, asked.mean_k) == (48, 80)
    over_cache = AttentionArgs(q, k.view(2, 80, 2, 64), k.view(2, 80, 2, 64), cu_seqlens_q=cu, max_seqlen_q=88)
    asked = check_forward("mha_fwd", over_cache).problem
    assert (asked.mean_q, asked.mean_k) == (48, 0)
    dense = AttentionArgs(q.view(2, 48, 4, 64), k.view(2, 80, 2, 64), k.view(2, 80, 2, 64))
    asked = check_forward("mha_fwd", dense).problem
    assert (asked.mean_q, asked.mean_k) == (0, 0)


def test_mean_lengths_decide_nothing_but_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = {"batch": 9, "features": ("gqa", "lse", "varlen")}
    hand_in_costs(monkeypatch, {})
    assert decide(**packed) == decide(**packed, mean_q=3, mean_k=5)


def test_rows_that_costs_may_choose_come_last() -> None:
    """Each, of at most 64 rows, stands beside a first row that computes all that it does."""
    for row in ROWS:
        if row.by_cost:
            assert row.tile.tile_m <= 64 and row.direction == "forward" and row.phase == "prefill"
            assert any(
                not other.by_cost and set(row.capabilities) <= set(other.capabilities)
                and (other.dtype, other.head_dim) == (row.dtype, row.head_dim) and other.features == row.features
                for other in support.ROWS if other.phase == "prefill" and other.direction == "forward"
            ), row.id  # fmt: skip
