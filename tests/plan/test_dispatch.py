"""Dispatch on described devices: rows, refusals and plans for every compute capability, without a GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from broadhead.capabilities import SMEM_BY_CAPABILITY
from broadhead.costs import Cost
from broadhead.plan import dispatch
from broadhead.plan.device import DeviceDescription, hypothetical
from broadhead.plan.dispatch import refusals, resolve
from broadhead.plan.native import NO_KERNELS, BuildDescription, parse_build_info, parse_cuda_version
from broadhead.support import CAPABILITIES, ROWS
from described import ALL_ARCHS, CAUSAL, FULL, build_of, h200, hand_in_costs, problem, schedule, without_family

pytestmark = pytest.mark.usefixtures("first_rows")

FP8 = {"dtype": "float8_e4m3fn"}
HEAD_DIMS = (8, 64, 72, 96, 128, 136, 192, 256, 264, 512)


# --- choice of the row -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "seqlen_q, phase", [(1, "decode"), (4, "decode"), (8, "decode"), (9, "prefill"), (4096, "prefill")]
)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_smallest_bucket_of_the_phase(head_dim: int, seqlen_q: int, phase: str, dtype: str, capability: tuple) -> None:
    """Every known capability has a row for every head_dim, in the phase that suits the query rows (group 4)."""
    plan = resolve(problem(head_dim=head_dim, seqlen_q=seqlen_q, dtype=dtype), hypothetical(capability), FULL)
    assert plan.row is not None, plan.reason
    fitting = [
        r
        for r in ROWS
        if r.phase == phase
        and (r.dtype, r.kv_dtype) == (dtype, "")
        and capability in r.capabilities
        and min(r.head_dim, r.head_dim_v) >= head_dim
    ]
    assert plan.row.head_dim + plan.row.head_dim_v == min(r.head_dim + r.head_dim_v for r in fitting)
    assert plan.row.head_dim >= head_dim and plan.row.head_dim_v >= head_dim
    assert plan.row.phase == phase and plan.row.dtype == dtype and capability in plan.row.capabilities
    assert plan.row.smem_limit <= SMEM_BY_CAPABILITY[capability]
    assert plan.row.id in plan.reason


@pytest.mark.parametrize("head_dim, head_dim_v, bucket", [(64, 512, 512), (192, 128, 192), (8, 96, 96), (256, 8, 256)])
def test_bucket_holds_both_head_dims(head_dim: int, head_dim_v: int, bucket: int) -> None:
    plan = resolve(problem(head_dim=head_dim, head_dim_v=head_dim_v), hypothetical((8, 0)), FULL)
    assert plan.row is not None and plan.row.head_dim == plan.row.head_dim_v == bucket


def test_small_shared_memory_takes_the_small_tiles() -> None:
    for capability, size in SMEM_BY_CAPABILITY.items():
        plan = resolve(problem(head_dim=512), hypothetical(capability), FULL)
        assert plan.row is not None
        assert ("smem99" in plan.row.id) == (size < 163 * 1024), (capability, plan.row.id)


def test_a_missing_phase_is_replaced_by_the_other() -> None:
    """A decode call still has the prefill rows, and the other way round."""
    decode = tuple(row.id for row in ROWS if row.phase == "decode")
    plan = resolve(problem(seqlen_q=1), h200(), build_of("90a", without=decode))
    assert plan.row is not None and plan.row.phase == "prefill"
    prefill = tuple(row.id for row in ROWS if row.phase == "prefill")
    plan = resolve(problem(), h200(), build_of("90a", without=prefill))
    assert plan.row is not None and plan.row.phase == "decode"


def test_more_sequences_than_backward_grids_have() -> None:
    plan = resolve(problem(direction="backward", batch=65535), h200(), FULL)
    assert plan.row is not None
    plan = resolve(problem(direction="backward", batch=65536), h200(), FULL)
    assert plan.row is None and "up to 65535 sequences, not 65536" in plan.reason
    assert resolve(problem(batch=65536), h200(), FULL).row is not None


def test_every_row_is_reached() -> None:
    """No row of the table is dead: some device and problem choose it."""
    head_dims = [*((d, d) for d in HEAD_DIMS), (192, 128), (64, 256)]
    queries = (1, 8, 1024)  # 4 heads of a KV head: tiles of 16 and of 32 rows, and prefill
    asked = [
        problem(head_dim=d, head_dim_v=dv, seqlen_q=sq, dtype=dtype, **mask)
        for (d, dv), sq, dtype, mask in itertools.product(head_dims, queries, ("bf16", "fp16"), ({}, CAUSAL))
    ]
    even = [(d, dv, sq) for (d, dv), sq in itertools.product(head_dims, queries) if d % 16 == dv % 16 == 0]
    for dtypes in (FP8, {"dtype": "bf16", "kv_dtype": FP8["dtype"]}, {"dtype": "fp16", "kv_dtype": FP8["dtype"]}):
        asked += [
            problem(head_dim=d, head_dim_v=dv, seqlen_q=sq, features=("descale", "lse"), **dtypes) for d, dv, sq in even
        ]
    plans = [resolve(x, hypothetical(c), FULL) for x, c in itertools.product(asked, CAPABILITIES)]
    assert all(plan.row is not None for plan in plans)
    absorbed = {"head_dim": 64, "head_dim_v": 512, "features": ("lse", "qv")}
    special = [problem(seqlen_q=sq, dtype=t, **absorbed) for sq in queries for t in ("bf16", "fp16")]
    window = {"window_left": 100, "features": ("lse", "window")}
    special += [problem(head_dim=256, dtype=t, **window) for t in ("bf16", "fp16")]
    sizes = [*((d, d) for d in HEAD_DIMS), (192, 128)]
    special += [
        problem(direction="backward", head_dim=d, head_dim_v=dv, dtype=t, features=features)
        for (d, dv), t, features in itertools.product(sizes, ("bf16", "fp16"), (("lse",), ("lse", "deterministic")))
    ]
    capabilities = ((8, 0), (9, 0), (10, 0), (12, 0))  # Hopper's backward kernels stand in front of the portable ones
    plans += [resolve(x, hypothetical(c), FULL) for x, c in itertools.product(special, capabilities)]
    # Portable rows for 9.0 alone are for builds without the Hopper kernels.
    plans += [resolve(x, hypothetical((9, 0)), without_family("sm90")) for x in special]
    assert {plan.row.id for plan in plans if plan.row is not None} == {row.id for row in ROWS if not row.by_cost}


def test_every_row_that_costs_may_choose_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it costs less than the first row, for the head dims and dtypes that it is for."""
    rows = [row for row in ROWS if row.by_cost]
    assert {row.family for row in rows} == {"sm80", "sm90"}
    for row in rows:
        asked = problem(head_dim=row.head_dim, dtype=row.dtype)
        first = resolve(asked, h200(), FULL).row
        assert first is not None and not first.by_cost
        hand_in_costs(monkeypatch, {first.name: Cost(0, block=100), row.name: Cost(0, block=1)})
        chosen = resolve(asked, h200(), FULL)
        assert chosen.row == row and chosen.reason.startswith(f"{row.id}: takes less time than {first.id}, the first ")
        hand_in_costs(monkeypatch, {})


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [(6, 1), (7, 5)])
def test_a_capability_before_the_oldest_has_no_kernel(capability: tuple[int, int]) -> None:
    """Later ones that the table does not know: test_later_capabilities.py."""
    plan = resolve(problem(), hypothetical(capability), FULL)
    assert plan.row is None and not plan.left_out
    assert f"compute capability {capability[0]}.{capability[1]}" in plan.reason and "8.0" in plan.reason
    found = refusals(problem(), hypothetical(capability), FULL)
    assert {r.row_id for r in found} == {row.id for row in ROWS}, "every row says why"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"head_dim": 520}, "head_dim 520 exceeds 512"),
        ({"head_dim": 64, "head_dim_v": 1024}, "head_dim_v 1024 exceeds 512"),
        ({"dtype": "fp32"}, "dtype fp32 has no CUDA kernel; kernels take bf16, "),
        ({"dtype": "float8_e5m2"}, "dtype float8_e5m2 has no CUDA kernel"),
        ({**FP8, "head_dim": 528}, "head_dim 528 exceeds 512, the largest of any CUDA kernel for float8_e4m3fn"),
        ({**FP8, "head_dim": 72}, "kernels take head_dim in multiples of 16 with dtype float8_e4m3fn"),
        ({**FP8, "head_dim_v": 24}, "kernels take head_dim_v in multiples of 16"),
        ({**FP8, "features": ("lse", "qv")}, "there is no CUDA kernel for float8_e4m3fn with qv"),
        ({"features": ("lse", "qv")}, "head_dim 128 exceeds 64, the largest of any CUDA kernel for bf16 with qv"),
        ({"head_dim": 64, "head_dim_v": 520, "features": ("lse", "qv")}, "head_dim_v 520 exceeds 512"),
        ({"features": ("descale", "lse")}, "there is no CUDA kernel for bf16 with descale"),
        (
            {"features": ("gradients", "lse", "paged")},
            "no CUDA kernel differentiates: no CUDA kernel combines lse, paged",
        ),
        ({"direction": "backward", "head_dim": 520}, "head_dim 520 exceeds 512"),
        ({"obstacles": ("the strides of q, (3, 1), are not multiples of 8 elements",)}, "strides of q"),
    ],
)
@pytest.mark.parametrize("build", [FULL, NO_KERNELS], ids=["full", "none"])
def test_refused_on_every_device(changes: dict[str, Any], words: str, build: BuildDescription) -> None:
    """The reason is what was asked, whatever the build: it never blames the device or the build."""
    for capability in CAPABILITIES:
        plan = resolve(problem(**changes), hypothetical(capability), build)
        assert plan.row is None and not plan.left_out and words in plan.reason
        assert "build" not in plan.reason and "capability" not in plan.reason


