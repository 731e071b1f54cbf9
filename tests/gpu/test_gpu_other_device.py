"""Calls on a device that is not the current one, new and known: they run there, and the current device stays."""

from __future__ import annotations

import random

import broadhead
import pytest
import torch
from calls import build
from checks import check_call
from gpu_calls import decode_call, prefill_call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture
def other(cuda: torch.device) -> torch.device:
    assert torch.cuda.current_device() == 0
    return torch.device("cuda", 1)


@pytest.mark.parametrize("kind", ["decode", "prefill", "append"])
def test_attention(kind: str, other: torch.device, rng: random.Random) -> None:
    call = {
        "decode": decode_call(128, metadata=True),
        "prefill": prefill_call(64),
        "append": decode_call(64, seqlens_k=(90, 17, 1, 64), num_new=(1, 1, 1, 1), causal=True),
    }[kind]
    for _ in range(3):
        check_call(build(call, other, rng))
        assert torch.cuda.current_device() == 0


def test_merge_and_metadata(other: torch.device) -> None:
    """The results are those of the same calls on the current device."""
    states = [torch.randn(70, 4, 64), torch.randn(4, 70), torch.randn(70, 4, 64), torch.randn(4, 70)]
    lengths = torch.tensor([900, 30], dtype=torch.int32)

    def results(device: torch.device) -> list[torch.Tensor]:
        merged = broadhead.merge_attn_states(*(x.to(device) for x in states))
        plan = broadhead.get_scheduler_metadata(2, 1, 1024, 8, 2, 64, lengths.to(device), page_size=16)
        return [*merged, plan]

    expected = results(torch.device("cuda", 0))
    for _ in range(3):
        found = results(other)
        assert all(x.device == other for x in found) and torch.cuda.current_device() == 0
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x.cpu(), y.cpu(), rtol=0, atol=0)
