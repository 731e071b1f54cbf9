"""Fixtures of the GPU tests: run one call on the device, check it, and assert which row of the table ran."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import broadhead
import pytest
import torch
from broadhead import device as device_module
from broadhead import support
from broadhead.forward import clear_launches
from calls import Built, Call, build
from checks import check_call
from gpu_calls import expected_phase

#: What CUDA, or dispatch, says of a kernel that was not compiled for the device at hand.
NO_CODE = ("no kernel image", "invalid device function", "left out of this build for compute capability")


@pytest.fixture
def run_call(
    cuda: torch.device, rng: random.Random, row_ran: Callable
) -> Callable[..., tuple[Built, support.KernelRow]]:
    """`run_call(call, **overrides)`: build, run and check on the device; `(built, row that ran)`."""

    def run(call: Call | Built, **overrides) -> tuple[Built, support.KernelRow]:
        built = call if isinstance(call, Built) else build(call, cuda, rng)
        check_call(built, **overrides)
        head_dim = max(built.call.head_dim, built.call.dim_v)
        return built, row_ran(phase=expected_phase(built), dtype=built.call.dtype, head_dim=head_dim)

    return run


@pytest.fixture
def capability(cuda: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(cuda)


@pytest.fixture
def run_row(
    run_call: Callable, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[support.KernelRow, Call], None]]:
    """`run_row(row, call)`: run the call on that very row.

    Rows for devices with less shared memory run here too: dispatch is shown this device with the shared memory that the row
    asks for, so that larger tiles refuse.
    """

    def run(row: support.KernelRow, call: Call) -> None:
        native = capability in row.capabilities
        if native:
            real = broadhead.device.describe(torch.device("cuda", torch.cuda.current_device()))
            smaller = real._replace(smem_per_block=row.smem_limit)
            monkeypatch.setattr(device_module, "_describe_cuda", lambda index: smaller)
            clear_launches()
        try:
            _, ran = run_call(call)
        except (broadhead.KernelError, broadhead.UnsupportedError) as error:
            if native or not any(words in str(error) for words in NO_CODE):
                raise
            pytest.skip(
                f"{row.id} is for compute capability {row.capabilities}; no code of it for this device: {error}"
            )
        assert ran.id == row.id

    clear_launches()
    yield run
    clear_launches()