def test_shared_memory_that_the_device_reports_is_checked() -> None:
    plan = resolve(problem(head_dim=512), h200(smem_per_block=100 * 1024), FULL)
    assert plan.row is None or plan.row.smem_limit <= 100 * 1024
    plan = resolve(problem(), h200(smem_per_block=48 * 1024), FULL)
    assert plan.row is None and not plan.left_out and f"{48 * 1024}" in plan.reason and "shared memory" in plan.reason


def test_not_cuda() -> None:
    for kind in ("cpu", "hip"):
        plan = resolve(problem(), DeviceDescription(kind, kind, None, 0, 0, 0, None), FULL)
        assert plan.row is None and not plan.left_out and f"on a {kind} device" in plan.reason


def test_build_without_the_kernel_is_another_error() -> None:
    """Availability never blames the GPU when the build lacks the kernel."""
    every = tuple(row.id for row in ROWS)
    cases = {
        "CPU package": NO_KERNELS,
        "left out of this build": build_of("90a", without=every),
        'built for "80;120"': build_of("80", "120"),
        "did not load: no driver": BuildDescription(True, (), (("sm80", "no driver"), ("sm90", "no driver"))),
        "library of sm80 kernels did not load": BuildDescription(True, (), (("sm80", "no driver"),)),
    }
    for words, build in cases.items():
        plan = resolve(problem(), h200(), build)
        assert plan.row is None and plan.left_out and words in plan.reason, plan.reason
        assert "sm90_fwd_d128_bf16" in plan.reason
        # Each reason once, with the best kernel that it keeps away.
        portable = "load" in words or "built for" in words
        assert plan.reason.count("kernel sm80_fwd_d128_bf16") == portable, plan.reason
        text = dispatch.refusal_text("mha_fwd", problem(), h200(), plan)
        assert text.startswith("mha_fwd: this build leaves the CUDA kernel out") and "NVIDIA H200" in text
        if "load" not in words:
            assert 'BROADHEAD_CUDA_ARCHS="90a"' in text
    plan = resolve(problem(head_dim=520), h200(), FULL)
    text = dispatch.refusal_text("mha_fwd", problem(head_dim=520, page_size=16), h200(), plan)
    assert "no CUDA kernel for this forward call" in text and "page_size=16" in text and "head_dim=520" in text
    assert "compute capability 9.0" in text and "CUDA 13.0" in text and "Remedy" in text


