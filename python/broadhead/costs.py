"""What kernels cost, in microseconds of an H200, for ``plan/cost.py``. ``benchmarks/fit_costs.py`` writes the numbers."""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """The four numbers of a kernel."""

    launch: float  # of a call
    tile: float  # of a tile, besides its n_blocks, for each wave of tiles
    block: float  # of an n_block
    gigabyte: float  # of q, k, v and out


#: Fitted to nothing yet.
COSTS: dict[str, Cost] = {}
