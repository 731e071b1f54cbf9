"""Full GPU set: reject_or_correct, strict: a call raises a BroadheadError or a kernel matches the judge.

BROADHEAD_FUZZ_CALLS sets the calls of each test (`scripts/gpu_check.sh OUT stress`): the default is for every run.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable

import broadhead
import pytest
import torch
from broadhead import support
from calls import Call, build
from checks import check_call
from edge_rows import run_edge, shape_of, suited, takes
from gpu_calls import (
    DECODE_ROWS,
    PREFILL_ROWS,
    ROWS,
    TORCH_DTYPES,
    cache_dtype,
    column_step,
    row_id,
    supports,
    value_masks_of,
    within,
    without_lacking,
)
from random_calls import LEGAL, VALUE_MASKS, random_call, wrong_mutations
from random_edges import random_edge

pytestmark = [pytest.mark.gpu, pytest.mark.full]

#: What every device has kernels for; 8-bit inputs and qv come to their rows in test_row.
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (
    8,
    16,
    24,
    40,
    56,
    64,
    72,
    80,
    88,
    96,
    104,
    120,
    128,
    136,
    160,
    168,
    192,
    208,
    232,
    256,
    264,
    320,
    360,
    512,
)
CHUNKS, CALLS = 10, int(os.environ.get("BROADHEAD_FUZZ_CALLS", "60"))
#: The masks that are values and that every row of 16-bit queries has; those of the others come to their rows.
COMMON = tuple(
    name for name in VALUE_MASKS if all(supports(row, {name: True}) for row in ROWS if row.dtype in ("bf16", "fp16"))
)
GROUPS = ((8, 8), (6, 2), (12, 2), (8, 1), (16, 1), (15, 3), (24, 1), (64, 1))


def check_case(call: Call, case: str, rng: random.Random, cuda: torch.device) -> bool:
    """Whether the call ran (and was right); a refusal of a call without oddities is a failure."""
    built = build(call, cuda, rng)
    oddity = rng.choice((None, None, None, *LEGAL))
    oddity = None if call.num_new else oddity
    if oddity is not None:
        oddity(built, rng)
    where = f"{case}, {oddity.__name__ if oddity else None}: {call}"
    try:
        check_call(built)
    except broadhead.UnsupportedError as error:
        assert oddity is not None, f"a plain call was refused ({error}): {where}"
        return False
    except Exception as error:
        raise AssertionError(where) from error
    return True


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_reject_or_correct(chunk: int, seed: int, cuda: torch.device, row_ran: Callable) -> None:
    refused = 0
    for i in range(CALLS):
        rng = random.Random(seed + i)
        longest = rng.choice((6, 40, 150, 600))
        decode = 1.0 if chunk % 2 else 0.5
        shares = {"decode": decode, "invariant": 0.2, "e4m3_cache": 0.15}
        call = random_call(rng, DTYPES, longest, HEAD_DIMS, **shares, values=COMMON)
        torch.manual_seed(seed + i)
        if check_case(call, f"case {i} (seed {seed + i})", rng, cuda):
            row_ran(dtype=call.dtype)
        else:
            refused += 1
    assert refused < max(CALLS // 2, 5)


def random_row_call(row: support.KernelRow, rng: random.Random) -> Call:
    """A random call within the row's head dims and masks, of lengths about a few of its tiles."""
    tile = rng.choice((row.tile.tile_m, row.tile.tile_n, 2 * row.tile.tile_m))
    longest = rng.choice((3, tile // 2, tile + 1, 3 * tile + 2, 700))
    step = column_step(row)
    dims = [tuple(rng.choice((d, rng.randrange(step, d + 1, step))) for d in (row.head_dim, row.head_dim_v))]
    dims.append((row.head_dim, row.head_dim_v))
    if row.head_dim == row.head_dim_v:
        dims.append((dims[0][0], dims[0][0]))
    head_dim, head_dim_v = rng.choice(dims)
    is_decode = row.phase == "decode"
    share = {"decode": 0.9, "invariant": 0.2} if is_decode else {}
    call = random_call(rng, (TORCH_DTYPES[row.dtype],), longest, head_dims=(head_dim,), **share)
    call, changes = without_lacking(row, call), {}
    if cache_dtype(row) != row.dtype:  # then keys are a cache that is only read
        changes |= {"kv_dtype": TORCH_DTYPES[cache_dtype(row)], "descale": rng.choice(("", "kv", "one")), "num_new": ()}
        changes |= {"function": "kvcache"} if call.function == "func" else {"page_size": call.page_size or 16}
    if rng.random() < 0.4:
        changes["heads_q"], changes["heads_kv"] = rng.choice(GROUPS)
    if call.page_size and rng.random() < 0.4:
        changes["page_size"] = rng.choice((row.tile.tile_n, 2 * row.tile.tile_n, 12, 24, 96, 100))
    if call.k_layout == "overlapping" and head_dim != head_dim_v:
        changes["k_layout"] = "plain"
    return within(row, call.with_(head_dim_v=head_dim_v, qv="qv" in row.requires, **changes))


@pytest.mark.parametrize("row", PREFILL_ROWS + DECODE_ROWS, ids=row_id)
def test_row(row: support.KernelRow, seed: int, cuda: torch.device, only_row: Callable, row_ran: Callable) -> None:
    """Any call that the row claims to run, on that very row: single queries too, which prefill rows seldom see, and
    long ones, of which decode rows see none."""
    only_row(row)
    refused = 0
    for i in range(CALLS):
        rng = random.Random(seed + i)
        torch.manual_seed(seed + i)
        if check_case(random_row_call(row, rng), f"case {i} (seed {seed + i}) on {row.id}", rng, cuda):
            assert row_ran().id == row.id
        else:
            refused += 1
    assert refused < max(CALLS // 2, 5)


@pytest.mark.parametrize("row", PREFILL_ROWS + DECODE_ROWS, ids=row_id)
def test_row_out_of_range(
    row: support.KernelRow, seed: int, cuda: torch.device, only_row: Callable, row_ran: Callable
) -> None:
    """Lengths, offsets, page ids and batch indices that are anything, on that very row, at any of its head dims."""
    only_row(row)
    step = column_step(row)
    for i in range(CALLS):
        rng = random.Random(seed + i)
        torch.manual_seed(seed + i)
        edge = suited(row, random_edge(rng, packed_k=not row.kv_dtype, values=value_masks_of(row)))
        if not takes(row, edge):
            continue
        shape = shape_of(row, i, edge)
        if rng.random() < 0.5:
            head_dim = rng.randrange(step, row.head_dim + 1, step)
            shape = dataclasses.replace(shape, head_dim=head_dim)
        run_edge(edge.with_(name=f"case {i} (seed {seed + i}) on {row.id}"), shape, cuda, rng)
        assert edge.rows_q == 0 or row_ran().id == row.id


def test_mistakes_raise(seed: int, cuda: torch.device) -> None:
    """On a device no value is read back, so only mistakes of shape, type and layout are told; all of those are."""
    for i in range(150):
        rng = random.Random(seed + i)
        built = build(random_call(rng, DTYPES, 40, HEAD_DIMS).with_(metadata=False), cuda, rng)
        wrong = wrong_mutations(built)
        name = sorted(wrong)[i % len(wrong)]
        wrong[name](built, rng)
        with pytest.raises(broadhead.BroadheadError):
            built.run()
            pytest.fail(f"case {i} (seed {seed + i}): {name} was accepted: {built.call}")
    torch.cuda.synchronize()
