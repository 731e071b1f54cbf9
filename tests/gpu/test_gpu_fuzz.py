"""Full GPU set: reject_or_correct, strict: a call raises a BroadheadError or a kernel matches the judge."""

from __future__ import annotations

import random
from collections.abc import Callable

import broadhead
import pytest
import torch
from calls import build
from checks import check_call
from random_calls import LEGAL, random_call, wrong_mutations

pytestmark = [pytest.mark.gpu, pytest.mark.full]

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (8, 16, 24, 40, 64, 72, 80, 96, 104, 128, 136, 160, 192, 256, 264, 320, 512)
CHUNKS, CALLS = 10, 60


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_reject_or_correct(chunk: int, seed: int, cuda: torch.device, row_ran: Callable) -> None:
    refused = 0
    for i in range(CALLS):
        rng = random.Random(seed + i)
        call = random_call(rng, DTYPES, longest=rng.choice((6, 40, 150, 600)), head_dims=HEAD_DIMS)
        torch.manual_seed(seed + i)
        built = build(call, cuda, rng)
        oddity = rng.choice((None, None, None, *LEGAL))
        oddity = None if call.num_new else oddity
        if oddity is not None:
            oddity(built, rng)
        where = f"case {i} (seed {seed + i}, {oddity.__name__ if oddity else None}): {call}"
        try:
            check_call(built)
        except broadhead.UnsupportedError:
            assert oddity is not None, f"a plain call was refused: {where}"
            refused += 1
            continue
        except Exception as error:
            raise AssertionError(where) from error
        row_ran(dtype=call.dtype)
    assert refused < CALLS // 2


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
