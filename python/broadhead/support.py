"""The table: one row is one CUDA kernel. It is the only list of kernels.

Read by ``cmake/generate.py`` (instantiations, C++ registry, the matrix of docs/support.md), by ``plan/dispatch.py``
(choice, refusals) and by the tests. It imports nothing but ``capabilities.py``, ``tiles.py`` and the standard library,
so a build without torch can read it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .capabilities import (
    BEFORE_SM100,
    BESIDE_SM100,
    CAPABILITIES,
    HUGE_SMEM,
    LARGE_SMEM,
    SMEM_99KB,
    SMEM_163KB,
    SMEM_227KB,
    is_later,
)
from .tiles import (
    TEMPLATES,
    AbsorbedDecodeTile,
    AbsorbedTile,
    BackwardTile,
    DecodeTile,
    Fp8Tile,
    FusedBackwardTile,
    HopperBackwardTile,
    HopperTile,
    PairBackwardTile,
    PortableFusedBackwardTile,
    Template,
    Tile,
    WideTile,
)

DTYPES = ("bf16", "fp16")
#: What ends the id of a row of each dtype a kernel can take.
ID_SUFFIXES = {"bf16": "bf16", "fp16": "fp16", "float8_e4m3fn": "e4m3"}
#: Bytes of an element of q, or of k and v.
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "float8_e4m3fn": 1}

#: What a call may ask of a kernel beyond dense attention. A row lists what it does.
FEATURES = (
    "causal",
    "window",
    "attention_chunk",
    "softcap",
    "sinks",
    "prefix_lens",
    "causal_by_sequence",
    "query_ranges",
    "tree_mask",
    "varlen",
    "seqused",
    "gqa",
    "paged",
    "leftpad",
    "batch_idx",
    "split_kv",
    "lse",
)
#: Features that only some kernels do: qv: a second query for v; descale: factors of 8-bit q, k and v; deterministic:
#: gradients whose sums have an order, so that they are the same in every run.
EXTRA_FEATURES = ("qv", "descale", "deterministic")
#: Query rows (tokens x heads of one KV head) up to which a call is decode: bound by memory, not by its products.
#: PERF(H200, 8192 keys, 32 rows, GB/s on decode and Hopper kernels: head_dim 128 3705, 3329; 256 3973, 3805; 512 3876,
#: 3758)
DECODE_MAX_ROWS = 32
#: Query rows from which a Hopper kernel beats a decode kernel with qv, where each key costs a product more: its tile
#: costs the same whatever it holds. PERF(H200, 64 x 8k, GB/s on decode and Hopper kernels: 16 rows 3687, 3514; 32 rows
#: 2395, 3312)
HOPPER_MIN_ROWS_QV = 17
#: Features that restrict which keys a query sees.
MASK_FEATURES = (
    "causal", "window", "attention_chunk", "prefix_lens", "causal_by_sequence", "query_ranges", "tree_mask",
)  # fmt: skip
#: Those of them that show keys which causal, window and attention_chunk hide.
SHOWING_FEATURES = ("prefix_lens", "query_ranges", "tree_mask")


def id_suffix(dtype: str, kv_dtype: str = "") -> str:
    """What ends a row's id: its dtype, and that of K and V where it is another, as in ``bf16_kve4m3``."""
    return ID_SUFFIXES[dtype] + (f"_kv{ID_SUFFIXES[kv_dtype]}" if kv_dtype else "")


