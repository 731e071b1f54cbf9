"""The cases of prefill and of gradients: names, shapes, operation counts."""

from __future__ import annotations

from typing import NamedTuple

PREFIXES = {
    "forward": "fwd",
    "backward": "bwd",
    "window": "win",
    "fp8": "fp8",
    "chunked": "chunk",
    "paged": "paged",
    "varlen": "varlen",
    "odd": "fwd",
    "odd-varlen": "varlen",
    "odd-paged": "paged",
    "backward-sweep": "bwd",
    "training": "layer",
    "prefix-lm": "plm",
}

#: Areas that time the backward pass alone: 2.5 times the operations of the forward pass.
BACKWARD_AREAS = ("backward", "backward-sweep")
BACKWARD_FACTOR = 2.5


def causal_pairs(seqlen_q: int, seqlen_k: int, window: int | None = None) -> int:
    """Visible pairs under a causal mask aligned to the bottom right, of the last ``window`` keys if given."""
    first, last = seqlen_k - seqlen_q + 1, seqlen_k  # keys that the first and the last query see without a window
    if window is None or window >= last:
        return (first + last) * seqlen_q // 2
    growing = max(0, window - first)  # queries that see less than a window
    return (first + first + growing - 1) * growing // 2 + (seqlen_q - growing) * window


def mask_name(causal: bool, window: int | None) -> str:
    """How the name of a case ends."""
    return f"window{window}" if window else "causal" if causal else "full"


def window_size(window: int | None) -> tuple[int, int]:
    """The last ``window`` keys as the flash-attn functions take them."""
    return (-1, -1) if window is None else (window - 1, 0)


class DenseCase(NamedTuple):
    """Self-attention over dense tensors: forward, backward or both, with a window or a prefix, or of e4m3 inputs."""

    area: str  # of PREFIXES
    batch: int
    seqlen: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    causal: bool
    value_dim: int | None = None  # head_dim_v where it differs
    window: int | None = None  # keys that a query sees at most, itself included
    prefix: int = 0  # keys that every query sees, whatever the causal mask says

    @property
    def name(self) -> str:
        dims = f"{self.head_dim}" + (f"/{self.value_dim}" if self.value_dim else "")
        mask = f"prefix{self.prefix}" if self.prefix else mask_name(self.causal, self.window)
        return (
            f"{PREFIXES[self.area]} B{self.batch} S{self.seqlen} H{self.num_heads_q} Hkv{self.num_heads_kv} D{dims} "
            f"{mask}"
        )

    @property
    def head_dim_v(self) -> int:
        return self.value_dim or self.head_dim

    @property
    def window_size(self) -> tuple[int, int]:
        """The window as the flash-attn functions take it."""
        return window_size(self.window)

    @property
    def flops(self) -> float:
        """2 B H Sq Sk (D + Dv), halved when causal, times 2.5 backward; of the visible pairs with a window."""
        pairs = float(self.seqlen**2) * (0.5 if self.causal else 1.0)
        if self.window is not None:
            pairs = float(causal_pairs(self.seqlen, self.seqlen, self.window))
        count = 2.0 * self.batch * self.num_heads_q * pairs * (self.head_dim + self.head_dim_v)
        return count * (BACKWARD_FACTOR if self.area in BACKWARD_AREAS else 1.0)


class PagedCase(NamedTuple):
    """Prefill over a paged cache: the last ``seqlen_q`` of a sequence's ``context`` tokens are queries."""

    area: str  # "chunked", "paged" or "odd-paged"
    batch: int
    seqlen_q: int
    context: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    page_size: int
    causal: bool = True

    @property
    def name(self) -> str:
        tokens = f"S{self.context}" if self.seqlen_q == self.context else f"Sq{self.seqlen_q} Sk{self.context}"
        return (
            f"{PREFIXES[self.area]} B{self.batch} {tokens} H{self.num_heads_q} Hkv{self.num_heads_kv} "
            f"D{self.head_dim} page{self.page_size}{'' if self.causal else ' full'}"
        )

    @property
    def seqlens(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return (self.context,) * self.batch

    @property
    def pages_per_sequence(self) -> int:
        return -(-self.context // self.page_size)

    @property
    def flops(self) -> float:
        """4 D for each visible pair of a query and a key."""
        pairs = causal_pairs(self.seqlen_q, self.context) if self.causal else self.seqlen_q * self.context
        return 4.0 * self.batch * self.num_heads_q * self.head_dim * pairs


class VarlenCase(NamedTuple):
    """Self-attention over packed sequences."""

    seqlens: tuple[int, ...]
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    causal: bool = True
    area: str = "varlen"  # or "odd-varlen", "backward-sweep"
    window: int | None = None  # keys that a query sees at most, itself included

    @property
    def name(self) -> str:
        return (
            f"{'bwd ' if self.area in BACKWARD_AREAS else ''}varlen N{len(self.seqlens)} T{sum(self.seqlens)} "
            f"H{self.num_heads_q} Hkv{self.num_heads_kv} D{self.head_dim} {mask_name(self.causal, self.window)}"
        )

    @property
    def window_size(self) -> tuple[int, int]:
        """The window as the flash-attn functions take it."""
        return window_size(self.window)

    @property
    def flops(self) -> float:
        """4 D for each visible pair of a query and a key, times 2.5 backward."""
        pairs = sum(causal_pairs(n, n, self.window) if self.causal else n * n for n in self.seqlens)
        count = 4.0 * self.num_heads_q * self.head_dim * pairs
        return count * (BACKWARD_FACTOR if self.area in BACKWARD_AREAS else 1.0)
