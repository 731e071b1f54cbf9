"""Values that only the device sees, in every row: rows that exist are the bound, pages that do not exist have no keys,
and lengths that another stream changes in the midst of a run neither fault nor hang."""

from __future__ import annotations

import random
from collections.abc import Callable

import broadhead
import pytest
import torch
from broadhead import support
from calls import Built, Call, build
from checks import check_against, check_dead_rows, poison_allocator
from gpu_calls import ROWS, row_call, row_id
from judge import judge
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.full]

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
#: Page ids that no pool has; the third is one past the test's own.
OUTSIDE = (-1, INT_MAX, "pages", INT_MIN, 1 << 20)

each_row = pytest.mark.parametrize("row", ROWS, ids=row_id)


def int32(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def rows_of(row: support.KernelRow) -> tuple[int, int]:
    """Query tokens of a long and of a short sequence for the row: a tile and a bit, or what decode takes."""
    return (2, 1) if row.phase == "decode" else (row.tile.tile_m + 5, 70)


def packed_call(row: support.KernelRow, **options) -> Call:
    long, short = rows_of(row)
    options = {"heads_q": 4, "heads_kv": 2, **options}
    return row_call(row, "varlen", (long, short, long), (3 * 128 + 7, 40, 300), **options)


# --- rows that exist are the bound ---


@pytest.mark.parametrize("beyond", [1, 17, 256, INT_MAX])
@each_row
def test_nothing_behind_out_is_written(
    row: support.KernelRow, beyond: int, only_row: Callable, cuda: torch.device, rng: random.Random
) -> None:
    """cu_seqlens_q ends behind the last row of q: the rows that there are get what they would have got, and the memory
    behind ``out`` keeps what it held."""
    only_row(row)
    call = packed_call(row, causal=True)
    built = build(call, cuda, rng)
    q, total = built.kwargs["q"], built.kwargs["q"].shape[0]
    bound = rows_of(row)[0] if row.phase == "decode" else 1024  # more rows would be prefill
    options = {name: x for name, x in built.kwargs.items() if name not in ("q", "out", "max_seqlen_q")}
    store = torch.full((total + 300, *built.out.shape[1:]), float("nan"), dtype=call.out_dtype, device=cuda)
    wide_q = torch.cat((q, torch.full((300, *q.shape[1:]), 1.0, device=cuda).to(q.dtype)))
    offsets = built.kwargs["cu_seqlens_q"].clone()
    offsets[-1] = min(INT_MAX, total + beyond)

    def run(cu: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        poison_allocator(built)
        return broadhead.flash_attn_varlen_func(
            wide_q[:total], **{**options, "cu_seqlens_q": cu}, max_seqlen_q=bound, out=out, return_attn_probs=True
        )

    expected, expected_lse = run(built.kwargs["cu_seqlens_q"], torch.empty_like(store[:total]))
    expected, expected_lse = expected.clone(), expected_lse.clone()
    out, lse = run(offsets, store[:total])
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=0)
    assert store[total:].isnan().all(), "rows behind out were written"


@each_row
def test_rows_from_max_seqlen_q_on_are_untouched(
    row: support.KernelRow, only_row: Callable, cuda: torch.device, rng: random.Random
) -> None:
    """They are as rows past seqused_q, for the mask too."""
    only_row(row)
    call = packed_call(row, causal=True)
    built = build(call, cuda, rng)
    bound = rows_of(row)[0] - 1
    used = int32([min(n, bound) for n in call.seqlens_q], cuda)

    def run(**options) -> tuple[Tensor, Tensor]:
        out = torch.full_like(built.out, float("nan"))
        return broadhead.flash_attn_varlen_func(**{**built.kwargs, **options, "out": out}, return_attn_probs=True)

    expected, expected_lse = run(seqused_q=used)
    out, lse = run(max_seqlen_q=bound)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    start = 0
    for length, kept in zip(call.seqlens_q, used.tolist(), strict=True):
        torch.testing.assert_close(
            lse[:, start : start + kept], expected_lse[:, start : start + kept], rtol=0, atol=0, equal_nan=True
        )
        assert out[start + kept : start + length].isnan().all()
        start += length


# --- pages that do not exist ---


def lose_pages(built: Built, rng: random.Random) -> list[list[int]]:
    """Puts ids outside the pool into some live entries; which keys of each sequence are left."""
    call, table = built.call, built.kwargs["page_table"]
    pages, kept = built.kwargs["k_cache" if "k_cache" in built.kwargs else "k"].shape[0], []
    for b, length in enumerate(call.seqlens_k):
        used = -(-length // call.page_size)
        lost = set(rng.sample(range(used), rng.randint(1, max(1, used // 2)))) if used else set()
        for column in lost:
            wrong = rng.choice(OUTSIDE)
            table[b, column] = pages if wrong == "pages" else wrong
        kept.append([key for key in range(length) if key // call.page_size not in lost])
    return kept


def check_lost(built: Built, kept: list[list[int]], out: Tensor, lse: Tensor) -> None:
    """Under no mask a sequence is what it is without the keys that do not exist."""
    call = built.call
    lengths = tuple(len(keys) for keys in kept)
    left = [[x[b][keys] for b, keys in enumerate(kept)] for x in (built.k, built.v)]
    smaller = Built(
        call.with_(seqlens_k=lengths), built.q, left[0], left[1], built.sinks, built.kwargs, built.out, built.rows,
        built.out_store, built.qv, built.descales,
    )  # fmt: skip
    check_against(smaller, out, lse)
    check_dead_rows(smaller, out)


@pytest.mark.parametrize("page_size", [1, 12, 16, 64, 128])
@each_row
def test_pages_outside_the_pool(
    row: support.KernelRow, page_size: int, only_row: Callable, cuda: torch.device, rng: random.Random
) -> None:
    """Keys behind such ids do not exist: they have no weight, and what the shared memory held reaches nothing."""
    only_row(row)
    long, short = rows_of(row)
    lengths = {"seqlens_q": (long, short, 1, long), "seqlens_k": (700, 300, 64, 129)}
    options = {"page_size": page_size, "heads_q": 4, "heads_kv": 2, "slack_k": 33, "sinks": "fp32"}
    for splits in (1, 3):
        built = build(row_call(row, "varlen", **lengths, **options, num_splits=splits), cuda, rng)
        poison = {name: torch.full_like(built.kwargs[name].float(), float("nan")).to(built.kwargs[name].dtype)
                  for name in ("k", "v")}  # fmt: skip
        built.run(**poison)  # leaves NaN in the shared memory of every multiprocessor
        kept = lose_pages(built, rng)
        built.out.fill_(float("nan"))
        poison_allocator(built)
        out, lse = built.run()
        check_lost(built, kept, out, lse)


@each_row
def test_no_page_exists(row: support.KernelRow, only_row: Callable, cuda: torch.device, rng: random.Random) -> None:
    """A sequence all of whose pages are outside the pool sees no key; its neighbours stay right."""
    only_row(row)
    long, short = rows_of(row)
    lengths = {"seqlens_q": (long, short, long), "seqlens_k": (300, 200, 129)}
    built = build(row_call(row, "varlen", **lengths, page_size=16, heads_q=4, causal=True), cuda, rng)
    built.kwargs["page_table"][1] = -1
    built.out.fill_(float("nan"))
    out, lse = built.run()
    kept = [list(range(300)), [], list(range(129))]
    check_lost(built, kept, out, lse)


@each_row
def test_batch_indices_outside_the_cache(
    row: support.KernelRow, only_row: Callable, cuda: torch.device, rng: random.Random
) -> None:
    only_row(row)
    long, _ = rows_of(row)
    for page_size in (0, 16):
        lengths = {"seqlens_q": (long,) * 4, "seqlens_k": (300, 200, 129, 64)}
        call = row_call(row, "kvcache", **lengths, page_size=page_size, heads_q=4, causal=True, batch_idx=True)
        built = build(call, cuda, rng)
        built.kwargs["cache_batch_idx"][1], built.kwargs["cache_batch_idx"][3] = -1, 1 << 20
        built.out.fill_(float("nan"))
        out, lse = built.run()
        check_lost(built, [list(range(300)), [], list(range(129)), []], out, lse)


# --- another stream ---


def wild_lengths(rng: random.Random, count: int, capacity: int) -> list[int]:
    return [rng.choice((0, 1, capacity, rng.randint(0, capacity), -5, INT_MAX, INT_MIN)) for _ in range(count)]


@pytest.mark.parametrize("sequences", [3, 16, 64])
@each_row
def test_values_that_change_during_the_run(
    row: support.KernelRow, sequences: int, only_row: Callable, cuda: torch.device, rng: random.Random
) -> None:
    """Another stream overwrites lengths, offsets, page ids and batch indices while the kernel runs: it ends, nothing
    faults, no row behind ``out`` is written, and the next call is right."""
    only_row(row)
    long, _ = rows_of(row)
    options = {"page_size": 16, "heads_q": 4, "heads_kv": 2, "causal": True, "slack_k": 200}
    call = row_call(row, "kvcache", (long,) * sequences, (900,) * sequences, ragged_q=True, **options)
    built = build(call, cuda, rng)
    kwargs = built.kwargs
    total = kwargs["q"].shape[0]
    store = torch.full((total + 64, *built.out.shape[1:]), float("nan"), dtype=built.out.dtype, device=cuda)
    names = ("cache_seqlens", "cu_seqlens_q", "page_table")
    good = {name: kwargs[name].clone() for name in names}
    bad = []
    for _ in range(8):
        lengths = int32(wild_lengths(rng, sequences, 900), cuda)
        offsets = int32(wild_lengths(rng, sequences + 1, total), cuda)
        table = good["page_table"].clone()
        table[torch.rand(table.shape, device=cuda) < 0.2] = rng.choice((-1, INT_MAX, INT_MIN))
        bad.append({"cache_seqlens": lengths, "cu_seqlens_q": offsets, "page_table": table})
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    for turn in range(24):
        with torch.cuda.stream(side):
            for step in range(40):
                source = good if step % 3 == 0 else bad[(turn + step) % len(bad)]
                for name in names:
                    kwargs[name].copy_(source[name], non_blocking=True)
        for _ in range(6):
            broadhead.flash_attn_with_kvcache(**{**kwargs, "out": store[:total]})
    torch.cuda.synchronize()
    assert store[total:].isnan().all(), "rows behind out were written"
    for name in names:
        kwargs[name].copy_(good[name])
    built.out.fill_(float("nan"))
    out, lse = built.run()
    check_against(built, out, lse)


def test_judge_of_nothing(cuda: torch.device, rng: random.Random) -> None:
    """What the tests above rely on: without keys the judge says 0 and -inf."""
    built = build(Call("varlen", (3,), (0,), heads_q=2, heads_kv=1, head_dim=64), cuda, rng)
    out, lse = judge(built)
    assert not out[0].any() and (lse[0] == float("-inf")).all()
