"""Scheduler metadata on the host: how a request is planned and filled, and which buffer was made for what."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..call import validation as check
from ..call.layout import contiguous, is_strided
from ..call.metadata_request import FUNCTION, MetadataRequest, describe_request
from ..call.plain import count_dispatch_modes, mark_written, plain
from ..call.problem import tensor_signature
from ..errors import InvalidArgumentError, InvalidTypeError
from ..plan import native
from ..plan.device import describe
from ..plan.dispatch import MetadataConfig, Plan, resolve

CURRENT_STREAM = -1  # the binding takes torch's current stream


def metadata_size(batch: int) -> int:
    """Elements of the metadata of ``batch`` sequences: split counts, tags, two reserved fields and a semaphore."""
    return 1 + 4 * round_up_4(batch)


def round_up_4(batch: int) -> int:
    return (batch + 3) // 4 * 4


class _Filled(NamedTuple):
    """A buffer that this process filled with metadata."""

    buffer: weakref.ref[Tensor]
    version: int | None
    config: MetadataConfig
    page_size: int
    seqlen_k: int  # 0: not known exactly
    num_splits: int  # as asked for; 0: heuristic
    guessed_qv: bool
    guessed_kv: bool


#: The tensors of a request: ``(cache_seqlens, cu_seqlens_q, cache_leftpad, out, page_table)``.
Tensors = tuple[Any, Any, Any, Any, Any]

#: By address.
filled: dict[int, _Filled] = {}
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


class Prepared(NamedTuple):
    """A validated request with its plan: what repeats from call to call."""

    request: MetadataRequest
    plan: Plan
    size: int
    numbers: tuple[int, ...] | None  # the last arguments of _C.scheduler_metadata; None: no kernel plans this call


#: By everything that validation and dispatch looked at; only for devices whose tensors are not read on the host.
_prepared: dict[tuple[Any, ...], Prepared] = {}
_MAX_PREPARED = 4096


def prepare(request: MetadataRequest, device: torch.device) -> Prepared:
    """Decide how the metadata of ``request`` is computed on ``device``."""
    problem = request.problem
    plan = resolve(problem, describe(device))
    numbers = None
    if plan.row is not None and plan.schedule is not None and problem.batch > 0:
        schedule = plan.schedule
        numbers = (
            problem.batch,
            problem.seqlen_q,
            problem.seqlen_k,
            request.seqlen_k_new,
            problem.window_left,
            problem.window_right,
            problem.attention_chunk,
            schedule.rows_per_token,
            schedule.heads_in_grid,
            schedule.tile_m,
            plan.row.tile.tile_n,
            max(1, schedule.num_splits),  # decode kernels plan for themselves: the device need not try
            schedule.target_ctas,
            plan.metadata_tag,
            CURRENT_STREAM,
        )
    return Prepared(request, plan, metadata_size(problem.batch), numbers)


def fill(
    prepared: Prepared,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor | None,
    cache_leftpad: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """Compute the metadata on the device of ``cache_seqlens`` without waiting for it; into ``out`` if given."""
    metadata = _allocate(cache_seqlens, prepared.size) if out is None else out
    if prepared.numbers is not None:
        module = native.extension()
        assert module is not None
        # Without cu_seqlens_k and seqused_q: the lengths of keys are cache_seqlens, those of queries cu_seqlens_q.
        tensors = (metadata, cache_seqlens, None, cache_leftpad, cu_seqlens_q, None)
        index = cache_seqlens.get_device()
        if index == torch.cuda.current_device():
            module.scheduler_metadata(*tensors, *prepared.numbers)
        else:
            with torch.cuda.device(index):
                module.scheduler_metadata(*tensors, *prepared.numbers)
        if out is not None:
            mark_written(out)
    else:
        batch = prepared.request.problem.batch
        slots = round_up_4(batch)
        metadata[: prepared.size] = 0
        metadata[:batch] = 1
        metadata[slots : slots + batch] = prepared.plan.metadata_tag
    _remember(metadata, prepared.request, prepared.plan)
    return metadata


def _allocate(cache_seqlens: Tensor, size: int) -> Tensor:
    """A buffer with a version counter, by which check_identity tells that somebody else wrote it."""
    if torch.is_inference_mode_enabled():
        with torch._C._InferenceMode(False):
            return cache_seqlens.new_empty(size)
    return cache_seqlens.new_empty(size)


def _version(tensor: Tensor) -> int | None:
    # Inference tensors have no version counter.
    return None if tensor.is_inference() else tensor._version


def _remember(metadata: Tensor, request: MetadataRequest, plan: Plan) -> None:
    if len(filled) >= _MAX_FILLED:
        for pointer in [pointer for pointer, entry in list(filled.items()) if entry.buffer() is None]:
            filled.pop(pointer, None)
        if len(filled) >= _MAX_FILLED:
            filled.clear()
    # A view dies before the buffer it was taken from: remember the buffer.
    owner = metadata if metadata._base is None else metadata._base
    filled[metadata.data_ptr()] = _Filled(
        weakref.ref(owner),
        _version(owner),
        plan.metadata_config,
        request.problem.page_size,
        request.problem.seqlen_k if request.explicit_length else 0,
        request.problem.num_splits,
        request.guessed_qv,
        request.guessed_kv,
    )


def check_identity(
    function: str, metadata: Tensor, config: MetadataConfig, page_size: int, seqlen_k: int, num_splits: int
) -> _Filled | None:
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
    made_for = entry.config
    mixed = config.qkv_dtype != config.kv_dtype
    if entry.guessed_kv and mixed and made_for.qkv_dtype in (config.qkv_dtype, config.kv_dtype):
        # Some clients name the dtype of the cache, some that of q. It costs what a wrong guess of qv does.
        made_for = made_for._replace(qkv_dtype=config.qkv_dtype, kv_dtype=config.kv_dtype, kernel="")
    if entry.guessed_qv and made_for.has_qv != config.has_qv:
        # A wrong guess costs splits (the device finds another tag), not the call.
        made_for, config = (c._replace(has_qv=False, kernel="") for c in (made_for, config))
    if not (made_for.kernel and config.kernel):
        # One side has no kernel (the torch fallback reads no metadata): compare what the caller chose.
        made_for, config = (c._replace(kernel="", pack_gqa=False) for c in (made_for, config))
    if made_for != config:
        for name, made, called in zip(MetadataConfig._fields, made_for, config, strict=True):
            if made != called:
                _refuse(function, name, made, called)
    if page_size and entry.page_size and page_size != entry.page_size:
        _refuse(function, "page_size", entry.page_size, page_size)
    if page_size and entry.seqlen_k and seqlen_k != entry.seqlen_k:
        _refuse(function, "page_table.size(1) * page_size", entry.seqlen_k, seqlen_k)
    if num_splits > entry.num_splits > 0:
        _refuse(function, "num_splits", entry.num_splits, num_splits)
    return entry


def _refuse(function: str, name: str, made: object, called: object) -> NoReturn:
    raise InvalidArgumentError(
        f"{function}: scheduler_metadata was made for {name}={made!r}, but this call has {name}={called!r};"
        " call get_scheduler_metadata with the arguments of this call"
    )


def find(tensors: Tensors, numbers: tuple[Any, ...]) -> tuple[tuple[Any, ...] | None, Prepared | None]:
    """What is looked at of a request, as a key, and the plan of a request like it before, if any.

    Without a key the request must be validated each time.

    Args:
        numbers: the other arguments of get_scheduler_metadata, in the order of describe_request without page_table.
    """
    cache_seqlens, cu_seqlens_q, cache_leftpad, out, page_table = tensors
    try:
        if cache_seqlens is not None and cache_seqlens.is_cuda and count_dispatch_modes() == 0:
            # Integers are negated lazily by no public function: their types say whether they are plain memory.
            key = (
                tensor_signature(cache_seqlens), None if cu_seqlens_q is None else tensor_signature(cu_seqlens_q),
                None if cache_leftpad is None else tensor_signature(cache_leftpad),
                None if out is None else tensor_signature(out),
                None if page_table is None else tensor_signature(page_table), numbers,
            )  # fmt: skip
            return key, _prepared.get(key)
    except (AttributeError, TypeError):
        pass  # not tensors, or unhashable values: validation names them
    return None, None


def run(tensors: Tensors, numbers: tuple[Any, ...]) -> Tensor:
    """get_scheduler_metadata on arguments that no mode or subclass has a say in."""
    key, prepared = find(tensors, numbers)
    return run_new(key, tensors, numbers) if prepared is None else fill(prepared, *tensors[:4])


def run_new(key: tuple[Any, ...] | None, tensors: Tensors, numbers: tuple[Any, ...]) -> Tensor:
    """The same for a request whose ``key`` is not known."""
    ready = tuple(
        plain(FUNCTION, name, value, written=name == "out")
        for name, value in zip(
            ("cache_seqlens", "cu_seqlens_q", "cache_leftpad", "out", "page_table"), tensors, strict=True
        )
    )
    cache_seqlens, cu_seqlens_q, cache_leftpad, out, page_table = ready
    given_out = tensors[3]
    read = (cache_seqlens, cu_seqlens_q, cache_leftpad, page_table)
    if any(is_strided(tensor) for tensor in read):
        cache_seqlens, cu_seqlens_q, cache_leftpad, page_table = map(contiguous, read)
        key = None  # of other tensors
    if any(a is not b for a, b in zip(ready, tensors, strict=True)):
        key = None
    lengths = _check_tensors(numbers[0], cache_seqlens, cu_seqlens_q, cache_leftpad, out, page_table)
    described = (*numbers[:16], page_table, *numbers[16:])
    request = describe_request(*described)
    prepared = prepare(request, lengths.device)
    if key is not None and not any(isinstance(value, Tensor) for value in (*numbers, *_sides(numbers[11]))):
        # A tensor in the key would be found again after its value has changed.
        if len(_prepared) >= _MAX_PREPARED:
            _prepared.clear()
        _prepared[key] = prepared
    metadata = fill(prepared, lengths, cu_seqlens_q, cache_leftpad, out)
    return metadata if given_out is None else given_out


def _sides(window_size: Any) -> tuple[Any, ...]:
    return tuple(window_size) if isinstance(window_size, (tuple, list)) else ()


def _check_tensors(
    batch_size: Any, cache_seqlens: Any, cu_seqlens_q: Any, cache_leftpad: Any, out: Any, page_table: Any
) -> Tensor:
    batch_size = check.check_int(FUNCTION, "batch_size", batch_size)
    lengths = check.check_tensor(FUNCTION, "cache_seqlens", cache_seqlens, "an int32 tensor of shape (batch_size,)")
    check.check_int32(FUNCTION, "cache_seqlens", lengths, (batch_size,), lengths.device, "(batch_size,)")
    check.check_lengths_on_cpu(FUNCTION, "cache_seqlens", lengths)
    for name, value, size in (
        ("cu_seqlens_q", cu_seqlens_q, batch_size + 1),
        ("cache_leftpad", cache_leftpad, batch_size),
    ):
        if value is not None:
            check.check_int32(FUNCTION, name, value, (size,), lengths.device, f"({size},)")
    if page_table is not None:
        check.check_int32(FUNCTION, "page_table", page_table, (None, None), lengths.device, "(batch, max_pages)")
    if out is not None:
        check_buffer(FUNCTION, "out", out, batch_size, lengths.device)
    return lengths
