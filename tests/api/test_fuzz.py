"""reject_or_correct on the CPU: a random call raises a BroadheadError or matches the judge; a mistake raises one."""

from __future__ import annotations

import random
import time

import broadhead
import pytest
import torch
from calls import build
from checks import check_call
from random_calls import LEGAL, random_call, wrong_mutations

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
HEAD_DIMS = (8, 16, 24, 40, 64, 72)
SECONDS = 4.0  # of each chunk
CHUNKS = 5


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_reject_or_correct(chunk: int, seed: int) -> None:
    """Valid calls, e4m3 and qv among them, a third with odd strides: the fallback takes every one.

    Every second chunk is of decode: few queries, sometimes of many sequences.
    """
    torch.set_num_threads(1)
    end, count = time.monotonic() + SECONDS, 0
    while time.monotonic() < end or count < 20:
        rng = random.Random(seed + count)
        dtypes = (*DTYPES, torch.float8_e4m3fn)
        longest, decode = rng.choice((6, 40, 40, 130)), 1.0 if chunk % 2 else 0.5
        call = random_call(rng, dtypes, longest, HEAD_DIMS, qv=0.2, decode=decode)
        torch.manual_seed(seed + count)
        built = build(call, CPU, rng)
        oddity = rng.choice((None, None, *LEGAL))
        if oddity is not None and not call.num_new:
            oddity(built, rng)
        try:
            check_call(built)
        except Exception as error:
            name = None if oddity is None else oddity.__name__
            raise AssertionError(f"case {count} (seed {seed + count}, {name}): {call}") from error
        count += 1


def test_mistakes_raise(seed: int) -> None:
    """Every mistake, in calls of every kind, raises our error and names the function."""
    names: set[str] = set()
    end, count = time.monotonic() + SECONDS, 0
    while time.monotonic() < end or count < 60:
        rng = random.Random(seed + count)
        call = random_call(rng, DTYPES, longest=9, head_dims=(16, 24))
        built = build(call.with_(metadata=False), CPU, rng)
        wrong = wrong_mutations(built)
        name = rng.choice(sorted(set(wrong) - names) or sorted(wrong))
        wrong[name](built, rng)
        names.add(name)
        try:
            built.run()
        except broadhead.BroadheadError as error:
            assert isinstance(error, (ValueError, TypeError, NotImplementedError)), name
            assert "flash_attn" in str(error), f"{name}: the text does not name the function: {error}"
        except Exception as error:
            raise AssertionError(
                f"case {count} (seed {seed + count}), {name}: {type(error).__name__}: {call}"
            ) from error
        else:
            pytest.fail(f"case {count} (seed {seed + count}): {name} was accepted: {call}")
        count += 1
