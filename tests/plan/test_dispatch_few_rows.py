"""17 to 32 query rows of a KV head: decode kernels; with qv, on 9.0, a Hopper kernel of even plans; splits."""

from __future__ import annotations

from math import ceil
from typing import Any

import broadhead
import pytest
import torch
from broadhead.call.arguments import AttentionArgs
from broadhead.call.check import check_forward
from broadhead.call.metadata_request import describe_request
from broadhead.plan.device import hypothetical
from broadhead.plan.dispatch import resolve
from broadhead.support import CAPABILITIES, DECODE_MAX_ROWS, HOPPER_MIN_ROWS_QV, ROWS, SMEM_227KB, KernelRow
from described import ALL_ARCHS, CAUSAL, FULL, build_of, h200, problem, schedule, without_family

pytestmark = pytest.mark.usefixtures("first_rows")

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
#: Tokens and query heads of a KV head.
FEW = ((1, 17), (1, 32), (17, 1), (32, 1), (4, 8), (8, 4), (5, 5), (6, 3))
#: Calls whose lengths the host does not know.
RAGGED = {"features": ("gqa", "lse", "seqused")}
#: Absorbed MLA, and such lengths.
QV = {"head_dim": 64, "head_dim_v": 512, "features": ("gqa", "lse", "qv")}
RAGGED_QV = {"features": ("gqa", "lse", "qv", "seqused")}


def row_of(seqlen_q: int = 8, group: int = 4, capability: tuple[int, int] = (9, 0), **changes: Any) -> KernelRow:
    asked = problem(seqlen_q=seqlen_q, num_heads_q=2 * group, **changes)
    device = h200() if capability == (9, 0) else hypothetical(capability)
    row = resolve(asked, device, FULL).row
    assert row is not None
    return row


# --- the kernel -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 512), (40, 264), (8, 8)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_hopper_kernels_of_qv_begin_at_17_rows(head_dim: int, head_dim_v: int, dtype: str) -> None:
    """A block alone up to 64 rows, where a second one of a cluster would have none; elsewhere tiles of 16 rows."""
    dims = {**QV, "head_dim": head_dim, "head_dim_v": head_dim_v, "dtype": dtype}
    for planned in ({"has_metadata": True, **RAGGED_QV}, {}):
        for rows in (1, 2, 15, 16):
            for row in (row_of(rows, 1, **{**dims, **planned}), row_of(1, rows, **{**dims, **planned})):
                assert (row.phase, row.tile.tile_m) == ("decode", 16)
        for seqlen_q, group in (*FEW, (33, 1), (1, 64), (16, 4)):
            assert seqlen_q * group >= HOPPER_MIN_ROWS_QV
            row = row_of(seqlen_q, group, **{**dims, **planned})
            assert (row.id, row.cluster) == (f"sm90_fwd_d64_v512_qv_m64_{dtype}", 1)
            for capability in set(CAPABILITIES) - {(9, 0)}:
                other = row_of(seqlen_q, group, capability, **{**dims, **planned})
                assert (other.phase, other.tile.tile_m) == ("decode", 16), capability
        for seqlen_q, group in ((65, 1), (1, 65), (1, 128), (17, 4)):
            row = row_of(seqlen_q, group, **{**dims, **planned})
            assert (row.id, row.cluster) == (f"sm90_fwd_d64_v512_qv_{dtype}", 2)


@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 64), (128, 128), (192, 128), (256, 256), (320, 320), (512, 512)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_hopper_kernels_without_qv_begin_at_33_rows(head_dim: int, head_dim_v: int, dtype: str) -> None:
    dims = {"head_dim": head_dim, "head_dim_v": head_dim_v, "dtype": dtype}
    for planned in ({"has_metadata": True, **RAGGED}, {}):
        for seqlen_q, group in FEW:
            assert seqlen_q * group <= DECODE_MAX_ROWS
            row = row_of(seqlen_q, group, **dims, **planned)
            assert (row.phase, row.tile.tile_m, row.smem_limit) == ("decode", 32, SMEM_227KB)
        assert row_of(33, 1, **dims, **planned).family == "sm90"


@pytest.mark.parametrize("seqlen_q, group", FEW)
def test_what_stays_on_decode_kernels(seqlen_q: int, group: int) -> None:
    """Cuts at multiples; lengths known on the device alone, without metadata; what Hopper has no kernel for."""
    cases: list[dict[str, Any]] = [{"tokens_per_split": 512}, {"tokens_per_split": 512, "has_metadata": True}]
    cases += [{"features": ("gqa", "lse", "qv", name)} for name in ("seqused", "varlen", "paged", "leftpad")]
    for changes in cases:
        row = row_of(seqlen_q, group, **{**QV, **changes})
        assert (row.phase, row.tile.tile_m) == ("decode", 16), (changes, row.id)
        # More rows are prefill, whatever they ask.
        assert row_of(33, 1, **{**QV, **changes}).family == "sm90"
    narrow: list[dict[str, Any]] = [{"kv_dtype": "float8_e4m3fn", "has_metadata": planned} for planned in (False, True)]
    for changes in (*narrow, {"dtype": "float8_e4m3fn"}):
        row = row_of(seqlen_q, group, **{"head_dim": 512, "head_dim_v": 512, **changes})
        assert (row.phase, row.tile.tile_m) == ("decode", 32), (changes, row.id)


