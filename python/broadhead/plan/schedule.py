"""The scheduling plan of a kernel: GQA packing, number of splits and the order of heads."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from ..call.masking import mask_width
from ..call.problem import AttentionProblem
from ..call.validation import MAX_SPLITS, TOKENS_PER_SPLIT_STEP
from ..support import MASK_FEATURES, SHOWING_FEATURES, KernelRow
from .device import DeviceDescription

#: A split does at least this many key tiles: each writes whole tiles of O.
MIN_TILES_PER_SPLIT = 4
#: A prefill grid that fills this share of the device is not split.
FULL_GRID = 0.8
#: The fewest splits whose wave efficiency reaches this share of the best are taken.
GOOD_ENOUGH_EFFICIENCY = 0.93
#: With metadata the device gives each sequence its own split count: the bound allows this many waves of blocks.
METADATA_WAVES = 4
#: The same for decode problems on prefill kernels, where one long sequence may outweigh all others. A grid of as many
#: waves balances itself unsplit, and needs neither partial results nor their merge.
DECODE_METADATA_WAVES = 16
#: Without metadata equal splits of a decode problem make at most this many waves.
DECODE_EQUAL_WAVES = 8
#: What a split costs besides its key tiles, in key tiles: kStartupBlocks of csrc/kernels/scheduler_metadata.h.
STARTUP_TILES = 2
#: The share of the L2 that the K and V of heads worked on together may take.
L2_SHARE = 0.5
#: More heads at a time than this gain a portable kernel nothing. PERF(H200, 8192 keys, head_dim 64 full: 287 -> 310,
#: 128: 341 -> 356, 256: 338 -> 350, 256 causal: 337 -> 345 TFLOP/s, all heads at once -> 4)
MAX_SECTION_HEADS = 4


class Schedule(NamedTuple):
    """How one launch divides its work; what get_scheduler_metadata and the forward call must agree on."""

    # Prefill: >= 1; with metadata the bound of each sequence. Decode, whose kernels plan for themselves: the most parts
    # of a tile, 0: any. With tokens_per_split 1.
    num_splits: int
    pack_gqa: bool  # the query heads of one KV head share a tile
    heads_per_section: int  # heads whose K/V share the L2 at a time; 0: all
    rows_per_token: int  # query rows of one token in a tile
    heads_in_grid: int
    tile_m: int  # query rows of a full tile, or of those of a cluster
    m_blocks: int  # of the longest sequence
    target_ctas: int  # blocks, or clusters, that fill the device once
    max_blocks: int  # of a persistent kernel: what sm_margin leaves; 0: all
    tokens_per_split: int  # the keys of every sequence are cut at multiples of it, instead of num_splits; 0: off

    @property
    def cell_blocks(self) -> int:
        """tokens_per_split in blocks of TOKENS_PER_SPLIT_STEP keys, as kernels take it."""
        return self.tokens_per_split // TOKENS_PER_SPLIT_STEP


def plan_schedule(problem: AttentionProblem, row: KernelRow, device: DeviceDescription) -> Schedule:
    """The schedule of ``problem`` on the kernel of ``row``."""
    if row.direction == "backward":
        return _plan_backward(problem, row, device)
    group = problem.num_heads_q // problem.num_heads_kv
    template = row.template
    tile_m = row.tile.tile_m * row.cluster
    # Tiles of whole tokens, or tokens of whole tiles: absorbed MLA has 128 heads.
    cut = template.whole_tokens and group % row.tile.tile_m == 0
    packable = group > 1 and (group <= row.tile.tile_m or cut or not template.whole_tokens)
    if problem.pack_gqa is None:
        # Packing pays when the rows of one head leave a tile partly empty.
        pack_gqa = packable and (row.phase == "decode" or problem.seqlen_q < tile_m)
    else:
        pack_gqa = problem.pack_gqa and packable
    rows_per_token = group if pack_gqa else 1
    if template.whole_tokens and rows_per_token <= row.tile.tile_m:
        tile_m -= row.tile.tile_m % rows_per_token * row.cluster
    heads_in_grid = problem.num_heads_kv if pack_gqa else problem.num_heads_q
    m_blocks = max(1, ceil(problem.seqlen_q * rows_per_token / tile_m))
    blocks = max(row.cluster, (device.sm_count - problem.sm_margin) * row.tile.min_blocks)
    target_ctas = blocks // row.cluster
    return Schedule(
        num_splits=_choose_splits(problem, row, m_blocks * heads_in_grid * problem.batch, target_ctas),
        pack_gqa=pack_gqa,
        heads_per_section=_heads_per_section(problem, row, group, pack_gqa, device.l2_bytes),
        rows_per_token=rows_per_token,
        heads_in_grid=heads_in_grid,
        tile_m=tile_m,
        m_blocks=m_blocks,
        target_ctas=target_ctas,
        max_blocks=blocks if problem.sm_margin else 0,
        tokens_per_split=problem.tokens_per_split if _cuts_cells(problem, row) else 0,
    )


def _plan_backward(problem: AttentionProblem, row: KernelRow, device: DeviceDescription) -> Schedule:
    """That of a backward kernel, which divides its work as it finds best."""
    blocks = max(row.cluster, (device.sm_count - problem.sm_margin) * row.tile.min_blocks)
    return Schedule(
        num_splits=0,
        pack_gqa=False,
        heads_per_section=0,
        rows_per_token=1,
        heads_in_grid=problem.num_heads_q,
        tile_m=row.tile.tile_m,
        m_blocks=max(1, ceil(problem.seqlen_q / row.tile.tile_m)),
        target_ctas=blocks // row.cluster,
        max_blocks=blocks if problem.sm_margin else 0,
        tokens_per_split=0,
    )


def _cuts_cells(problem: AttentionProblem, row: KernelRow) -> bool:
    """Whether keys are cut at multiples of tokens_per_split. Prefill has blocks enough without, and on decode kernels,
    where nothing else serves it, more query rows than a workspace of cells could hold."""
    return row.phase == "decode" and problem.is_decode and problem.num_splits != 1


def _choose_splits(problem: AttentionProblem, row: KernelRow, ctas: int, target_ctas: int) -> int:
    if problem.tokens_per_split:
        return 1  # what follows looks at the batch
    if row.phase == "decode":
        return problem.num_splits
    width = problem.seqlen_k
    if not any(name in problem.features for name in SHOWING_FEATURES):
        width = mask_width(problem.seqlen_q, width, problem.window_left, problem.window_right, problem.attention_chunk)
    key_tiles = max(1, ceil(width / row.tile.tile_n))
    planned = problem.is_decode and problem.has_metadata
    if problem.num_splits > 0:
        most = min(problem.num_splits, key_tiles)
        # Clients ask for 32 whatever the batch: more than the bound gains no balance, but takes room.
        return min(most, _planned_splits(ctas, target_ctas)) if planned else most
    limit = max(1, min(MAX_SPLITS, key_tiles // MIN_TILES_PER_SPLIT))
    if limit == 1 or ctas == 0:
        return 1
    if planned:
        return min(limit, _planned_splits(ctas, target_ctas))
    if problem.is_decode:
        return _equal_splits(key_tiles, limit, ctas, target_ctas)
    if ctas >= FULL_GRID * target_ctas:
        return 1
    if problem.has_metadata:
        return min(limit, max(1, ceil(METADATA_WAVES * target_ctas / ctas)))
    # The share of the device that equal blocks keep busy: 1 when they fill whole waves. Of all counts of splits, for
    # all rows that may run: without a call for each.
    grids = range(ctas, ctas * limit + 1, ctas)
    efficiencies = [blocks / (-(-blocks // target_ctas) * target_ctas) for blocks in grids]
    good = GOOD_ENOUGH_EFFICIENCY * max(efficiencies)
    return next(splits for splits, efficiency in enumerate(efficiencies, 1) if efficiency >= good)


def _planned_splits(ctas: int, target_ctas: int) -> int:
    """The bound of a decode problem's splits with metadata, which gives each sequence its own count."""
    return max(1, DECODE_METADATA_WAVES * target_ctas // max(1, ctas))


def _equal_splits(key_tiles: int, limit: int, ctas: int, target_ctas: int) -> int:
    """The fewest splits that take the least time where all blocks have as much to do: whole waves of the longest."""
    most = min(limit, max(1, DECODE_EQUAL_WAVES * target_ctas // ctas))

    def cost(splits: int) -> int:
        return ceil(ctas * splits / target_ctas) * (ceil(key_tiles / splits) + STARTUP_TILES)

    return min(range(1, most + 1), key=cost)


def _heads_per_section(problem: AttentionProblem, row: KernelRow, group: int, pack_gqa: bool, l2_bytes: int) -> int:
    if row.phase == "decode" or l2_bytes == 0:
        return 0  # decode reads every key once
    bytes_per_head = problem.seqlen_k * (problem.head_dim + problem.head_dim_v) * row.kv_element_bytes
    in_l2 = int(L2_SHARE * l2_bytes / max(1, bytes_per_head))
    everything = problem.num_heads_kv * problem.batch
    wanted = _portable_section(problem, row, in_l2) if row.family == "sm80" else _hopper_section(problem, in_l2)
    kv_heads = min(wanted, everything)
    if kv_heads in (0, everything):
        return 0
    # Equal sections: a short last one leaves the device partly idle.
    # PERF(H200, head_dim 256 causal: 300 -> 344 TFLOP/s)
    while everything % kv_heads:
        kv_heads -= 1
    return kv_heads * (1 if pack_gqa else group)


def _portable_section(problem: AttentionProblem, row: KernelRow, in_l2: int) -> int:
    """KV heads that blocks launched one a tile work on at a time, of which ``in_l2`` share the L2; 0: all."""
    if problem.window_right == 0 and max(row.head_dim, row.head_dim_v) <= 64:
        return 0  # PERF(H200, head_dim 64 causal: 290 -> 295 TFLOP/s): little to share, and the last section's tail
    return min(MAX_SECTION_HEADS, max(1, in_l2))


def _hopper_section(problem: AttentionProblem, in_l2: int) -> int:
    """KV heads that persistent blocks work on at a time, of which ``in_l2`` share the L2.

    Without a mask all tiles are equal and one head's keys pass through the L2 once. Masked tiles differ: more heads at
    a time give the blocks that finish early something to take.
    """
    return max(2, in_l2) if any(name in problem.features for name in MASK_FEATURES) else 1
