"""The curated GPU set: every row of the table and every feature in a few tens of small calls; memcheck runs it too."""

from __future__ import annotations

import random
from collections.abc import Callable

import broadhead
import pytest
import torch
from broadhead import support
from calls import Call, build
from checks import check_against, check_call
from edge_cases import BASE
from edge_rows import ONE_OF_A_KIND, run_edge, shape_of, suited, takes
from gpu_calls import (
    MASK_FEATURES,
    PREFILL_ROWS,
    ROWS,
    capture,
    decode_call,
    prefill_call,
    row_call,
    row_cases,
    row_id,
    shortened,
)

pytestmark = [pytest.mark.gpu, pytest.mark.curated]

#: What each row's call does beside the plain case, in turn: every feature meets several rows.
PREFILL_TWISTS = (
    {"window": (70, 0)},
    {"softcap": 20.0, "sinks": "fp32"},
    {"prefix": (40, 0, 3, 209)},
    {"slack_q": 3, "slack_k": 5, "tail": 4},
    {"page_size": 16, "k_layout": "interleaved"},
    {"attention_chunk": 48},
    {"causal": False, "window": (31, 9), "sinks": "q"},
)
DECODE_TWISTS = (
    {"num_splits": 3},
    {"metadata": True, "causal": True},
    {"page_size": 1, "sinks": "fp32"},
    {"page_size": 64, "window": (100, 0), "causal": True},
    {"k_layout": "interleaved", "softcap": 20.0, "num_splits": 2},
    {"leftpad": (5, 0, 0, 40), "batch_idx": True},
    {"seqlens_q": (7,) * 4, "causal": True, "num_splits": 2},
)


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_row(row: support.KernelRow, run_row: Callable) -> None:
    """Each row computes its head dims."""
    index = ROWS.index(row)
    make, twists = (decode_call, DECODE_TWISTS) if row.phase == "decode" else (prefill_call, PREFILL_TWISTS)
    call = make(row.head_dim, **twists[index % len(twists)])
    of_the_row = ("dtype", "kv_dtype", "head_dim", "head_dim_v", "qv", "descale")
    run_row(row, row_call(row, **{name: x for name, x in vars(call).items() if name not in of_the_row}))


#: What may go wrong differently in each prefill kernel: copies, masks, tiles, splits.
ROW_CALLS = {
    "packed": {"causal": True, "heads_q": 6, "slack_q": 3, "tail": 2},
    "pages_16": {"page_size": 16, "k_layout": "interleaved", "heads_q": 4},
    "pages_64": {"page_size": 64, "k_layout": "heads_first", "causal": True, "window": (50, 0), "freed_entries": True},
    "splits": {"num_splits": 3, "sinks": "fp32", "q_layout": "gapped", "k_layout": "gapped", "out_layout": "gapped"},
    "masks": {"causal": True, "window": (40, 0), "prefix": (30, 0, 3, 100), "softcap": 20.0},
}


BF16_ROWS = tuple(row for row in PREFILL_ROWS if row.dtype == "bf16" and not row.requires and row.family != "sm80")
#: Portable kernels, and those that only some calls are for; the sanitizers take minutes for each call of theirs too.
OTHER_ROWS = tuple(row for row in PREFILL_ROWS if row.requires or "descale" in row.features or row.id.endswith("bf16"))
OTHER_CALLS = {name: ROW_CALLS[name] for name in ("pages_16", "splits")}
PREFILL_CASES = row_cases(ROW_CALLS, BF16_ROWS) + row_cases(
    OTHER_CALLS, tuple(row for row in OTHER_ROWS if row not in BF16_ROWS)
)


@pytest.mark.parametrize("row, name", PREFILL_CASES)
def test_prefill_row(row: support.KernelRow, name: str, run_row: Callable) -> None:
    """A few small calls of every prefill kernel; those of fp16 differ in their numbers alone."""
    m, n = row.tile.tile_m, row.tile.tile_n
    run_row(row, row_call(row, "varlen", (m + 5, 1, 0, 9), (2 * n + 5, 40, 7, n), **ROW_CALLS[name]))


#: Values that point past each tensor, and the kinds of kernels that must not follow them.
EDGES = ("cu_seqlens_q_256_beyond", "cu_seqlens_k_extreme", "cache_seqlens_int_max", "batch_idx_extreme", "varlen_16",
         "bad_first_middle_last_1", "past_the_table_and_bad_64", "append_past_the_table_16")  # fmt: skip