def test_a_build_without_the_hopper_kernel_says_so() -> None:
    """The cluster's kernel and decode kernels come next; for other calls, without those, portable prefill ones."""
    asked = problem(seqlen_q=8, **QV)
    one = "sm90_fwd_d64_v512_qv_m64_bf16"
    for build, expected in (
        (without_family("sm90"), "sm80_fwd_decode_d64_v512_qv_bf16"),
        (build_of(*ALL_ARCHS, without=(one,)), "sm90_fwd_d64_v512_qv_bf16"),
    ):
        plan = resolve(asked, h200(), build)
        assert plan.row is not None and plan.row.id == expected
        assert f"kernel {one} is left out of this build" in plan.reason
    decode = tuple(row.id for row in ROWS if row.phase == "decode")
    without = tuple(row.id for row in ROWS if row.family == "sm90") + decode
    plan = resolve(problem(seqlen_q=8, head_dim=320), h200(), build_of(*ALL_ARCHS, without=without))
    assert plan.row is not None and plan.row.id.startswith("sm80_fwd_d")
    for capability in ((8, 0), (10, 0)):
        assert "left out" not in resolve(asked, hypothetical(capability), build_of("80", "100")).reason


def test_explain_tells_the_choice() -> None:
    asked = {"num_heads_q": 8, "num_heads_kv": 1, "device": h200(), "build": FULL}
    for options, kernel in (
        ({"seqlen_q": 2, "head_dim": 512}, "sm80_fwd_decode_d512_bf16"),
        ({"seqlen_q": 4, "head_dim": 512}, "sm80_fwd_decode_d512_m32_bf16"),
        ({"seqlen_q": 2}, "sm80_fwd_decode_d64_v512_qv_bf16"),
        ({"seqlen_q": 4}, "sm90_fwd_d64_v512_qv_m64_bf16"),
        ({"seqlen_q": 4, "page_size": 64}, "sm80_fwd_decode_d64_v512_qv_bf16"),
        ({"seqlen_q": 4, "tokens_per_split": 64}, "sm80_fwd_decode_d64_v512_qv_bf16"),
        ({"seqlen_q": 9}, "sm90_fwd_d64_v512_qv_bf16"),
    ):
        latent = {} if "head_dim" in options else {"head_dim": 64, "head_dim_v": 512, "qv": True}
        assert f"runs on: cuda, kernel {kernel}: " in broadhead.explain(**asked, **latent, **options), options


# --- metadata ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen_q, heads_q, heads_kv", [(4, 8, 1), (8, 32, 8), (1, 32, 1), (20, 2, 2), (3, 24, 4)])
@pytest.mark.parametrize("changes", [{}, {"causal": True}, {"window": (100, 0)}, {"num_splits": 32}, {"tokens": 256}])
@pytest.mark.parametrize("how", ["dense", "paged", "varlen"])
def test_metadata_and_call_choose_alike(
    how: str, changes: dict[str, Any], seqlen_q: int, heads_q: int, heads_kv: int
) -> None:
    """By what get_scheduler_metadata knows, whatever else the call brings; lengths may differ but for the page table's.

    The engines' graphs: the metadata is made for the lengths of a step, the call for the widest page table.
    """
    latent = (64, 512, BF16)
    for head_dim, head_dim_v, dtype in (
        (64, 64, BF16), (128, 128, BF16), (256, 256, torch.float16), (512, 512, BF16), (128, 128, E4M3), latent
    ):  # fmt: skip
        is_latent = (head_dim, head_dim_v, dtype) == latent
        q = torch.zeros(3, seqlen_q, heads_q, head_dim).to(dtype)
        qv = torch.zeros(3, seqlen_q, heads_q, head_dim_v, dtype=dtype) if is_latent else None
        k, v = (torch.zeros(3, 4096, heads_kv, size).to(dtype) for size in (head_dim, head_dim_v))
        args = AttentionArgs(q, k, v, qv=qv, seqused_k=torch.tensor([4096, 3, 900], dtype=torch.int32))
        if how != "dense":
            k, v = k.reshape(-1, 64, heads_kv, head_dim), v.reshape(-1, 64, heads_kv, head_dim_v)
            args = args._replace(k=k, v=v, page_table=torch.zeros(3, 64, dtype=torch.int32))
        if how == "varlen":
            cu_seqlens_q = torch.tensor([0, seqlen_q, seqlen_q, 2 * seqlen_q], dtype=torch.int32)
            args = args._replace(q=q.flatten(0, 1), cu_seqlens_q=cu_seqlens_q, max_seqlen_q=seqlen_q)
            args = args._replace(qv=None if qv is None else qv.flatten(0, 1))
            args = args._replace(sinks=torch.zeros(heads_q), softcap=5.0)
        args = args._replace(
            scheduler_metadata=torch.zeros(17, dtype=torch.int32),
            causal=changes.get("causal", False),
            window_size=changes.get("window", (-1, -1)),
            num_splits=changes.get("num_splits", 0),
            tokens_per_split=changes.get("tokens", 0),
        )
        called = resolve(check_forward("mha_fwd", args).problem, h200(), FULL)
        for longest in (4096, 1500):
            request = describe_request(
                3, seqlen_q, longest, heads_q, heads_kv, head_dim, head_dim_v, dtype, 64 if how != "dense" else None, 0,
                args.causal, args.window_size, 0, args.num_splits, None, 0, None,
                has_qv=is_latent, tokens_per_split=args.tokens_per_split,
            )  # fmt: skip
            planned = resolve(request.problem, h200(), FULL)
            assert called.row is not None and called.row == planned.row
            assert called.metadata_tag == planned.metadata_tag and called.metadata_config == planned.metadata_config
            if longest == 4096:
                assert called.schedule == planned.schedule
        few = seqlen_q * heads_q // heads_kv >= HOPPER_MIN_ROWS_QV and not args.tokens_per_split
        assert called.row.family == ("sm90" if few and is_latent else "sm80")


