"""The estimate of a call's time: what its terms count, and what it is never below."""

from __future__ import annotations

import random
from typing import Any

import pytest
from broadhead import costs
from broadhead.costs import Cost
from broadhead.plan import cost
from broadhead.plan.schedule import plan_schedule
from broadhead.support import ROWS
from described import CAUSAL, h200, hand_in_costs, problem

BY_ID = {row.id: row for row in ROWS}
FORWARD = [row for row in ROWS if row.direction == "forward"]


def terms_of(row_id: str, **changes: Any) -> cost.Terms:
    asked, row = problem(**changes), BY_ID[row_id]
    return cost.terms(asked, row, plan_schedule(asked, row, h200()), h200())


def test_terms_of_a_full_device() -> None:
    """2 x 8 heads x 8 m_blocks of 128 rows, 8 n_blocks of 128 keys and half of one, 132 places."""
    launch, merge, again, tiles, blocks, chain = terms_of("sm90_fwd_d128_bf16")
    assert (launch, merge, again) == (1, 0, 0)
    assert tiles == pytest.approx(128 / 132) and blocks == pytest.approx(128 * 8.5 / 132) and chain == 8
    _, _, again, tiles, blocks, chain = terms_of("sm90_fwd_d128_m64_bf16", batch=20)
    assert tiles == pytest.approx(20 * 8 * 16 / 264), "two blocks run on a multiprocessor"
    assert blocks == pytest.approx(20 * 8 * 16 * (1024 / 48 + 0.5) / 264)
    assert again == 1 and chain == 22
    assert terms_of("sm90_fwd_d128_m64_bf16", batch=20, sm_margin=66)[3] == pytest.approx(20 * 8 * 16 / 132)


def test_divided_keys_shorten_the_chain_and_are_merged() -> None:
    """Of one tile that has 512 n_blocks; four times as many tiles run, of which not all find a place at once."""
    few = {"batch": 1, "seqlen_q": 64, "seqlen_k": 65536, "num_heads_q": 1, "num_heads_kv": 1}
    whole = terms_of("sm90_fwd_d128_bf16", **few, num_splits=1)
    divided = terms_of("sm90_fwd_d128_bf16", **few, num_splits=128)
    assert whole[1] == 0 and whole[5] == 512
    assert divided[1] == 1 and divided[5] == 4 and divided[2] == 0
    assert divided[3:5] == whole[3:5], "the work is the same"
    assert terms_of("sm90_fwd_d128_bf16", **{**few, "num_heads_q": 2, "num_heads_kv": 2}, num_splits=128)[2] == 1


def test_masks_hide_n_blocks() -> None:
    size = {"seqlen_q": 4096, "seqlen_k": 4096}
    full, causal, window, tail, plain_tail = (
        terms_of("sm90_fwd_d128_bf16", **{**size, "pack_gqa": False, "num_splits": 1, **mask})
        for mask in (
            {},
            CAUSAL,
            {"window_left": 127, "window_right": 0, "features": ("causal", "lse", "window")},
            {**CAUSAL, "seqlen_q": 100},
            {"seqlen_q": 100},
        )
    )
    assert 0.45 < causal[4] / full[4] < 0.6 and window[4] < causal[4] / 4
    assert tail[4] == pytest.approx(plain_tail[4], rel=0.1), "the last queries see nearly all keys"
    assert full[5] == causal[5] == 32 and window[5] == 2, "the longest tile sees all keys, but for a window"
    to_the_right = terms_of("sm90_fwd_d128_bf16", **size, window_left=127, features=("lse", "window"))
    assert to_the_right[5] == 32


def test_few_n_blocks_are_counted_whole() -> None:
    size = {"batch": 1, "num_heads_q": 132, "num_heads_kv": 132, "seqlen_q": 64, "num_splits": 1}
    for keys, blocks in ((1, 1), (128, 1), (129, 2), (512, 4), (513, 513 / 128 + 0.5)):
        assert terms_of("sm90_fwd_d128_bf16", seqlen_k=keys, **size)[4] == pytest.approx(blocks), keys


