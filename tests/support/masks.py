"""Masks that a call gives as values: ranges of keys by query and trees of drafts, by the names of their patterns.

A `Call` (calls.py) names a pattern, `drawn` makes numbers of it, for each sequence by its lengths alone.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calls import Call

Range = tuple[int, int]
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
#: Ranges that cover nothing, whatever the sequence.
NOTHING = (
    (-1, -1),
    (0, 0),
    (7, 7),
    (9, 3),
    (-5, 10**6),
    (INT_MIN, INT_MAX),
    (INT_MAX, INT_MIN),
    (1, INT_MIN),
    (5, -1),
    (-1, 3),
)
#: Sizes of tiles, blocks and pages, about whose multiples ranges begin and end.
EDGES = (16, 32, 64, 96, 128)
#: Queries that a sequence with a tree has at most.
MOST_DRAFTS = 64
#: Bits of a word that are no key's or of no draft: a tree says nothing about them.
WORD = 1 << 64


class Drawn(tuple):
    """Numbers by sequence that print as the name of their pattern: a long call stays readable."""

    name: str

    def __new__(cls, values: Any, name: str) -> Drawn:
        made = super().__new__(cls, values)
        made.name = name
        return made

    def __getnewargs__(self) -> tuple:
        return tuple(self), self.name

    def __repr__(self) -> str:
        return f"<{self.name}: {sum(map(len, self))} queries>"


def drawn(call: Call, rng: random.Random) -> Call:
    """The call with numbers in place of the names of patterns."""
    changes = {}
    lengths = list(zip(call.seqlens_q, call.seqlens_k, strict=True))
    for name, patterns in (("ranges", RANGES), ("tree", TREES)):
        pattern = getattr(call, name)
        if isinstance(pattern, str) and pattern:
            changes[name] = Drawn((tuple(patterns[pattern](rng, sq, sk)) for sq, sk in lengths), pattern)
    return dataclasses.replace(call, **changes) if changes else call


# --- ranges -----------------------------------------------------------------------------------------------------------


def nothing(rng: random.Random, sq: int, sk: int) -> list[Range]:
    return [rng.choice(NOTHING) for _ in range(sq)]


def runs(rng: random.Random, sq: int, longest: int, draw: Callable[[int], Range]) -> list[Range]:
    """Ranges that neighbouring queries share; ``draw`` is asked with the first query of each run."""
    found: list[Range] = []
    while len(found) < sq:
        found += [draw(len(found))] * rng.randint(1, max(1, longest))
    return found[:sq]


def images(rng: random.Random, sq: int, sk: int) -> list[Range]:
    """Blocks of tokens that see each other, as Gemma has them, with text between; the queries may begin and end within
    a block, as those of a chunked prefill do: its end is then beyond the keys that there are."""
    longest = rng.choice((5, 40, 130, 300))
    by_position: list[Range] = []
    while len(by_position) < max(sq, sk):
        text, image = rng.randint(0, longest), rng.randint(1, longest)
        begin = len(by_position) + text
        by_position += [rng.choice(NOTHING[:2])] * text + [(begin, begin + image)] * image
    first = max(0, sk - sq)
    return by_position[first : first + sq]


def tiles(rng: random.Random, sq: int, sk: int) -> list[Range]:
    """Ranges that begin and end at the edges of tiles, or one key beside them."""

    def edge() -> int:
        step = rng.choice(EDGES)
        return max(0, step * rng.randint(0, sk // step + 1) + rng.choice((-1, 0, 0, 1)))

    return runs(rng, sq, rng.choice((1, 16, 64, 129)), lambda _: tuple(sorted((edge(), edge()))))


def pages(rng: random.Random, sq: int, sk: int) -> list[Range]:
    """Overlapping spans of any keys, each shared by some queries."""

    def span(_: int) -> Range:
        begin = rng.randint(0, max(0, sk - 1))
        return begin, begin + rng.randint(1, max(1, sk // 2))

    return runs(rng, sq, 70, span)


def splits(rng: random.Random, sq: int, sk: int) -> list[Range]:
    """All keys or most of them for some queries, nothing for the others: every split has a share of few rows."""
    return runs(rng, sq, 9, lambda _: rng.choice(((0, sk), (sk // 7, sk - sk // 9), *NOTHING[:3])))


def far(rng: random.Random, sq: int, sk: int) -> list[Range]:
    """A few keys at the beginning, far behind the queries and any window."""
    return runs(rng, sq, 40, lambda _: (first := rng.randint(0, sk // 4 + 1), first + rng.randint(1, 20)))


def ahead(rng: random.Random, sq: int, sk: int) -> list[Range]:
    """The keys from just behind the query's own on: what causality hides."""
    own = [i + sk - sq for i in range(sq)]
    return [(max(0, at + rng.choice((0, 1, 1, 2))), at + rng.choice((2, 3, 20, 70))) for at in own]


def beyond(rng: random.Random, sq: int, sk: int) -> list[Range]:
    """Ends behind the last key, beginnings there, too."""
    ends = (sk, sk + 1, sk + 64, INT_MAX)
    return runs(rng, sq, 20, lambda _: (rng.choice((0, sk // 2, max(0, sk - 1), sk, sk + 5)), rng.choice(ends)))


def single(rng: random.Random, sq: int, sk: int) -> list[Range]:
    """One key of each query, of its own."""
    return [(key, key + 1) for key in (rng.randint(0, max(0, sk - 1)) for _ in range(sq))]


def anything(rng: random.Random, sq: int, sk: int) -> list[Range]:
    """Of all patterns, query by query."""
    others = [pattern(rng, sq, sk) for name, pattern in RANGES.items() if name != "random"]
    return [rng.choice(others)[i] for i in range(sq)]


#: By name: ranges of a sequence of so many queries and keys.
RANGES: dict[str, Callable[[random.Random, int, int], list[Range]]] = {
    "nothing": nothing, "images": images, "tiles": tiles, "pages": pages, "splits": splits, "far": far, "ahead": ahead,
    "beyond": beyond, "single": single, "random": anything,
}  # fmt: skip


# --- trees ------------------------------------------------------------------------------------------------------------


def signed(word: int) -> int:
    """A word of 64 bits as int64 has it."""
    word %= WORD
    return word - WORD if word >= WORD // 2 else word


def eagle(rng: random.Random, sq: int, sk: int) -> list[int]:
    """Drafts are the last keys; each sees its ancestors, itself and the keys before the first draft."""
    first = MOST_DRAFTS - sq  # the bit of the first draft
    words: list[int] = []
    for i in range(sq):
        parent = rng.randrange(i) if i else None
        words.append((words[parent] if parent is not None else (1 << first) - 1) | 1 << first + i)
    return [signed(word) for word in words]


def chain(rng: random.Random, sq: int, sk: int) -> list[int]:
    """What causality says."""
    return [signed((1 << MOST_DRAFTS - sq + i + 1) - 1) for i in range(sq)]


def words(rng: random.Random, sq: int, sk: int) -> list[int]:
    """Any bits, with none and all among them: gaps before the drafts, drafts that see later ones."""
    return [
        rng.choice((0, -1, INT_MIN, signed(rng.getrandbits(64)), signed(1 << rng.randrange(64)))) for _ in range(sq)
    ]


#: By name: words of a sequence of so many drafts and keys.
TREES: dict[str, Callable[[random.Random, int, int], list[int]]] = {"eagle": eagle, "chain": chain, "words": words}
