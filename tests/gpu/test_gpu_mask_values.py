"""Full GPU set: masks that are values, on every row that lists them: ranges of keys by query, trees, causality by
sequence; rows that do not list one refuse it by name, and the call falls back in sight."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import broadhead
import pytest
import torch
from broadhead import support
from calls import Built, Call, build
from checks import check_against, check_call, check_equal
from gpu_calls import (
    MASK_FEATURES,
    ROWS,
    VALUE_MASKS,
    capture,
    row_call,
    row_cases,
    row_id,
    supports,
    value_masks_of,
)
from layouts import bytes_of
from masks import EDGES, RANGES, TREES, Drawn

pytestmark = [pytest.mark.gpu, pytest.mark.full]

NAMES = ("ranges", "causal_each", "tree")
EACH = (True, False, True, False)
NAN = float("nan")


def rows_with(name: str) -> Any:
    """Parameters: every row whose kernel has the mask."""
    return pytest.mark.parametrize("row", [row for row in ROWS if supports(row, {name: True})], ids=row_id)


def queries(row: support.KernelRow, tree: bool = False) -> tuple[int, ...]:
    """Queries of four sequences: about the row's tile, or as many as decode and trees have."""
    if tree:
        return (64, 1, 0, 33) if row.phase == "prefill" else (8, 1, 0, 5)
    return (2 * row.tile.tile_m + 9, 1, 0, row.tile.tile_m - 1) if row.phase == "prefill" else (8, 1, 0, 5)


def keys(row: support.KernelRow) -> tuple[int, ...]:
    """Some tiles, fewer than there are queries, some without a query, one tile and a key."""
    return max(5 * row.tile.tile_n + 3, queries(row)[0]), 64, 9, row.tile.tile_n + 1


def some_call(row: support.KernelRow, function: str = "varlen", **options: Any) -> Call:
    """A call of the row under a mask of four sequences; a cache of another dtype has pages."""
    options = {"seqlens_q": queries(row, "tree" in options), "seqlens_k": keys(row), "heads_q": 4, **options}
    if row.kv_dtype or function == "kvcache":
        options = {"page_size": 16, **options}
    ragged = function == "kvcache" and len(set(options["seqlens_q"])) > 1
    return row_call(row, function, ragged_q=ragged, **options)


# --- every pattern on every row ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("row, mask", row_cases(VALUE_MASKS, ROWS))
def test_row(row: support.KernelRow, mask: str, run_row: Callable) -> None:
    """NaN in each key that no query sees, anything in the entries of pages without another key."""
    options, turn = VALUE_MASKS[mask], list(VALUE_MASKS).index(mask) + ROWS.index(row)
    lengths = {"seqlens_q": (*queries(row, "tree" in options), 2), "seqlens_k": (*keys(row), 300)}
    extra = ({}, {"softcap": 15.0}, {"sinks": "fp32"}, {"sinks": "q", "softcap": 3.0})[turn % 4]
    heads = ({"heads_q": 6, "heads_kv": 2}, {"heads_q": 2, "heads_kv": 2}, {"heads_q": 8, "heads_kv": 1})[turn % 3]
    lengths |= {**options, **extra, **heads}
    run_row(row, some_call(row, **lengths, slack_q=0 if "tree" in options else 3, tail=2))
    pages = {"page_size": (1, 16, row.tile.tile_n, 48, 64)[turn % 5], "k_layout": "interleaved", "freed_entries": True}
    run_row(row, some_call(row, **lengths, **pages, pack_gqa=turn % 2 == 0, num_splits=(1, 3, 0)[turn % 3]))
    many = queries(row, "tree" in options)[0]
    dense = {**lengths, "seqlens_q": (many if turn % 2 else 3,) * 5, "leftpad": (3, 0, row.tile.tile_n, 70, 1)}
    run_row(row, some_call(row, "kvcache", **dense, batch_idx=True, slack_k=33, out_layout="guarded"))


