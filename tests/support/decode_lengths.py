"""Lengths of the sequences of a decode step: what balances well and what does not; one sequence among others."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from calls import Built, Call, build

HUGE = 16384


def _mixed(size: int, rng: random.Random) -> list[int]:
    return [rng.choice((0, 1, 15, 16, 17, 64, rng.randint(0, 300))) for _ in range(size)]


def _padding(size: int, rng: random.Random) -> list[int]:
    """A batch that a graph was captured for, with few requests in it: at both ends and in the middle."""
    lengths = [0] * size
    for b in {0, 1, size // 2, size // 2 + 1, size - 1, *(rng.randrange(size) for _ in range(3))}:
        lengths[min(b, size - 1)] = rng.randint(1, 3000)
    return lengths


def _one_huge(size: int, rng: random.Random) -> list[int]:
    lengths = [rng.randint(1, 20) for _ in range(size)]
    lengths[rng.randrange(size)] = HUGE
    return lengths


#: By name: the lengths of a batch of any size.
PATTERNS: dict[str, Callable[[int, random.Random], list[int]]] = {
    "mixed": _mixed,
    "padding": _padding,
    "one_huge": _one_huge,
    "equal": lambda size, rng: [rng.choice((64, 100, 257))] * size,
    "empty": lambda size, rng: [0] * size,
}


def lengths_of(pattern: str, size: int, rng: random.Random) -> list[int]:
    return PATTERNS[pattern](size, rng)


def sample_of(lengths: Sequence[int], rng: random.Random, count: int = 6) -> list[int]:
    """Indices worth a closer look: both ends, the longest, the shortest, the last that is not empty, some others."""
    indices = range(len(lengths))
    chosen = {0, len(lengths) - 1, max(indices, key=lengths.__getitem__), min(indices, key=lengths.__getitem__)}
    chosen |= {max((b for b in indices if lengths[b]), default=0)}
    return sorted(chosen | set(rng.sample(indices, min(count, len(lengths)))))


#: A sequence's place among the lengths of others; the None is its own.
PLACES = {
    "behind six": (0, 1, 300, 5000, 64, 17, None),
    "among many": (*(n * 37 % 1500 for n in range(17)), None, *(n * 91 % 700 for n in range(23))),
    "beside one huge": (None, 20000),
    "behind empty ones": (*(0,) * 70, None),
}


def place(call: Call, name: str, sequence: Built, device: torch.device, rng: random.Random) -> tuple[Built, int]:
    """The one sequence of a call among others, on other pages, with a wider page table; and where it is."""
    lengths, own = PLACES[name], sequence.call.seqlens_k[0]
    at = lengths.index(None)
    seqlens_k = tuple(own if n is None else n for n in lengths)
    call = call.with_(seqlens_q=call.seqlens_q * len(lengths), seqlens_k=seqlens_k, slack_k=rng.choice((0, 40, 9000)))
    return build(call, device, rng, given={at: (sequence.q[0], sequence.k[0], sequence.v[0])}), at