class KernelRow(NamedTuple):
    """One kernel. ``smem_limit`` is asserted at compile time."""

    stem: str  # the id without dtypes
    family: str  # the library that holds it: "sm80" -> libbroadhead_sm80.so
    direction: str  # "forward" or "backward"
    phase: str  # "prefill": many query rows, all backward rows; "decode": at most tile_m packed rows are worth it
    capabilities: tuple[tuple[int, int], ...]
    dtype: str  # of q
    head_dim: int  # the largest it takes
    head_dim_v: int  # the largest it takes
    smem_limit: int
    tile: (
        Tile | DecodeTile | AbsorbedDecodeTile | HopperTile | WideTile | Fp8Tile | AbsorbedTile | BackwardTile
        | PortableFusedBackwardTile | FusedBackwardTile | HopperBackwardTile | PairBackwardTile
    )  # fmt: skip
    features: tuple[str, ...]
    requires: tuple[str, ...] = ()  # features without which a call is not for this kernel
    kv_dtype: str = ""  # of k and v where it is not dtype
    min_rows: int = DECODE_MAX_ROWS + 1  # of a prefill kernel: query rows from which it goes before decode kernels
    max_rows: int = 0  # and above which it comes last; 0: never. Below, the table's order decides
    by_cost: bool = False  # it comes last but where it takes the least time (plan/cost.py)

    @property
    def id(self) -> str:
        """The stem, the dtype of q, and that of k and v where it is another: ``sm80_fwd_decode_d64_bf16_kve4m3``."""
        return f"{self.stem}_{id_suffix(self.dtype, self.kv_dtype)}"

    @property
    def name(self) -> str:
        """What rows that differ in the dtype of q only share: the source file that instantiates them.

        Kernels of 8-bit q are others than those of 16 bits, but for decode kernels, which take q of any dtype over
        8-bit k and v: ``d64_bf16_kve4m3``, ``d64_fp16_kve4m3`` and ``d64_e4m3`` share ``d64_kve4m3``.
        """
        if ELEMENT_BYTES[self.dtype] == 1 and not self.template.of_kv_dtype:
            return self.id
        return self.stem if self.kv_element_bytes > 1 else f"{self.stem}_kv{ID_SUFFIXES['float8_e4m3fn']}"

    @property
    def kv_element_bytes(self) -> int:
        return ELEMENT_BYTES[self.kv_dtype or self.dtype]

    @property
    def portable(self) -> bool:
        """Whether it runs on every capability of the table, so that it serves those that the table does not know."""
        return set(self.capabilities) == set(CAPABILITIES)

    def runs_on(self, capability: tuple[int, int] | None) -> bool:
        """Whether the kernel is meant for devices of a compute capability; None: devices without one."""
        if capability in self.capabilities:
            return True
        return capability is not None and self.portable and is_later(capability)

    @property
    def cluster(self) -> int:
        """Blocks that work on neighbouring tiles together."""
        return self.tile.cluster if isinstance(self.tile, WideTile) else 1

    @property
    def template(self) -> Template:
        return TEMPLATES[type(self.tile)]