@pytest.mark.parametrize("row", ONE_OF_A_KIND, ids=row_id)
def test_edges(row: support.KernelRow, only_row: Callable, cuda: torch.device, rng: random.Random) -> None:
    """Lengths, offsets, page ids and indices out of range: nothing outside the tensors is read or written."""
    only_row(row)
    by_name = {edge.name: edge for edge in BASE}
    for turn, name in enumerate(EDGES):
        edge = suited(row, by_name[name].with_(causal=turn % 2 == 0))
        if takes(row, edge):
            run_edge(edge, shape_of(row, turn, edge), cuda, rng)


#: Masks that are values, of four sequences.
VALUE_CALLS = {
    "ranges": {"causal": True, "window": (20, 0), "ranges": "random"},
    "ranges_in_window": {"causal": True, "window": (90, 0), "ranges": "images", "ranges_in_window": True},
    "causal_each": {"causal_each": (True, False, True, False), "causal_dtype": torch.int32},
    "tree": {"causal": True, "tree": "eagle"},
}


@pytest.mark.parametrize("row, name", row_cases(VALUE_CALLS, ONE_OF_A_KIND))
def test_mask_values(row: support.KernelRow, name: str, run_row: Callable) -> None:
    """A few small calls of every kind of kernel."""
    m, n = (min(row.tile.tile_m, 60) if name == "tree" else row.tile.tile_m), row.tile.tile_n
    lengths = {"seqlens_q": (m + 4 if row.phase == "prefill" else 8, 1, 0, 9), "seqlens_k": (2 * n + 5, 40, 7, n)}
    options = {"page_size": 16, "heads_q": 4, "tail": 2, **VALUE_CALLS[name]}
    run_row(row, row_call(row, "varlen", **lengths, **options, freed_entries=True))
    run_row(row, row_call(row, "kvcache", **lengths, **options, ragged_q=True, num_splits=3))


FEATURES = {
    "dense": Call("func", (70, 70), (130, 130), heads_q=4),
    "dense_one_row": Call("func", (1, 1), (130, 130), heads_q=4, heads_kv=1),
    "dense_strides": Call("func", (70,), (130,), q_layout="packed", k_layout="rows", causal=True),
    "dense_heads_first": Call("func", (70,), (130,), q_layout="heads_first", k_layout="heads_first"),
    "dense_chunk": Call("func", (200,), (200,), attention_chunk=50, causal=True),
    "more_queries_than_keys": Call("func", (150,), (20,), causal=True, sinks="fp32"),
    "no_keys": Call("varlen", (5, 130), (0, 0)),
    "head_dim_8": prefill_call(8),
    "head_dim_40": prefill_call(40),
    "head_dim_200": prefill_call(200),
    "head_dim_264": prefill_call(264, heads_q=2, heads_kv=1),
    "head_dim_v_smaller": prefill_call(192, head_dim_v=128),
    "head_dim_v_larger": prefill_call(64, head_dim_v=512, heads_q=2, heads_kv=1),
    "decode_head_dim_v": decode_call(96, head_dim_v=40),
    "scale_one": prefill_call(64, softmax_scale=1.0),
    "gqa_unpacked": prefill_call(64, pack_gqa=False),
    "gqa_packed": prefill_call(64, pack_gqa=True),
    "mqa_16": decode_call(128, heads_q=16),
    "mqa_48": decode_call(64, heads_q=48),
    "group_6_two_tokens": decode_call(128, heads_q=12, heads_kv=2, seqlens_q=(2, 2, 2, 2), causal=True),
    "varlen_used": prefill_call(128, slack_q=7, slack_k=9, tail=5),
    "varlen_loose_max": prefill_call(64, max_seqlen_slack=300),
    "window_left_only": prefill_call(64, causal=False, window=(33, -1)),
    "window_right_only": prefill_call(64, causal=False, window=(-1, 5)),
    "window_zero": prefill_call(64, window=0),
    "prefix_window": prefill_call(64, window=(20, 0), prefix=(64, 0, 3, 100)),
    "page_3": decode_call(64, page_size=3),
    "page_48_prefill": prefill_call(128, page_size=48),
    "page_256": decode_call(256, page_size=256),
    "overlapping_pool": decode_call(128, page_size=32, k_layout="overlapping"),
    "contiguous_cache": decode_call(128, page_size=0, batch_idx=True, leftpad=(7, 3, 0, 0)),
    "ragged_decode": decode_call(128, ragged_q=True, seqlens_q=(1, 0, 1, 3), tail=2, causal=True),
    "append": decode_call(64, seqlens_k=(300, 17, 1, 129), num_new=(1, 1, 1, 1), causal=True),
    "append_ragged": decode_call(
        64, seqlens_q=(3, 0, 1, 2), seqlens_k=(300, 17, 1, 129), num_new=(3, 0, 1, 2), ragged_q=True, causal=True
    ),
    "splits_bound": decode_call(512, num_splits=32, heads_q=8),
    "splits_prefill": prefill_call(256, num_splits=4),
    "splits_sinks_lse": decode_call(64, num_splits=5, sinks="q", softcap=10.0),
    "tokens_per_split": decode_call(128, seqlens_k=(300, 17, 0, 128), tokens_per_split=64),
    "e4m3_cache": decode_call(128, kv_dtype=torch.float8_e4m3fn, descale="kv", causal=True),
    "guarded_out": decode_call(64, num_splits=3, out_layout="guarded", ragged_q=True, tail=2),
    "metadata_ragged": decode_call(
        128, ragged_q=True, seqlens_q=(1, 2, 1, 3), metadata=True, causal=True, num_splits=32
    ),
}


