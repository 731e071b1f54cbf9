"""The benchmark cases: names, shapes, operation and byte counts."""

from __future__ import annotations

from typing import NamedTuple


class DenseCase(NamedTuple):
    """Self-attention over dense tensors, forward or backward."""

    area: str  # "forward" or "backward"
    batch: int
    seqlen: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    causal: bool

    @property
    def name(self) -> str:
        prefix = {"forward": "fwd", "backward": "bwd"}[self.area]
        return (
            f"{prefix} B{self.batch} S{self.seqlen} H{self.num_heads_q} Hkv{self.num_heads_kv} D{self.head_dim} "
            f"{'causal' if self.causal else 'full'}"
        )

    @property
    def flops(self) -> float:
        """2 B H Sq Sk (D + Dv), halved when causal, times 2.5 backward."""
        count = 2.0 * self.batch * self.num_heads_q * self.seqlen**2 * 2 * self.head_dim
        return count * (0.5 if self.causal else 1.0) * (2.5 if self.area == "backward" else 1.0)


class DecodeCase(NamedTuple):
    """One query token a sequence over a paged cache in which every sequence holds ``context`` tokens."""

    batch: int
    context: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    page_size: int

    @property
    def name(self) -> str:
        return (
            f"dec B{self.batch} ctx{self.context} H{self.num_heads_q} Hkv{self.num_heads_kv} D{self.head_dim} "
            f"page{self.page_size}"
        )

    @property
    def pages_per_sequence(self) -> int:
        return -(-self.context // self.page_size)

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that one call reads (two-byte elements)."""
        return 2 * 2 * self.batch * self.context * self.num_heads_kv * self.head_dim


class HostCase(NamedTuple):
    """An eager call whose host time is measured; the shape is small so that the device is never the bottleneck."""

    name: str
    dense: DenseCase | None
    decode: DecodeCase | None


FORWARD_SHAPES = (
    (2, 8192, 32, 32, 64),
    (2, 8192, 16, 16, 128),
    (2, 8192, 12, 12, 192),
    (2, 8192, 8, 8, 256),
    (1, 8192, 16, 2, 256),
    (2, 8192, 4, 4, 512),
    (1, 8192, 32, 4, 512),
)
BACKWARD_SHAPES = (
    (2, 8192, 32, 32, 64),
    (2, 8192, 16, 16, 128),
    (2, 8192, 8, 8, 256),
    (2, 8192, 4, 4, 512),
)
DECODE_SHAPES = (
    (128, 8192, 8, 1, 128),
    (16, 8192, 32, 8, 128),
    (1, 65536, 32, 8, 128),
    (64, 8192, 16, 2, 256),
    (1, 65536, 16, 2, 256),
    (16, 8192, 32, 4, 512),
    (1, 65536, 32, 4, 512),
)
DECODE_PAGE_SIZES = (64, 128)

#: What a CPU can do in seconds: the torch fallback is a reference, not something to time.
CPU_DENSE_SHAPES = ((1, 128, 4, 2, 64), (1, 64, 2, 1, 512))
CPU_DECODE_SHAPES = ((2, 100, 4, 2, 64), (1, 130, 2, 1, 512))

AREAS = ("forward", "backward", "decode", "host")


def cases_of(area: str, on_cpu: bool = False) -> list[DenseCase] | list[DecodeCase] | list[HostCase]:
    """The cases of an area, in the order of the published tables.

    Args:
        area: one of AREAS.
        on_cpu: the tiny set that the torch fallback can run.
    """
    if area in ("forward", "backward"):
        shapes: tuple[tuple[int, int, int, int, int], ...] = CPU_DENSE_SHAPES
        if not on_cpu:
            shapes = FORWARD_SHAPES if area == "forward" else BACKWARD_SHAPES
        return [DenseCase(area, *shape, causal) for shape in shapes for causal in (False, True)]
    if area == "decode":
        if on_cpu:
            return [DecodeCase(*shape, 16) for shape in CPU_DECODE_SHAPES]
        return [DecodeCase(*shape, page) for shape in DECODE_SHAPES for page in DECODE_PAGE_SIZES]
    return [
        HostCase("host decode+metadata", None, DecodeCase(4, 1024, 32, 8, 128, 64)),
        HostCase("host dense", DenseCase("forward", 1, 128, 8, 8, 128, True), None),
    ]
