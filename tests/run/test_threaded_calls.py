"""Several threads call at once: on the CPU the torch fallback, whose caches of decided calls they share."""

from __future__ import annotations

import pytest
import threaded_calls
import torch
from threaded_calls import run_threads

CPU = torch.device("cpu")


def test_two_threads() -> None:
    torch.set_num_threads(1)
    assert run_threads(CPU, kinds=400, threads=2) == []


def test_a_wrong_result_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """One key too many in softmax_lse, an exception in a thread: both are complaints."""
    real = threaded_calls.broadhead.flash_attn_func

    def off(*args, **kwargs):
        out, lse = real(*args, **kwargs)
        return out, lse + 2e-3

    monkeypatch.setattr(threaded_calls.broadhead, "flash_attn_func", off)
    assert len(run_threads(CPU, kinds=8, threads=2)) == 2
    monkeypatch.setattr(threaded_calls.broadhead, "flash_attn_func", None)
    assert all("TypeError" in text for text in run_threads(CPU, kinds=8, threads=2))
