"""The shapes of a CTA's work that kernels are instantiated for, and the C++ templates behind them.

A row of the table (``support.py``) names a tile. Like it this imports nothing outside the standard library.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """The shape of a CTA's work; the template arguments of ``sm80::ForwardTraits`` in this order."""

    tile_m: int  # query rows
    tile_n: int  # keys of an n_block
    warps_m: int  # warps over the rows
    warps_n: int  # warps over the keys of S and the columns of O
    stages: int  # stages of the ring of K and V
    k_chunk: int  # head-dim columns of K in a stage
    v_chunk: int  # keys of V in a stage
    v_cols: int  # columns of V in a stage
    min_blocks: int  # CTAs that must fit an SM: bounds the registers


class DecodeTile(NamedTuple):
    """The shape of a CTA's work in the decode kernels; arguments of ``decode::DecodeTraits`` in this order."""

    tile_m: int  # query rows
    tile_n: int  # keys of an n_block
    warps: int
    key_groups: int  # groups of warps that divide the n_blocks of a tile; the warps of a group divide the columns
    stages: int  # stages of each warp's ring of K and V
    min_blocks: int  # as for Tile


class AbsorbedDecodeTile(DecodeTile):
    """The same for absorbed MLA, where q has few columns and is for k, and qv is for v; the last template arguments of
    ``decode::AbsorbedTraits``."""


class HopperTile(NamedTuple):
    """The shape of a CTA's work in the Hopper kernel; the last template arguments of ``sm90::ForwardTraits``.

    S of an n_block is always in flight beside P V of the n_block before; ``overlap`` 2 has registers for P of both.
    """

    tile_m: int  # query rows, 64 for each consumer warpgroup
    tile_n: int  # keys of an n_block
    stages: int  # stages of K, and as many of V
    overlap: int  # 1 or 2: how many P the registers hold
    min_blocks: int = 1  # as for Tile


class WideTile(NamedTuple):
    """The shape of a CTA's work in the wide Hopper kernel; the last template arguments of ``sm90::WideTraits``."""

    tile_m: int  # query rows
    tile_n: int  # keys of an n_block
    q_register_cols: int  # head-dim columns of Q that are kept in registers
    cluster: int  # CTAs that load their K and V together, for neighbouring m_blocks of one head

    @property
    def min_blocks(self) -> int:
        return 1


class Fp8Tile(NamedTuple):
    """The shape of a CTA's work in the e4m3 Hopper kernel; the last template arguments of ``sm90::Fp8Traits``."""

    tile_m: int  # query rows, 64 for each consumer warpgroup
    tile_n: int  # keys of an n_block
    min_blocks: int = 1  # as for Tile


class AbsorbedTile(WideTile):
    """The same for absorbed MLA, where q has few columns and is for k, and qv is for v, the rest of the key; the last
    template arguments of ``sm90::AbsorbedTraits``. ``q_register_cols`` are columns of qv."""


class BackwardTile(NamedTuple):
    """The shapes of a CTA's work in the two portable backward kernels; the last template arguments of
    ``sm80::BackwardTraits``.

    ``key_*`` is of the kernel that keeps a tile of keys and gives dK and dV, ``query_*`` of the one that keeps a tile
    of queries and gives dQ. rows: of the side that is kept; cols: rows of the other side that stream by at a time;
    warps_rows, warps_cols: groups of warps that share rows, and warps of a group, which divide the columns (a kernel
    with two roles has twice as many: ``sm80::SideTraits``); stages: buffers for what streams by; min_blocks: as for
    ``Tile``.
    """

    key_rows: int
    key_cols: int
    key_warps_rows: int
    key_warps_cols: int
    key_stages: int
    key_min_blocks: int
    query_rows: int
    query_cols: int
    query_warps_rows: int
    query_warps_cols: int
    query_stages: int
    query_min_blocks: int

    @property
    def tile_m(self) -> int:
        return max(self.key_rows, self.query_rows)

    @property
    def tile_n(self) -> int:
        return max(self.key_cols, self.query_cols)

    @property
    def min_blocks(self) -> int:
        return min(self.key_min_blocks, self.query_min_blocks)


class PortableFusedBackwardTile(NamedTuple):
    """The shape of a CTA's work in the portable backward kernel that gives all three gradients; the last template
    arguments of ``sm80::FusedBackwardTraits``. What they mean: ``BackwardTile``, of the kernel that keeps keys."""

    key_rows: int
    key_cols: int
    key_warps_rows: int
    key_warps_cols: int
    key_stages: int
    min_blocks: int

    @property
    def tile_m(self) -> int:
        return self.key_cols

    @property
    def tile_n(self) -> int:
        return self.key_rows


