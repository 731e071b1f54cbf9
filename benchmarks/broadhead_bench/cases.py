"""The benchmark cases: names, shapes, operation and byte counts."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

from broadhead_bench.cases_backward import TRAINING_AREAS, StepCase, training_cases
from broadhead_bench.cases_decode import DECODE_AREAS, CascadeCase, DecodeCase, decode_cases
from broadhead_bench.cases_landscape import LandscapeCase, default_count, landscape_cases
from broadhead_bench.cases_masks import MaskCase, mask_cases
from broadhead_bench.cases_model import InferenceCase, model_cases
from broadhead_bench.cases_prefill import DenseCase, PagedCase, VarlenCase


class HostCase(NamedTuple):
    """An eager call whose host time is measured; the shape is small so that the device is never the bottleneck."""

    name: str
    kind: str  # "decode", "append", "plan" or "dense"
    inner: DecodeCase | DenseCase


Case = (
    DenseCase
    | DecodeCase
    | CascadeCase
    | PagedCase
    | VarlenCase
    | HostCase
    | StepCase
    | InferenceCase
    | MaskCase
    | LandscapeCase
)

#: Batch, tokens, query heads, KV heads, head_dim, head_dim_v where it differs.
FORWARD_SHAPES: tuple[tuple[int, int, int, int, int, int | None], ...] = (
    (2, 8192, 32, 32, 64, None),
    (2, 8192, 16, 16, 96, None),
    (2, 8192, 16, 16, 128, None),
    (2, 8192, 12, 12, 192, None),
    (2, 8192, 16, 16, 192, 128),
    (2, 8192, 8, 8, 256, None),
    (1, 8192, 16, 2, 256, None),
    (2, 8192, 4, 4, 512, None),
    (1, 8192, 32, 4, 512, None),
)

#: Query heads, KV heads, head_dim of served models with GQA.
GQA_HEADS = ((32, 8, 128), (16, 2, 256), (32, 4, 512))
CHUNKED_CACHED, CHUNKED_NEW, CHUNKED_PAGE_SIZES = 32768, (512, 2048), (16, 64)
VARLEN_COUNT, VARLEN_SHORTEST, VARLEN_LONGEST = 32, 128, 16384
PAGED_SHAPES = ((2, 8192, (4, 4, 512)), (1, 8192, (32, 4, 512)), (2, 8192, (16, 8, 128)))
PAGED_PAGE_SIZES = (16, 64, 128, 1)
WINDOW, WINDOW_SHAPES = 1024, ((1, 16384, 32, 16, 256), (1, 16384, 32, 8, 128))
FP8_SHAPES = ((2, 8192, 16, 16, 128), (2, 8192, 8, 8, 256))
#: Heads and head_dim where that is no multiple of 64 columns, the width of a box or a tile's side: full and causal.
ODD_BATCH, ODD_SEQLEN, ODD_PAGE_SIZE = 2, 4096, 64
ODD_HEADS = ((16, 40), (16, 72), (16, 80), (16, 104), (12, 136), (12, 160), (12, 168), (8, 208), (8, 232))
#: Those that are packed and paged as well: heads, head_dim, causal.
ODD_LAYOUTS = ((16, 72, False), (16, 80, False), (12, 160, True))

#: What a CPU can do in seconds: the torch fallback is a reference, not something to time.
CPU_FORWARD_SHAPES = ((1, 128, 4, 2, 64, None), (1, 64, 2, 1, 512, None), (1, 64, 2, 2, 192, 128))

ODD_AREAS = ("odd", "odd-varlen", "odd-paged")
AREAS = (
    "forward",
    *ODD_AREAS,
    "chunked",
    "varlen",
    "paged",
    "window",
    "fp8",
    "masks",
    *TRAINING_AREAS,
    *DECODE_AREAS,
    "host",
    "model",
    "landscape",
)
#: Areas whose cases are drawn from a seed.
DRAWN_AREAS = ("backward-sweep", "landscape")
#: Names that stand for several areas on the command line.
GROUPS = {"decode-all": (*DECODE_AREAS, "host"), "odd-all": ODD_AREAS, "training-all": TRAINING_AREAS}


def ragged_lengths(count: int, shortest: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths whose logarithms are uniform, the same for the same seed on every machine."""
    draw = random.Random(seed)
    return tuple(round(math.exp(draw.uniform(math.log(shortest), math.log(longest)))) for _ in range(count))


