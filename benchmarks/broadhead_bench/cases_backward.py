"""The cases of training: backward passes, a sweep of drawn ones, layers, steps of a model, and prefix-LM."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

from broadhead_bench.cases_prefill import DenseCase, VarlenCase

TRAINING_AREAS = ("backward", "backward-sweep", "training", "prefix-lm")

#: Batch, tokens, query heads, KV heads, head_dim.
BACKWARD_SHAPES = (
    (2, 8192, 32, 32, 64),
    (2, 8192, 16, 16, 128),
    (1, 8192, 32, 8, 128),
    (2, 8192, 12, 12, 192),
    (2, 8192, 8, 8, 256),
    (1, 8192, 16, 2, 256),
    (2, 8192, 4, 4, 512),
    (1, 8192, 32, 4, 512),
)
CPU_BACKWARD_SHAPES = ((1, 128, 4, 2, 64), (1, 64, 2, 1, 512))

#: What a sweep draws from. There are as many cases as head_dims, each head_dim once.
SWEEP_HEAD_DIMS = tuple(range(40, 513, 8))
SWEEP_LENGTHS, SWEEP_SHORTEST_WINDOW = (128, 32768), 64
SWEEP_GROUPS, SWEEP_KV_HEADS = (1, 2, 3, 4, 6, 8, 12, 16), (1, 2, 4, 8)
SWEEP_MASKS = ("full", "causal", "window")
SWEEP_VARLEN, SWEEP_MOST_SEQUENCES = 0.25, 64
#: FLOPs of a backward pass: one sequence too many is cut to the most, and the batch fills what is drawn between both.
SWEEP_FLOPS = (1e11, 3e12)

#: Gemma 4's attention: query heads, KV heads, head_dim, window.
Layer = tuple[int, int, int, int | None]
GEMMA4_LOCAL: Layer = (32, 16, 256, 1024)
GEMMA4_GLOBAL: Layer = (32, 4, 512, None)
LAYER_TOKENS, STEP_TOKENS = 8192, (4096, 16384)
#: HRM-Text's attention: heads of 128; half of each sequence is its prefix; so many tokens a batch.
PREFIX_HEADS, PREFIX_HEAD_DIM, PREFIX_TOKENS = 10, 128, 16384
PREFIX_LENGTHS = (256, 512, 1024, 2048, 4096)


class ModelShape(NamedTuple):
    """A decoder of Gemma 4's layers: windowed ones, then one that sees all."""

    hidden: int
    intermediate: int
    vocabulary: int
    window_layers: int
    local: Layer
    wide: Layer  # of the layer that sees all, without a window


GEMMA4_MODEL = ModelShape(2560, 8192, 32000, 5, GEMMA4_LOCAL, GEMMA4_GLOBAL)
CPU_MODEL = ModelShape(64, 96, 128, 1, (4, 2, 32, 24), (4, 1, 64, None))


class StepCase(NamedTuple):
    """Forward and backward of a whole model on one sequence, without an optimizer."""

    tokens: int
    model: ModelShape
    area: str = "training"

    @property
    def name(self) -> str:
        _, _, head_dim, window = self.model.local
        return f"step S{self.tokens} hidden{self.model.hidden} D{head_dim} window{window} D{self.model.wide[2]} causal"


TrainingCase = DenseCase | VarlenCase | StepCase


