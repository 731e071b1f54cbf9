"""The CUDA backend: turns a validated call into a Launch once; later calls of its kind only allocate and launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .dispatch import MetadataConfig, Plan
from .errors import KernelError
from .metadata import CURRENT_STREAM, check_identity
from .problem import AttentionArgs, AttentionProblem, CheckedCall, out_dtype
from .schedule import Schedule
from .support import KernelRow
from .validation import TOKENS_PER_SPLIT_STEP


class Launch(NamedTuple):
    """What repeats from call to call: found by the shapes, dtypes, strides and flags of a call."""

    kernel_id: str
    device: torch.device
    out_shape: tuple[int, ...]
    out_dtype: torch.dtype
    lse_shape: tuple[int, ...]
    # fp32 of the splits' partial outputs and LSE in one buffer, and the counter of kernels that need one at its end; or
    # the workspace of a decode kernel.
    partial_size: int  # 0: one split, no counter
    zero_out: bool  # rows exist that no sequence may own: an output allocated here is cleared first
    seqlen_k: int
    # The last arguments of _C.forward, seqlen_q to stream: fields of AttnParams (csrc/host/params.h).
    numbers: tuple[int | float, ...]
    # What scheduler metadata must have been made for.
    config: MetadataConfig
    page_size: int
    num_splits_asked: int
    dispatch: tuple[str, str | None, str]


#: What csrc/decode/workspace.h keeps of a block besides its partial results, in fp32.
BLOCK_PARTS_SIZE = 4


def _decode_workspace(problem: AttentionProblem, row: KernelRow, schedule: Schedule) -> int:
    """fp32 elements of the workspace of a decode kernel: csrc/decode/workspace.h.

    A slot holds the rows of a tile and their LSE. Slots follow from what the call declares, never from a length on the
    device, and launch_decode counts as this does: rows of a tile and tiles from max_seqlen_q (dense: q.shape[1]),
    cells from the capacity of keys (page_table.size(1) * page_size, max_seqlen_k, or the cache's rows). Without cells
    there are two slots for each block that runs at once, however many tiles there are: a block holds at most the end
    of one tile and the begin of another as parts. check_cells (validation.py) bounds those of cells.
    """
    slot = min(row.tile.tile_m, problem.seqlen_q * schedule.rows_per_token) * (problem.head_dim_v + 1)
    if schedule.tokens_per_split:
        cells = -(-problem.seqlen_k // schedule.tokens_per_split)
        return problem.batch * schedule.heads_in_grid * schedule.m_blocks * cells * slot if cells > 1 else 0
    if schedule.num_splits == 1:
        return 0
    return schedule.target_ctas * (BLOCK_PARTS_SIZE + 2 * slot)


def make_launch(args: AttentionArgs, call: CheckedCall, plan: Plan) -> Launch:
    """The Launch of a validated call for which ``plan`` has a row."""
    assert plan.row is not None and plan.schedule is not None
    problem, schedule = call.problem, plan.schedule
    q = args.q
    packed = args.cu_seqlens_q is not None
    heads = problem.num_heads_q
    splits = schedule.num_splits
    if plan.row.phase == "decode":
        partial_size = _decode_workspace(problem, plan.row, schedule)
    else:
        partial_size = splits * heads * call.total_q * (problem.head_dim_v + 1) if splits > 1 else 0
    return Launch(
        kernel_id=plan.row.id,
        device=q.device,
        out_shape=(*q.shape[:-1], problem.head_dim_v),
        out_dtype=out_dtype(q.dtype),
        lse_shape=(heads, q.shape[0]) if packed else (q.shape[0], heads, q.shape[1]),
        partial_size=partial_size + int(plan.row.template.needs_counter),
        zero_out=args.seqused_q is not None,
        seqlen_k=problem.seqlen_k,
        numbers=(
            problem.seqlen_q,
            problem.seqlen_k,
            problem.window_left,
            problem.window_right,
            problem.attention_chunk,
            call.softmax_scale,
            call.softcap,
            splits,
            int(schedule.pack_gqa),
            plan.metadata_tag,
            schedule.heads_per_section,
            schedule.max_blocks,
            schedule.tokens_per_split // TOKENS_PER_SPLIT_STEP,
            CURRENT_STREAM,
        ),
        config=plan.metadata_config,
        page_size=problem.page_size,
        num_splits_asked=problem.num_splits,
        dispatch=("cuda", plan.row.id, plan.reason),
    )


_FLOAT32 = torch.float32
_forward: Any = None  # _C.forward, once loaded


def _load_forward() -> Any:
    global _forward
    module = native.extension()
    if module is None:
        raise KernelError("broadhead: the compiled module broadhead._C is not installed")
    _forward = module.forward
    return _forward


def launch_forward(
    function: str,
    launch: Launch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    kv_batch_idx: Tensor | None,
    page_table: Tensor | None,
    prefix_lens: Tensor | None,
    sinks: Tensor | None,
    scheduler_metadata: Tensor | None,
    qv: Tensor | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Allocate what the kernel writes and launch it: ``(out, softmax_lse or None)``; ``launch`` was made for them."""
    (
        kernel_id, device, out_shape, dtype, lse_shape, partial_size, zero_out, seqlen_k, numbers, config, page_size,
        num_splits_asked, _,
    ) = launch  # fmt: skip
    if scheduler_metadata is not None:
        check_identity(function, scheduler_metadata, config, page_size, seqlen_k, num_splits_asked)
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch_forward(
                function, launch, q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k,
                kv_batch_idx, page_table, prefix_lens, sinks, scheduler_metadata, qv, q_descale, k_descale, v_descale,
                need_lse,
            )  # fmt: skip
    if out is None:
        out = q.new_zeros(out_shape, dtype=dtype) if zero_out else q.new_empty(out_shape, dtype=dtype)
    lse = None
    if need_lse:
        lse = q.new_empty(lse_shape, dtype=_FLOAT32)
        if zero_out:
            lse.fill_(float("-inf"))
    # The lse_partial argument is None: it lies behind the outputs, and the counter behind both.
    partial = q.new_empty(partial_size, dtype=_FLOAT32) if partial_size else None
    (_forward or _load_forward())(
        kernel_id, q, k, v, out, lse, partial, None, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
        leftpad_k, kv_batch_idx, page_table, prefix_lens, sinks, scheduler_metadata, qv, q_descale, k_descale,
        v_descale, *numbers,
    )  # fmt: skip
    return out, lse