@pytest.mark.parametrize(
    "archs, capability, runs",
    [
        (("80",), (8, 6), True),
        (("86",), (8, 0), False),
        (("90a",), (9, 0), True),
        (("90a",), (10, 0), False),
        (("100",), (10, 3), True),
        (("100a",), (10, 3), False),
        (("120",), (12, 1), True),
    ],
)
def test_arch_coverage(archs: tuple[str, ...], capability: tuple[int, int], runs: bool) -> None:
    plan = resolve(problem(), hypothetical(capability), build_of(*archs))
    assert (plan.row is not None) == runs and plan.left_out != runs


def test_cuda_versions_are_integer_tuples() -> None:
    assert parse_cuda_version("12.10") == (12, 10) > parse_cuda_version("12.3") == (12, 3)  # type: ignore[operator]
    assert parse_cuda_version("13") == (13, 0) and parse_cuda_version("12.8.93") == (12, 8)
    assert parse_cuda_version(12100) == (12, 10) and parse_cuda_version(13000) == (13, 0)
    assert parse_cuda_version(None) is parse_cuda_version("") is parse_cuda_version(0) is None
    old = resolve(problem(), h200(cuda_version=(12, 10)), FULL)
    assert old.row is None and old.left_out and "needs CUDA 13.0 or newer, the driver serves 12.10" in old.reason
    assert resolve(problem(), h200(cuda_version=(12, 4)), build_of("90a", cuda=(12, 9))).row is not None
    assert resolve(problem(), h200(cuda_version=None), FULL).row is not None, "unknown is not too old"