def _sm80_rows() -> tuple[KernelRow, ...]:
    """The portable prefill kernels (mma.sync, cp.async): of rows that serve a request, the best one first.

    A row runs wherever its shared memory fits, so the small tiles of 8.6, 8.9 and 12.0 can be tested on any device.
    """
    shapes = (
        # name, phase, capabilities, head_dim, smem_limit, tile
        ("d64", "prefill", CAPABILITIES, 64, SMEM_99KB, Tile(128, 96, 4, 1, 3, 64, 96, 64, 2)),
        ("d64_m64", "prefill", CAPABILITIES, 64, SMEM_99KB, Tile(64, 64, 4, 1, 3, 64, 64, 64, 3)),
        ("d64_m32", "prefill", CAPABILITIES, 64, SMEM_99KB, Tile(32, 32, 2, 1, 3, 64, 32, 64, 7)),
        ("d128_m64", "prefill", CAPABILITIES, 128, SMEM_99KB, Tile(64, 32, 4, 1, 4, 128, 32, 128, 2)),
        ("d128_m32", "prefill", CAPABILITIES, 128, SMEM_99KB, Tile(32, 32, 2, 1, 4, 128, 32, 128, 5)),
        ("d256_m64", "prefill", CAPABILITIES, 256, SMEM_99KB, Tile(64, 32, 4, 1, 3, 256, 32, 256, 2)),
        ("d256_m32", "prefill", CAPABILITIES, 256, SMEM_99KB, Tile(32, 32, 2, 1, 2, 256, 32, 256, 4)),
        ("d96", "prefill", CAPABILITIES, 96, SMEM_99KB, Tile(128, 64, 4, 1, 3, 128, 64, 128, 2)),
        # ptxas spills the widest tile on 10.x and 12.x. The next one spills on 10.0 or takes all registers there, as
        # the code around it happens to be; the smallest has some to spare. Code for 10.0 may serve 10.3.
        ("d128", "prefill", BEFORE_SM100, 128, SMEM_99KB, Tile(128, 64, 4, 1, 3, 128, 64, 128, 2)),
        ("d128_n48", "prefill", BESIDE_SM100, 128, SMEM_99KB, Tile(128, 48, 4, 1, 4, 128, 48, 128, 2)),
        ("d128_n32", "prefill", CAPABILITIES, 128, SMEM_99KB, Tile(128, 32, 4, 1, 5, 128, 32, 128, 2)),
        ("d192", "prefill", HUGE_SMEM, 192, SMEM_227KB, Tile(128, 128, 4, 2, 2, 192, 128, 192, 1)),
        ("d192_smem163", "prefill", LARGE_SMEM, 192, SMEM_163KB, Tile(128, 64, 4, 2, 3, 192, 64, 192, 1)),
        ("d192_smem99", "prefill", CAPABILITIES, 192, SMEM_99KB, Tile(64, 64, 2, 2, 2, 192, 64, 192, 1)),
        ("d256", "prefill", HUGE_SMEM, 256, SMEM_227KB, Tile(128, 96, 4, 2, 2, 256, 96, 256, 1)),
        ("d256_smem163", "prefill", LARGE_SMEM, 256, SMEM_163KB, Tile(128, 64, 4, 2, 2, 256, 64, 256, 1)),
        ("d256_smem99", "prefill", CAPABILITIES, 256, SMEM_99KB, Tile(64, 64, 2, 2, 3, 128, 32, 256, 1)),
        ("d512", "prefill", HUGE_SMEM, 512, SMEM_227KB, Tile(64, 128, 2, 4, 2, 256, 64, 512, 1)),
        ("d512_smem163", "prefill", LARGE_SMEM, 512, SMEM_163KB, Tile(64, 64, 2, 4, 5, 128, 16, 512, 1)),
        ("d512_smem99", "prefill", CAPABILITIES, 512, SMEM_99KB, Tile(64, 32, 2, 4, 3, 128, 16, 256, 1)),
    )
    return tuple(
        KernelRow(
            f"sm80_fwd_{name}", "sm80", "forward", phase, caps, dtype, head_dim, head_dim, limit,
            tile, FEATURES, by_cost=tile.warps_n == 1 and tile.tile_m <= 64,
        )
        for name, phase, caps, head_dim, limit, tile in shapes
        for dtype in DTYPES
    )  # fmt: skip


#: What backward kernels compute. Gradients through pages, batch indices and left padding are left to torch.
BACKWARD_FEATURES = tuple(
    name for name in FEATURES if name not in ("tree_mask", "paged", "leftpad", "batch_idx", "split_kv")
)


def _backward_rows(family: str, shapes: tuple[Any, ...]) -> tuple[KernelRow, ...]:
    """``shapes``: name, capabilities, head_dim, head_dim_v, smem_limit, tile. Fused kernels add dQ in no order."""
    ordered = (*BACKWARD_FEATURES, "deterministic")
    return tuple(
        KernelRow(
            f"{family}_bwd_{name}", family, "backward", "prefill", caps, dtype, head_dim, head_dim_v, limit, tile,
            BACKWARD_FEATURES if isinstance(tile, FusedBackwardTile | PortableFusedBackwardTile) else ordered,
        )
        for name, caps, head_dim, head_dim_v, limit, tile in shapes
        for dtype in DTYPES
    )  # fmt: skip