# --- splits -----------------------------------------------------------------------------------------------------------

STEP = {
    **CAUSAL,
    "batch": 128,
    "seqlen_q": 4,
    "seqlen_k": 8192,
    "num_heads_q": 8,
    "num_heads_kv": 1,
    "head_dim": 64,
    "head_dim_v": 512,
    "features": ("causal", "gqa", "lse", "qv"),
}
#: Batch, tokens, keys, query heads, KV heads; equal splits that fill the device.
EVEN = (
    (128, 4, 8192, 8, 1, 1),
    (64, 4, 8192, 16, 2, 1),
    (16, 8, 8192, 32, 8, 1),
    (16, 4, 8192, 32, 4, 2),
    (1, 8, 65536, 32, 8, 16),
    (1, 4, 65536, 16, 2, 64),
    (1, 4, 65536, 32, 4, 32),
    (5, 8, 8192, 32, 8, 3),
    (17, 8, 8192, 32, 8, 5),
    (256, 8, 8192, 32, 8, 1),
    (1, 8, 300, 32, 8, 1),
)


@pytest.mark.parametrize("batch, seqlen_q, seqlen_k, heads_q, heads_kv, splits", EVEN)
def test_equal_lengths_fill_whole_waves(
    batch: int, seqlen_q: int, seqlen_k: int, heads_q: int, heads_kv: int, splits: int
) -> None:
    """Without metadata: of all counts none takes less time, with what each split costs besides its keys."""
    asked = {"batch": batch, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "num_heads_q": heads_q}
    plan, row = schedule(**{**STEP, **asked, "num_heads_kv": heads_kv})
    assert row.family == "sm90" and plan.num_splits == splits
    ctas, tiles = batch * plan.heads_in_grid * plan.m_blocks, ceil(seqlen_k / row.tile.tile_n)
    waves = lambda n: ceil(ctas * n / plan.target_ctas)  # noqa: E731
    fair = [n for n in range(1, 129) if n == 1 or (waves(n) <= 8 and tiles // n >= 4)]
    best = min(waves(n) * (ceil(tiles / n) + 2) for n in fair)
    assert waves(splits) * (ceil(tiles / splits) + 2) == best


def test_metadata_may_split_what_fills_the_device() -> None:
    """Lengths may differ: the device must have shares to balance with. A grid of many waves balances itself."""
    common = {**STEP, "has_metadata": True}
    assert schedule(**common)[0].num_splits == 16 and schedule(**{**common, "seqlen_k": 65536})[0].num_splits == 16
    assert schedule(**{**common, "batch": 1, "seqlen_k": 65536})[0].num_splits == 128
    assert (
        schedule(**{**common, "batch": 1100})[0].num_splits == schedule(**{**common, "batch": 5000})[0].num_splits == 1
    )
    assert schedule(**{**common, "seqlen_k": 250})[0].num_splits == 1, "no share is shorter than four key tiles"
    assert schedule(**{**common, "seqlen_q": 512})[0].num_splits == 1, "prefill"


@pytest.mark.parametrize("batch", [1, 8, 64, 256, 1024])
def test_32_splits_of_every_client_take_no_more_room_than_they_are_worth(batch: int) -> None:
    """vLLM asks for 32 under a graph: with metadata the bound follows the batch, or partials of gigabytes."""
    common = {**STEP, "batch": batch, "num_heads_q": 64, "num_heads_kv": 8, "num_splits": 32}
    plan, row = schedule(**common, has_metadata=True)
    assert row.family == "sm90" and 1 <= plan.num_splits <= 32
    assert plan.num_splits == 32 or plan.num_splits == 1 or plan.num_splits * batch * 8 <= 16 * 132
    partials = plan.num_splits * batch * STEP["seqlen_q"] * 64 * (512 + 1) * 4
    assert partials <= 16 * 132 * 32 * 513 * 4 or plan.num_splits == 1
    assert schedule(**common)[0].num_splits == 32, "equal splits were asked for"
    assert schedule(**{**common, "num_splits": 1}, has_metadata=True)[0].num_splits == 1