def test_build_info_is_parsed() -> None:
    info = {
        "version": "1",
        "families": {"sm80": {"archs": "80;90a", "cuda": (13, 0), "kernels": ["a", "b"], "path": "x"}},
        "errors": {"sm90": "gone"},
    }
    build = parse_build_info(info)
    assert build.has_module and build.load_error("sm90") == "gone" and build.load_error("sm80") == ""
    family = build.family("sm80")
    assert family is not None and family.archs == ("80", "90a") and family.kernels == {"a", "b"}
    assert family.covers((8, 9)) and family.covers((9, 0)) and not family.covers((10, 0))
    hash(build)


# --- the plan --------------------------------------------------------------------------------------------------------


#: Where no decode kernel is built prefill kernels take its calls.
NO_DECODE = build_of(*ALL_ARCHS, without=tuple(row.id for row in ROWS if row.phase == "decode"))


def test_few_queries_of_a_prefill_kernel_are_split_over_the_device() -> None:
    """Few sequences of a long context: the blocks fill whole waves; a batch that fills the device is split little."""
    one, row = schedule(batch=1, seqlen_q=1, seqlen_k=65536, build=NO_DECODE)
    assert row.phase == "prefill"
    ctas = one.num_splits * one.heads_in_grid * one.m_blocks
    waves = ctas / one.target_ctas
    assert one.num_splits > 16 and waves / -(-ctas // one.target_ctas) >= 0.9
    assert one.num_splits * 4 * row.tile.tile_n <= 65536, "a split has at least 4 key tiles"
    many, _ = schedule(batch=128, seqlen_q=1, seqlen_k=8192, num_heads_q=8, num_heads_kv=1, build=NO_DECODE)
    assert 1 <= many.num_splits <= 8
    short, row = schedule(batch=1, seqlen_q=1, seqlen_k=100, build=NO_DECODE)
    assert short.num_splits == 1


@pytest.mark.parametrize("asked", [0, 1, 2, 128])
def test_decode_kernels_plan_for_themselves(asked: int) -> None:
    """They know the lengths: a plan holds what was asked and the blocks that run at once, whatever the lengths."""
    window = {"window_left": 511, "window_right": 0, "features": ("causal", "gqa", "lse", "window")}
    for changes in ({}, {"batch": 1, "seqlen_k": 65536}, {"batch": 300}, {"has_metadata": True}, window):
        plan, row = schedule(**{"seqlen_q": 1, "seqlen_k": 100, "num_splits": asked, **changes})
        assert row.phase == "decode" and plan.num_splits == asked, changes
        assert plan.target_ctas == 132 * row.tile.min_blocks and plan.tokens_per_split == 0
    plan, _ = schedule(seqlen_q=1, seqlen_k=65536, num_splits=0, tokens_per_split=256)
    assert (plan.num_splits, plan.tokens_per_split) == (1, 256), "what is cut at multiples is not cut otherwise"
    plan, _ = schedule(seqlen_q=1, seqlen_k=65536, num_splits=1, tokens_per_split=256)
    assert (plan.num_splits, plan.tokens_per_split) == (1, 0), "no cuts at all"


@pytest.mark.parametrize("seqlen_q, tile_m", [(1, 16), (4, 16), (5, 32), (8, 32), (12, 32), (100, 32)])
def test_decode_takes_the_fewest_tiles_and_of_these_the_smallest(seqlen_q: int, tile_m: int) -> None:
    """Of 4 heads a token. More than 32 rows come here only where no prefill kernel is built."""
    build = build_of(*ALL_ARCHS, without=tuple(row.id for row in ROWS if row.phase == "prefill"))
    for head_dim in (64, 128, 256, 512):
        _, row = schedule(seqlen_q=seqlen_q, head_dim=head_dim, build=build)
        assert row.phase == "decode" and row.tile.tile_m == tile_m, row.id


def test_full_prefill_is_not_split() -> None:
    assert schedule(batch=2, seqlen_q=8192, seqlen_k=8192)[0].num_splits == 1
    assert schedule(batch=1, seqlen_q=128, seqlen_k=65536, num_heads_q=2)[0].num_splits > 1


@pytest.mark.parametrize("asked", [1, 2, 7, 128])
def test_explicit_splits_are_the_bound(asked: int) -> None:
    assert schedule(seqlen_q=1, seqlen_k=65536, num_splits=asked, build=NO_DECODE)[0].num_splits == asked
    few, row = schedule(seqlen_q=1, seqlen_k=128, num_splits=asked, build=NO_DECODE)
    assert few.num_splits == min(asked, -(-128 // row.tile.tile_n)), "never more splits than key tiles"


def test_a_window_bounds_the_splits() -> None:
    common = {"batch": 1, "seqlen_q": 1, "seqlen_k": 65536, "num_heads_kv": 2, "build": NO_DECODE}
    wide = schedule(**common)[0].num_splits
    window = {"window_left": 511, "window_right": 0, "features": ("causal", "gqa", "lse", "window")}
    narrow, row = schedule(**common, **window)
    assert narrow.num_splits < wide and narrow.num_splits * row.tile.tile_n <= 512 + row.tile.tile_n


def test_sm_margin_leaves_room() -> None:
    assert schedule(sm_margin=32)[0].target_ctas < schedule()[0].target_ctas
    assert schedule(sm_margin=10**6)[0].target_ctas >= 1


@pytest.mark.parametrize("pack_gqa", [None, False, True])
@pytest.mark.parametrize("heads_kv", [1, 2, 8])
@pytest.mark.parametrize("seqlen_q", [1, 100, 4096])
def test_pack_gqa(seqlen_q: int, heads_kv: int, pack_gqa: bool | None) -> None:
    group = 8 // heads_kv
    plan, row = schedule(seqlen_q=seqlen_q, num_heads_kv=heads_kv, pack_gqa=pack_gqa)
    default = group > 1 and (row.phase == "decode" or seqlen_q < row.tile.tile_m)
    assert plan.pack_gqa == (default if pack_gqa is None else pack_gqa and group > 1)
    assert plan.heads_in_grid == (heads_kv if plan.pack_gqa else 8)
    assert plan.rows_per_token == (group if plan.pack_gqa else 1)
    assert plan.m_blocks == -(-seqlen_q * plan.rows_per_token // row.tile.tile_m) and plan.tile_m == row.tile.tile_m


def test_heads_share_the_l2_in_sections() -> None:
    """The portable kernels; those of Hopper have a rule of their own."""
    build = without_family("sm90")
    assert schedule(seqlen_k=1024, seqlen_q=1024, build=build)[0].heads_per_section == 0, "everything fits"
    large = {"batch": 2, "seqlen_q": 65536, "seqlen_k": 65536, "num_heads_q": 32, "num_heads_kv": 8, "pack_gqa": False}
    assert schedule(**large, build=build)[0].heads_per_section == 4, "one KV head, four query heads"
    middle = {**large, "seqlen_q": 8192, "seqlen_k": 8192}
    assert schedule(**middle, build=build)[0].heads_per_section == 16, "four KV heads at most"
    assert schedule(**middle, head_dim=64, build=build)[0].heads_per_section == 16
    assert schedule(**middle, head_dim=64, build=build, **CAUSAL)[0].heads_per_section == 0
    assert schedule(seqlen_q=1, seqlen_k=65536, batch=64)[0].heads_per_section == 0, "decode reads every key once"


def test_metadata_tag() -> None:
    """Non-zero, 31 bits, and another one for everything that a plan depends on but the lengths."""
    base = problem(seqlen_q=1, seqlen_k=4096, has_metadata=True)
    tag = resolve(base, h200(), FULL).metadata_tag
    assert 0 < tag < 2**31
    for change in (
        {"batch": 3}, {"num_heads_q": 16}, {"num_heads_kv": 1}, {"head_dim": 120}, {"head_dim_v": 120},
        {"dtype": "fp16"}, {"window_left": 64}, {"attention_chunk": 64}, {"pack_gqa": False},
        {"features": ("gqa", "lse", "qv")}, {"kv_dtype": "float8_e4m3fn"}, {"tokens_per_split": 64},
    ):  # fmt: skip
        assert resolve(base._replace(**change), h200(), FULL).metadata_tag != tag, change
    for change in ({"seqlen_k": 8192}, {"num_splits": 3}, {"seqlen_q": 2}, {"window_right": 0}, {"page_size": 16}):
        assert resolve(base._replace(**change), h200(), FULL).metadata_tag == tag, change


def test_plans_are_cached_and_equal() -> None:
    assert resolve(problem(), h200(), FULL) is resolve(problem(), h200(), build_of(*ALL_ARCHS))


def test_random_problems_get_a_sound_plan(rng) -> None:
    for _ in range(300):
        heads_kv = rng.choice([1, 2, 3, 8])
        asked = problem(
            batch=rng.choice([0, 1, 3, 200]),
            seqlen_q=rng.choice([0, 1, 2, 17, 513, 30000]),
            seqlen_k=rng.choice([0, 1, 63, 1000, 10**6, 2**31 - 1]),
            num_heads_q=heads_kv * rng.choice([1, 2, 3, 16]),
            num_heads_kv=heads_kv,
            head_dim=rng.choice(HEAD_DIMS),
            head_dim_v=rng.choice(HEAD_DIMS),
            window_left=rng.choice([-1, 0, 100]),
            window_right=rng.choice([-1, 0, 100]),
            attention_chunk=rng.choice([0, 0, 64]),
            num_splits=rng.choice([0, 0, 1, 5, 128]),
            tokens_per_split=rng.choice([0, 0, 64, 4096]),
            pack_gqa=rng.choice([None, True, False]),
            has_metadata=rng.random() < 0.5,
            sm_margin=rng.choice([0, 0, 100]),
        )
        device = hypothetical(rng.choice(CAPABILITIES), rng.choice([1, 20, 132]), rng.choice([0, 4 << 20, 50 << 20]))
        plan = resolve(asked, device, FULL)
        assert plan.schedule is not None and plan.row is not None, plan.reason
        s = plan.schedule
        asked_splits = 1 if asked.tokens_per_split else asked.num_splits
        assert s.num_splits == asked_splits if plan.row.phase == "decode" else 1 <= s.num_splits <= 128
        assert (
            s.tokens_per_split in (0, asked.tokens_per_split)
            and s.m_blocks >= 1
            and s.target_ctas >= 1
            and s.heads_per_section >= 0
        )
        assert s.heads_in_grid * s.rows_per_token == asked.num_heads_q
