"""Stand-ins for CUDA tensors, for testing the bindings where there is no GPU, and access to the stub library's text."""

from __future__ import annotations

import ctypes
from pathlib import Path


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Device:
    def __init__(self, index: int) -> None:
        self.index = index


class AttributeTensor:
    """A CUDA tensor to whoever reads the attributes of torch.Tensor."""

    def __init__(self, pointer, shape, dtype="torch.bfloat16", strides=None, device=0, is_cuda=True) -> None:
        if strides is None:
            strides, step = [], 1
            for size in reversed(shape):
                strides.insert(0, step)
                step *= size
        self.shape, self.dtype, self.is_cuda, self.device = tuple(shape), dtype, is_cuda, _Device(device)
        self._pointer, self._strides = pointer, tuple(strides)
        self.requires_grad = False
        self.c_shape = (ctypes.c_int64 * len(shape))(*shape)
        self.c_strides = (ctypes.c_int64 * len(shape))(*strides)

    def data_ptr(self) -> int:
        return self._pointer

    def stride(self) -> tuple[int, ...]:
        return self._strides

    def new_empty(self, size: int, dtype: str) -> AttributeTensor:
        assert dtype == "torch.float32"
        scratch_sizes.append(size)
        return AttributeTensor(SCRATCH, (size,), dtype)


DTYPES = {
    "torch.bfloat16": (4, 16),
    "torch.float16": (2, 16),
    "torch.float32": (2, 32),
    "torch.int32": (0, 32),
    "torch.int64": (0, 64),
    "torch.bool": (6, 8),
    "torch.float8_e4m3fn": (10, 8),
}
CUDA_DEVICE = 2  # kDLCUDA
CURRENT_STREAM = 0x5EED
SCRATCH = 6 << 12  # the address of what a call allocates for itself
OUT_OF_MEMORY = 9999  # a size that the exchange API refuses
scratch_sizes: list[int] = []
freed: list[int] = []  # of those allocated through the exchange API


TensorReader = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(_DLTensor))


@TensorReader
def _read(tensor, out) -> int:
    view = out[0]
    # Half of the address by the offset: the reader must add it.
    view.data, view.byte_offset = tensor.data_ptr() - 8, 8
    view.device_type, view.device_id = (CUDA_DEVICE if tensor.is_cuda else 1), tensor.device.index
    view.ndim, view.lanes = len(tensor.shape), 1
    view.code, view.bits = DTYPES.get(tensor.dtype, (6, 8))
    view.shape = ctypes.cast(tensor.c_shape, ctypes.POINTER(ctypes.c_int64))
    view.strides = ctypes.cast(tensor.c_strides, ctypes.POINTER(ctypes.c_int64))
    return 0


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))
def _stream(device_type, device_id, out) -> int:
    out[0] = CURRENT_STREAM + device_id
    return 0


class _Managed(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    ]


@ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
def _free(managed) -> None:
    freed.append(scratch_sizes[-1])


@ctypes.PYFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(_DLTensor), ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_void_p
)
def _allocate(like, out, context, set_error) -> int:
    wanted = like[0]
    if wanted.shape[0] == OUT_OF_MEMORY:
        return -1
    assert (wanted.device_type, wanted.ndim, wanted.code, wanted.bits, wanted.lanes) == (2, 1, 2, 32, 1)
    scratch_sizes.append(wanted.shape[0])
    _managed.deleter = ctypes.cast(_free, ctypes.c_void_p)
    _managed.tensor.data, _managed.tensor.byte_offset = SCRATCH - 8, 8
    out[0] = ctypes.addressof(_managed)
    return 0


_managed = _Managed()


class ExchangeAPI(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("prev_api", ctypes.c_void_p),
        ("allocator", ctypes.c_void_p),
        ("from_py_object", ctypes.c_void_p),
        ("to_py_object", ctypes.c_void_p),
        ("read", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    ]


_new_capsule = ctypes.pythonapi.PyCapsule_New
CAPSULE_NAME = b"dlpack_exchange_api"  # a capsule keeps the pointer
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_kept: list[tuple[ExchangeAPI, TensorReader]] = []


def make_exchange_api(read: TensorReader) -> object:
    """DLPack's C exchange API in its capsule: ``read`` describes a tensor, memory and stream are the stub's."""
    functions = [None if f is None else ctypes.cast(f, ctypes.c_void_p) for f in (_allocate, None, None, read, _stream)]
    _kept.append((ExchangeAPI(1, 3, None, *functions), read))
    return _new_capsule(ctypes.addressof(_kept[-1][0]), CAPSULE_NAME, None)


class ExchangeTensor(AttributeTensor):
    """The same to whoever reads DLPack's C exchange API."""

    __dlpack_c_exchange_api__ = make_exchange_api(_read)


def stub_launches(library: Path, forget: bool = False) -> list[dict[str, str]]:
    """What the stub library was launched with, by the fields of the argument blocks; ``entry`` names the entry."""
    stub = ctypes.CDLL(str(library))
    stub.stub_launches.restype = ctypes.c_char_p
    texts = stub.stub_launches(int(forget)).decode().split("\n\n")
    return [dict(line.split("=", 1) for line in text.splitlines()) for text in texts if text]


def last_call(library: Path, entry: str = "") -> dict[str, str]:
    """The fields of the last launch, of an entry if one is named; none where there was no launch."""
    calls = [call for call in stub_launches(library) if entry in ("", call["entry"])]
    return {name: value for call in calls[-1:] for name, value in call.items() if name != "entry"}