class HopperBackwardTile(NamedTuple):
    """The shapes of a CTA's work in the two Hopper backward kernels; the last template arguments of
    ``sm90::BackwardTraits``.

    One keeps keys and gives dK and dV. With 128 of them two warpgroups share the keys, with 64 the products. The other
    keeps queries and gives dQ.
    """

    key_rows: int  # keys that are kept
    key_cols: int  # queries that stream by them at a time
    key_stages: int  # buffers for those
    query_rows: int  # queries that are kept
    query_cols: int  # keys that stream by them at a time
    k_stages: int  # buffers for their K
    v_stages: int  # buffers for their V

    @property
    def tile_m(self) -> int:
        return self.query_rows

    @property
    def tile_n(self) -> int:
        return self.key_rows

    @property
    def min_blocks(self) -> int:
        return 1


class FusedBackwardTile(NamedTuple):
    """The shape of a CTA's work in the Hopper backward kernel that gives all three gradients; the last template
    arguments of ``sm90::FusedBackwardTraits``."""

    key_rows: int  # keys that are kept
    key_cols: int  # queries that stream by them at a time
    key_stages: int  # buffers for those

    @property
    def tile_m(self) -> int:
        return self.key_cols

    @property
    def tile_n(self) -> int:
        return self.key_rows

    @property
    def min_blocks(self) -> int:
        return 1


class PairBackwardTile(NamedTuple):
    """The work of a cluster of two CTAs in the two Hopper backward kernels of wide heads, 64 rows of either side at a
    time; the last template arguments of ``sm90::PairBackwardTraits``."""

    stages: int  # buffers for the side that streams by, in each CTA

    @property
    def tile_m(self) -> int:
        return 64

    @property
    def tile_n(self) -> int:
        return 64

    @property
    def min_blocks(self) -> int:
        return 1


class Template(NamedTuple):
    """The C++ templates behind a tile class, and how its launches divide their work."""

    header: str  # below csrc
    traits: str
    launcher: str
    workspace: str  # tells how much scratch a call needs
    takes_head_dim_v: bool  # as a template argument behind head_dim
    whole_tokens: bool  # with packed GQA a tile holds whole tokens; else the heads of a token may straddle two tiles
    of_kv_dtype: bool = False  # the traits name the dtype of K and V; q of any dtype that goes with it is read as it is


def _hopper(folder: str, traits: str, launcher: str) -> Template:
    """The templates of a persistent kernel in a folder of sm90."""
    header = f"sm90/{folder}/launch.cuh"
    return Template(header, f"sm90::{traits}", f"sm90::{launcher}", "tma::persistent_workspace", True, True)


_DECODE = Template(
    "decode/launch.cuh", "decode::DecodeTraits", "decode::launch_decode", "decode::decode_workspace", False, False, True
)
TEMPLATES: dict[type, Template] = {
    Tile: Template(
        "sm80/forward/launch.cuh", "sm80::ForwardTraits", "sm80::launch_forward", "sm80::forward_workspace", False,
        False,
    ),
    DecodeTile: _DECODE,
    AbsorbedDecodeTile: _DECODE._replace(traits="decode::AbsorbedTraits", takes_head_dim_v=True, of_kv_dtype=False),
    HopperTile: _hopper("forward", "ForwardTraits", "launch_forward"),
    WideTile: _hopper("forward_wide", "WideTraits", "launch_wide"),
    Fp8Tile: _hopper("forward_fp8", "Fp8Traits", "launch_fp8"),
    AbsorbedTile: _hopper("forward_wide", "AbsorbedTraits", "launch_wide"),
    BackwardTile: Template(
        "sm80/backward/launch.cuh", "sm80::BackwardTraits", "sm80::launch_backward", "sm80::backward_workspace", False,
        False,
    ),
    PortableFusedBackwardTile: Template(
        "sm80/backward/launch.cuh", "sm80::FusedBackwardTraits", "sm80::launch_fused", "sm80::fused_workspace", False,
        False,
    ),
    FusedBackwardTile: Template(
        "sm90/backward/launch.cuh", "sm90::FusedBackwardTraits", "sm90::launch_fused", "sm90::fused_workspace", True,
        False,
    ),
    PairBackwardTile: Template(
        "sm90/backward_wide/launch.cuh", "sm90::PairBackwardTraits", "sm90::launch_pair_backward",
        "sm90::backward_workspace", True, False,
    ),
    HopperBackwardTile: Template(
        "sm90/backward/launch.cuh", "sm90::BackwardTraits", "sm90::launch_backward", "sm90::backward_workspace", True,
        False,
    ),
}  # fmt: skip
