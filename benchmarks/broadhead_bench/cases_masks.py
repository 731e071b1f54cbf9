"""The cases of masks that are given as values: images, trees of drafts, and causality by sequence."""

from __future__ import annotations

import random
from typing import NamedTuple

from broadhead_bench.cases_decode import DecodeCase
from broadhead_bench.cases_prefill import DenseCase, mask_name

AREA = "masks"
#: Bits of the word of a draft: the last keys of its sequence.
WORD_BITS = 64
#: Drafts of a level of a tree, below its root.
TREE_WIDTH = 8


def image_spans(first: int, tokens: int, count: int, length: int) -> tuple[tuple[int, int], ...]:
    """``count`` images of ``length`` tokens, spread evenly over ``tokens`` of them from position ``first`` on. They
    begin a third into their share, so that they do not fit the tiles of a kernel."""
    share = tokens // max(1, count)
    starts = [first + share * index + share // 3 for index in range(count)]
    return tuple((start, start + length) for start in starts)


class ImagesCase(NamedTuple):
    """Causal self-attention of one sequence, in which the tokens of an image see each other as well."""

    direction: str  # "fwd", "bwd", or "fwd+bwd" in one call
    seqlen: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    window: int | None  # keys that a query sees at most, itself included, images aside
    images: int  # 0: none
    image_tokens: int
    in_window: bool = False  # the window's left side holds for images, too

    @property
    def area(self) -> str:
        return AREA

    @property
    def name(self) -> str:
        return (
            f"{self.direction} S{self.seqlen} H{self.num_heads_q} Hkv{self.num_heads_kv} D{self.head_dim} "
            f"{mask_name(True, self.window)} images{self.images}x{self.image_tokens}"
            f"{' in window' if self.in_window else ''}"
        )

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First token of each image, and the one behind it."""
        return image_spans(0, self.seqlen, self.images, self.image_tokens)

    @property
    def plain(self) -> DenseCase:
        """The shape, and the mask without the images."""
        heads = (self.num_heads_q, self.num_heads_kv, self.head_dim)
        return DenseCase(AREA, 1, self.seqlen, *heads, True, window=self.window)


class ChunkCase(NamedTuple):
    """Chunked prefill: the last ``new`` of ``context`` tokens attend, causally, over an e4m3 cache in pages. Among them
    are images, whose tokens see each other as well."""

    new: int
    context: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    page_size: int
    images: int  # 0: none
    image_tokens: int

    @property
    def area(self) -> str:
        return AREA

    @property
    def name(self) -> str:
        return (
            f"chunk Sq{self.new} Sk{self.context} H{self.num_heads_q} Hkv{self.num_heads_kv} D{self.head_dim} "
            f"page{self.page_size} e4m3 images{self.images}x{self.image_tokens}"
        )

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First token of each image, and the one behind it."""
        return image_spans(self.context - self.new, self.new, self.images, self.image_tokens)

    @property
    def plain(self) -> DecodeCase:
        """The shape, and the mask without the images."""
        heads = (self.num_heads_q, self.num_heads_kv, self.head_dim)
        return DecodeCase(1, self.context, *heads, self.page_size, AREA, seqlen_q=self.new, cache="e4m3")


class TreeCase(NamedTuple):
    """The last ``drafts`` tokens of each sequence are a tree of drafts over a paged cache that already holds them."""

    batch: int
    context: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    page_size: int
    drafts: int
    chain: bool = False  # each draft follows the one before: causal

    @property
    def area(self) -> str:
        return AREA

    @property
    def name(self) -> str:
        return (
            f"tree B{self.batch} q{self.drafts} ctx{self.context} H{self.num_heads_q} Hkv{self.num_heads_kv} "
            f"D{self.head_dim} page{self.page_size}"
        )

    @property
    def words(self) -> tuple[tuple[int, ...], ...]:
        """The words of each sequence, whose trees differ: which of the last 64 keys a draft sees."""
        draw = random.Random(0)
        return tuple(tree_words(self._parents(draw)) for _ in range(self.batch))

    @property
    def plain(self) -> DecodeCase:
        """The same tokens, causal."""
        heads = (self.num_heads_q, self.num_heads_kv, self.head_dim)
        return DecodeCase(self.batch, self.context, *heads, self.page_size, AREA, seqlen_q=self.drafts)

    def _parents(self, draw: random.Random) -> list[int]:
        return [*range(-1, self.drafts - 1)] if self.chain else tree_parents(self.drafts, draw)


class CausalityCase(NamedTuple):
    """Self-attention of sequences of one length, of which every other one is causal, and the rest sees all."""

    batch: int
    seqlen: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int

    @property
    def area(self) -> str:
        return AREA

    @property
    def name(self) -> str:
        return (
            f"fwd B{self.batch} S{self.seqlen} H{self.num_heads_q} Hkv{self.num_heads_kv} D{self.head_dim} half causal"
        )

    @property
    def plain(self) -> DenseCase:
        """All of it, causal."""
        heads = (self.num_heads_q, self.num_heads_kv, self.head_dim)
        return DenseCase(AREA, self.batch, self.seqlen, *heads, True)

    @property
    def halves(self) -> tuple[tuple[slice, DenseCase], ...]:
        """Which sequences are causal, then which are not, each half as a call of its own."""
        half = self.plain._replace(batch=self.batch // 2)
        return (slice(0, None, 2), half), (slice(1, None, 2), half._replace(causal=False))


MaskCase = ImagesCase | ChunkCase | TreeCase | CausalityCase

#: Gemma 4's attention over 16k tokens, 2k of them of images: query heads, KV heads, head_dim, window; what is timed.
IMAGES_TOKENS, IMAGES, IMAGE_TOKENS = 16384, 8, 256
IMAGES_LOCAL, IMAGES_LOCAL_DIRECTIONS = (32, 16, 256, 1024), ("fwd", "fwd+bwd")
IMAGES_GLOBAL, IMAGES_GLOBAL_DIRECTIONS = (32, 4, 512, None), ("fwd", "bwd")
CHUNK_NEW, CHUNK_CACHED, CHUNK_IMAGES, PAGE_SIZE = 2048, 16384, 4, 64
TREE_BATCH, TREE_CONTEXT, TREE_DRAFTS = 16, 8192, (8, 16, 64)
CAUSALITY_BATCH, CAUSALITY_TOKENS = 8, 4096
#: Query heads, KV heads, head_dim of the other cases.
HEADS = ((32, 8, 128), (16, 2, 256))


def mask_cases(on_cpu: bool = False) -> list[MaskCase]:
    """The cases of the area; ``on_cpu``: the tiny set that the torch fallback can run."""
    if on_cpu:
        images = ImagesCase("fwd", 64, 4, 2, 64, 8, 2, 20)
        both = images._replace(direction="fwd+bwd", in_window=True)
        return [
            *(images, images._replace(in_window=True), both, images._replace(direction="bwd", window=None)),
            ChunkCase(24, 100, 4, 2, 64, 16, 2, 9),
            *(TreeCase(2, 100, 4, 2, 64, 16, drafts) for drafts in (5, 64)),
            CausalityCase(4, 48, 4, 2, 64),
        ]
    layer = (IMAGES, IMAGE_TOKENS)
    return [
        *(
            ImagesCase(direction, IMAGES_TOKENS, *IMAGES_LOCAL, *layer, in_window)
            for direction in IMAGES_LOCAL_DIRECTIONS
            for in_window in (False, True)
        ),
        *(ImagesCase(direction, IMAGES_TOKENS, *IMAGES_GLOBAL, *layer) for direction in IMAGES_GLOBAL_DIRECTIONS),
        *(
            ChunkCase(CHUNK_NEW, CHUNK_CACHED + CHUNK_NEW, *heads, PAGE_SIZE, CHUNK_IMAGES, IMAGE_TOKENS)
            for heads in HEADS
        ),
        *(TreeCase(TREE_BATCH, TREE_CONTEXT, *heads, PAGE_SIZE, drafts) for heads in HEADS for drafts in TREE_DRAFTS),
        *(CausalityCase(CAUSALITY_BATCH, CAUSALITY_TOKENS, *heads) for heads in HEADS),
    ]


def tree_parents(count: int, draw: random.Random) -> list[int]:
    """The parent of each draft of a tree as drafting models propose it: a root (-1), then levels of TREE_WIDTH drafts,
    each with a parent drawn from the level before."""
    parents = [-1]
    level = [0]
    while len(parents) < count:
        below = range(len(parents), min(count, len(parents) + TREE_WIDTH))
        parents += [draw.choice(level) for _ in below]
        level = [*below]
    return parents


def tree_words(parents: list[int]) -> tuple[int, ...]:
    """The 64 bits of each draft, as signed numbers: itself, its ancestors, and the keys in front of the drafts."""
    first = WORD_BITS - len(parents)
    words: list[int] = []
    for index, parent in enumerate(parents):
        words.append((words[parent] if parent >= 0 else (1 << first) - 1) | 1 << first + index)
    return tuple(word - (1 << WORD_BITS) if word >> WORD_BITS - 1 else word for word in words)
