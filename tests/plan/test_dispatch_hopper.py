"""Dispatch and plans of the Hopper kernels: their choice by head dims and masks, builds without them, 8-bit rows."""

from __future__ import annotations

from typing import Any

import broadhead
import pytest
import torch
from broadhead.capabilities import SMEM_BY_CAPABILITY
from broadhead.plan.device import hypothetical
from broadhead.plan.dispatch import refusals, resolve
from broadhead.support import CAPABILITIES, ROWS, SMEM_163KB, SMEM_227KB
from described import ALL_ARCHS, CAUSAL, FULL, build_of, h200, problem, schedule, without_family

pytestmark = pytest.mark.usefixtures("first_rows")


@pytest.mark.parametrize(
    "head_dim, head_dim_v, row",
    [
        (8, 8, "d64"), (64, 64, "d64"), (72, 72, "d96"), (96, 96, "d96"), (128, 128, "d128"), (128, 64, "d128"),
        (64, 128, "d128"), (192, 128, "d192_v128"), (136, 8, "d192_v128"), (192, 136, "d192"), (192, 192, "d192"),
        (256, 256, "d256"), (200, 64, "d256"), (64, 256, "d64_v256"), (64, 136, "d64_v256"), (72, 256, "d256"),
        (264, 264, "d384"),
        (384, 320, "d384"),
        (392, 384, "d512"), (512, 512, "d512"), (64, 512, "d512"), (512, 64, "d512"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_hopper_rows_by_head_dims(head_dim: int, head_dim_v: int, row: str, dtype: str) -> None:
    """On 9.0 prefill runs on the Hopper kernel with the least padding; elsewhere no Hopper kernel runs."""
    asked = problem(head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype, **CAUSAL)
    plan = resolve(asked, h200(), FULL)
    assert plan.row is not None and plan.row.id == f"sm90_fwd_{row}_{dtype}"
    assert f"{plan.row.id}: the first prefill row for head_dim {head_dim}" in plan.reason
    assert (f"head_dim_v {head_dim_v}" in plan.reason) == (head_dim != head_dim_v)
    decode = resolve(asked._replace(seqlen_q=1), h200(), FULL)
    assert decode.row is not None and (decode.row.family, decode.row.phase) == ("sm80", "decode")
    for capability in set(CAPABILITIES) - {(9, 0)}:
        other = resolve(asked, hypothetical(capability), FULL)
        assert other.row is not None and other.row.family == "sm80", capability
        refused = {refusal.row_id: refusal.reason for refusal in refusals(asked, hypothetical(capability), FULL)}
        assert "runs on compute capability 9.0, not" in refused[f"sm90_fwd_{row}_{dtype}"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"features": ("gqa", "lse", "paged", "seqused", "sinks", "softcap", "split_kv", "varlen")},
        CAUSAL,
        {"window_left": 64, "features": ("lse", "window")},
        {"attention_chunk": 64, "features": ("attention_chunk", "lse")},
        {"window_right": 0, "features": ("causal", "lse", "prefix_lens")},
        {"head_dim": 104, "head_dim_v": 72},
    ],
)
def test_one_row_serves_every_feature(changes: dict[str, Any]) -> None:
    plan = resolve(problem(**changes), h200(), FULL)
    assert plan.row is not None and plan.row.id == "sm90_fwd_d128_bf16"


@pytest.mark.parametrize("changes", [{}, CAUSAL, {"head_dim": 192, "head_dim_v": 128}, {"head_dim": 512}])
def test_a_build_without_the_hopper_kernels_takes_the_portable_ones(changes: dict[str, Any]) -> None:
    """It runs, and it says what is missing and how to get it."""
    best = resolve(problem(**changes), h200(), FULL).row
    assert best is not None
    not_loading = without_family("sm90")._replace(errors=(("sm90", "no such symbol"),))
    for build, words in (
        (build_of("80"), 'BROADHEAD_CUDA_ARCHS="90a"'),
        (without_family("sm90"), 'BROADHEAD_CUDA_ARCHS="90a"'),
        (build_of(*ALL_ARCHS, without=tuple(r.id for r in ROWS if r.family == "sm90")), 'BROADHEAD_CUDA_ARCHS="90a"'),
        (not_loading, "did not load: no such symbol"),
    ):
        plan = resolve(problem(**changes), h200(), build)
        if build == build_of("80"):
            assert plan.row is None and plan.left_out  # nor is there portable code for 9.0
        else:
            assert plan.row is not None and plan.row.family == "sm80" and not plan.left_out
            assert plan.row.head_dim >= problem(**changes).head_dim and f"{plan.row.id}: the first" in plan.reason
        assert f"kernel {best.id} is left out" in plan.reason and words in plan.reason
        if not changes:
            text = broadhead.explain(head_dim=128, seqlen_q=1024, num_heads_q=8, device=h200(), build=build)
            assert text.splitlines()[0].count(best.id) == 1 and ": is left out" in text
            assert "refused by this build:\n  sm90_fwd_" in text
    assert "left out" not in resolve(problem(**changes), h200(), FULL).reason
    # On another device nothing is missing.
    assert "left out" not in resolve(problem(**changes), hypothetical((8, 0)), build_of("80")).reason


def test_a_missing_hopper_kernel_is_replaced_by_the_next() -> None:
    build = build_of(*ALL_ARCHS, without=("sm90_fwd_d192_v128_bf16",))
    plan = resolve(problem(head_dim=192, head_dim_v=128), h200(), build)
    assert plan.row is not None and plan.row.id == "sm90_fwd_d192_bf16"
    # The least padded work counts for more than the family: (64, 256) is no kernel for (64, 64).
    build = build_of(*ALL_ARCHS, without=("sm90_fwd_d64_bf16",))
    plan = resolve(problem(head_dim=64), h200(), build)
    assert plan.row is not None and plan.row.id == "sm80_fwd_d64_bf16"


@pytest.mark.parametrize("head_dim, row", [(256, "d256_window"), (200, "d256_window"), (192, "d192"), (512, "d512")])
@pytest.mark.parametrize("window", [{"window_left": 1024}, {"window_right": 7}])
def test_windows_at_head_dim_256_have_a_row_of_their_own(head_dim: int, row: str, window: dict) -> None:
    asked = problem(head_dim=head_dim, features=("lse", "window"), **window)
    plan = resolve(asked, h200(), FULL)
    assert plan.row is not None and plan.row.id == f"sm90_fwd_{row}_bf16"
    for features in (("lse",), ("attention_chunk", "lse")):
        asked = problem(head_dim=256, features=features)
        plan = resolve(asked, h200(), FULL)
        assert plan.row is not None and plan.row.id == "sm90_fwd_d256_bf16"
        reasons = {refusal.row_id: refusal.reason for refusal in refusals(asked, h200(), FULL)}
        assert "needs window" in reasons["sm90_fwd_d256_window_bf16"]


FP8 = {"dtype": "float8_e4m3fn"}
QV = {"head_dim": 64, "head_dim_v": 512, "features": ("gqa", "lse", "qv")}


@pytest.mark.parametrize(
    "head_dim, head_dim_v, row",
    [
        (16, 16, "d64"), (64, 64, "d64"), (96, 96, "d128"), (128, 128, "d128"), (64, 128, "d128"),
        (192, 128, "d192_v128"), (144, 16, "d192_v128"), (192, 144, "d192"), (208, 64, "d256"), (64, 256, "d256"),
        (256, 256, "d256"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("features", [("lse",), ("causal", "descale", "gqa", "lse", "sinks", "softcap", "window")])
def test_8_bit_rows(head_dim: int, head_dim_v: int, row: str, features: tuple[str, ...]) -> None:
    """With factors or without. Few queries have decode kernels, which elsewhere than on 9.0 take many too."""
    asked = problem(head_dim=head_dim, head_dim_v=head_dim_v, features=features, **FP8)
    plan = resolve(asked, h200(), FULL)
    assert plan.row is not None and plan.row.id == f"sm90_fwd_{row}_e4m3"
    assert f"{plan.row.id}: the first prefill row" in plan.reason
    decode = "d64" if max(head_dim, head_dim_v) <= 64 else "d128" if max(head_dim, head_dim_v) <= 128 else "d256"
    for capability in CAPABILITIES:
        for kv, dtypes in (("e4m3", FP8), ("bf16_kve4m3", {"dtype": "bf16", "kv_dtype": "float8_e4m3fn"})):
            few = resolve(asked._replace(seqlen_q=1, **dtypes), hypothetical(capability), FULL).row
            assert few is not None and few.id.startswith(f"sm80_fwd_decode_{decode}") and few.id.endswith(f"_{kv}")
            assert few.tile.tile_m == 16 and few.head_dim == int(decode[1:])
            if kv == "e4m3" and capability == (9, 0):
                continue
            many = resolve(asked._replace(**dtypes), hypothetical(capability), FULL)
            assert many.row is not None and (many.row.phase, many.row.tile.tile_m) == ("decode", 32)
            assert many.row.head_dim == few.head_dim and f"{many.row.id}: the first decode row" in many.reason


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 512), (8, 8), (64, 64), (64, 256), (40, 264)])
def test_calls_with_qv_have_a_row_of_their_own(head_dim: int, head_dim_v: int, dtype: str) -> None:
    """Whatever head dims it pads; no call without qv runs there."""
    for seqlen_q, row_id in (
        (16, f"sm90_fwd_d64_v512_qv_m64_{dtype}"),
        (17, f"sm90_fwd_d64_v512_qv_{dtype}"),
        (1024, f"sm90_fwd_d64_v512_qv_{dtype}"),
    ):
        asked = problem(head_dim=head_dim, head_dim_v=head_dim_v, seqlen_q=seqlen_q, dtype=dtype)
        plan = resolve(asked._replace(features=QV["features"]), h200(), FULL)
        assert plan.row is not None and plan.row.id == row_id
        plain = resolve(asked, h200(), FULL)
        assert plain.row is not None and plain.row.id != row_id
        assert {r.row_id: r.reason for r in refusals(asked, h200(), FULL)}[row_id] == "needs qv"
    # Where it is missing the decode kernels take its place, and no kernel without qv does.
    asked = problem(dtype=dtype, **QV)
    plan = resolve(asked, h200(), without_family("sm90"))
    assert plan.row is not None and plan.row.id == f"sm80_fwd_decode_d64_v512_qv_{dtype}"
    assert f"kernel {row_id} is left out" in plan.reason
    absorbed = tuple(row.id for row in ROWS if "qv" in row.requires)
    plan = resolve(asked, h200(), build_of(*ALL_ARCHS, without=absorbed))
    assert plan.row is None and plan.left_out and f"kernel {row_id} is left out" in plan.reason


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("seqlen_q, heads", [(1, 1), (1, 16), (2, 16), (1, 17), (4, 8), (1, 64), (1, 128), (9, 64)])
def test_decode_rows_with_qv(seqlen_q: int, heads: int, dtype: str, capability: tuple[int, int]) -> None:
    """On every capability; more rows than a tile only where no Hopper kernel is for them. All heads share a tile."""
    dims = {**QV, "seqlen_q": seqlen_q, "num_heads_q": heads, "num_heads_kv": 1, "dtype": dtype, "seqlen_k": 10**5}
    smem = SMEM_BY_CAPABILITY[capability]
    size = "" if smem == SMEM_227KB else "_smem163" if smem == SMEM_163KB else "_smem99"
    for changes in (
        {}, {"has_metadata": True}, {"tokens_per_split": 512}, {"features": ("gqa", "lse", "paged", "qv", "seqused")},
        {"head_dim": 8, "head_dim_v": 16},
    ):  # fmt: skip
        plan = resolve(problem(**{**dims, **changes}), hypothetical(capability), FULL)
        assert plan.row is not None and plan.schedule is not None
        rows, unplanned = seqlen_q * heads, "tokens_per_split" in changes or "features" in changes
        if capability == (9, 0) and (rows > 32 or (rows > 16 and not unplanned)):
            assert plan.row.id == f"sm90_fwd_d64_v512_qv{'' if rows > 64 else '_m64'}_{dtype}"
            continue
        assert plan.row.id == f"sm80_fwd_decode_d64_v512_qv{size}_{dtype}" and plan.row.tile.tile_m == 16
        assert plan.schedule.rows_per_token == heads and plan.schedule.heads_in_grid == 1
        is_cut = "tokens_per_split" in changes and seqlen_q * heads <= 32
        assert plan.schedule.tokens_per_split == (512 if is_cut else 0)
    other = resolve(problem(**{**dims, "features": ("gqa", "lse")}), hypothetical(capability), FULL)
    assert other.row is not None and "qv" not in other.row.features


def test_explain_knows_descale_and_qv() -> None:
    e4m3 = {"dtype": torch.float8_e4m3fn, "device": (9, 0), "build": FULL}
    ok, reason = broadhead.is_supported(head_dim=256, descale=True, seqlen_q=4096, **e4m3)
    assert ok and "sm90_fwd_d256_e4m3" in reason
    text = broadhead.explain(head_dim=128, descale=True, seqlen_q=4096, **e4m3)
    assert "features: descale, lse" in text and "kernel sm90_fwd_d128_e4m3" in text
    assert not broadhead.is_supported(head_dim=128, descale=True, device=(9, 0), build=FULL)[0], "bf16 has no factors"
    ok, reason = broadhead.is_supported(head_dim=72, **e4m3)
    assert not ok and "multiples of 16" in reason
    k = torch.zeros(2, 70, 2, 64).to(torch.float8_e4m3fn)
    for seqlen_q, row in ((50, "sm90_fwd_d64_e4m3"), (5, "sm80_fwd_decode_d64_e4m3")):
        q = torch.zeros(2, seqlen_q, 4, 64).to(torch.float8_e4m3fn)
        assert f"kernel {row}: " in broadhead.explain(q, k, k, descale=True, device=h200(), build=FULL)
    text = broadhead.explain(head_dim=64, head_dim_v=512, qv=True, device=(9, 0), build=FULL)
    assert "kernel sm80_fwd_decode_d64_v512_qv_bf16" in text
    text = broadhead.explain(head_dim=64, head_dim_v=512, qv=True, seqlen_q=64, device=(9, 0), build=FULL)
    assert "kernel sm90_fwd_d64_v512_qv_m64_bf16" in text
    text = broadhead.explain(head_dim=64, head_dim_v=512, seqlen_q=64, device=(9, 0), build=FULL)
    assert "kernel sm90_fwd_d512_bf16" in text and ": needs qv" in text


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack_gqa", [None, True])
@pytest.mark.parametrize("group", [1, 2, 3, 6, 7, 48, 64, 65, 128, 129, 192, 193])
@pytest.mark.parametrize("head_dim", [64, 128, 512])
@pytest.mark.parametrize("seqlen_q", [1, 50, 127, 128, 1000])
def test_hopper_tiles_hold_whole_tokens_or_a_whole_part_of_one(
    seqlen_q: int, head_dim: int, group: int, pack_gqa: bool | None
) -> None:
    asked = {"seqlen_q": seqlen_q, "head_dim": head_dim, "num_heads_q": 2 * group, "pack_gqa": pack_gqa, **CAUSAL}
    plan, row = schedule(**asked)
    if row.phase == "decode":
        return
    assert row.family == "sm90"
    tile_m, cluster = row.tile.tile_m, row.cluster
    cut = group % tile_m == 0
    packable = group > 1 and (group <= tile_m or cut)
    assert plan.pack_gqa == (packable and (bool(pack_gqa) or seqlen_q < tile_m * cluster))
    if plan.rows_per_token <= tile_m:
        tokens = tile_m // plan.rows_per_token * cluster  # each block of a cluster has a tile of its own
        assert tokens >= 1 and plan.tile_m == tokens * plan.rows_per_token <= tile_m * cluster
        assert plan.m_blocks == max(1, -(-seqlen_q // tokens))
    else:  # a token is a number of whole tiles
        assert plan.tile_m == tile_m * cluster
        assert plan.m_blocks == -(-seqlen_q * group // plan.tile_m)
    # The portable kernel cuts a token's heads between two tiles.
    portable = resolve(problem(**asked), h200(), without_family("sm90"))
    assert portable.schedule is not None and portable.row is not None and portable.row.family == "sm80"
    assert portable.schedule.tile_m == portable.row.tile.tile_m
    rows = seqlen_q * portable.schedule.rows_per_token
    assert portable.schedule.m_blocks == max(1, -(-rows // portable.row.tile.tile_m))


def test_target_ctas_counts_the_clusters_that_run_at_once() -> None:
    """The wide kernel's blocks work in pairs: half as many units of work as there are multiprocessors."""
    for head_dim, target in ((64, 132), (256, 132), (512, 66)):
        assert schedule(head_dim=head_dim, **CAUSAL)[0].target_ctas == target
    margin, _ = schedule(head_dim=512, sm_margin=31)
    assert (margin.target_ctas, margin.max_blocks) == (50, 101)
    assert schedule(head_dim=512)[0].max_blocks == 0 and schedule(head_dim=512, sm_margin=10**6)[0].max_blocks == 2
    assert schedule(head_dim=64, sm_margin=10**6)[0].max_blocks == 1
    assert schedule(h200(sm_count=1), head_dim=512)[0].target_ctas == 1
    assert schedule(hypothetical((8, 0), sm_count=108), head_dim=64)[0].target_ctas == 216


LONG = {"batch": 2, "seqlen_q": 8192, "seqlen_k": 8192, "num_heads_q": 32, "num_heads_kv": 8}


def section(**changes: Any) -> int:
    """KV heads at a time."""
    plan, row = schedule(**{**LONG, **changes})
    assert row.family == "sm90"
    return plan.heads_per_section // (1 if plan.pack_gqa else 4)


def test_unmasked_hopper_tiles_share_one_head_at_a_time() -> None:
    """Its K and V pass through the L2 once; masked tiles need others' beside them."""
    for head_dim in (64, 128, 256, 512):
        assert section(head_dim=head_dim) == section(head_dim=head_dim, pack_gqa=True) == 1
        assert section(head_dim=head_dim, seqlen_q=65, seqlen_k=65) == 1, "however short"
    assert section(batch=1, num_heads_q=4, num_heads_kv=1) == 0, "there is only one"


def test_masked_hopper_tiles_share_what_half_the_l2_holds() -> None:
    # 8192 keys of head_dim 128: 4 MiB of K and V in 16 bits, 25 MiB of the L2, of 16 heads.
    assert section(**CAUSAL) == 4 and section(**CAUSAL, **FP8) == 8, "a divisor of all heads"
    assert section(**CAUSAL, head_dim=64) == 8
    assert section(**CAUSAL, seqlen_k=65536, seqlen_q=65536) == 2, "two at least"
    assert section(**CAUSAL, seqlen_k=65536, seqlen_q=65536, batch=1, num_heads_q=20, num_heads_kv=5) == 1
    assert section(**CAUSAL, seqlen_k=512, seqlen_q=512) == 0, "all at most"
    assert section(window_left=64, features=("gqa", "lse", "window")) == 4
    assert section(attention_chunk=64, features=("attention_chunk", "gqa", "lse")) == 4
    assert schedule(h200(l2_bytes=0), **LONG, **CAUSAL)[0].heads_per_section == 0
