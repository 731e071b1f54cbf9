"""Full GPU set: kernels have code of their own for plain calls, dense and over pages; and rows that costs choose."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import broadhead
import pytest
import torch
from broadhead import support
from broadhead.costs import Cost
from calls import Built, Call, build
from checks import check_call
from gpu_calls import PREFILL_ROWS, TORCH_DTYPES, row_call, row_cases, row_id

pytestmark = [pytest.mark.gpu, pytest.mark.full]

ROWS_BY_COST = tuple(row for row in PREFILL_ROWS if row.by_cost)
MASKS = {"full": {}, "causal": {"causal": True}, "window": {"causal": True, "window": (70, 0)}}
PAGE_SIZES = (1, 16, 48, 64, 128)


# --- plain calls ------------------------------------------------------------------------------------------------------


def about_tiles(row: support.KernelRow) -> dict[str, tuple[int, ...]]:
    """Lengths at the edges of tiles: one row, none, a full tile, one more, one less."""
    m, n = row.tile.tile_m, row.tile.tile_n
    return {
        "seqlens_q": (m + 1, 1, 0, m, 2 * m - 1, 3),
        "seqlens_k": (2 * n + 1, n, 5, n - 1, 4 * n + m, 0),
    }


def forms(row: support.KernelRow, turn: int, **mask) -> dict[str, Call]:
    """A plain call of packed sequences, one over pages, both with divided keys, and the same two as calls that are not
    plain: with left padding of nothing, and over a cache that batch indices choose from."""
    page_size = PAGE_SIZES[turn % len(PAGE_SIZES)]
    options = {"heads_q": 6, "heads_kv": 2, "num_splits": 1, "descale": "", **about_tiles(row), **mask}
    cache = {"ragged_q": True, "slack_k": 9, **options}
    nothing = (0,) * len(options["seqlens_q"])
    return {
        "dense": row_call(row, "varlen", **options),
        "paged": row_call(row, "varlen", page_size=page_size, slack_k=9, **options),
        "dense, divided": row_call(row, "varlen", **{**options, "num_splits": 3}),
        "paged, divided": row_call(row, "varlen", page_size=page_size, slack_k=9, **{**options, "num_splits": 2}),
        "paged, not plain": row_call(row, "kvcache", page_size=page_size, leftpad=nothing, **cache),
        "dense, not plain": row_call(row, "kvcache", batch_idx=True, **cache),
    }


def rounded(row: support.KernelRow) -> float:
    """Two roundings of the output, which is bf16 where q has 8 bits."""
    return 2 * torch.finfo(torch.float16 if row.dtype == "fp16" else torch.bfloat16).eps


@pytest.mark.parametrize("row, mask", row_cases(MASKS, tuple(row for row in PREFILL_ROWS if "qv" not in row.requires)))
def test_all_forms_of_a_call_agree(
    row: support.KernelRow, mask: str, run_row: Callable, cuda: torch.device, rng: random.Random
) -> None:
    """Each is right, in an output of NaN, and they differ by roundings at most."""
    drawn: dict[int, tuple] = {}
    results: dict[str, torch.Tensor] = {}
    for name, call in forms(row, PREFILL_ROWS.index(row), **MASKS[mask]).items():
        built = build(call, cuda, rng, given=drawn)
        run_row(row, built)
        drawn = dict(enumerate(zip(built.q, built.k, built.v, strict=True)))
        results[name] = torch.cat(built.split(built.out)).float()
    for name, out in results.items():
        message = f"{row.id} {mask}: {name}"
        # Small numbers are sums of large ones, whose weights are rounded against another maximum.
        bounds = {"rtol": rounded(row), "atol": 0.06 if row.dtype == "float8_e4m3fn" else rounded(row) / 4}
        torch.testing.assert_close(out, results["dense"], **bounds, msg=lambda x, m=message: m + x)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("row", PREFILL_ROWS, ids=row_id)
def test_plain_calls_over_pages(row: support.KernelRow, page_size: int, run_row: Callable) -> None:
    """Batch indices, garbage behind the pages that are used and in place of freed ones, more tiles than places."""
    lengths = about_tiles(row)
    options = {"page_size": page_size, "num_splits": 1, "heads_q": 6, "slack_k": 33}
    run_row(row, row_call(row, "kvcache", **lengths, **options, batch_idx=True, ragged_q=True, tail=3, causal=True))
    window = {"causal": True, "window": (row.tile.tile_n + 5, 0), "freed_entries": True}
    run_row(row, row_call(row, "kvcache", **lengths, **options, **window, ragged_q=True, sinks="fp32"))
    divided = {**options, "num_splits": 3}
    run_row(row, row_call(row, "kvcache", **lengths, **divided, **window, ragged_q=True, batch_idx=True, tail=3))
    many = {name: 30 * sizes for name, sizes in lengths.items()}
    run_row(row, row_call(row, "varlen", **many, **options, out_layout="guarded"))


@pytest.mark.parametrize("row", PREFILL_ROWS, ids=row_id)
def test_dense_plain_calls(row: support.KernelRow, run_row: Callable) -> None:
    """Sequences of one length, whole tiles and parts of them, NaN behind their keys; heads that do not fill their
    columns."""
    m, n = row.tile.tile_m, row.tile.tile_n
    for sq, sk in ((m, n), (m + 1, n + 1), (2 * m, 2 * n), (m - 1, 3 * n - 1), (1, n), (8, 8)):
        for causal in (False, True):
            options = {"num_splits": 1, "heads_q": 4, "causal": causal, "out_layout": "guarded"}
            run_row(row, row_call(row, "func", (sq,) * 3, (sk,) * 3, **options))
            run_row(row, row_call(row, "func", (sq,) * 3, (sk,) * 3, **options, k_layout="followed"))
            run_row(row, row_call(row, "func", (sq,) * 3, (sk,) * 3, **options, head_dim=row.head_dim - 16))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("batch", [30, 90])
@pytest.mark.parametrize("row", PREFILL_ROWS, ids=row_id)
def test_many_tiles(row: support.KernelRow, batch: int, causal: bool, run_row: Callable) -> None:
    """More tiles than run at a time: CTAs take them in turn, or from a counter. 240 are two rounds of 132 CTAs."""
    m, n = row.tile.tile_m, row.tile.tile_n
    lengths = {"seqlens_q": (2 * m - 3,) * batch, "seqlens_k": (2 * m - 3 + (0 if causal else n),) * batch}
    run_row(row, row_call(row, "func", **lengths, num_splits=1, heads_q=4, causal=causal, out_layout="guarded"))


# --- rows that costs choose -------------------------------------------------------------------------------------------


@pytest.fixture
def run_by_cost(costs_are: Callable, row_ran: Callable, capability: tuple[int, int]) -> Callable[..., None]:
    """`run_by_cost(row, built, **overrides)`: run and check, on that row as the one that takes the least time."""

    def run(row: support.KernelRow, built: Built, **overrides) -> None:
        if capability not in row.capabilities:
            pytest.skip(f"{row.id} runs on {row.capabilities}, this device is {capability}")
        costs_are({})
        check_call(built, **overrides)
        first = row_ran(dtype=built.call.dtype)
        assert first.id != row.id
        costs_are({first.name: Cost(9), row.name: Cost(1)})
        built.out.fill_(float("nan"))
        check_call(built, **overrides)
        assert row_ran(dtype=built.call.dtype).id == row.id
        assert f"takes less time than {first.id}" in broadhead.last_dispatch()[2]

    return run


STEPS = {
    "decode": {"seqlens_q": (1, 1, 1, 1), "seqlens_k": (30, 17, 0, 9)},
    "drafts": {"seqlens_q": (4, 1, 2, 4), "seqlens_k": (30, 17, 5, 40), "ragged_q": True},
    "chunk": {"seqlens_q": (50, 1, 0, 33), "seqlens_k": (70, 17, 0, 33), "ragged_q": True},
}


@pytest.mark.parametrize("metadata", [False, True], ids=["bare", "metadata"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("row", ROWS_BY_COST, ids=row_id)
def test_steps_over_few_keys(
    row: support.KernelRow, step: str, metadata: bool, run_by_cost: Callable, cuda: torch.device, rng: random.Random
) -> None:
    call = row_call(
        row, "kvcache", **STEPS[step], heads_q=8, page_size=16, causal=True, metadata=metadata, num_splits=0
    )
    run_by_cost(row, build(call, cuda, rng))


@pytest.mark.parametrize("kind", ["stale", "foreign lengths", "splits", "tag", "random"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("row", ROWS_BY_COST, ids=row_id)
def test_metadata_is_not_for_them(
    row: support.KernelRow, step: str, kind: str, run_by_cost: Callable, cuda: torch.device, rng: random.Random
) -> None:
    """They ignore what was planned, for whatever lengths: it is for the first row."""
    call = row_call(row, "kvcache", **STEPS[step], heads_q=8, page_size=16, causal=True, num_splits=0, slack_k=40)
    built = build(call, cuda, rng)
    if kind == "stale":
        lengths = torch.tensor([0, 1, 0, 3], dtype=torch.int32, device=cuda)
        metadata = dataclasses.replace(built, kwargs={**built.kwargs, "cache_seqlens": lengths}).scheduler_metadata()
    elif kind == "foreign lengths":
        heads = (call.heads_q, call.heads_kv, call.head_dim)
        longest = torch.full((4,), 60_000, dtype=torch.int32, device=cuda)
        metadata = broadhead.get_scheduler_metadata(
            4, max(call.seqlens_q), 65536, *heads, longest, qkv_dtype=call.dtype, page_size=16, causal=True,
            cu_seqlens_q=built.kwargs.get("cu_seqlens_q"),
        )  # fmt: skip
    else:
        metadata = torch.empty_like(built.scheduler_metadata()).copy_(built.scheduler_metadata())
        if kind == "splits":
            metadata[:4] = torch.tensor([10**6, -5, 0, 7], dtype=torch.int32, device=cuda)
        elif kind == "tag":
            metadata[4:8] += 1
        else:
            metadata.random_(-(2**31), 2**31 - 1)
    run_by_cost(row, built, scheduler_metadata=metadata)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_as_measured(head_dim: int, dtype: str, run_call: Callable, rng: random.Random) -> None:
    """By the costs of this release: random short calls are right on whatever row they run."""
    for _ in range(20):
        batch, most = rng.choice((1, 5, 40)), rng.choice((1, 8, 70, 300))
        lengths_q = tuple(rng.randint(1, most) for _ in range(batch))
        lengths_k = tuple(length + rng.choice((0, rng.randint(0, 300))) for length in lengths_q)
        options = {"heads_q": rng.choice((1, 4, 8)), "heads_kv": 1, "causal": rng.random() < 0.7}
        options |= {"head_dim": head_dim - rng.choice((0, 8)), "dtype": TORCH_DTYPES[dtype], "num_splits": 0}
        if rng.random() < 0.5:
            run_call(Call("varlen", lengths_q, lengths_k, **options))
        else:
            planned = {"page_size": 16, "ragged_q": True, "metadata": rng.random() < 0.5}
            run_call(Call("kvcache", lengths_q, lengths_k, **options, **planned))
