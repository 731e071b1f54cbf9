"""How long the kernel of a row takes for a problem, about: what decides between rows that all compute it.

The estimate is a sum. A kernel has a number for each part of it (``costs.Cost``), fitted to measured times:

- ``launch``: of every call;
- ``merge``: of a call whose prefill kernel divides keys, so that a second kernel merges what the splits leave;
- ``again``: of a call of more tiles than run at a time, which are handed out while others run;
- ``tile``, ``block``: of each tile and of each n_block of a place, where all tiles are shared evenly by the places of
  the device: the blocks that run on it at a time. They are what a call of many tiles takes;
- ``chain``: of each n_block of the longest tile, one behind the other. It is what a call of few tiles waits for.

No estimate is below what it takes to read q and the keys that are seen, and to write out.
"""

from __future__ import annotations

from math import ceil, inf

from ..call.problem import AttentionProblem
from ..costs import COSTS, MICROSECONDS_PER_GIGABYTE
from ..support import ELEMENT_BYTES, KernelRow
from .device import DeviceDescription
from .schedule import Schedule

#: n_blocks up to which a tile's count is rounded up; of more, the last one is half full on average.
FEW_BLOCKS = 4
HALF_BLOCK = 0.5
#: Where between the mean and the longest the sequences of a packed batch are that most tiles belong to: long ones have
#: more tiles, of more n_blocks.
LONG_SEQUENCES = 0.5

Terms = tuple[float, float, float, float, float, float]


def estimate(problem: AttentionProblem, row: KernelRow, schedule: Schedule, device: DeviceDescription) -> float | None:
    """Microseconds of a forward call on an H200, about; None: nobody measured the row."""
    cost = COSTS.get(row.name)
    if cost is None:
        return None
    return max(sum(a * b for a, b in zip(cost, terms(problem, row, schedule, device))), memory_time(problem, row))


def least(row: KernelRow) -> float:
    """Microseconds that the row takes for the shortest call: no estimate is below. Infinite: nobody measured it."""
    cost = COSTS.get(row.name)
    return inf if cost is None else cost.launch + cost.chain


def terms(problem: AttentionProblem, row: KernelRow, schedule: Schedule, device: DeviceDescription) -> Terms:
    """What the six numbers of a row's Cost are multiplied by."""
    seqlen_q, seqlen_k = _mean_lengths(problem)
    m_blocks = float(schedule.m_blocks)
    if problem.mean_q:
        m_blocks = min(m_blocks, max(1.0, seqlen_q * schedule.rows_per_token / schedule.tile_m + HALF_BLOCK))
    if problem.mean_q and (problem.mean_q, problem.seqlen_q) == (problem.mean_k, problem.seqlen_k):
        seqlen_q = seqlen_k = seqlen_k + LONG_SEQUENCES * (problem.seqlen_k - seqlen_k)
    places = max(1, (device.sm_count - problem.sm_margin) * row.tile.min_blocks)
    tiles = m_blocks * schedule.heads_in_grid * problem.batch / places
    tokens = min(max(1, schedule.tile_m // schedule.rows_per_token), max(1.0, seqlen_q))
    tile_n = row.tile.tile_n
    begin, end, longest = _visible_keys(problem, seqlen_q, seqlen_k, tokens)
    blocks = (end - begin) / tile_n
    if end - begin < seqlen_k:
        blocks += HALF_BLOCK * (begin > 0) + HALF_BLOCK * (problem.window_right >= 0)
    else:
        blocks = ceil(blocks) if blocks <= FEW_BLOCKS else blocks + HALF_BLOCK
    blocks = max(1.0, blocks)
    share = tiles * blocks
    chain = max(1.0, ceil(longest / tile_n))
    splits = max(1, schedule.num_splits)
    if row.phase == "decode":
        # Decode kernels divide all n_blocks evenly unless they are told not to, and merge in any case.
        share = max(share, chain) if splits == schedule.num_splits == 1 else max(share, 1.0)
        chain = splits = 1
    return 1.0, float(splits > 1), float(tiles * splits > 1), tiles, share, max(1.0, chain / splits)


def memory_time(problem: AttentionProblem, row: KernelRow) -> float:
    """Microseconds that the memory needs for q, out, and the keys and values that are seen, each once."""
    seqlen_q, seqlen_k = _mean_lengths(problem)
    if problem.window_left >= 0 and problem.window_right >= 0:
        seqlen_k = min(seqlen_k, seqlen_q + problem.window_left + problem.window_right)
    if problem.attention_chunk > 0:
        seqlen_k = min(seqlen_k, seqlen_q + problem.attention_chunk)
    elements = seqlen_q * problem.num_heads_q * ELEMENT_BYTES[problem.dtype]
    elements += seqlen_k * problem.num_heads_kv * row.kv_element_bytes
    return problem.batch * elements * (problem.head_dim + problem.head_dim_v) * MICROSECONDS_PER_GIGABYTE / 1e9


def _mean_lengths(problem: AttentionProblem) -> tuple[float, float]:
    """Queries and keys of a sequence in the mean, about. The last page of a sequence is half full."""
    seqlen_q = problem.mean_q or problem.seqlen_q
    half_page = problem.page_size // 2
    return seqlen_q, problem.mean_k or max(min(seqlen_q, problem.seqlen_k), problem.seqlen_k - half_page)


def _visible_keys(
    problem: AttentionProblem, seqlen_q: float, seqlen_k: float, tokens: float
) -> tuple[float, float, float]:
    """-> (first key that a tile of ``tokens`` tokens sees, and the one behind the last, in the mean over a sequence;
    how many keys the last tile sees)"""
    offset = seqlen_k - seqlen_q  # the key that the first query is at
    begin, end, longest = 0.0, seqlen_k, seqlen_k
    if problem.window_right >= 0:
        end = min(end, offset + (seqlen_q + tokens) / 2 + problem.window_right)
    if problem.window_left >= 0:
        begin = max(begin, offset + (seqlen_q - tokens) / 2 - problem.window_left)
        if problem.window_right >= 0:
            longest = min(longest, tokens + problem.window_left + problem.window_right)
    end = max(end, begin + 1)
    return begin, end, longest
