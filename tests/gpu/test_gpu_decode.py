"""Full GPU set: every decode row on every length of queries, head group, mask, page size, layout and split."""

from __future__ import annotations

import random
from collections.abc import Callable

import broadhead
import pytest
import torch
from broadhead import support
from calls import Call, build
from checks import check_call, check_equal
from gpu_calls import DECODE_ROWS, EXTRAS, MASKS, MOST_DECODE, dims_within, row_call, row_cases, row_id
from layouts import bytes_of, nan_of

pytestmark = [pytest.mark.gpu, pytest.mark.full, pytest.mark.usefixtures("first_rows")]

HEAD_DIMS = (64, 96, 128, 192, 256, 320, 512)
PAIRS = ((192, 128), (128, 192), (64, 256), (64, 512), (512, 64), (320, 256), (96, 40), (40, 96))
QUERY_LENGTHS = (*range(1, 9), 16)
GROUPS = (1, 2, 4, 5, 8, 16)
PAGE_SIZES = (0, 1, 4, 16, 48, 64, 128, 256)
K_LAYOUTS = ("plain", "interleaved", "heads_first", "rows", "gapped", "overlapping")
Q_LAYOUTS = ("plain", "packed", "heads_first", "gapped")

each_row = pytest.mark.parametrize("row", DECODE_ROWS, ids=row_id)


def heads(group: int) -> dict[str, int]:
    heads_kv = 1 if group > 8 else 2
    return {"heads_q": group * heads_kv, "heads_kv": heads_kv}


def step(row: support.KernelRow, seqlen_q: int = 1, **options) -> Call:
    """Five sequences of one length of queries and keys about the row's tile, one empty; garbage past their pages."""
    n = row.tile.tile_n
    lengths = {"seqlens_q": (seqlen_q,) * 5, "seqlens_k": (3 * n + 5, 17, 0, n, 2 * n + 1)}
    defaults = {"page_size": 16, "slack_k": 33, "heads_q": 4, "heads_kv": 1}
    return row_call(row, "kvcache", **{**lengths, **defaults, **options})


def turn(row: support.KernelRow, choices: tuple, shift: int = 0):
    """Another choice for each row and shift: every pair of them meets, if not in every row."""
    return choices[(DECODE_ROWS.index(row) + shift) % len(choices)]


# --- which row runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen_q, group", [(1, 1), (1, 8), (16, 1), (4, 4), (5, 5), (3, 8), (2, 16), (16, 2)])
@pytest.mark.parametrize("head_dim, head_dim_v", [*((d, d) for d in HEAD_DIMS), *PAIRS])
def test_dispatch(
    head_dim: int, head_dim_v: int, seqlen_q: int, group: int, run_call: Callable, capability: tuple[int, int]
) -> None:
    """Up to 32 packed rows a decode row runs, that of the smallest tile that holds them."""
    dims = {"head_dim": head_dim, "head_dim_v": head_dim_v}
    call = Call("kvcache", (seqlen_q,) * 4, (300, 17, 0, 129), **dims, **heads(group), page_size=16, causal=True)
    assert call.packed_rows <= MOST_DECODE
    _, row = run_call(call.with_(metadata=True))
    assert row.phase == "decode"
    _, row = run_call(call.with_(function="func", seqlens_k=(300,) * 4, page_size=0))
    assert row.phase == "decode"
    _, row = run_call(call)
    assert row.phase == "decode"
    size = (row.dtype, row.head_dim, row.head_dim_v)
    tiles = [
        other.tile.tile_m
        for other in DECODE_ROWS
        if (other.dtype, other.head_dim, other.head_dim_v) == size and capability in other.capabilities
    ]
    fitting = [tile_m for tile_m in tiles if tile_m >= call.packed_rows]
    assert row.tile.tile_m == min(fitting, default=max(tiles)), f"{row.id} ran for {call.packed_rows} packed rows"