@pytest.mark.parametrize("num_splits", [2, 5, 32])
@pytest.mark.parametrize("row", [row for row in ROWS if value_masks_of(row)], ids=row_id)
def test_splits(row: support.KernelRow, num_splits: int, run_row: Callable) -> None:
    """Ranges within a split, over the border of two, in one that has nothing else; plans know nothing of them."""
    for name in value_masks_of(row):
        patterns = {
            "ranges": ["images", "splits", "far", "random"],
            "tree": ["eagle", "words"],
            "causal_each": [EACH],
        }[name]
        for turn, pattern in enumerate(patterns):
            causal = {} if name == "causal_each" else {"causal": True}
            options = {name: pattern, "num_splits": num_splits, **causal, "seqlens_k": (900, 64, 9, 2100)}
            if turn % 2 and name != "tree":
                options["window"] = (row.tile.tile_n, 0)
            run_row(row, some_call(row, **options))
            run_row(row, some_call(row, "kvcache", **options, metadata=True))


@rows_with("ranges")
def test_ranges_about_tiles(row: support.KernelRow, run_row: Callable) -> None:
    """Each pair of a begin and an end at most one key from an edge of a tile, in neighbouring queries and alone."""
    prefill = row.phase == "prefill"
    for step in dict.fromkeys((row.tile.tile_n, 64, *((row.tile.tile_m, *EDGES) if prefill else ()))):
        marks = [edge + by for edge in (0, step, 2 * step, 5 * step) for by in (-1, 0, 1) if edge + by >= 0]
        pairs = [(a, b) for a in marks for b in marks if a <= b]
        for stride in (1, 7):
            turned = [pairs[stride * i % len(pairs)] for i in range(len(pairs))]
            for first in range(0, len(pairs), len(pairs) if prefill else 16):
                mine = Drawn([tuple(turned[first : first + (len(pairs) if prefill else 16)])], f"pairs of {step}")
                lengths = {"seqlens_q": (len(mine[0]),), "seqlens_k": (max(5 * step + 9, len(pairs)),)}
                options = {"causal": True, "window": (3, 0), "ranges": mine, "heads_q": 2}
                run_row(row, some_call(row, **lengths, **options, num_splits=1 + first % 3))


@rows_with("ranges")
def test_chunked_prefill(row: support.KernelRow, run_row: Callable, rng: random.Random) -> None:
    """A sequence of text and images comes in chunks over a paged cache: an image may begin in one, end in another."""
    total, turn = 700, 0
    whole = RANGES["images"](rng, total, total)
    begin = 0
    while begin < total:
        end = min(total, begin + (rng.randint(100, 300) if row.phase == "prefill" else rng.randint(1, 16)))
        ranges = Drawn([tuple(whole[begin:end])], f"images of [{begin}, {end})")
        for options in ({}, {"window": (64, 0), "ranges_in_window": True}):
            lengths = {"seqlens_q": (end - begin,), "seqlens_k": (end,), "ranges": ranges}
            run_row(row, some_call(row, "kvcache", **lengths, causal=True, **options, slack_k=40))
        begin, turn = end, turn + 1
        begin = begin if row.phase == "prefill" or turn % 4 else min(total, begin + 150)


