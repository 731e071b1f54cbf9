"""Random cases over everything that forward calls are made of, other ones for each seed: nobody can tune to them."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

from broadhead_bench.cases_prefill import causal_pairs, mask_name, window_size

#: The kinds, and how often each is drawn: dense and packed calls, prefill over pages of whole sequences and of chunks,
#: and steps of decode.
KINDS = {"dense": 0.4, "varlen": 0.2, "paged": 0.1, "chunk": 0.1, "decode": 0.2}
PAGED_KINDS = ("paged", "chunk", "decode")
DTYPES = {"bf16": 0.6, "fp16": 0.25, "e4m3": 0.15}
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "e4m3": 1}
#: head_dims of models, of which three in five cases have one; the others have any multiple of 8.
MODEL_HEAD_DIMS = (64, 64, 72, 80, 96, 128, 128, 128, 192, 256, 256, 512)
ANY_HEAD_DIM = tuple(range(40, 513, 8))
#: e4m3 goes in steps of 16 columns, and no kernel of peers takes more than 256.
E4M3_HEAD_DIMS = (64, 96, 128, 128, 128, 160, 192, 256, 256)
#: head_dim and head_dim_v of models where they differ: of one case in ten.
UNEQUAL_HEAD_DIMS = ((192, 128), (192, 128), (64, 256), (128, 64), (96, 48), (256, 128), (72, 144))
GROUPS = (1, 1, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 12, 16)
MOST_HEADS, MOST_BATCH, LONGEST = 64, 512, 65536
PAGE_SIZES = (1, 16, 16, 32, 64, 64, 128, 256)
#: New tokens of a step of decode: one, or drafts.
DECODE_TOKENS = (1, 1, 1, 1, 1, 2, 3, 4, 5, 8, 16)
CHUNK_TOKENS = (16, 4096)
SHORTEST_WINDOW = 16
#: What a case may do and hold: the batch is cut, then heads, then tokens.
MOST_FLOPS, MOST_BYTES = 1.5e12, 3e9
#: Cases of a seed where nobody says how many.
CASES = 200
#: On a CPU.
CPU_CASES, CPU_FLOPS, CPU_LONGEST = 12, 2e7, 96
#: One case in so many also runs on the peers that compile what they run.
COMPILED_SHARE = 10


class LandscapeCase(NamedTuple):
    """One call. Sequence i has ``seqlens_q[i]`` queries, which are its last of ``seqlens_k[i]`` tokens where a mask
    asks for their places."""

    number: int
    kind: str  # of KINDS
    seqlens_q: tuple[int, ...]  # of dense and paged calls all alike
    seqlens_k: tuple[int, ...]  # of dense calls all alike
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    causal: bool
    window: int | None = None  # keys that a query sees at most, itself included
    sinks: bool = False
    dtype: str = "bf16"  # of DTYPES: of q, k and v
    page_size: int = 0  # 0: no pages
    compiled: bool = False  # peers that compile at their first call run it as well

    @property
    def area(self) -> str:
        return "landscape"

    @property
    def name(self) -> str:
        q, k = _range_text(self.seqlens_q), _range_text(self.seqlens_k)
        dims = f"{self.head_dim}" + ("" if self.head_dim == self.head_dim_v else f"/{self.head_dim_v}")
        words = [
            f"{self.number:03}", self.kind, f"B{self.batch}", f"Sq{q}", f"Sk{k}", f"H{self.num_heads_q}",
            f"Hkv{self.num_heads_kv}", f"D{dims}", mask_name(self.causal, self.window), self.dtype,
        ]  # fmt: skip
        words += ["sinks"] if self.sinks else []
        return " ".join([*words, f"page{self.page_size}"] if self.page_size else words)

    @property
    def batch(self) -> int:
        return len(self.seqlens_q)

    @property
    def window_size(self) -> tuple[int, int]:
        """The window as the flash-attn functions take it."""
        return window_size(self.window)

    @property
    def is_self_attention(self) -> bool:
        return self.seqlens_q == self.seqlens_k

    @property
    def flops(self) -> float:
        """2 (D + Dv) for each visible pair of a query and a key, of each head."""
        pairs = sum(
            causal_pairs(q, k, self.window) if self.causal else q * k for q, k in zip(self.seqlens_q, self.seqlens_k)
        )
        return 2.0 * self.num_heads_q * (self.head_dim + self.head_dim_v) * pairs

    @property
    def bytes(self) -> float:
        """Of q, k, v and out, each once."""
        dims = self.head_dim + self.head_dim_v
        queries = self.num_heads_q * sum(self.seqlens_q) * (self.head_dim * self.element_bytes + 2 * self.head_dim_v)
        return queries + self.num_heads_kv * dims * sum(self.seqlens_k) * self.element_bytes

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]


def default_count(on_cpu: bool) -> int:
    """How many cases of a seed run where nobody says how many."""
    return CPU_CASES if on_cpu else CASES


def landscape_cases(seed: int, count: int, on_cpu: bool = False) -> list[LandscapeCase]:
    """The first ``count`` cases of a seed, the same on every machine."""
    draw = random.Random(seed)
    return [_draw(draw, index, on_cpu) for index in range(count)]


def _draw(draw: random.Random, index: int, on_cpu: bool) -> LandscapeCase:
    kind, dtype = _weighted(draw, KINDS), _weighted(draw, DTYPES)
    head_dim = draw.choice(MODEL_HEAD_DIMS if draw.random() < 0.6 else ANY_HEAD_DIM)
    head_dim_v = head_dim
    if dtype == "e4m3":
        head_dim = head_dim_v = draw.choice(E4M3_HEAD_DIMS)
    elif kind not in PAGED_KINDS and draw.random() < 0.1:
        head_dim, head_dim_v = draw.choice(UNEQUAL_HEAD_DIMS)
    group = draw.choice(GROUPS)
    kv_heads = round(_log_uniform(draw, 1, MOST_HEADS // group))
    longest = CPU_LONGEST if on_cpu else LONGEST
    batch = round(_log_uniform(draw, 1, 8 if on_cpu else MOST_BATCH))
    seqlens_q, seqlens_k = _lengths(draw, kind, batch, longest)
    mask = _weighted(draw, {"causal": 0.45, "full": 0.35, "window": 0.2})
    if kind in PAGED_KINDS and mask == "full":
        mask = "causal"
    if any(q > k for q, k in zip(seqlens_q, seqlens_k)):
        mask = "full"
    window = round(_log_uniform(draw, SHORTEST_WINDOW, max(seqlens_k))) if mask == "window" else None
    if window is not None and window >= max(seqlens_k):
        mask, window = "causal", None
    sinks = draw.random() < 0.05
    page_size = draw.choice(PAGE_SIZES) if kind in PAGED_KINDS else 0
    case = LandscapeCase(
        index, kind, seqlens_q, seqlens_k, kv_heads * group, kv_heads, head_dim, head_dim_v, mask != "full", window,
        sinks, dtype, page_size, draw.randrange(COMPILED_SHARE) == 0,
    )  # fmt: skip
    return _cut(case, *((CPU_FLOPS, 1e8) if on_cpu else (MOST_FLOPS, MOST_BYTES)))


def _lengths(draw: random.Random, kind: str, batch: int, longest: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Queries and keys of each sequence."""
    top = _log_uniform(draw, 1, longest)
    spread = top / _log_uniform(draw, 1, 64)  # the shortest sequence of a ragged batch
    ragged = [max(1, round(_log_uniform(draw, max(1.0, spread), top))) for _ in range(batch)]
    same = [max(1, round(top))] * batch
    if kind == "dense":
        keys = same if draw.random() < 0.6 else [max(1, round(_log_uniform(draw, 1, longest)))] * batch
        return tuple(same), tuple(keys)
    if kind == "varlen":
        if draw.random() < 0.8:
            return tuple(ragged), tuple(ragged)
        other = _log_uniform(draw, 1, longest)
        return tuple(ragged), tuple(max(1, round(_log_uniform(draw, max(1.0, other / 8), other))) for _ in range(batch))
    if kind == "paged":
        return tuple(same), tuple(same)
    if kind == "chunk":
        new = round(_log_uniform(draw, *(min(n, longest // 2) for n in CHUNK_TOKENS)))
    else:
        new = draw.choice(DECODE_TOKENS)
    cached = ragged if draw.random() < 0.6 else same
    return (new,) * batch, tuple(new + n for n in cached)


def _cut(case: LandscapeCase, most_flops: float, most_bytes: float) -> LandscapeCase:
    """The case with fewer sequences, then fewer KV heads, then fewer tokens, until it fits."""
    while case.flops > most_flops or case.bytes > most_bytes:
        kept = case.batch // 2
        group = case.num_heads_q // case.num_heads_kv
        if kept:
            case = case._replace(seqlens_q=case.seqlens_q[:kept], seqlens_k=case.seqlens_k[:kept])
        elif case.num_heads_kv > 1:
            kv_heads = case.num_heads_kv // 2
            case = case._replace(num_heads_q=kv_heads * group, num_heads_kv=kv_heads)
        else:
            new = case.seqlens_q[0] if case.kind in ("chunk", "decode") else max(1, int(case.seqlens_q[0] * 0.8))
            case = case._replace(seqlens_q=(new,), seqlens_k=(max(new, int(case.seqlens_k[0] * 0.8)),))
    if case.window is not None and case.window >= max(case.seqlens_k):
        case = case._replace(window=None)
    return case


def _weighted(draw: random.Random, weights: dict[str, float]) -> str:
    return draw.choices(list(weights), list(weights.values()))[0]


def _log_uniform(draw: random.Random, low: float, high: float) -> float:
    return math.exp(draw.uniform(math.log(low), math.log(max(low, high))))


def _range_text(lengths: tuple[int, ...]) -> str:
    return f"{min(lengths)}-{max(lengths)}" if len(set(lengths)) > 1 else f"{lengths[0]}"