def _sm80_backward_rows() -> tuple[KernelRow, ...]:
    """The portable backward kernels (mma.sync, cp.async): of rows that serve a request, the best one first."""
    shapes = (
        # name, capabilities, head_dim, smem_limit, the shapes of the kernels that keep keys and that keep queries:
        # rows, columns, warps over rows and over columns, stages, blocks
        # Blocks of four warps are for devices where two or more fit a multiprocessor: 227 KB, at head_dim 64 163 KB.
        ("d64", LARGE_SMEM, 64, SMEM_99KB, (64, 32, 2, 1, 2, 3), (128, 32, 4, 1, 2, 2)),
        ("d64_smem99", CAPABILITIES, 64, SMEM_99KB, (64, 32, 2, 1, 2, 2), (128, 32, 4, 1, 1, 2)),
        ("d96", HUGE_SMEM, 96, SMEM_99KB, (64, 32, 2, 1, 2, 2), (128, 32, 4, 1, 2, 2)),
        ("d96_smem99", CAPABILITIES, 96, SMEM_99KB, (128, 16, 4, 1, 2, 1), (128, 32, 8, 1, 2, 1)),
        ("d128", HUGE_SMEM, 128, SMEM_99KB, (64, 32, 2, 1, 2, 2), (128, 32, 4, 1, 2, 2)),
        ("d128_smem99", CAPABILITIES, 128, SMEM_99KB, (128, 16, 4, 1, 2, 1), (128, 32, 8, 1, 2, 1)),
        ("d192", LARGE_SMEM, 192, SMEM_163KB, (64, 64, 2, 2, 2, 1), (64, 64, 2, 2, 1, 2)),
        ("d192_smem99", CAPABILITIES, 192, SMEM_99KB, (64, 32, 2, 2, 1, 1), (64, 32, 4, 2, 1, 1)),
        ("d256", HUGE_SMEM, 256, SMEM_227KB, (64, 64, 2, 2, 2, 1), (128, 64, 4, 2, 1, 1)),
        ("d256_smem163", LARGE_SMEM, 256, SMEM_163KB, (64, 32, 2, 2, 2, 1), (64, 64, 2, 4, 1, 1)),
        ("d256_smem99", CAPABILITIES, 256, SMEM_99KB, (64, 16, 2, 2, 1, 1), (64, 16, 4, 2, 1, 1)),
        ("d512", HUGE_SMEM, 512, SMEM_227KB, (32, 32, 1, 4, 2, 1), (64, 32, 2, 4, 1, 1)),
        ("d512_smem163", LARGE_SMEM, 512, SMEM_163KB, (32, 32, 1, 4, 1, 1), (32, 32, 2, 4, 1, 1)),
        ("d512_smem99", CAPABILITIES, 512, SMEM_99KB, (16, 32, 1, 4, 1, 1), (16, 32, 1, 4, 1, 1)),
    )
    rows = ((name, caps, d, d, limit, BackwardTile(*keys, *queries)) for name, caps, d, limit, keys, queries in shapes)
    return _backward_rows("sm80", tuple(rows))


def _sm80_fused_backward_rows() -> tuple[KernelRow, ...]:
    """The portable backward kernels that multiply five times a step, not seven, but add dQ in no order."""
    shapes = (
        # name, capabilities, head_dim, smem_limit, tile
        ("d64_fused", HUGE_SMEM, 64, SMEM_227KB, PortableFusedBackwardTile(128, 128, 4, 1, 2, 1)),
        ("d64_fused_smem99", CAPABILITIES, 64, SMEM_99KB, PortableFusedBackwardTile(128, 64, 4, 1, 2, 1)),
        ("d96_fused", LARGE_SMEM, 96, SMEM_163KB, PortableFusedBackwardTile(128, 64, 4, 1, 2, 1)),
        ("d128_fused", LARGE_SMEM, 128, SMEM_163KB, PortableFusedBackwardTile(128, 64, 4, 1, 2, 1)),
        ("d128_fused_smem99", CAPABILITIES, 128, SMEM_99KB, PortableFusedBackwardTile(128, 32, 4, 1, 1, 1)),
        ("d192_fused", HUGE_SMEM, 192, SMEM_227KB, PortableFusedBackwardTile(64, 64, 2, 2, 2, 1)),
        ("d192_fused_smem163", LARGE_SMEM, 192, SMEM_163KB, PortableFusedBackwardTile(64, 64, 2, 2, 1, 1)),
        # ptxas spills both on 10.x, that of CUDA 13.2 the second one as well.
        ("d256_fused", ((9, 0),), 256, SMEM_227KB, PortableFusedBackwardTile(64, 64, 2, 2, 2, 1)),
        (
            "d256_fused_smem163",
            tuple(c for c in LARGE_SMEM if c in BEFORE_SM100),
            256,
            SMEM_163KB,
            PortableFusedBackwardTile(64, 64, 2, 2, 1, 1),
        ),
    )
    rows = ((name, caps, head_dim, head_dim, limit, tile) for name, caps, head_dim, limit, tile in shapes)
    return _backward_rows("sm80", tuple(rows))