@pytest.mark.parametrize("name", FEATURES)
def test_feature(name: str, run_call: Callable) -> None:
    run_call(FEATURES[name])


def test_every_feature_of_the_table_is_here() -> None:
    """A feature that a row names is exercised by one of the calls above."""
    calls = [*FEATURES.values()]
    values = [prefill_call(64, **options) for options in VALUE_CALLS.values()]
    used = {
        "query_ranges": any(c.ranges for c in values),
        "tree_mask": any(c.tree for c in values),
        "causal_by_sequence": any(c.causal_each for c in values),
        "causal": any(c.causal for c in calls),
        "window": any(c.normalized_window[0] >= 0 for c in calls),
        "attention_chunk": any(c.attention_chunk for c in calls),
        "softcap": any(c.softcap for c in calls),
        "sinks": any(c.sinks for c in calls),
        "prefix_lens": any(c.prefix for c in calls),
        "varlen": any(c.function == "varlen" for c in calls),
        "seqused": any(c.slack_q for c in calls),
        "gqa": any(c.heads_q != c.heads_kv for c in calls),
        "paged": any(c.page_size for c in calls),
        "leftpad": any(c.leftpad for c in calls),
        "batch_idx": any(c.batch_idx for c in calls),
        "split_kv": any((c.num_splits or 0) > 1 for c in calls),
        "lse": True,
    }
    listed = set(support.FEATURES) | set(MASK_FEATURES.values())
    assert set(used) == listed, "a feature of the table has no case here"
    assert all(used.values())


@pytest.mark.parametrize("head_dim", [128, 512])
def test_graph_replays_with_new_lengths(head_dim: int, cuda: torch.device, rng: random.Random) -> None:
    """One captured step, metadata and all, replays for other cache_seqlens."""
    built = build(decode_call(head_dim, num_splits=8, causal=True), cuda, rng)
    buffer = torch.zeros(17, dtype=torch.int32, device=cuda)

    def step() -> None:
        built.scheduler_metadata(out=buffer)
        broadhead.flash_attn_with_kvcache(**built.kwargs, scheduler_metadata=buffer)

    graph = capture(step)
    for lengths in ([300, 17, 0, 129], [1, 0, 0, 64], [257, 16, 0, 1]):
        built.kwargs["cache_seqlens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        built.out.fill_(float("nan"))
        graph.replay()
        check_against(shortened(built, lengths), built.out)


def test_foreign_metadata(cuda: torch.device, rng: random.Random) -> None:
    """A buffer of random bits is read within bounds and changes no result."""
    built = build(decode_call(128, num_splits=8), cuda, rng)
    foreign = torch.randint(-(2**31), 2**31 - 1, (17,), dtype=torch.int32, device=cuda)
    check_call(built, scheduler_metadata=foreign)


def test_combine_kernel(cuda: torch.device) -> None:
    partial, lse = torch.randn(5, 2, 3, 4, 72, device=cuda), torch.randn(5, 2, 3, 4, device=cuda)
    out, combined = broadhead.flash_attn_combine(partial, lse, out_dtype=torch.bfloat16)
    expected = (torch.softmax(lse, dim=0)[..., None] * partial).sum(0)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(combined, torch.logsumexp(lse, dim=0))
