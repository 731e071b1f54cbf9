"""Dispatch and plans of the Hopper kernels: their choice by head dims and masks, builds without them, 8-bit rows."""

from __future__ import annotations

from typing import Any

import broadhead
import pytest
from broadhead import dispatch
from broadhead.device import hypothetical
from broadhead.dispatch import resolve
from broadhead.native import BuildDescription, FamilyBuild
from broadhead.support import CAPABILITIES, ROWS
from described import ALL_ARCHS, CAUSAL, FULL, build_of, h200, problem, schedule, without_family


@pytest.mark.parametrize(
    "head_dim, head_dim_v, row",
    [
        (8, 8, "d64"), (64, 64, "d64"), (72, 72, "d96"), (96, 96, "d96"), (128, 128, "d128"), (128, 64, "d128"),
        (64, 128, "d128"), (192, 128, "d192_v128"), (136, 8, "d192_v128"), (192, 136, "d192"), (192, 192, "d192"),
        (256, 256, "d256"), (200, 64, "d256"), (64, 256, "d64_v256"), (64, 136, "d64_v256"), (72, 256, "d256"),
        (264, 264, "d512"), (512, 512, "d512"), (64, 512, "d512"), (512, 64, "d512"),
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
        refused = {refusal.row_id: refusal.reason for refusal in other.refusals}
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
            assert f"refused: {best.id}: is left out" in text
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


def test_8_bit_rows_need_no_rule_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of another dtype and with features of its own is found, and refused, like any other."""
    base = next(row for row in ROWS if row.id == "sm90_fwd_d128_bf16")
    fp8 = base._replace(id="sm90_fwd_d128_e4m3", dtype="float8_e4m3fn", features=(*base.features, "descale", "qv"))
    assert fp8.name == base.name
    build = BuildDescription(True, (FamilyBuild("sm90", ("90a",), (13, 0), frozenset({fp8.id, base.id})),), ())
    asked = problem(dtype="float8_e4m3fn", features=("descale", "gqa", "lse"))
    assert "dtype float8_e4m3fn has no CUDA kernel" not in resolve(asked, h200(), build).reason
    assert "have no CUDA kernel" in resolve(asked, h200(), build).reason
    plain = asked._replace(features=("lse",))
    assert "dtype float8_e4m3fn has no CUDA kernel; kernels take bf16, fp16" in resolve(plain, h200(), build).reason
    monkeypatch.setattr(dispatch, "_plans", {})
    monkeypatch.setattr(dispatch, "ROWS", (base, fp8))
    for features in (("lse",), ("descale", "gqa", "lse"), ("lse", "qv")):
        for seqlen_q in (1, 1024):
            plan = resolve(asked._replace(features=features, seqlen_q=seqlen_q), h200(), build)
            assert plan.row is fp8, plan.reason
    for feature in ("qv", "descale"):
        plan = resolve(problem(features=("lse", feature)), h200(), build)
        assert plan.row is None and f"no CUDA kernel combines lse, {feature}" in plan.reason.replace(
            f"{feature}, lse", f"lse, {feature}"
        )
        assert f"lacks {feature}" in {refusal.reason for refusal in plan.refusals}
    plan = resolve(asked._replace(head_dim=256), h200(), build)
    assert plan.row is None and "head_dim 256 exceeds 128" in plan.reason


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack_gqa", [None, True])
@pytest.mark.parametrize("group", [1, 2, 3, 6, 7, 48, 64, 65, 128, 129, 192, 193])
@pytest.mark.parametrize("head_dim", [64, 128, 512])
@pytest.mark.parametrize("seqlen_q", [1, 50, 127, 128, 1000])
def test_hopper_tiles_hold_whole_tokens(seqlen_q: int, head_dim: int, group: int, pack_gqa: bool | None) -> None:
    asked = {"seqlen_q": seqlen_q, "head_dim": head_dim, "num_heads_q": 2 * group, "pack_gqa": pack_gqa, **CAUSAL}
    plan, row = schedule(**asked)
    if row.phase == "decode":
        return
    assert row.family == "sm90"
    tile_m, cluster = row.tile.tile_m, row.template.cluster
    assert plan.pack_gqa == (1 < group <= tile_m and (bool(pack_gqa) or seqlen_q < tile_m * cluster))
    tokens = tile_m // plan.rows_per_token * cluster  # each block of a cluster has a tile of its own
    assert tokens >= 1 and plan.tile_m == tokens * plan.rows_per_token <= tile_m * cluster
    assert plan.m_blocks == max(1, -(-seqlen_q // tokens))
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