@rows_with("tree")
def test_drafts(row: support.KernelRow, run_row: Callable) -> None:
    """From 1 to 64 drafts behind contexts of all lengths about 64, of none, of fewer keys than drafts."""
    for turn, drafts in enumerate((1, 2, 3, 7, 16, 31, 33, 63, 64)):
        contexts = (0, 1, 64 - drafts, 64, 129, row.tile.tile_n + 1, 500)
        lengths = {"seqlens_q": (drafts,) * 8, "seqlens_k": (*(n + drafts for n in contexts), drafts // 2)}
        first, second = (list(TREES)[(turn + shift) % len(TREES)] for shift in (0, 1))
        run_row(row, some_call(row, "kvcache", **lengths, causal=True, tree=first, slack_k=70))
        options = {"window": (70, -1), "tree": second, "page_size": 1, "num_splits": 3, "leftpad": (5,) * 8}
        run_row(row, some_call(row, "kvcache", **lengths, **options, metadata=drafts % 2 == 0))


@rows_with("causal_each")
def test_causality_of_many(row: support.KernelRow, run_row: Callable, rng: random.Random) -> None:
    """Every sequence by itself, none and all of them, as bool and as int32."""
    lengths = {"seqlens_q": queries(row) * 5, "seqlens_k": keys(row) * 5}
    for turn, each in enumerate(([rng.random() < 0.5 for _ in range(20)], [True] * 20, [False] * 20)):
        for options in ({}, {"window": (40, 9)}, {"num_splits": 3, "window": (-1, 3)}, {"attention_chunk": 50}):
            turn += 1
            dtype = torch.bool if turn % 2 else torch.int32
            run_row(row, some_call(row, **lengths, causal_each=tuple(each), causal_dtype=dtype, **options))
    mixed = tuple(b % 3 == 0 for b in range(20))
    run_row(row, some_call(row, **lengths, causal_each=mixed, prefix=tuple(rng.randint(0, 90) for _ in mixed)))


@pytest.mark.parametrize("row", [row for row in ROWS if value_masks_of(row)], ids=row_id)
def test_append(row: support.KernelRow, run_row: Callable) -> None:
    """Keys that the call itself appends are keys of ranges and trees."""
    if row.kv_dtype or row.dtype == "float8_e4m3fn":
        pytest.skip("new keys are rounded on their way into an 8-bit cache: tests/gpu/test_gpu_append.py")
    new = (9, 0, 1, 5)
    lengths = {"seqlens_q": new, "num_new": new, "seqlens_k": (300, 7, 1, 129), "ragged_q": True, "slack_k": 17}
    for name in value_masks_of(row):
        patterns = {"ranges": ["beyond", "random"], "tree": ["eagle", "words"], "causal_each": [EACH]}[name]
        for pattern in patterns:
            for page_size in (0, 16):
                options = {name: pattern, "page_size": page_size, "causal": name != "causal_each"}
                run_row(row, row_call(row, "kvcache", **lengths, **options))


# --- graphs -----------------------------------------------------------------------------------------------------------

#: What a captured call has, and what it gets between two replays.
REPLAYS = 12


def redraw(built: Built, rng: random.Random) -> Built:
    """Other values in the tensors of the masks, in place; what must come out now."""
    call, changes = built.call, {}
    lengths = list(zip(call.seqlens_q, call.seqlens_k, strict=True))
    for name, argument, patterns in (("ranges", "query_ranges", RANGES), ("tree", "tree_mask", TREES)):
        if getattr(call, name):
            pattern = rng.choice(list(patterns))
            changes[name] = Drawn([tuple(patterns[pattern](rng, *pair)) for pair in lengths], pattern)
            flat = built.kwargs[argument].flatten(0, -2 if name == "ranges" else -1)
            for rows, values in zip(built.rows, changes[name], strict=True):
                if values:
                    flat[rows] = torch.tensor(values, dtype=flat.dtype, device=flat.device)
    if call.causal_each:
        changes["causal_each"] = tuple(rng.random() < 0.5 for _ in call.causal_each)
        built.kwargs["causal"].copy_(torch.tensor(changes["causal_each"]))
    return dataclasses.replace(built, call=call.with_(**changes))


def everything(built: Built) -> Built:
    """The call with numbers in all keys: other values of the masks show other keys."""
    for name, logical in (("k_cache", built.k), ("v_cache", built.v)):
        flat = bytes_of(built.kwargs[name]).flatten(0, 1)
        assert flat.data_ptr() == built.kwargs[name].data_ptr()
        for slots, x in zip(built.slots, logical, strict=True):
            flat[slots] = bytes_of(x)
    assert not built.call.freed_entries
    return built


@pytest.mark.parametrize("row", [row for row in ROWS if value_masks_of(row)], ids=row_id)
def test_replays(row: support.KernelRow, only_row: Callable, cuda: torch.device, rng: random.Random) -> None:
    """One captured call, whose ranges, words and causality change in place between its replays."""
    only_row(row)
    many = 64 if row.phase == "prefill" else 4
    lengths = {"seqlens_q": (many,) * 4, "seqlens_k": (700, 300, 129, 9), "page_size": 16, "heads_q": 4}
    cases: list[dict[str, Any]] = [
        {name: {"ranges": "images", "tree": "eagle", "causal_each": EACH}[name]} for name in value_masks_of(row)
    ]
    if {"ranges", "causal_each"} <= set(value_masks_of(row)):
        cases.append({"ranges": "far", "causal_each": EACH, "window": (20, -1), "ranges_in_window": True})
    for turn, case in enumerate(cases):
        options = {"causal": "causal_each" not in case, "num_splits": (1, 3)[turn % 2], "metadata": turn > 0, **case}
        if "ranges" in case and "window" not in case:
            options["window"] = (30, 0)
        built = everything(build(row_call(row, "kvcache", **lengths, **options), cuda, rng))
        results: list[tuple[torch.Tensor, torch.Tensor]] = []
        graph = capture(lambda built=built, results=results: results.append(built.run()))
        assert broadhead.last_dispatch()[1] == row.id
        for _ in range(REPLAYS):
            now = redraw(built, rng)
            built.out.fill_(NAN)
            results[-1][1].fill_(NAN)
            graph.replay()
            check_against(now, *results[-1])


@pytest.mark.parametrize("row", [row for row in ROWS if value_masks_of(row)], ids=row_id)
def test_no_value_is_read_back(
    row: support.KernelRow, only_row: Callable, cuda: torch.device, rng: random.Random
) -> None:
    only_row(row)
    for name in value_masks_of(row):
        pattern = {"ranges": "random", "tree": "words", "causal_each": EACH}[name]
        built = build(some_call(row, **{name: pattern}, causal=name != "causal_each"), cuda, rng)
        first = [x.clone() for x in built.run()]
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = built.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for a, b in zip(again, first, strict=True):
            check_equal(a, b)


# --- which row runs ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::broadhead.FallbackWarning")
@pytest.mark.parametrize("row", [row for row in ROWS if set(value_masks_of(row)) != set(NAMES)], ids=row_id)
def test_rows_without_a_mask_refuse_it(
    row: support.KernelRow,
    only_row: Callable,
    cuda: torch.device,
    rng: random.Random,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the name of its feature; where fallbacks are allowed, the torch reference computes it and says why."""
    only_row(row)
    for name in set(NAMES) - set(value_masks_of(row)):
        pattern = {"ranges": "random", "tree": "words", "causal_each": EACH}[name]
        call = some_call(row, seqlens_q=queries(row, tree=True)).with_(**{name: pattern})
        built = build(call, cuda, rng)
        monkeypatch.setenv("BROADHEAD_STRICT", "1")
        with pytest.raises(broadhead.UnsupportedError, match=MASK_FEATURES[name]):
            built.run()
        assert built.out.isnan().all(), "a refused call has written"
        monkeypatch.setenv("BROADHEAD_STRICT", "0")
        check_call(built)
        backend, _, reason = broadhead.last_dispatch()
        assert backend == "torch" and MASK_FEATURES[name] in reason, (backend, reason)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256, 512])
def test_dispatch(
    head_dim: int, name: str, capability: tuple[int, int], cuda: torch.device, rng: random.Random, row_ran: Callable
) -> None:
    """Without a row forced: one that lists the mask runs wherever there is one, for prefill and for decode."""
    pattern = {"ranges": "images", "tree": "eagle", "causal_each": EACH}[name]
    able = {
        row.phase
        for row in ROWS
        if capability in row.capabilities
        and supports(row, {name: True})
        and not (row.requires or row.kv_dtype)
        and row.dtype == "bf16"
        and min(row.head_dim, row.head_dim_v) >= head_dim
    }
    for phase, heads, many in (("prefill", 8, 64), ("decode", 2, 3)):
        lengths = {"seqlens_q": (many,) * 4, "seqlens_k": (700, 300, 129, 64), "heads_q": heads, "heads_kv": 1}
        call = Call("kvcache", head_dim=head_dim, page_size=16, causal=name != "causal_each", **lengths)
        built = build(call.with_(**{name: pattern}), cuda, rng)
        if phase in able:
            check_call(built)
            assert supports(row_ran(dtype=call.dtype), {name: True})
        elif not able:
            with pytest.raises(broadhead.UnsupportedError, match=MASK_FEATURES[name]):
                built.run()
