"""The decode cases: a few new tokens a sequence over a paged cache, shared prefixes, and appending to the cache."""

from __future__ import annotations

import random
from typing import NamedTuple

#: In the order of the published tables. The group `decode-all` runs these and the host's.
DECODE_AREAS = (
    "decode",
    "decode-pages",
    "decode-mixed",
    "decode-mtp",
    "decode-fp8",
    "decode-mla",
    "decode-invariant",
    "cascade",
    "append",
    "latency",
)

#: Bytes of an element of the caches.
ELEMENT_BYTES = {"bf16": 2, "e4m3": 1}


class DecodeCase(NamedTuple):
    """The last ``seqlen_q`` tokens of each sequence attend, causally, over a paged cache that already holds them."""

    batch: int
    context: int  # tokens of the longest sequence
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    page_size: int
    area: str = "decode"
    seqlen_q: int = 1
    lengths: tuple[int, ...] = ()  # tokens of each sequence, where they differ
    cache: str = "bf16"  # dtype of K and V, of ELEMENT_BYTES
    tokens_per_split: int = 0  # 0: the schedule is free
    head_dim_v: int = 0  # absorbed MLA: there is one cache, and V is its first columns; 0: two, as wide as each other

    @property
    def name(self) -> str:
        words = ["append" if self.area == "append" else "dec", f"B{self.batch}"]
        if self.seqlen_q > 1:
            words.append(f"q{self.seqlen_q}")
        words.append(f"mixed T{self.tokens}" if self.lengths else f"ctx{self.context}")
        dims = f"{self.head_dim}/{self.head_dim_v}" if self.head_dim_v else f"{self.head_dim}"
        words += [f"H{self.num_heads_q} Hkv{self.num_heads_kv} D{dims} page{self.page_size}"]
        if self.cache != "bf16":
            words.append(self.cache)
        if self.tokens_per_split:
            words.append(f"split{self.tokens_per_split}")
        return " ".join(words)

    @property
    def seqlens(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return self.lengths or (self.context,) * self.batch

    @property
    def tokens(self) -> int:
        return sum(self.seqlens)

    @property
    def pages_per_sequence(self) -> int:
        """Of the longest sequence: the width of the page table."""
        return -(-self.context // self.page_size)

    @property
    def beside_qv(self) -> DecodeCase:
        """Of absorbed MLA, with the head_dim of q and k beside qv."""
        return self._replace(head_dim=self.head_dim - self.head_dim_v)

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that one call reads: each token's once."""
        caches = 1 if self.head_dim_v else 2
        return caches * ELEMENT_BYTES[self.cache] * self.tokens * self.num_heads_kv * self.head_dim


class CascadeCase(NamedTuple):
    """One query token of each of ``batch`` sequences, which share their first ``prefix`` tokens."""

    batch: int
    prefix: int  # a multiple of page_size
    suffix: int  # further tokens of each sequence
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    page_size: int

    @property
    def area(self) -> str:
        return "cascade"

    @property
    def name(self) -> str:
        return (
            f"cascade B{self.batch} prefix{self.prefix}+{self.suffix} H{self.num_heads_q} Hkv{self.num_heads_kv} "
            f"D{self.head_dim} page{self.page_size}"
        )

    @property
    def plain(self) -> DecodeCase:
        """The same step for a call that knows nothing of the prefix."""
        context = self.prefix + self.suffix
        heads = (self.num_heads_q, self.num_heads_kv, self.head_dim)
        return DecodeCase(self.batch, context, *heads, self.page_size, self.area)

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that the sequences hold together, the prefix once."""
        return 2 * 2 * (self.prefix + self.batch * self.suffix) * self.num_heads_kv * self.head_dim


#: Batch, tokens, query heads, KV heads, head_dim.
DECODE_SHAPES = (
    (128, 8192, 8, 1, 128),
    (16, 8192, 32, 8, 128),
    (1, 65536, 32, 8, 128),
    (64, 8192, 16, 2, 256),
    (1, 65536, 16, 2, 256),
    (16, 8192, 32, 4, 512),
    (1, 65536, 32, 4, 512),
)
BATCH_SHAPES = tuple(shape for shape in DECODE_SHAPES if shape[0] > 1)
LATENCY_SHAPES = tuple(
    (batch, context, *heads)
    for heads in ((32, 8, 128), (32, 4, 512))
    for batch, context in ((1, 1024), (1, 4096), (8, 2048))
)
DECODE_PAGE_SIZES = (64, 128)
PAGE_SIZE = 64
PAGES_SHAPES = tuple(shape for shape in BATCH_SHAPES if shape[2:] != (32, 8, 128))
PAGES_PAGE_SIZES = (1, 16, 64)
#: Batch, query heads, KV heads, head_dim. Half as many sequences at head_dim 512, where a token takes twice the bytes.
MIXED_SHAPES = ((128, 8, 1, 128), (128, 32, 8, 128), (128, 16, 2, 256), (64, 32, 4, 512))
MIXED_LONGEST = 32768
MTP_QUERIES = (1, 2, 4, 8, 16)
#: Batch, tokens, query heads of one latent head: 16 are those of one of eight GPUs, 128 of a GPU that has all.
MLA_SHAPES = ((64, 8192, 16), (64, 8192, 32), (64, 8192, 64), (64, 8192, 128), (1, 65536, 16), (1, 65536, 128))
MLA_HEAD_DIM, MLA_HEAD_DIM_V = 576, 512  # DeepSeek-V2 and -V3: 512 latent columns and 64 of position
TOKENS_PER_SPLIT = 4096
CASCADE_HEADS = ((8, 1, 128), (32, 8, 128), (16, 2, 256), (32, 4, 512))
CASCADE_BATCHES, CASCADE_PREFIX, CASCADE_SUFFIX = (4, 16, 64), 8192, 1024

#: What a CPU can do in seconds: the torch fallback is a reference, not something to time.
CPU_DECODE_SHAPES = ((2, 100, 4, 2, 64), (1, 130, 2, 1, 512))
CPU_MIXED_LENGTHS = (37, 1, 90, 64)
CPU_TOKENS_PER_SPLIT = 64
CPU_MLA_SHAPE = (2, 100, 4, 1, 64, 16)


def uniform_lengths(count: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths uniform in 1 to ``longest``, the same for the same seed on every machine."""
    draw = random.Random(seed)
    return tuple(draw.randint(1, longest) for _ in range(count))


def decode_cases(area: str, on_cpu: bool) -> list[DecodeCase | CascadeCase]:
    """The cases of one of DECODE_AREAS; ``on_cpu``: the tiny set that the torch fallback can run."""
    if area == "cascade":
        return _cascade_cases(on_cpu)
    if area == "decode-mixed":
        return [case for pair in _mixed_pairs(area, on_cpu) for case in pair]
    return list(_paged_cases(area, on_cpu))


def _paged_cases(area: str, on_cpu: bool) -> list[DecodeCase]:
    if on_cpu:
        return _tiny_cases(area)
    if area == "decode":
        return [DecodeCase(*shape, page) for shape in DECODE_SHAPES for page in DECODE_PAGE_SIZES]
    if area == "decode-pages":
        return [DecodeCase(*shape, page, area) for shape in PAGES_SHAPES for page in PAGES_PAGE_SIZES]
    if area == "decode-mtp":
        return [DecodeCase(*shape, PAGE_SIZE, area, seqlen_q=q) for shape in BATCH_SHAPES for q in MTP_QUERIES]
    if area == "decode-fp8":
        return [DecodeCase(*shape, PAGE_SIZE, area, cache="e4m3") for shape in DECODE_SHAPES]
    if area == "decode-mla":
        dims = (MLA_HEAD_DIM, PAGE_SIZE, area)
        return [DecodeCase(*shape, 1, *dims, head_dim_v=MLA_HEAD_DIM_V) for shape in MLA_SHAPES]
    if area == "decode-invariant":
        cases = [DecodeCase(*shape, PAGE_SIZE, area) for shape in BATCH_SHAPES]
        cases += [mixed for mixed, _ in _mixed_pairs(area, on_cpu)]
        return [case._replace(tokens_per_split=TOKENS_PER_SPLIT) for case in cases]
    shapes = LATENCY_SHAPES
    if area == "append":
        shapes = (*BATCH_SHAPES, *(shape for shape in LATENCY_SHAPES if shape[0] > 1))
    return [DecodeCase(*shape, PAGE_SIZE, area) for shape in shapes]


def _tiny_cases(area: str) -> list[DecodeCase]:
    cases = [DecodeCase(*shape, 16, area) for shape in CPU_DECODE_SHAPES]
    if area == "decode-pages":
        return [case._replace(page_size=page) for case in cases for page in (1, 16)]
    if area == "decode-mtp":
        return [case._replace(seqlen_q=q) for case in cases for q in (1, 4)]
    if area == "decode-fp8":
        return [case._replace(cache="e4m3") for case in cases]
    if area == "decode-mla":
        return [DecodeCase(*CPU_MLA_SHAPE, area, head_dim_v=48)]
    if area == "decode-invariant":
        cases += [mixed for mixed, _ in _mixed_pairs(area, on_cpu=True)]
        return [case._replace(tokens_per_split=CPU_TOKENS_PER_SPLIT) for case in cases]
    return cases


def _mixed_pairs(area: str, on_cpu: bool) -> list[tuple[DecodeCase, DecodeCase]]:
    """Cases of mixed lengths, each with one of as many tokens in sequences of one length."""
    pairs = []
    for batch, heads_q, heads_kv, head_dim in ((4, 4, 2, 64),) if on_cpu else MIXED_SHAPES:
        lengths = CPU_MIXED_LENGTHS if on_cpu else uniform_lengths(batch, MIXED_LONGEST)
        page_size = 16 if on_cpu else PAGE_SIZE
        mixed = DecodeCase(batch, max(lengths), heads_q, heads_kv, head_dim, page_size, area, lengths=lengths)
        pairs.append((mixed, mixed._replace(context=round(sum(lengths) / batch), lengths=())))
    return pairs


def _cascade_cases(on_cpu: bool) -> list[DecodeCase | CascadeCase]:
    if on_cpu:
        return [CascadeCase(3, 48, 20, 4, 2, 64, 16)]
    return [
        CascadeCase(batch, CASCADE_PREFIX, CASCADE_SUFFIX, *heads, PAGE_SIZE)
        for heads in CASCADE_HEADS
        for batch in CASCADE_BATCHES
    ]
