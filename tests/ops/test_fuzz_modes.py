"""fuzz_modes on the CPU."""

from __future__ import annotations

import random
import time

import pytest
import torch
from entries import backward_entries, entries
from fuzz_modes import check_random_call

SECONDS = 4.0  # of each chunk


@pytest.mark.parametrize("chunk", range(3))
def test_random_calls_in_random_modes(chunk: int, seed: int) -> None:
    dtype = (torch.float32, torch.bfloat16, torch.float16)[chunk]
    end, count = time.monotonic() + SECONDS, 0
    while time.monotonic() < end or count < 20:
        rng = random.Random(seed + count)
        torch.manual_seed(seed + count)
        calls = entries(dtype=dtype) | backward_entries(dtype=dtype)
        name = rng.choice(sorted(calls))
        try:
            check_random_call(calls[name], rng)
        except Exception as error:
            raise AssertionError(f"case {count} (seed {seed + count}): {name}") from error
        count += 1