def _decode_rows() -> tuple[KernelRow, ...]:
    """The portable decode kernels (mma.sync, cp.async): tiles of 16 and 32 packed query rows. Those with qv come last.

    CTAs of eight warps take a multiprocessor of 227 KB for themselves; those of four fit 99 KB, and two fit 227 KB.
    One CTA a multiprocessor cuts less: PERF(H200, 128 x 8k, 8/1 heads of 128: 4110 GB/s, two CTAs 3910).
    """
    shapes = (
        # name, capabilities, head_dim, smem_limit, tile
        ("d64", HUGE_SMEM, 64, SMEM_227KB, DecodeTile(16, 32, 8, 8, 3, 1)),
        ("d64_smem99", CAPABILITIES, 64, SMEM_99KB, DecodeTile(16, 32, 4, 4, 5, 2)),
        ("d128", HUGE_SMEM, 128, SMEM_227KB, DecodeTile(16, 16, 8, 8, 3, 1)),
        ("d128_smem99", CAPABILITIES, 128, SMEM_99KB, DecodeTile(16, 16, 4, 4, 5, 2)),
        ("d256", HUGE_SMEM, 256, SMEM_227KB, DecodeTile(16, 16, 8, 4, 5, 1)),
        ("d256_smem99", CAPABILITIES, 256, SMEM_99KB, DecodeTile(16, 16, 4, 2, 5, 2)),
        ("d512", HUGE_SMEM, 512, SMEM_227KB, DecodeTile(16, 32, 8, 2, 3, 1)),
        ("d512_smem99", CAPABILITIES, 512, SMEM_99KB, DecodeTile(16, 16, 4, 1, 3, 2)),
        ("d64_m32", HUGE_SMEM, 64, SMEM_227KB, DecodeTile(32, 32, 8, 8, 3, 1)),
        ("d64_m32_smem99", CAPABILITIES, 64, SMEM_99KB, DecodeTile(32, 32, 4, 4, 5, 2)),
        ("d128_m32", HUGE_SMEM, 128, SMEM_227KB, DecodeTile(32, 16, 8, 8, 5, 1)),
        ("d128_m32_smem99", CAPABILITIES, 128, SMEM_99KB, DecodeTile(32, 16, 4, 4, 5, 2)),
        ("d256_m32", HUGE_SMEM, 256, SMEM_227KB, DecodeTile(32, 16, 8, 4, 3, 1)),
        ("d256_m32_smem99", CAPABILITIES, 256, SMEM_99KB, DecodeTile(32, 16, 4, 2, 3, 2)),
        ("d512_m32", HUGE_SMEM, 512, SMEM_227KB, DecodeTile(32, 16, 8, 2, 3, 1)),
        ("d512_m32_smem99", CAPABILITIES, 512, SMEM_99KB, DecodeTile(32, 16, 4, 1, 3, 2)),
    )
    shapes_8bit = (
        ("d64", HUGE_SMEM, 64, SMEM_227KB, DecodeTile(16, 32, 8, 8, 5, 1)),
        ("d64_smem99", CAPABILITIES, 64, SMEM_99KB, DecodeTile(16, 32, 4, 4, 9, 2)),
        ("d128", HUGE_SMEM, 128, SMEM_227KB, DecodeTile(16, 32, 8, 8, 3, 1)),
        ("d128_smem99", CAPABILITIES, 128, SMEM_99KB, DecodeTile(16, 32, 4, 4, 5, 2)),
        ("d256", HUGE_SMEM, 256, SMEM_227KB, DecodeTile(16, 32, 8, 4, 3, 1)),
        ("d256_smem99", CAPABILITIES, 256, SMEM_99KB, DecodeTile(16, 16, 4, 2, 9, 2)),
        ("d512", HUGE_SMEM, 512, SMEM_227KB, DecodeTile(16, 32, 8, 2, 3, 1)),
        ("d512_smem99", CAPABILITIES, 512, SMEM_99KB, DecodeTile(16, 16, 4, 1, 7, 2)),
        ("d64_m32", CAPABILITIES, 64, SMEM_99KB, DecodeTile(32, 32, 4, 4, 7, 2)),
        ("d128_m32", CAPABILITIES, 128, SMEM_99KB, DecodeTile(32, 16, 4, 4, 9, 2)),
        ("d256_m32", CAPABILITIES, 256, SMEM_99KB, DecodeTile(32, 16, 4, 2, 7, 2)),
        ("d512_m32", CAPABILITIES, 512, SMEM_99KB, DecodeTile(32, 16, 4, 1, 5, 2)),
    )
    e4m3 = "float8_e4m3fn"
    dtypes = (("bf16", ""), ("fp16", ""), ("bf16", e4m3), ("fp16", e4m3), (e4m3, ""))
    rows = []
    for dtype, kv_dtype in dtypes:
        is_8bit = e4m3 in (dtype, kv_dtype)
        rows += [
            KernelRow(
                f"sm80_fwd_decode_{name}", "sm80", "forward", "decode", caps, dtype,
                head_dim, head_dim, limit, tile, (*FEATURES, "descale") if is_8bit else FEATURES, kv_dtype=kv_dtype,
            )
            for name, caps, head_dim, limit, tile in (shapes_8bit if is_8bit else shapes)
        ]  # fmt: skip
    return (*rows, *_absorbed_decode_rows())


