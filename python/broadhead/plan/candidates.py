"""The rows of the table that compute a problem on a device with a build, the best one first.

Most of it is the same for all calls of a kind, and is worked out once for them.
"""

from __future__ import annotations

from typing import NamedTuple

from ..call.problem import AttentionProblem
from ..support import KernelRow
from .device import DeviceDescription
from .fastest import needs_decode_kernel
from .native import BuildDescription
from .refusal import Kind, build_refusal, device_refusal, request_refusal

#: head_dim above which a tile is chosen for the rows of a shared prefix as well. Below, tiles of 16 rows that find it
#: in the L2 beat those of 32. PERF(H200, 4 sequences sharing 8k, us with 16 and 32 rows: 32/8 heads of 128 26.5, 30.9;
#: 16/2 of 256 23.3, 26.5; 32/4 of 512 55.0, 49.3)
SHARED_TILES_ABOVE = 256
#: Query rows from which rows are ordered alike: every ``min_rows`` and ``max_rows`` of the table is below it, and of
#: decode tiles the largest is the best.
MOST_COUNTED_ROWS = 128


class Able:
    """The rows that compute a kind of problem. It is compared by identity, so that caches need not hash its rows."""

    def __init__(
        self, kind: Kind, table: tuple[KernelRow, ...], device: DeviceDescription, build: BuildDescription
    ) -> None:
        #: On any device.
        self.rows = [row for row in table if not request_refusal(row, kind)]
        #: On this one, with the reason why the build does not hold the row ("" if it does).
        self.running = [
            (row, build_refusal(row, device, build)) for row in self.rows if not device_refusal(row, device)
        ]


class Order(NamedTuple):
    """What decides between the rows of a kind: it depends on nothing but what get_scheduler_metadata knows as well, and
    on has_metadata."""

    rows: int  # query rows that one pass over the keys of a KV head serves
    tile_rows: int  # those that a decode tile is chosen for
    decode_only: bool  # the keys are to be divided as only decode kernels do

    def preference(self, row: KernelRow) -> int:
        """What decides between the phases; the rows with the lowest number come first."""
        if row.by_cost:
            return 4
        if row.phase == "decode":
            return 1
        if row.max_rows and self.rows > row.max_rows:
            return 3
        return 0 if self.rows >= row.min_rows and not self.decode_only else 2

    def tile_fit(self, row: KernelRow) -> tuple[int, int]:
        """Orders rows that are alike but for their tiles: the preferred phase comes first, then the least padded
        columns of both products, then this, then the table's order. Decode: the fewest tiles, then the smallest."""
        return (-(-self.tile_rows // row.tile.tile_m), row.tile.tile_m) if row.phase == "decode" else (0, 0)

    def key(self, row: KernelRow) -> tuple[int, int, tuple[int, int]]:
        """Sorts rows, the best one first."""
        return self.preference(row), row.head_dim + row.head_dim_v, self.tile_fit(row)


def order_of(problem: AttentionProblem) -> Order:
    """The order of a problem's rows, one for all calls of many rows: from MOST_COUNTED_ROWS on it stays the same."""
    rows = tile_rows = min(problem.query_rows, MOST_COUNTED_ROWS)
    if max(problem.head_dim, problem.head_dim_v) > SHARED_TILES_ABOVE:
        tile_rows = max(rows, min(problem.shared_rows, MOST_COUNTED_ROWS))
    return Order(rows, tile_rows, needs_decode_kernel(problem))


class Candidates:
    """The rows that run a problem, the best one first. It is compared by identity, as Able is."""

    def __init__(self, able: Able, order: Order) -> None:
        left_out: dict[str, str] = {}  # why the build does not hold better ones: reason -> the best such kernel
        held: list[KernelRow] = []
        for row, reason in sorted(able.running, key=lambda running: order.key(running[0])):
            if not reason:
                held.append(row)
            elif not held and not row.by_cost:
                left_out.setdefault(reason, row.id)
        self.held = tuple(held)
        #: What of the build stands in the way of better rows; "": nothing.
        self.missing = "; ".join(f"kernel {row_id} {reason}" for reason, row_id in left_out.items())
