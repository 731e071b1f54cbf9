"""Numbers at their ends, in every row: softcaps as large as "off", scores of NaN, with sinks and without."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from broadhead import support
from calls import Call, build
from gpu_calls import ROWS, row_call, row_id

pytestmark = [pytest.mark.gpu, pytest.mark.full]

each_row = pytest.mark.parametrize("row", ROWS, ids=row_id)


def call_of(row: support.KernelRow, **options) -> Call:
    """Some masked and some plain blocks of keys, of which every query sees one; one query a sequence in decode."""
    if row.phase == "decode":
        return row_call(row, "kvcache", (1,) * 3, (300, 17, 129), heads_q=4, page_size=16, **options)
    m, n = row.tile.tile_m, row.tile.tile_n
    lengths = (m + 5, 3, 70), (max(3 * n, m) + 7, 40, max(2 * n, 70))
    return row_call(row, "varlen", *lengths, heads_q=4, causal=True, **options)


def of_rounding(call: Call) -> dict[str, float]:
    """How far outputs may lie apart whose P was rounded against other maxima: a number of 8 bits by up to 1 in 16."""
    bound = 8e-2 if call.dtype.itemsize == 1 else 3e-2
    return {"rtol": bound, "atol": bound}


@pytest.mark.parametrize("softcap", [1e3, 1e5, 1e6, 1e8, 3e38])
@each_row
def test_large_softcap(row: support.KernelRow, softcap: float, run_row: Callable) -> None:
    """The error of the softcap is one of the score, not of the cap: the LSE tells."""
    run_row(row, call_of(row, softcap=softcap))


@pytest.mark.parametrize("sinks", ["fp32", "q", ""])
@pytest.mark.parametrize("splits", [1, 3])
@each_row
def test_rows_of_nan(
    row: support.KernelRow, splits: int, sinks: str, only_row: Callable, cuda: torch.device, rng: random.Random
) -> None:
    """A query of NaN has NaN results, LSE and all; no sink hides it. Its neighbours in the tile do not notice."""
    only_row(row)
    built = build(call_of(row, num_splits=splits, sinks=sinks), cuda, rng)
    clean, clean_lse = (x.clone() for x in built.run())
    q = built.kwargs["q"]
    rows = q.flatten(0, -3)
    bad = torch.zeros(rows.shape[0], rows.shape[1], dtype=torch.bool, device=cuda)
    for index in built.rows:
        bad[index[len(index) // 2], 1] = True
        bad[index[0], 0] = True
    poisoned = q.float()
    poisoned.flatten(0, -3)[bad] = float("nan")
    out, lse = built.run(q=poisoned.to(q.dtype))
    live = built.live_mask()
    nan = out.flatten(0, -3).isnan()
    assert nan[bad].all(), f"{built.call}: a row of NaN scores has numbers"
    fine = live[:, None] & ~bad
    assert not nan[fine].any(), f"{built.call}: NaN reached another row"
    lse_rows = lse.transpose(-1, -2).flatten(0, -2)
    assert lse_rows[bad].isnan().all(), f"{built.call}: the LSE of a row of NaN scores is {lse_rows[bad]}"
    # Rows of a warp share when they look for their maxima, and so how P is rounded.
    tolerance = of_rounding(built.call)
    torch.testing.assert_close(out.flatten(0, -3)[fine], clean.flatten(0, -3)[fine], **tolerance)
    torch.testing.assert_close(lse_rows[fine], clean_lse.transpose(-1, -2).flatten(0, -2)[fine], **tolerance)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("scores", ["plain", "softcap", "negative"])
@each_row
def test_keys_of_missing_pages(
    row: support.KernelRow,
    scores: str,
    page_size: int,
    only_row: Callable,
    row_ran: Callable,
    cuda: torch.device,
    rng: random.Random,
) -> None:
    """A page id that the pool does not have takes its keys away, whatever scores the others have.

    Every query sees every key, so the same pages without those ids, and shorter sequences, must give the same.
    """
    only_row(row)
    options = {"plain": {}, "softcap": {"softcap": 3.0}, "negative": {"softmax_scale": -0.2}}[scores]
    pages = (300 // page_size, 64 // page_size, 160 // page_size)
    lengths = tuple(n * page_size for n in pages)
    queries = (1,) * 3 if row.phase == "decode" else (70, 3, 129)
    call = row_call(row, "kvcache", queries, lengths, ragged_q=True, heads_q=4, page_size=page_size, **options)
    built = build(call, cuda, rng)
    whole = built.kwargs["page_table"]
    gaps, short, left = whole.clone(), whole.clone(), []
    for b, n in enumerate(pages):
        # The first, the last, and some between; of the second sequence all.
        missing = {0, n - 1, *rng.sample(range(n), n // 3)} if b != 1 else set(range(n))
        for i in missing:
            gaps[b, i] = rng.choice((-1, -(2**31), 2**31 - 1, int(built.kwargs["k_cache"].shape[0])))
        kept = [int(whole[b, i]) for i in range(n) if i not in missing]
        short[b, : len(kept)] = torch.tensor(kept, dtype=torch.int32, device=cuda)
        left.append(len(kept) * page_size)
    fewer = torch.tensor(left, dtype=torch.int32, device=cuda)
    want, want_lse = (x.clone() for x in built.run(page_table=short, cache_seqlens=fewer))
    built.out_store.fill_(float("nan"))
    out, lse = built.run(page_table=gaps)
    assert row_ran(dtype=call.dtype).id == row.id
    tolerance = of_rounding(call)
    for b, (mine, other) in enumerate(zip(built.split(out), built.split(want), strict=True)):
        torch.testing.assert_close(mine, other, **tolerance, msg=lambda text, b=b: f"{call}, sequence {b}: {text}")
    for mine, other in zip(built.split_lse(lse), built.split_lse(want_lse), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    assert (built.split_lse(lse)[1] == float("-inf")).all() and (built.split(out)[1] == 0).all()
