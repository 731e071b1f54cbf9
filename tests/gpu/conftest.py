"""Fixtures of the GPU tests: run one call on the device, check it, and assert which row of the table ran."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from broadhead import support
from broadhead.costs import Cost
from broadhead.plan import dispatch as dispatch_module
from broadhead.run.cuda_backend import forget_calls
from calls import Built, Call, build
from checks import check_call
from described import hand_in_costs
from gpu_calls import expected_phase


@pytest.fixture
def run_call(
    cuda: torch.device, rng: random.Random, row_ran: Callable
) -> Callable[..., tuple[Built, support.KernelRow]]:
    """`run_call(call, **overrides)`: build, run and check on the device; `(built, row that ran)`."""

    def run(call: Call | Built, **overrides) -> tuple[Built, support.KernelRow]:
        built = call if isinstance(call, Built) else build(call, cuda, rng)
        check_call(built, **overrides)
        call = built.call
        asked = {"head_dim": call.head_dim, "head_dim_v": call.dim_v}
        planned = overrides.get("scheduler_metadata") is not None
        phase = expected_phase(call, planned, built.kwargs.get("max_seqlen_q"))
        return built, row_ran(phase=phase, dtype=call.dtype, **asked)

    return run


@pytest.fixture
def capability(cuda: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(cuda)


@pytest.fixture
def first_rows(first_rows: None) -> Iterator[None]:
    """What ran before is forgotten, and after the test what ran in it."""
    forget_calls()
    yield
    forget_calls()


@pytest.fixture
def costs_are(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, Cost]], None]]:
    """`costs_are({name: cost})`: from now on kernels cost that, and what was decided before is forgotten."""

    def hand_in(costs: dict[str, Cost]) -> None:
        hand_in_costs(monkeypatch, costs)
        forget_calls()

    yield hand_in
    forget_calls()


@pytest.fixture
def only_row(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[support.KernelRow], None]]:
    """`only_row(row)`: from now on dispatch sees a table of that row alone, so that it runs or the call is refused."""

    def forget() -> None:
        dispatch_module._decided.cache_clear()
        forget_calls()

    def show(row: support.KernelRow) -> None:
        if capability not in row.capabilities:
            pytest.skip(f"{row.id} runs on {row.capabilities}, this device is {capability}")
        monkeypatch.setattr(dispatch_module, "ROWS", (row,))
        forget()

    forget()
    yield show
    forget()


@pytest.fixture
def run_row(only_row: Callable, row_ran: Callable, cuda: torch.device, rng: random.Random) -> Callable[..., Built]:
    """`run_row(row, call, **overrides)`: build, run and check on that very row, whatever phase it would choose."""

    def run(row: support.KernelRow, call: Call | Built, **overrides) -> Built:
        only_row(row)
        built = call if isinstance(call, Built) else build(call, cuda, rng)
        check_call(built, **overrides)
        assert row_ran(dtype=built.call.dtype).id == row.id
        return built

    return run