def _absorbed_decode_rows() -> tuple[KernelRow, ...]:
    """Those for calls with qv. Tiles of 32 rows are slower than two of 16, of which the second finds the keys in the
    L2: PERF(H200, us, 32 and 16 rows: 64 x 8k, 32 heads 277, 252; 1 x 64k 68, 55).
    """
    shapes = (
        ("d64_v512_qv", HUGE_SMEM, SMEM_227KB, AbsorbedDecodeTile(16, 32, 8, 2, 2, 1)),
        ("d64_v512_qv_smem163", LARGE_SMEM, SMEM_163KB, AbsorbedDecodeTile(16, 16, 8, 2, 3, 1)),
        ("d64_v512_qv_smem99", CAPABILITIES, SMEM_99KB, AbsorbedDecodeTile(16, 16, 4, 1, 3, 2)),
    )
    return tuple(
        KernelRow(
            f"sm80_fwd_decode_{name}", "sm80", "forward", "decode", caps, dtype, 64, 512, limit,
            tile, (*FEATURES, "qv"), ("qv",),
        )
        for name, caps, limit, tile in shapes
        for dtype in DTYPES
    )  # fmt: skip


def _sm90_row(
    name: str, dtype: str, head_dim: int, head_dim_v: int, tile: HopperTile | WideTile | Fp8Tile | AbsorbedTile
) -> KernelRow:
    """A Hopper forward kernel (wgmma, TMA, warp specialisation), on 9.0."""
    return KernelRow(
        f"sm90_fwd_{name}", "sm90", "forward", "prefill", ((9, 0),), dtype, head_dim, head_dim_v,
        SMEM_227KB, tile, FEATURES, by_cost=tile.min_blocks > 1,
    )  # fmt: skip


