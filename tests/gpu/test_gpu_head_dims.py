"""Full GPU set: every head_dim and dtype, unequal head dims, head groups, and the edges of every row's tile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from broadhead import support
from calls import Call
from gpu_calls import ROWS, decode_call, prefill_call, row_call, row_cases

pytestmark = [pytest.mark.gpu, pytest.mark.full]

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = range(8, 513, 8)
PAIRS = (
    (64, 256),
    (128, 64),
    (512, 256),
    (48, 136),
    (192, 72),
    (64, 512),
    (512, 64),
    (192, 128),
    (128, 192),
    (8, 256),
    (264, 8),
    (72, 136),
    (576 - 64, 448),
    (40, 48),
    (256, 320),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dim(head_dim: int, dtype: torch.dtype, run_call: Callable) -> None:
    run_call(prefill_call(head_dim, dtype=dtype))
    run_call(decode_call(head_dim, dtype=dtype, num_splits=2))
    run_call(Call("func", (37, 37), (90, 90), head_dim=head_dim, dtype=dtype, causal=True, q_layout="packed"))


@pytest.mark.parametrize("head_dim, head_dim_v", PAIRS)
def test_unequal_head_dims(head_dim: int, head_dim_v: int, run_call: Callable) -> None:
    run_call(prefill_call(head_dim, head_dim_v=head_dim_v))
    run_call(prefill_call(head_dim, head_dim_v=head_dim_v, page_size=8, k_layout="rows", tail=3))
    run_call(decode_call(head_dim, head_dim_v=head_dim_v, k_layout="interleaved", num_splits=3))


@pytest.mark.parametrize("pack_gqa", [None, True, False])
@pytest.mark.parametrize(
    "heads", [(1, 1), (2, 1), (4, 2), (6, 1), (12, 2), (8, 1), (16, 2), (16, 1), (5, 5), (32, 1), (40, 1)]
)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_head_groups(head_dim: int, heads: tuple[int, int], pack_gqa: bool | None, run_call: Callable) -> None:
    q, kv = heads
    run_call(decode_call(head_dim, heads_q=q, heads_kv=kv, pack_gqa=pack_gqa, causal=True, sinks="fp32"))
    run_call(
        decode_call(head_dim, heads_q=q, heads_kv=kv, pack_gqa=pack_gqa, seqlens_q=(3,) * 4, causal=True, num_splits=3)
    )
    lengths = (70, 0, 9)
    call = Call("varlen", lengths, (90, 5, 9), q, kv, head_dim, causal=True, pack_gqa=pack_gqa, window=(40, 0))
    run_call(call)


def edges(size: int) -> tuple[int, ...]:
    return (0, 1, size - 1, size, size + 1, 2 * size - 1, 2 * size, 2 * size + 1)


EDGE_MASKS = {"full": {}, "causal": {"causal": True}, "window": {"window": (-1, -1)}}


@pytest.mark.parametrize("row, mask", row_cases(EDGE_MASKS, ROWS))
def test_tile_edges(row: support.KernelRow, mask: str, run_row: Callable) -> None:
    """Every pair of query and key lengths around the tile's sides, packed in one call and paged in another."""
    tile_m, tile_n = row.tile.tile_m, row.tile.tile_n
    masks = EDGE_MASKS[mask] if mask != "window" else {"window": (tile_n, tile_n // 2 - 1)}
    if row.phase == "decode":
        lengths_q = (0, 1, 2, tile_m - 1, tile_m, tile_m + 1)
        pairs = [(sq, sk) for sq in lengths_q for sk in (*edges(tile_n), 5 * tile_n - 1)]
        options = {"heads_q": 2, "heads_kv": 2}
    else:
        pairs = [(sq, sk) for sq in edges(tile_m) for sk in edges(tile_n)]
        options = {"heads_q": 2, "heads_kv": 1}
    lengths = tuple(zip(*pairs, strict=True))
    run_row(row, row_call(row, "varlen", *lengths, **masks, **options))
    run_row(row, row_call(row, "varlen", *lengths, **masks, **options, page_size=tile_n // 2, num_splits=2))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256, 512])
@pytest.mark.parametrize("sq, sk", [(1, 1), (127, 128), (128, 127), (129, 65), (64, 600), (600, 64), (257, 257)])
@pytest.mark.parametrize("causal", [False, True])
def test_dense(head_dim: int, sq: int, sk: int, causal: bool, run_call: Callable) -> None:
    run_call(Call("func", (sq,) * 2, (sk,) * 2, heads_q=4, head_dim=head_dim, causal=causal, k_layout="rows"))
