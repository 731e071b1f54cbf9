"""Passes tensors of the CPU off as tensors of an H200 whose kernels only record: for a process of its own.

From a public function to the launcher of a kernel everything is then what runs on a GPU, but for these:

- `plan.device` describes the CPU as an H200;
- DLPack's C API, by which the compiled module reads torch's tensors, says that they are on CUDA device 0, and gives
  the stub's stream and scratch;
- launches are made for device 0, as tensors of the CPU have no index, and torch.cuda does not change the device;
- `Tensor.is_cuda` is true within `on_device`.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from broadhead.plan import device, native
from broadhead.support import ROWS, KernelRow
from described import h200
from stub_process import compile_stub
from stub_tensor import CAPSULE_NAME, CUDA_DEVICE, ExchangeAPI, TensorReader, make_exchange_api, stub_launches

#: The calls that were decided and not known, by the function of the compiled module that ran them.
decided: list[str] = []


def compile_table(directory: Path) -> None:
    """Compile a recording library with all portable rows of the table."""
    kernels = directory / "kernels.inc"
    kernels.write_text("".join(_declaration(row) for row in ROWS if row.family == "sm80"))
    compile_stub(directory, f'-DSTUB_KERNELS="{kernels}"')


_DTYPES = {"bf16": "kBFloat16", "fp16": "kFloat16", "float8_e4m3fn": "kFloat8E4M3"}


def _declaration(row: KernelRow) -> str:
    dtypes = ", ".join(f"DataType::{_DTYPES[dtype]}" for dtype in (row.dtype, row.kv_dtype or row.dtype))
    kind = f"Direction::k{row.direction.title()}, Phase::k{row.phase.title()}"
    return f'kernel("{row.id}", {kind}, {dtypes}),\n'


class _Module:
    """The compiled module, for tensors that do not know the index of their device."""

    def __getattr__(self, name: str) -> Any:
        from broadhead import _C

        value = getattr(_C, name)
        if name.endswith("Launch"):
            return lambda **fields: value(**{**fields, "device": 0})
        if not name.startswith(("run_new", "remember")):
            return value

        def decide(*arguments: Any) -> Any:
            decided.append(name)
            return value(*arguments)

        return decide


def install() -> None:
    """From here on this process takes the CPU for an H200. Its libraries: BROADHEAD_KERNEL_LIB_DIR."""
    module = _Module()
    native.extension = lambda: module  # type: ignore[assignment,return-value]
    device.CPU = h200(cuda_version=(13, 1))
    torch.Tensor.__dlpack_c_exchange_api__ = make_exchange_api(_reader_as_cuda())
    torch.cuda.current_device = lambda: -1  # get_device() of a CPU tensor
    torch.cuda.device = lambda index: contextlib.nullcontext()  # type: ignore[misc,assignment]
    # Two functions: torch.compile knows them apart.
    torch.cuda._exchange_device = lambda index: 0  # type: ignore[assignment]
    torch.cuda._maybe_exchange_device = lambda index: 0  # type: ignore[assignment]


@contextlib.contextmanager
def on_device() -> Iterator[None]:
    """Within, tensors say that they are on a CUDA device; torch.compile would not believe them."""
    torch.Tensor.is_cuda = True  # type: ignore[assignment]
    try:
        yield
    finally:
        del torch.Tensor.is_cuda


def _reader_as_cuda() -> TensorReader:
    """Torch's own description of a tensor, but for the device."""
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    api = ExchangeAPI.from_address(pointer_of(torch.Tensor.__dlpack_c_exchange_api__, CAPSULE_NAME))
    read = TensorReader(api.read)

    @TensorReader
    def read_as_cuda(tensor: Any, out: Any) -> int:
        status = read(tensor, out)
        out[0].device_type, out[0].device_id = CUDA_DEVICE, 0
        return status

    return read_as_cuda


def take_launches(directory: Path) -> list[dict[str, str]]:
    """What was launched since this was asked last; see stub_launches."""
    return stub_launches(directory / "libbroadhead_sm80.so", forget=True)
