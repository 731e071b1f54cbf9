"""How long the kernel of a row takes for a problem, about: what decides between rows that all compute it.

The estimate is ``launch + tile * waves + block * blocks + gigabyte * traffic``: what a call costs at least, what a tile
costs besides its n_blocks for each wave of tiles, what an n_block costs for each that a CTA works on, and the traffic
to memory. The four numbers of a kernel were fitted to measured times (``costs.py``).
"""

from __future__ import annotations

from math import ceil, inf

from ..call.problem import AttentionProblem
from ..costs import COSTS
from ..support import ELEMENT_BYTES, KernelRow
from .device import DeviceDescription
from .schedule import Schedule

#: n_blocks up to which a tile's count is rounded up; of more, the last one is half full on average.
FEW_BLOCKS = 4
#: Of masked tiles: the first and the last n_block are partly hidden.
MASKED_ENDS = 0.7
HALF_BLOCK = 0.5


def estimate(problem: AttentionProblem, row: KernelRow, schedule: Schedule, device: DeviceDescription) -> float | None:
    """Microseconds of a forward call on an H200, about; None: nobody measured the row."""
    cost = COSTS.get(row.name)
    return None if cost is None else sum(a * b for a, b in zip(cost, terms(problem, row, schedule, device)))


def least(row: KernelRow) -> float:
    """Microseconds that the row takes for the shortest call: no estimate is below. Infinite: nobody measured it."""
    cost = COSTS.get(row.name)
    return inf if cost is None else cost.launch + cost.tile + cost.block


def terms(
    problem: AttentionProblem, row: KernelRow, schedule: Schedule, device: DeviceDescription
) -> tuple[float, float, float, float]:
    """What the four numbers of a row's Cost are multiplied by."""
    rows_per_token = schedule.rows_per_token
    seqlen_q, seqlen_k = problem.mean_q or problem.seqlen_q, problem.mean_k or problem.seqlen_k
    m_blocks = float(schedule.m_blocks)
    if problem.mean_q:
        m_blocks = min(m_blocks, seqlen_q * rows_per_token / schedule.tile_m + HALF_BLOCK)
    tiles = m_blocks * schedule.heads_in_grid * problem.batch
    places = max(1, (device.sm_count - problem.sm_margin) * row.tile.min_blocks)
    keys = _visible_keys(problem, seqlen_q, seqlen_k, max(1, schedule.tile_m // rows_per_token))
    blocks = keys / row.tile.tile_n
    if keys < seqlen_k:
        blocks += MASKED_ENDS
    else:
        blocks = ceil(blocks) if blocks <= FEW_BLOCKS else blocks + HALF_BLOCK
    blocks = max(1.0, blocks)
    # Decode kernels divide all n_blocks evenly unless they are told not to; others divide those of a tile where the
    # schedule says so.
    evenly = row.phase == "decode" and schedule.num_splits != 1
    longest = 1.0 if evenly else max(1.0, blocks / max(1, schedule.num_splits))
    dims = problem.head_dim + problem.head_dim_v
    elements = seqlen_q * problem.num_heads_q * dims * ELEMENT_BYTES[problem.dtype]
    elements += seqlen_k * problem.num_heads_kv * dims * row.kv_element_bytes
    return 1.0, max(1.0, tiles / places), max(longest, tiles * blocks / places), problem.batch * elements / 1e9


def _visible_keys(problem: AttentionProblem, seqlen_q: int, seqlen_k: int, tokens: int) -> float:
    """Keys between the first and the last that a tile of ``tokens`` tokens sees, in the mean over a sequence."""
    tokens = min(tokens, max(1, seqlen_q))
    first = seqlen_k - seqlen_q  # the key that the first query is at
    begin, end = 0.0, float(seqlen_k)
    if problem.window_right >= 0:
        end = min(end, first + (seqlen_q + tokens) / 2 + problem.window_right)
    if problem.window_left >= 0:
        begin = max(begin, first + (seqlen_q - tokens) / 2 - problem.window_left)
    return max(1.0, end - begin)
