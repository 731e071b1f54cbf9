"""Full GPU set: every prefill row around its tiles: lengths, head groups, head dims, many tiles."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from broadhead import support
from calls import build
from gpu_calls import PREFILL_ROWS, dims_within, row_call, row_cases, row_id

pytestmark = [pytest.mark.gpu, pytest.mark.full]

GROUPS = (1, 2, 3, 6, 8, 16, 64)

each_row = pytest.mark.parametrize("row", PREFILL_ROWS, ids=row_id)


def packed_rows(row: support.KernelRow, group: int) -> int:
    """Tokens of a tile when the heads of a group share it."""
    return max(1, row.tile.tile_m // group)


@pytest.mark.parametrize("pack_gqa", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("group", GROUPS)
@each_row
def test_head_groups(row: support.KernelRow, group: int, pack_gqa: bool, run_row: Callable) -> None:
    """A packed tile holds whole tokens: it keeps rows free where the group does not divide it."""
    tokens, tile_n = packed_rows(row, group) if pack_gqa else row.tile.tile_m, row.tile.tile_n
    heads_kv = 2 if group <= 8 else 1
    lengths_q = (1, tokens - 1, tokens, tokens + 1, 0, 2 * tokens, 2 * tokens + 1, 4 * tokens + 1)
    lengths_k = (tile_n + 1, 2 * tile_n, tile_n - 1, tokens + 1, 7, tile_n, 3 * tile_n + 5, 2 * tile_n + 1)
    options = {"heads_q": group * heads_kv, "heads_kv": heads_kv, "pack_gqa": pack_gqa, "sinks": "fp32"}
    run_row(row, row_call(row, "varlen", lengths_q, lengths_k, causal=True, **options))
    run_row(row, row_call(row, "varlen", lengths_q, lengths_k, num_splits=3, slack_q=2, tail=1, **options))


@pytest.mark.parametrize("heads", [128, 200])
@each_row
def test_groups_larger_than_a_tile(row: support.KernelRow, heads: int, run_row: Callable) -> None:
    """Packing is a wish: a group that no tile holds runs all the same."""
    options = {"heads_q": heads, "heads_kv": 1, "pack_gqa": True, "causal": True}
    run_row(row, row_call(row, "varlen", (1, 3, 0, 5), (row.tile.tile_n + 1, 3, 4, 9), **options))


@pytest.mark.parametrize(
    "row, head_dim, head_dim_v",
    [pytest.param(row, d, dv, id=f"{row.id}-{d}-{dv}") for row in PREFILL_ROWS for d, dv in dims_within(row)],
)
def test_head_dims(row: support.KernelRow, head_dim: int, head_dim_v: int, run_row: Callable) -> None:
    """NaN lies behind the last column of each head, or the next tensor does: neither is read nor overwritten."""
    tile_m, tile_n = row.tile.tile_m, row.tile.tile_n
    options = {"head_dim": head_dim, "head_dim_v": head_dim_v, "heads_q": 4}
    gapped = {"q_layout": "gapped", "k_layout": "gapped", "out_layout": "gapped"}
    run_row(row, row_call(row, "varlen", (tile_m + 3, 9), (tile_n + 3, 2 * tile_n), **options, **gapped))
    paged = {"page_size": 16, "k_layout": "interleaved", "causal": True, "num_splits": 2}
    run_row(row, row_call(row, "varlen", (tile_m + 3, 9), (5 * tile_n + 3, tile_n), **options, **paged))


@pytest.mark.parametrize("row, mask", row_cases({"full": {}, "causal": {"causal": True}}))
def test_dense_lengths(row: support.KernelRow, mask: str, run_row: Callable) -> None:
    """Far more queries than keys and the reverse, single rows and keys, tiles in pairs as clusters take them."""
    m, n = row.tile.tile_m, row.tile.tile_n
    lengths = ((1, 1), (1, 7 * n + 3), (6 * m + 1, 7), (2 * m, 2 * n), (4 * m - 1, n), (3 * m, 4 * n + 1), (m, 1))
    for sq, sk in lengths:
        run_row(row, row_call(row, "func", (sq,) * 3, (sk,) * 3, heads_q=4, causal=mask == "causal"))


@each_row
def test_nothing_to_do(row: support.KernelRow, run_row: Callable) -> None:
    """No queries, no keys, neither; out = 0 and LSE = -inf where there are queries."""
    m, n = row.tile.tile_m, row.tile.tile_n
    for lengths_q, lengths_k in (
        ((0, 0, 0), (n, 0, 5)),
        ((2 * m + 1, 1, 5), (0, 0, 0)),
        ((0,), (0,)),
        ((0, 0, m + 1, 0), (9, 0, n + 1, 0)),
    ):
        for options in ({}, {"causal": True, "num_splits": 3}, {"page_size": 16, "sinks": "fp32"}):
            run_row(row, row_call(row, "varlen", lengths_q, lengths_k, slack_q=3, tail=2, **options))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("row, mask", row_cases({"full": {}, "window": {"causal": True, "window": (90, 0)}}))
def test_more_tiles_than_multiprocessors(
    row: support.KernelRow, mask: str, paged: bool, run_row: Callable, rng: random.Random
) -> None:
    """Blocks that go on to another tile: of another head, another sequence, and past many empty ones."""
    lengths_q = tuple(rng.choice((0, 1, row.tile.tile_m, rng.randint(1, 3 * row.tile.tile_m))) for _ in range(40))
    lengths_k = tuple(rng.choice((0, 1, row.tile.tile_n, rng.randint(1, 4 * row.tile.tile_n))) for _ in range(40))
    options = {"heads_q": 8, "heads_kv": 2, "page_size": 64 if paged else 0}
    options |= {"causal": True, "window": (90, 0)} if mask == "window" else {}
    run_row(row, row_call(row, "varlen", lengths_q, lengths_k, **options))


@pytest.mark.parametrize("row, mask", row_cases({"full": {}, "causal": {"causal": True}}))
def test_large_values(row: support.KernelRow, mask: str, run_row: Callable, cuda: torch.device) -> None:
    """Scores of hundreds and values near the end of fp16: nothing overflows between two steps."""
    if row.dtype != "fp16" or "qv" in row.requires:
        pytest.skip("bf16 has the range of fp32, e4m3 ends at 448, and values of thousands are no keys of a qv")
    m, n = row.tile.tile_m, row.tile.tile_n
    call = row_call(row, "varlen", (2 * m + 1, 9, 70), (3 * n + 1, 2 * n, 70), heads_q=4, causal=mask == "causal")
    built = build(call, cuda)
    for name, logical, factor in (("q", built.q, 6.0), ("k", built.k, 6.0), ("v", built.v, 9000.0)):
        built.kwargs[name].mul_(factor)
        logical[:] = [x * factor for x in logical]
    run_row(row, built)