def cases_of(area: str, on_cpu: bool = False, seed: int = 0) -> list[Case]:
    """The cases of an area, in the order of the published tables.

    Args:
        area: one of AREAS.
        on_cpu: the tiny set that the torch fallback can run.
        seed: draws the cases of DRAWN_AREAS.
    """
    if area == "landscape":
        return [*landscape_cases(seed, default_count(on_cpu), on_cpu)]
    if area == "forward":
        shapes = CPU_FORWARD_SHAPES if on_cpu else FORWARD_SHAPES
        return [DenseCase(area, *shape[:5], causal, shape[5]) for shape in shapes for causal in (False, True)]
    if area in TRAINING_AREAS:
        return list(training_cases(area, on_cpu, seed))
    if area == "model":
        return list(model_cases(on_cpu))
    if area == "masks":
        return list(mask_cases(on_cpu))
    if area in ODD_AREAS:
        return _odd_cases(area, on_cpu)
    if area in DECODE_AREAS:
        return list(decode_cases(area, on_cpu))
    if area == "host":
        step = DecodeCase(4, 1024, 32, 8, 128, 64)
        return [
            HostCase("host decode+metadata", "decode", step),
            HostCase("host append+rotary", "append", step._replace(area="append")),
            HostCase("host metadata", "plan", step),
            HostCase("host dense", "dense", DenseCase("forward", 1, 128, 8, 8, 128, True)),
        ]
    return _masked_cases(area, on_cpu)


def _odd_cases(area: str, on_cpu: bool) -> list[Case]:
    """Forward of head_dims that are no multiple of 64."""
    batch, seqlen = (1, 64) if on_cpu else (ODD_BATCH, ODD_SEQLEN)
    if area == "odd":
        shapes = ((2, 72),) if on_cpu else ODD_HEADS
        return [
            DenseCase(area, batch, seqlen, heads, heads, head_dim, causal)
            for heads, head_dim in shapes
            for causal in (False, True)
        ]
    layouts = ((2, 72, False), (2, 40, True)) if on_cpu else ODD_LAYOUTS
    if area == "odd-varlen":
        return [VarlenCase((seqlen,) * batch, heads, heads, dim, causal, area) for heads, dim, causal in layouts]
    pages = (batch, seqlen, seqlen)
    return [PagedCase(area, *pages, heads, heads, dim, ODD_PAGE_SIZE, causal) for heads, dim, causal in layouts]


def _masked_cases(area: str, on_cpu: bool) -> list[Case]:
    """Chunked, varlen and paged prefill, windows and FP8."""
    if area == "chunked":
        if on_cpu:
            return [PagedCase(area, 1, 24, 100, 4, 2, 64, 16)]
        return [
            PagedCase(area, 1, new, CHUNKED_CACHED + new, *heads, page)
            for heads in GQA_HEADS
            for new in CHUNKED_NEW
            for page in CHUNKED_PAGE_SIZES
        ]
    if area == "varlen":
        if on_cpu:
            return [VarlenCase(ragged_lengths(4, 8, 64), 4, 2, 64)]
        lengths = ragged_lengths(VARLEN_COUNT, VARLEN_SHORTEST, VARLEN_LONGEST)
        return [VarlenCase(lengths, *heads) for heads in GQA_HEADS]
    if area == "paged":
        if on_cpu:
            return [PagedCase(area, 2, 64, 64, 4, 2, 64, page) for page in (16, 1)]
        return [
            PagedCase(area, batch, tokens, tokens, *heads, page)
            for batch, tokens, heads in PAGED_SHAPES
            for page in PAGED_PAGE_SIZES
        ]
    if area == "window":
        windows = [((1, 128, 4, 2, 64), 32)] if on_cpu else [(shape, WINDOW) for shape in WINDOW_SHAPES]
        return [DenseCase(area, *shape, True, window=window) for shape, window in windows]
    shapes = ((1, 64, 4, 2, 64),) if on_cpu else FP8_SHAPES
    return [DenseCase(area, *shape, causal) for shape in shapes for causal in (False, True)]
