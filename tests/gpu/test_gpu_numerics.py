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
    """Some masked and some plain blocks of keys; one query a sequence where the row is of decode."""
    if row.phase == "decode":
        return row_call(row, "kvcache", (1,) * 3, (300, 17, 129), heads_q=4, page_size=16, **options)
    m, n = row.tile.tile_m, row.tile.tile_n
    return row_call(row, "varlen", (m + 5, 3, 70), (3 * n + 7, 40, 2 * n), heads_q=4, causal=True, **options)


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
    tolerance = {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(out.flatten(0, -3)[fine], clean.flatten(0, -3)[fine], **tolerance)
    torch.testing.assert_close(lse_rows[fine], clean_lse.transpose(-1, -2).flatten(0, -2)[fine], **tolerance)
