"""Which buffers hold scheduler metadata, and what each was made for."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..call import validation as check
from ..errors import InvalidArgumentError, InvalidTypeError
from ..plan.dispatch import MetadataConfig


def metadata_size(batch: int) -> int:
    """Elements of the metadata of ``batch`` sequences: split counts, tags, two reserved fields and a semaphore."""
    return 1 + 4 * round_up_4(batch)


def round_up_4(batch: int) -> int:
    return (batch + 3) // 4 * 4


class MadeFor(NamedTuple):
    """What metadata was made for."""

    config: MetadataConfig
    page_size: int
    seqlen_k: int  # 0: not known exactly
    num_splits: int  # as asked for; 0: heuristic
    guessed_qv: bool
    guessed_kv: bool


class Record(NamedTuple):
    """A buffer that this process filled with metadata."""

    buffer: weakref.ref[Tensor]
    version: int | None
    made_for: MadeFor


#: By address.
filled: dict[int, Record] = {}
_MAX_FILLED = 1024


def check_buffer(function: str, name: str, buffer: Any, batch: int, device: torch.device) -> None:
    """int32, 1-D, contiguous, on the device, and long enough for ``batch`` sequences."""
    size = metadata_size(batch)
    accepted = f"an int32 tensor of shape ({size},) or longer, 1 + 4 * round_up(batch, 4) for batch {batch}"
    tensor = check.check_tensor(function, name, buffer, accepted)
    if tensor.dtype != torch.int32:
        raise InvalidTypeError(f"{function}: {name} must be {accepted}, got dtype {tensor.dtype}")
    if tensor.dim() != 1 or tensor.shape[0] < size:
        raise InvalidArgumentError(f"{function}: {name} must be {accepted}, got shape {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise InvalidArgumentError(f"{function}: {name} must be contiguous, got strides {tensor.stride()}")
    check.check_device(function, name, tensor, device)


def _version(tensor: Tensor) -> int | None:
    # Inference tensors have no version counter.
    return None if tensor.is_inference() else tensor._version


def remember(metadata: Tensor, made_for: MadeFor) -> None:
    """Note that the buffer was filled just now."""
    if len(filled) >= _MAX_FILLED:
        for pointer in [pointer for pointer, entry in list(filled.items()) if entry.buffer() is None]:
            filled.pop(pointer, None)
        if len(filled) >= _MAX_FILLED:
            filled.clear()
    # A view dies before the buffer it was taken from: remember the buffer.
    owner = metadata if metadata._base is None else metadata._base
    filled[metadata.data_ptr()] = Record(weakref.ref(owner), _version(owner), made_for)


def check_identity(
    function: str, metadata: Tensor, config: MetadataConfig, page_size: int, seqlen_k: int, num_splits: int
) -> Record | None:
    """Refuse metadata that this process made for another call. Other buffers pass: the device checks their tags.

    Returns the record that says so; while it is the one that ``filled`` holds for the address, the buffer passes again.

    Raises:
        InvalidArgumentError: naming the first field that differs.
    """
    entry = filled.get(metadata.data_ptr())
    if entry is None:
        return None
    owner = entry.buffer()
    if owner is None or (metadata is not owner and metadata._base is not owner):
        return None  # freed
    if entry.version is None or _version(owner) != entry.version:
        return None  # overwritten since, or nobody counts what is written to it
    request = entry.made_for
    made_for = request.config
    mixed = config.qkv_dtype != config.kv_dtype
    if request.guessed_kv and mixed and made_for.qkv_dtype in (config.qkv_dtype, config.kv_dtype):
        # Some clients name the dtype of the cache, some that of q. It costs what a wrong guess of qv does.
        made_for = made_for._replace(qkv_dtype=config.qkv_dtype, kv_dtype=config.kv_dtype, kernel="")
    if request.guessed_qv and made_for.has_qv != config.has_qv:
        # A wrong guess costs splits (the device finds another tag), not the call.
        made_for, config = (c._replace(has_qv=False, kernel="") for c in (made_for, config))
    if not (made_for.kernel and config.kernel):
        # One side has no kernel (the torch fallback reads no metadata): compare what the caller chose.
        made_for, config = (c._replace(kernel="", pack_gqa=False) for c in (made_for, config))
    if made_for != config:
        for name, made, called in zip(MetadataConfig._fields, made_for, config, strict=True):
            if made != called:
                _refuse(function, name, made, called)
    if page_size and request.page_size and page_size != request.page_size:
        _refuse(function, "page_size", request.page_size, page_size)
    if page_size and request.seqlen_k and seqlen_k != request.seqlen_k:
        _refuse(function, "page_table.size(1) * page_size", request.seqlen_k, seqlen_k)
    if num_splits > request.num_splits > 0:
        _refuse(function, "num_splits", request.num_splits, num_splits)
    return entry


def _refuse(function: str, name: str, made: object, called: object) -> NoReturn:
    about = " (causal=True is 0, and a causal tensor counts as causal=False)" if name == "window_right" else ""
    raise InvalidArgumentError(
        f"{function}: scheduler_metadata was made for {name}={made!r}, but this call has {name}={called!r}{about};"
        " call get_scheduler_metadata with the arguments of this call"
    )