# --- queries and heads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen_q", QUERY_LENGTHS)
@each_row
def test_query_lengths(row: support.KernelRow, seqlen_q: int, run_row: Callable) -> None:
    """Dense q: a token of a sequence sees one key more than the one before it, more queries than keys included."""
    some, other = (heads(turn(row, GROUPS, seqlen_q + shift)) for shift in (0, 3))
    run_row(row, step(row, seqlen_q, causal=True, **some, k_layout=turn(row, K_LAYOUTS[:5], seqlen_q)))
    run_row(row, step(row, seqlen_q, page_size=0, sinks="fp32", **other, q_layout=turn(row, Q_LAYOUTS, seqlen_q)))
    run_row(row, step(row, seqlen_q, causal=True, pack_gqa=False, **some, seqlens_k=(seqlen_q, 3, 1, 200, 64)))


@pytest.mark.parametrize("pack_gqa", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("group", GROUPS)
@each_row
def test_head_groups(row: support.KernelRow, group: int, pack_gqa: bool, run_row: Callable) -> None:
    """Ragged q of every length at once: the heads of a token may straddle two tiles."""
    n, lengths_q = row.tile.tile_n, (*QUERY_LENGTHS, 0)
    lengths_k = (n + 1, 2 * n, n - 1, 70, 0, n, 3 * n + 5, 7, 5 * n + 1, 64)
    options = {"seqlens_q": lengths_q, "seqlens_k": lengths_k, "ragged_q": True, "pack_gqa": pack_gqa, **heads(group)}
    run_row(row, step(row, **options, causal=True, tail=3, sinks="q", out_layout="guarded"))
    run_row(row, step(row, **options, page_size=0, num_splits=3, q_layout="packed"))


@each_row
def test_more_tiles_than_blocks(row: support.KernelRow, run_row: Callable, rng: random.Random) -> None:
    """A block goes on to another tile, head or sequence, past sequences without queries or keys."""
    lengths_q = tuple(rng.choice((0, 1, 4, 16)) for _ in range(60))
    lengths_k = tuple(rng.choice((0, 1, row.tile.tile_n, rng.randint(1, 900))) for _ in range(60))
    options = {"seqlens_q": lengths_q, "seqlens_k": lengths_k, "ragged_q": True, "heads_q": 20, "heads_kv": 4}
    run_row(row, step(row, **options, causal=True))


@each_row
def test_head_dims(row: support.KernelRow, run_row: Callable) -> None:
    """NaN lies behind the last column of each head, or the next tensor does: neither is read nor overwritten."""
    gapped = {"q_layout": "gapped", "k_layout": "gapped", "out_layout": "guarded", "page_size": 0}
    for head_dim, head_dim_v in dims_within(row):
        dims = {"head_dim": head_dim, "head_dim_v": head_dim_v}
        run_row(row, step(row, 2, **dims, **gapped, causal=True))
        run_row(row, step(row, **dims, k_layout="interleaved", num_splits=5, pack_gqa=False))


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row, mask", row_cases(MASKS, DECODE_ROWS))
def test_masks(row: support.KernelRow, mask: str, run_row: Callable) -> None:
    """Keys that no query sees are NaN, and entries of pages without any other key are garbage."""
    n, shift = row.tile.tile_n, list(MASKS).index(mask)
    extra, seqlen_q = turn(row, tuple(EXTRAS.values()), shift), turn(row, QUERY_LENGTHS[1:], shift)
    options = {"seqlens_k": (5 * n + 3, 64, 9, 300, 63), **MASKS[mask], **extra, "freed_entries": True}
    group = heads(turn(row, GROUPS, shift))
    run_row(row, step(row, **options, **group, page_size=turn(row, (1, 16, 48, 64), shift)))
    run_row(row, step(row, seqlen_q, **options, **group, num_splits=turn(row, (0, 3, 7), shift)))
    ragged = {"seqlens_q": (seqlen_q, 1, 0, 16, 2), "ragged_q": True}
    options.pop("freed_entries")
    run_row(row, step(row, **ragged, **options, page_size=0, pack_gqa=False))


@each_row
def test_scales(row: support.KernelRow, run_row: Callable) -> None:
    """1.0 as Gemma 4 has it, none, negative; large scores: the maximum is subtracted before any exponential."""
    for scale in (1.0, 0.0, -0.3, 2.0):
        run_row(row, step(row, 2, softmax_scale=scale, causal=True, num_splits=4))
        run_row(row, step(row, softmax_scale=scale, sinks="fp32", softcap=5.0))


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@each_row
def test_pages(row: support.KernelRow, page_size: int, run_row: Callable) -> None:
    """Shuffled tables with negative and huge entries behind the used ones; caches without pages."""
    shift = PAGE_SIZES.index(page_size)
    layouts = K_LAYOUTS if page_size and row.head_dim == row.head_dim_v else K_LAYOUTS[:5]
    first, second = (turn(row, layouts, shift + by) for by in (0, 2))
    options = {"page_size": page_size, "slack_k": 2 * page_size + 1, "heads_q": 8, "heads_kv": 2}
    run_row(row, step(row, **options, k_layout=first))
    run_row(row, step(row, turn(row, QUERY_LENGTHS, shift), **options, k_layout=second, causal=True, num_splits=3))
    masks = {"causal": True, "window": (row.tile.tile_n + 5, 0), "freed_entries": bool(page_size)}
    call = step(row, **options, **masks, tail=2, slack_q=2, k_layout=first)
    run_row(row, call.with_(function="varlen", seqlens_q=(1, 3, 0, 2, 16)))


@pytest.mark.parametrize("page_size", [0, 1, 16, 64])
@each_row
def test_leftpad_and_batch_index(row: support.KernelRow, page_size: int, run_row: Callable) -> None:
    """Sequences that begin within a page or a block of keys, in a cache of more sequences than the batch has."""
    n = row.tile.tile_n
    for options in (
        {"leftpad": (n - 1, 0, 3, 70, 16)},
        {"batch_idx": True, "causal": True},
        {"leftpad": (1, 64, 2, n, 200), "batch_idx": True, "causal": True, "window": (40, 0), "freed_entries": True},
    ):
        run_row(row, step(row, page_size=page_size, **options))
        run_row(row, step(row, 3, page_size=page_size, num_splits=2, **options))


@each_row
def test_used_lengths(row: support.KernelRow, run_row: Callable) -> None:
    """seqused_q and seqused_k within packed sequences, of 0 too: dead rows keep what they hold."""
    lengths = {"seqlens_q": (1, 0, 4, 2, 16), "seqlens_k": (300, 40, 0, 1, 2 * row.tile.tile_n)}
    for options in ({}, {"causal": True, "num_splits": 3}, {"page_size": 16, "sinks": "q"}):
        call = row_call(row, "varlen", **lengths, heads_q=6, heads_kv=2, slack_q=3, slack_k=5, tail=4, **options)
        run_row(row, call)
        run_row(row, call.with_(max_seqlen_slack=5, out_layout="guarded"))


@each_row
def test_nothing_to_do(row: support.KernelRow, run_row: Callable) -> None:
    """No queries, no keys, neither; out = 0 and LSE = -inf where there are queries."""
    for lengths_q, lengths_k in (
        ((0, 0, 0), (40, 0, 5)),
        ((1, 4, 16), (0, 0, 0)),
        ((0,), (0,)),
        ((0, 1, 0), (9, 0, 3)),
    ):
        for options in ({}, {"causal": True, "num_splits": 3}, {"sinks": "fp32", "page_size": 0}):
            lengths = {"seqlens_q": lengths_q, "seqlens_k": lengths_k, "ragged_q": True}
            run_row(row, step(row, **lengths, tail=2, **options))
    for options in ({}, {"num_splits": 7}, {"metadata": True}):
        run_row(row, step(row, seqlens_k=(0,) * 5, **options))


@each_row
def test_long_keys(row: support.KernelRow, run_row: Callable) -> None:
    """One sequence long enough for every block of the device, beside short ones."""
    lengths = {"seqlens_k": (20000, 3, 0, 257, 1), "heads_q": 2}
    run_row(row, step(row, **lengths, page_size=64))
    run_row(row, step(row, 8, **lengths, page_size=1, causal=True))
    run_row(row, step(row, **lengths, page_size=0, window=(9000, 0), causal=True, sinks="fp32"))


# --- how the work is divided ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_splits", [0, 1, 2, 3, 7, 128])
@each_row
def test_splits(row: support.KernelRow, num_splits: int, run_row: Callable) -> None:
    """More splits than a sequence has blocks of keys; with and without metadata; rows that see no key of a share."""
    lengths = {"seqlens_k": (2100, 64, 0, 500, 9 * row.tile.tile_n + 1), "num_splits": num_splits}
    run_row(row, step(row, **lengths))
    run_row(row, step(row, 4, **lengths, metadata=True, causal=True, heads_q=10, heads_kv=2))
    run_row(row, step(row, 3, **lengths, page_size=0, pack_gqa=False, causal=True, window=(100, 0), sinks="fp32"))


@pytest.mark.parametrize("sm_margin", [1, 40, 131, 500])
@each_row
def test_sm_margin(row: support.KernelRow, sm_margin: int, run_row: Callable) -> None:
    """Fewer blocks, down to the last."""
    lengths = {"seqlens_k": (2100, 64, 0, 500, 1000), "sm_margin": sm_margin}
    run_row(row, step(row, **lengths, heads_q=8, heads_kv=2))
    run_row(row, step(row, 2, **lengths, metadata=True, causal=True))


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_layout", ["plain", "heads_first", "gapped", "guarded"])
@each_row
def test_outputs(
    row: support.KernelRow,
    out_layout: str,
    only_row: Callable,
    row_ran: Callable,
    cuda: torch.device,
    rng: random.Random,
) -> None:
    """Given out= of any strides, or not, with softmax_lse or without: the same bits."""
    only_row(row)
    for num_splits in (1, 5):
        built = build(step(row, 3, causal=True, num_splits=num_splits, out_layout=out_layout), cuda, rng)
        given, lse = (x.clone() for x in check_call(built))
        assert row_ran().id == row.id
        out, again = built.run(out=None)
        check_equal(out, given)
        check_equal(again, lse)
        check_equal(broadhead.flash_attn_with_kvcache(**{**built.kwargs, "out": None}), given)


@pytest.mark.parametrize("num_splits", [1, 4])
@each_row
def test_nan_in_a_query_is_told(
    row: support.KernelRow,
    num_splits: int,
    only_row: Callable,
    row_ran: Callable,
    cuda: torch.device,
    rng: random.Random,
) -> None:
    """A row of NaN scores is not an empty row: NaN comes out, with splits as without, and in that row alone."""
    only_row(row)
    built = build(step(row, 2, seqlens_k=(900, 70, 0, 500, 64), num_splits=num_splits), cuda, rng)
    q = built.kwargs["q"]
    bytes_of(q)[1, 1, 2, 3] = nan_of(q.dtype)
    out, lse = built.run()
    assert row_ran().id == row.id
    broken = torch.zeros(5, 2, 4, dtype=torch.bool, device=cuda)
    broken[1, 1, 2] = True
    assert torch.equal(out.isnan().all(-1), broken) and torch.equal(out.isnan().any(-1), broken)
    assert torch.equal(lse.isnan(), broken.transpose(1, 2))


@each_row
def test_large_values(row: support.KernelRow, run_row: Callable, cuda: torch.device) -> None:
    """Scores of hundreds and values near the end of fp16: nothing overflows between two blocks or two splits."""
    call = step(row, 2, page_size=0, num_splits=3, seqlens_k=(900, 70, 0, 500, 64))
    if call.k_dtype.itemsize == 1 or call.qv:
        pytest.skip("e4m3 ends at 448, and values of thousands are no keys of a qv")
    built = build(call, cuda)
    names = {"q": built.q, "k_cache": built.k, "v_cache": built.v}
    for (name, logical), factor in zip(names.items(), (6.0, 6.0, 9000.0)):
        built.kwargs[name].mul_(factor)
        logical[:] = [x * factor for x in logical]
    run_row(row, built)
