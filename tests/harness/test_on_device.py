"""What `on_device` says of a test that attends: kernels of every direction, and nothing else."""

from __future__ import annotations

import threading

import broadhead
import pytest
import torch
from broadhead import support
from broadhead.run.fallback import state
from on_device import Dispatches

ROWS = {
    direction: next(row.id for row in support.ROWS if row.direction == direction)
    for direction in ("forward", "backward")
}


def dispatches(*seen: tuple[str, str | None]) -> Dispatches:
    found = Dispatches()
    found.seen = [(backend, row, "a reason") for backend, row in seen]
    return found


def test_kernels_of_each_direction_pass() -> None:
    dispatches(("cuda", ROWS["forward"]), ("cuda", ROWS["backward"])).check("forward", "backward")
    dispatches().check()


@pytest.mark.parametrize("seen", [[], [("cuda", ROWS["forward"])]])
def test_a_direction_without_a_kernel_fails(seen: list[tuple[str, str | None]]) -> None:
    with pytest.raises(AssertionError, match=r"no kernel ran.*backward"):
        dispatches(*seen).check("forward", "backward")


@pytest.mark.parametrize("other", [("torch", None), ("cuda", "no_row_of_the_table")])
def test_one_call_on_something_else_fails(other: tuple[str, str | None]) -> None:
    with pytest.raises(AssertionError, match="1 of 2 calls ran on no kernel"):
        dispatches(("cuda", ROWS["forward"]), other).check("forward")


def test_calls_of_every_thread_are_noted() -> None:
    q = torch.randn(1, 3, 2, 16)
    before = broadhead.last_dispatch()
    with Dispatches() as ran:
        broadhead.flash_attn_func(q, q, q)
        thread = threading.Thread(target=broadhead.flash_attn_func, args=(q, q, q))
        thread.start()
        thread.join()
        assert broadhead.last_dispatch() == ran.seen[0]
    assert [backend for backend, _, _ in ran.seen] == ["torch", "torch"]
    assert before[0] in ("none", "torch")
    state.last = ("cuda", "a row", "")
    assert broadhead.last_dispatch()[1] == "a row", "the record is as it was"
    broadhead.flash_attn_func(q, q, q)
