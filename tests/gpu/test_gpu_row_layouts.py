"""Full GPU set: every prefill row on every layout: pages, strides, left padding, freed and shared keys."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from broadhead import support
from calls import build
from gpu_calls import PREFILL_ROWS, row_call, row_cases, row_id
from random_calls import broadcast_keys, repeated_heads

pytestmark = [pytest.mark.gpu, pytest.mark.full]

PAGE_SIZES = (1, 3, 8, 12, 16, 32, 64, 128, 256, "tile", "two tiles", "one and a half")
K_LAYOUTS = ("plain", "interleaved", "heads_first", "rows", "gapped", "overlapping")
Q_LAYOUTS = ("packed", "heads_first", "gapped", "plain")
OUT_LAYOUTS = ("gapped", "plain", "heads_first")

each_row = pytest.mark.parametrize("row", PREFILL_ROWS, ids=row_id)


def page_rows(row: support.KernelRow, page_size: int | str) -> int:
    tile_n = row.tile.tile_n
    named = {"tile": tile_n, "two tiles": 2 * tile_n, "one and a half": 3 * tile_n // 2}
    return named[page_size] if isinstance(page_size, str) else page_size


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@each_row
def test_pages(row: support.KernelRow, page_size: int | str, run_row: Callable) -> None:
    """Shuffled tables with garbage behind their used entries; each page size meets each layout in some row."""
    m, n, size = row.tile.tile_m, row.tile.tile_n, page_rows(row, page_size)
    turn = PAGE_SIZES.index(page_size) + PREFILL_ROWS.index(row)
    first, second = (K_LAYOUTS[(turn + shift) % len(K_LAYOUTS)] for shift in (0, 3))
    options = {"page_size": size, "slack_k": size + 1, "heads_q": 4}
    lengths = {"seqlens_q": (m + 1, 1, 0, 70), "seqlens_k": (2 * n + 3, 40, 9, 5 * n + 1)}
    run_row(row, row_call(row, "varlen", **lengths, k_layout=first, **options))
    masks = {"causal": True, "window": (n + 5, 0), "freed_entries": True}
    run_row(row, row_call(row, "kvcache", **lengths, k_layout=second, ragged_q=True, tail=3, **masks, **options))


@pytest.mark.parametrize("turn", range(6))
@each_row
def test_strides(row: support.KernelRow, turn: int, run_row: Callable) -> None:
    """Slices and transposes of wider tensors on every side, with poison in the gaps."""
    m, n, turn = row.tile.tile_m, row.tile.tile_n, turn + PREFILL_ROWS.index(row)
    layouts = {
        "q_layout": Q_LAYOUTS[turn % 4],
        "k_layout": K_LAYOUTS[turn % 5],  # overlapping views are of pages
        "out_layout": OUT_LAYOUTS[turn % 3],
    }
    options = {"heads_q": 6, "heads_kv": 2, **layouts}
    run_row(row, row_call(row, "func", (m + 1,) * 2, (n + 9,) * 2, **options, causal=True))
    run_row(row, row_call(row, "varlen", (2 * m, 7), (n - 1, 2 * n + 1), slack_q=5, slack_k=3, tail=4, **options))


@pytest.mark.parametrize("page_size", [0, 1, 16, 64, 128])
@each_row
def test_leftpad_and_batch_index(row: support.KernelRow, page_size: int, run_row: Callable) -> None:
    """Sequences that begin within a page or a tile of keys, in a cache of more sequences than the batch has."""
    m, n = row.tile.tile_m, row.tile.tile_n
    lengths = {"seqlens_q": (m + 5,) * 4, "seqlens_k": (2 * n + 3, n, m + 5, 0)}
    options = {"page_size": page_size, "heads_q": 4, "slack_k": 33}
    leftpad = (n - 1, 0, 3, 70)
    run_row(row, row_call(row, "kvcache", **lengths, leftpad=leftpad, **options))
    masks = {"causal": True, "window": (n, 0), "freed_entries": True}
    run_row(row, row_call(row, "kvcache", **lengths, leftpad=leftpad, batch_idx=True, num_splits=2, **masks, **options))


FREED = {
    "window": {"causal": True, "window": (40, 0)},
    "window_one": {"causal": True, "window": (0, 0)},
    "window_right": {"window": (-1, 9)},
    "chunk": {"attention_chunk": 96, "causal": True},
    "prefix_window": {"causal": True, "window": (20, 0), "prefix": (30, 0, 200)},
}


@pytest.mark.parametrize("page_size", [1, 16, 64, "tile"])
@pytest.mark.parametrize("row, mask", row_cases(FREED))
def test_freed_pages(row: support.KernelRow, mask: str, page_size: int | str, run_row: Callable) -> None:
    """Long sequences under narrow masks: pages that no query sees are gone, and so are their entries."""
    m, n = row.tile.tile_m, row.tile.tile_n
    lengths = {"seqlens_q": (m + 5, 3, 40), "seqlens_k": (8 * n, 5 * n + 1, 300)}
    options = {"page_size": page_rows(row, page_size), "freed_entries": True, "heads_q": 4, **FREED[mask]}
    run_row(row, row_call(row, "varlen", **lengths, **options))


@each_row
def test_keys_shared_by_the_batch(row: support.KernelRow, run_row: Callable, cuda: torch.device) -> None:
    """k and v with stride 0 over the batch."""
    m, n = row.tile.tile_m, row.tile.tile_n
    for k_layout in ("plain", "heads_first", "rows"):
        built = build(row_call(row, "func", (m + 1,) * 3, (2 * n + 1,) * 3, heads_q=4, k_layout=k_layout), cuda)
        broadcast_keys(built, random.Random(0))
        assert built.kwargs["k"].stride(0) == 0
        run_row(row, built)


@each_row
def test_one_query_for_all_heads(row: support.KernelRow, run_row: Callable, cuda: torch.device) -> None:
    """q with stride 0 over the heads."""
    for pack_gqa in (True, False):
        built = build(row_call(row, "func", (70,) * 2, (200,) * 2, heads_q=6, heads_kv=2, pack_gqa=pack_gqa), cuda)
        repeated_heads(built, random.Random(0))
        run_row(row, built)


@pytest.mark.parametrize("ragged", [False, True])
@each_row
def test_append(row: support.KernelRow, ragged: bool, run_row: Callable) -> None:
    """Keys that the call itself appends are in the cache before its copies read them."""
    m, n = row.tile.tile_m, row.tile.tile_n
    lengths = (m + 1, 0, 1, 9) if ragged else (m + 1,) * 4
    totals = (2 * n + m, 7, 1, 2 * m) if ragged else (2 * n + m, m + 1, m + 2, 2 * m)
    for page_size in (0, 16, 128):
        options = {"num_new": lengths, "ragged_q": ragged, "page_size": page_size, "causal": True, "slack_k": 17}
        run_row(row, row_call(row, "kvcache", lengths, totals, **options))
