"""Scheduler metadata on the host: a request is as one before, or it is validated, planned and remembered."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import validation as check
from ..call.layout import contiguous, is_strided
from ..call.metadata_request import FUNCTION, MetadataRequest, describe_request
from ..call.plain import plain
from ..plan.device import describe
from ..plan.dispatch import Plan, resolve
from . import known
from .cuda_backend import connected_module
from .metadata_records import MadeFor, check_buffer, metadata_size, remember, round_up_4

#: The tensors of a request: ``(cache_seqlens, cu_seqlens_q, cache_leftpad, out, page_table)``.
Tensors = tuple[Any, Any, Any, Any, Any]
NAMES = ("cache_seqlens", "cu_seqlens_q", "cache_leftpad", "out", "page_table")


class ScheduleNumbers(NamedTuple):
    """What the device needs of a plan: fields of SchedulerMetadataParams (csrc/host/params.h)."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    seqlen_k_new: int
    window_left: int
    window_right: int
    attention_chunk: int
    rows_per_token: int
    heads_in_grid: int
    tile_m: int
    tile_n: int
    num_splits: int
    target_ctas: int
    metadata_tag: int


def run(tensors: Tensors, numbers: tuple[Any, ...]) -> Tensor:
    """get_scheduler_metadata on arguments that no mode or subclass has a say in.

    Args:
        numbers: the other arguments of get_scheduler_metadata, in the order of describe_request without page_table.
    """
    metadata = known.run_known_metadata(*tensors, numbers)
    return run_new(tensors, numbers) if metadata is None else metadata


def run_new(tensors: Tensors, numbers: tuple[Any, ...]) -> Tensor:
    """The metadata of a request that is not known."""
    ready = tuple(
        plain(FUNCTION, name, value, written=name == "out") for name, value in zip(NAMES, tensors, strict=True)
    )
    cache_seqlens, cu_seqlens_q, cache_leftpad, out, page_table = ready
    given_out = tensors[3]
    read = (cache_seqlens, cu_seqlens_q, cache_leftpad, page_table)
    as_given = not any(a is not b for a, b in zip(ready, tensors, strict=True))
    if any(is_strided(tensor) for tensor in read):
        cache_seqlens, cu_seqlens_q, cache_leftpad, page_table = map(contiguous, read)
        as_given = False  # requests are found by the tensors that were given
    lengths = _check_tensors(numbers[0], cache_seqlens, cu_seqlens_q, cache_leftpad, out, page_table)
    described = (*numbers[:16], page_table, *numbers[16:])
    request = describe_request(*described)
    plan = resolve(request.problem, describe(lengths.device))
    schedule, made_for = schedule_numbers(request, plan), made_for_request(request, plan)
    if schedule is None:
        metadata = _unplanned(lengths, out, request.problem.batch, plan)
        remember(metadata, made_for)
    else:
        allocate = functools.partial(new_metadata, size=metadata_size(request.problem.batch))
        metadata = connected_module().run_new_metadata(
            lengths.get_device(), allocate, made_for, schedule, lengths, cu_seqlens_q, cache_leftpad, out, page_table,
            numbers if as_given else None,
        )  # fmt: skip
    return metadata if given_out is None else given_out


def schedule_numbers(request: MetadataRequest, plan: Plan) -> ScheduleNumbers | None:
    """What the device plans a request by; None: no kernel plans it."""
    problem, schedule = request.problem, plan.schedule
    if plan.row is None or schedule is None or problem.batch == 0:
        return None
    return ScheduleNumbers(
        batch=problem.batch,
        seqlen_q=problem.seqlen_q,
        seqlen_k=problem.seqlen_k,
        seqlen_k_new=request.seqlen_k_new,
        window_left=problem.window_left,
        window_right=problem.window_right,
        attention_chunk=problem.attention_chunk,
        rows_per_token=schedule.rows_per_token,
        heads_in_grid=schedule.heads_in_grid,
        tile_m=schedule.tile_m,
        tile_n=plan.row.tile.tile_n,
        num_splits=max(1, schedule.num_splits),  # decode kernels plan for themselves: the device need not try
        target_ctas=schedule.target_ctas,
        metadata_tag=plan.metadata_tag,
    )


def made_for_request(request: MetadataRequest, plan: Plan) -> MadeFor:
    """What the metadata of a request is remembered by."""
    return MadeFor(
        config=plan.metadata_config,
        page_size=request.problem.page_size,
        seqlen_k=request.problem.seqlen_k if request.explicit_length else 0,
        num_splits=request.problem.num_splits,
        guessed_qv=request.guessed_qv,
        guessed_kv=request.guessed_kv,
    )


def new_metadata(cache_seqlens: Tensor, size: int) -> Tensor:
    """A buffer with a version counter, by which check_identity tells that somebody else wrote it."""
    if torch.is_inference_mode_enabled():
        with torch._C._InferenceMode(False):
            return cache_seqlens.new_empty(size)
    return cache_seqlens.new_empty(size)


def _unplanned(lengths: Tensor, out: Tensor | None, batch: int, plan: Plan) -> Tensor:
    """Metadata that no kernel reads: one split for each sequence."""
    size, slots = metadata_size(batch), round_up_4(batch)
    metadata = new_metadata(lengths, size) if out is None else out
    metadata[:size] = 0
    metadata[:batch] = 1
    metadata[slots : slots + batch] = plan.metadata_tag
    return metadata


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