def training_cases(area: str, on_cpu: bool = False, seed: int = 0) -> list[TrainingCase]:
    """The cases of an area of TRAINING_AREAS.

    Args:
        on_cpu: the tiny set that the torch fallback can run.
        seed: draws the sweep.
    """
    if area == "backward":
        shapes = CPU_BACKWARD_SHAPES if on_cpu else BACKWARD_SHAPES
        return [DenseCase(area, *shape, causal) for shape in shapes for causal in (False, True)]
    if area == "backward-sweep":
        return [*(sweep_cases(seed, 4, (16, 96), (1e5, 5e7)) if on_cpu else sweep_cases(seed))]
    if area == "training":
        layers = ((4, 2, 64, 24), (4, 1, 64, None)) if on_cpu else (GEMMA4_LOCAL, GEMMA4_GLOBAL)
        found: list[TrainingCase] = [
            DenseCase(area, 1, 64 if on_cpu else LAYER_TOKENS, layer[0], layer[1], layer[2], True, window=layer[3])
            for layer in layers
        ]
        return found + ([StepCase(48, CPU_MODEL)] if on_cpu else [StepCase(n, GEMMA4_MODEL) for n in STEP_TOKENS])
    lengths, total = ((32, 64), 64) if on_cpu else (PREFIX_LENGTHS, PREFIX_TOKENS)
    heads = (PREFIX_HEADS, PREFIX_HEADS, PREFIX_HEAD_DIM)
    return [DenseCase(area, total // length, length, *heads, True, prefix=length // 2) for length in lengths]


def sweep_cases(
    seed: int,
    count: int = len(SWEEP_HEAD_DIMS),
    lengths: tuple[int, int] = SWEEP_LENGTHS,
    flops: tuple[float, float] = SWEEP_FLOPS,
) -> list[DenseCase | VarlenCase]:
    """Random backward cases, the same for the same seed on every machine; no two have one head_dim.

    Args:
        count: at most len(SWEEP_HEAD_DIMS).
        lengths: the shortest and the longest sequence; logarithms are uniform.
        flops: what a case has, about at least and at most.
    """
    draw = random.Random(seed)
    cases: list[DenseCase | VarlenCase] = []
    for head_dim in draw.sample(SWEEP_HEAD_DIMS, count):
        kv_heads, group, mask = draw.choice(SWEEP_KV_HEADS), draw.choice(SWEEP_GROUPS), draw.choice(SWEEP_MASKS)
        seqlen, wanted = round(_log_uniform(draw, *lengths)), _log_uniform(draw, *flops)
        packed = draw.random() < SWEEP_VARLEN
        window = None
        if mask == "window":
            shortest = min(SWEEP_SHORTEST_WINDOW, seqlen // 4)
            window = round(_log_uniform(draw, shortest, seqlen / 2))
        case = DenseCase(
            "backward-sweep", 1, seqlen, kv_heads * group, kv_heads, head_dim, mask != "full", None, window
        )
        case = _cut(case, flops[1] / 2 if packed else flops[1])
        if packed:
            cases.append(_packed(draw, case, lengths[0], wanted, flops[1]))
        else:
            batch = max(1, min(SWEEP_MOST_SEQUENCES, int(wanted / case.flops)))
            cases.append(case._replace(batch=batch))
    return cases


def _log_uniform(draw: random.Random, low: float, high: float) -> float:
    return math.exp(draw.uniform(math.log(low), math.log(high)))


def _cut(case: DenseCase, most: float) -> DenseCase:
    """The case with fewer heads, then fewer query heads a KV head, then fewer tokens, until it fits ``most`` FLOPs."""
    while case.flops > most:
        group = case.num_heads_q // case.num_heads_kv
        if case.num_heads_kv > 1:
            kv_heads = case.num_heads_kv // 2
            case = case._replace(num_heads_q=kv_heads * group, num_heads_kv=kv_heads)
        elif group > 1:
            case = case._replace(num_heads_q=group // 2)
        else:
            case = case._replace(seqlen=int(case.seqlen * 0.9))
    return case if case.window is None else case._replace(window=min(case.window, case.seqlen))


def _packed(draw: random.Random, case: DenseCase, shortest: int, wanted: float, most: float) -> VarlenCase:
    """The sequence of ``case`` and others up to its length behind one another, until they have the FLOPs wanted."""
    heads = (case.num_heads_q, case.num_heads_kv, case.head_dim)
    packed = VarlenCase((case.seqlen,), *heads, case.causal, case.area, case.window)
    while len(packed.seqlens) < 2 or (packed.flops < wanted and len(packed.seqlens) < SWEEP_MOST_SEQUENCES):
        length = round(_log_uniform(draw, min(shortest, case.seqlen), case.seqlen))
        longer = packed._replace(seqlens=(*packed.seqlens, length))
        if longer.flops > most:
            break
        packed = longer
    return packed._replace(seqlens=tuple(draw.sample(packed.seqlens, len(packed.seqlens))))