def test_decode_rows_divide_n_blocks_evenly_unless_told_not_to() -> None:
    step = {"batch": 1, "seqlen_q": 1, "seqlen_k": 65536, "num_heads_kv": 1, "num_heads_q": 1}
    all_blocks = 65536 / 16 + 0.5
    evenly = terms_of("sm80_fwd_decode_d128_bf16", **step)
    assert evenly[4] == pytest.approx(all_blocks / 132) and evenly[1] == 0 and evenly[5] == 1
    assert terms_of("sm80_fwd_decode_d128_bf16", **step, num_splits=1)[4] == 65536 / 16
    assert terms_of("sm90_fwd_d128_bf16", **step, num_splits=1)[5] == 65536 / 128


def test_the_last_page_is_half_full() -> None:
    """In the mean, where the device alone knows lengths; but it holds the queries."""
    paged = {"batch": 40, "page_size": 256, "features": ("gqa", "lse", "paged", "seqused"), "num_splits": 1}
    for keys, queries, seen in ((256, 1, 128), (1024, 1, 896), (256, 200, 200)):
        found = terms_of("sm80_fwd_d128_m64_bf16", seqlen_k=keys, seqlen_q=queries, **paged)
        assert found[5] == -(-seen // 32), (keys, queries)


def test_mean_lengths_count_instead_of_the_longest() -> None:
    """Packed sequences that differ: there are tiles for the mean ones, most of which belong to longer ones."""
    packed = {"batch": 300, "seqlen_q": 4096, "seqlen_k": 4096, "features": ("gqa", "lse", "varlen")}
    for row_id in ("sm90_fwd_d128_bf16", "sm80_fwd_d128_m32_bf16"):
        longest, mean = terms_of(row_id, **packed), terms_of(row_id, **packed, mean_q=64, mean_k=64)
        assert mean[3] < longest[3] / 20 and mean[4] < longest[4] / 20
        assert longest[5] / 2 <= mean[5] <= longest[5] / 2 + 2
        others = terms_of(row_id, **{**packed, "seqlen_k": 2048}, mean_q=64, mean_k=64)
        assert others[5] <= 2, "keys that are not those of the queries have no tiles more where they are more"
        assert cost.memory_time(problem(**packed, mean_q=64, mean_k=64), BY_ID[row_id]) == pytest.approx(
            cost.memory_time(problem(**packed), BY_ID[row_id]) / 64
        )


def test_no_estimate_is_below_the_time_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, out, and keys and values that are seen: of a window no more than it shows, however wide the page table is."""
    step = {"batch": 128, "seqlen_q": 1, "num_heads_q": 16, "num_heads_kv": 8, "head_dim": 256, "head_dim_v": 256}
    paged = {"page_size": 16, "features": ("causal", "gqa", "lse", "paged", "seqused", "window")}
    row = BY_ID["sm80_fwd_d256_m32_bf16"]
    hand_in_costs(monkeypatch, {row.name: Cost(0)})
    for keys in (2176, 33_024):
        asked = problem(**step, **paged, seqlen_k=keys, window_left=1023, window_right=0, num_splits=1)
        time = cost.estimate(asked, row, plan_schedule(asked, row, h200()), h200())
        gigabytes = 128 * 512 * 2 * (1024 * 8 + 16) / 1e9
        assert time == pytest.approx(gigabytes * costs.MICROSECONDS_PER_GIGABYTE), keys
    asked = problem(**step, seqlen_k=4096, num_splits=1)
    assert cost.memory_time(asked, row) == pytest.approx(128 * 512 * 2 * (4096 * 8 + 16) * 208 / 1e9)


def test_no_estimate_is_below_the_least(rng: random.Random) -> None:
    for _ in range(300):
        row = rng.choice([row for row in FORWARD if row.name in costs.COSTS])
        q, k = rng.choice((0, 1, 70, 4000)), rng.choice((0, 1, 70, 4000, 100_000))
        asked = problem(
            batch=rng.choice((0, 1, 9)), seqlen_q=q, seqlen_k=k, num_splits=rng.choice((0, 1)),
            window_left=rng.choice((-1, 30)), window_right=rng.choice((-1, 0)), mean_q=rng.choice((0, q // 2)),
            mean_k=rng.choice((0, k // 2)), has_metadata=rng.random() < 0.5, features=("gqa", "lse"),
        )  # fmt: skip
        time = cost.estimate(asked, row, plan_schedule(asked, row, h200()), h200())
        assert time is not None and time >= cost.least(row) > 0