def _sm90_rows() -> tuple[KernelRow, ...]:
    """The Hopper kernels of 16-bit inputs, and those that only some calls are for."""
    shapes = (
        # name, head_dim, head_dim_v, tile
        ("d64", 64, 64, HopperTile(192, 96, 2, 2)),
        ("d64_m64", 64, 64, HopperTile(64, 64, 2, 1, 3)),
        ("d96_m64", 96, 96, HopperTile(64, 48, 2, 1, 3)),
        ("d128_m64", 128, 128, HopperTile(64, 48, 2, 1, 2)),
        ("d256_m64", 256, 256, HopperTile(64, 32, 2, 1, 2)),
        ("d192_m64", 192, 192, HopperTile(64, 48, 2, 1, 2)),
        ("d96", 96, 96, HopperTile(128, 128, 2, 2)),
        ("d128", 128, 128, HopperTile(128, 128, 2, 2)),
        ("d192_v128", 192, 128, HopperTile(128, 128, 2, 2)),
        ("d192", 192, 192, HopperTile(128, 112, 2, 1)),
        ("d64_v256", 64, 256, HopperTile(128, 80, 2, 1)),
        ("d256_window", 256, 256, HopperTile(128, 64, 2, 1)),
        ("d256", 256, 256, HopperTile(128, 80, 2, 1)),
        ("d384", 384, 384, WideTile(64, 64, 256, 2)),
        ("d512", 512, 512, WideTile(64, 64, 256, 2)),
    )
    rows = [_sm90_row(name, dtype, d, dv, tile) for name, d, dv, tile in shapes for dtype in DTYPES]
    # Fewer keys a step waste less at the two ends of a window.
    # PERF(H200, head_dim 256, window 1024 of 16k: 80 keys a step 480 TFLOP/s, 64 530; without a window 725 and 705)
    rows = [row._replace(requires=("window",)) if row.stem.endswith("_window") else row for row in rows]
    # All queries of a latent head in one tile: the second block of a cluster would have none. That row comes first.
    # PERF(H200, 64 x 8k, 64 heads, us: clusters of two 262, blocks alone 182)
    for name, cluster, max_rows in (("d64_v512_qv_m64", 1, 64), ("d64_v512_qv", 2, 0)):
        absorbed = [_sm90_row(name, dtype, 64, 512, AbsorbedTile(64, 64, 256, cluster)) for dtype in DTYPES]
        rows += [
            row._replace(features=(*FEATURES, "qv"), requires=("qv",), min_rows=HOPPER_MIN_ROWS_QV, max_rows=max_rows)
            for row in absorbed
        ]
    fp8_shapes = (
        ("d64", 64, 64, Fp8Tile(192, 128)),
        ("d64_m64", 64, 64, Fp8Tile(64, 64, 3)),
        ("d128_m64", 128, 128, Fp8Tile(64, 128, 2)),
        ("d192_m64", 192, 192, Fp8Tile(64, 64, 2)),
        ("d256_m64", 256, 256, Fp8Tile(64, 64, 2)),
        ("d128", 128, 128, Fp8Tile(128, 192)),
        ("d192_v128", 192, 128, Fp8Tile(128, 192)),
        ("d192", 192, 192, Fp8Tile(128, 128)),
        ("d256", 256, 256, Fp8Tile(128, 128)),
    )
    fp8_rows = [_sm90_row(name, "float8_e4m3fn", d, dv, tile) for name, d, dv, tile in fp8_shapes]
    return (*rows, *(row._replace(features=(*FEATURES, "descale")) for row in fp8_rows))


def _sm90_backward_rows() -> tuple[KernelRow, ...]:
    """The Hopper backward kernels (wgmma, TMA, warp specialisation), on 9.0."""
    shapes = (
        # name, head_dim, head_dim_v, tile
        # Fused kernels multiply five times a step, the others seven, but add dQ in no order.
        ("d64_fused", 64, 64, FusedBackwardTile(128, 128, 2)),
        ("d96_fused", 96, 96, FusedBackwardTile(128, 64, 2)),
        ("d128_fused", 128, 128, FusedBackwardTile(128, 64, 2)),
        ("d64", 64, 64, HopperBackwardTile(128, 64, 3, 128, 128, 2, 2)),
        ("d96", 96, 96, HopperBackwardTile(128, 64, 3, 128, 96, 2, 2)),
        ("d128", 128, 128, HopperBackwardTile(128, 64, 3, 128, 96, 2, 2)),
        ("d192_v128", 192, 128, HopperBackwardTile(64, 96, 2, 128, 64, 2, 2)),
        ("d192", 192, 192, HopperBackwardTile(64, 64, 2, 128, 64, 2, 2)),
        ("d256", 256, 256, HopperBackwardTile(64, 64, 2, 128, 64, 2, 1)),
        ("d384", 384, 384, PairBackwardTile(3)),
        ("d512", 512, 512, PairBackwardTile(2)),
    )
    rows = ((name, ((9, 0),), d, dv, SMEM_227KB, tile) for name, d, dv, tile in shapes)
    return _backward_rows("sm90", tuple(rows))


#: Of rows that serve a request equally tightly dispatch takes the first.
ROWS: tuple[KernelRow, ...] = (
    *_sm90_rows(),
    *_sm80_rows(),
    *_sm90_backward_rows(),
    *_sm80_fused_backward_rows(),
    *_sm80_backward_rows(),
    *_decode_rows(),
)


#: Major compute capabilities for which the kernels of a family are written. The portable ones run on all of
#: CAPABILITIES, but use neither wgmma nor tcgen05, which Hopper and Blackwell need for their speed.
NATIVE_MAJORS = {"sm80": (8, 12), "sm90": (9,)}


def is_native(row: KernelRow, capability: tuple[int, int]) -> bool:
    """Whether the row's kernel is written for the architecture of ``capability``, and not merely runs there."""
    return capability[0] in NATIVE_MAJORS[row.family]
