#!/usr/bin/env python3
"""Draws the masks of docs/masks.md by the predicate of the torch reference (python/broadhead/reference/mask.py).

``draw_masks.py docs/masks.md`` rewrites the pictures between their markers; with ``--check`` it only says whether they
are up to date. The predicate is taken from the source tree, so that nothing needs to be built or installed but torch.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "cmake"))

from generate import load_module  # noqa: E402

SEEN, HIDDEN = "#", "."
MARKED = re.compile(
    r"(?P<begin><!-- picture of (?P<name>\w+): written by scripts/draw_masks\.py -->\n)"
    r".*?(?P<end><!-- end of picture -->)",
    re.DOTALL,
)


class Panel(NamedTuple):
    """One call over a sequence, or over several of one length, and the sequence of it that is drawn.

    ``arguments``: those of the attention functions, tensors as nested tuples of ints or bools.
    """

    caption: str
    arguments: dict[str, Any]
    seqlen_q: int = 8
    seqlen_k: int = 12
    sequence: int = 0


def ranges_of(spans: Sequence[tuple[int, int]], seqlen_q: int, seqlen_k: int) -> tuple[tuple[int, int], ...]:
    """The ranges of queries whose tokens lie in spans that see each other, as make_query_ranges has them."""
    positions = range(seqlen_k - seqlen_q, seqlen_k)
    return tuple(next((span for span in spans if span[0] <= p < span[1]), (0, 0)) for p in positions)


def words_of(parents: Sequence[int]) -> tuple[int, ...]:
    """The words of a tree of drafts: each sees what is before all drafts, its ancestors and itself."""
    words: list[int] = []
    first = 64 - len(parents)  # the bit of the first draft
    for i, parent in enumerate(parents):
        before = words[parent] if parent >= 0 else (1 << first) - 1
        words.append(before | 1 << first + i)
    return tuple(word - (1 << 64) if word >= 1 << 63 else word for word in words)


IMAGES = (ranges_of([(3, 7), (8, 11)], 8, 12),)
IMAGE = (ranges_of([(3, 10)], 8, 12),)
TREE = (words_of((-1, 0, 0, 1, 1, 2, 3, 6)),)
SOME_CAUSAL = {"causal": (True, False), "window_size": (4, 2)}

#: By name: what is drawn side by side.
PICTURES: dict[str, tuple[Panel, ...]] = {
    "causal": (Panel("no mask", {}), Panel("causal=True", {"causal": True})),
    "causal_by_sequence": (
        Panel("causal[0] = True", SOME_CAUSAL, sequence=0),
        Panel("causal[1] = False", SOME_CAUSAL, sequence=1),
    ),
    "window_size": (
        Panel("window_size=(3, 1)", {"window_size": (3, 1)}),
        Panel("window_size=(3, 1), causal=True", {"window_size": (3, 1), "causal": True}),
    ),
    "attention_chunk": (
        Panel("attention_chunk=5", {"attention_chunk": 5}),
        Panel("attention_chunk=5, causal=True", {"attention_chunk": 5, "causal": True}),
    ),
    "prefix_lens": (
        Panel("prefix_lens[b] = 7", {"prefix_lens": (7,), "causal": True}),
        Panel("prefix_lens[b] = 3, window_size=(2, 0)", {"prefix_lens": (3,), "causal": True, "window_size": (2, 0)}),
    ),
    "query_ranges": (
        Panel("causal=True", {"causal": True}),
        Panel("the same with query_ranges", {"causal": True, "query_ranges": IMAGES}),
    ),
    "ranges_in_window": (
        Panel("ranges_in_window=False", {"causal": True, "window_size": (2, 0), "query_ranges": IMAGE}),
        Panel(
            "ranges_in_window=True",
            {"causal": True, "window_size": (2, 0), "query_ranges": IMAGE, "ranges_in_window": True},
        ),
    ),
    "tree_mask": (Panel("tree_mask", {"tree_mask": TREE}),),
    "tree_mask_of_many_keys": (
        Panel(
            "tree_mask, window_size=(60, 0)", {"causal": True, "window_size": (60, 0), "tree_mask": TREE}, seqlen_k=72
        ),
    ),
}


def hidden(panel: Panel) -> Tensor:
    """``(seqlen_q, seqlen_k)``: whether the reference hides key j from query i, from the arguments of the call on."""
    masking, padded = (load_source(path) for path in ("call/masking.py", "reference/padded.py"))
    given = dict(panel.arguments)
    tensors = {
        name: torch.tensor(given.pop(name), dtype=dtype)
        for name, dtype in (("prefix_lens", torch.int32), ("query_ranges", torch.int32), ("tree_mask", torch.int64))
        if name in given
    }
    causal = given.pop("causal", False)
    causal, by_sequence = masking.split_causal(torch.tensor(causal) if isinstance(causal, tuple) else causal)
    batch = 1 if by_sequence is None else len(by_sequence)
    left, right = masking.normalize_window(given.pop("window_size", (-1, -1)), causal)
    q, k = torch.zeros(batch, panel.seqlen_q, 1, 8), torch.zeros(batch, panel.seqlen_k, 1, 8)
    values = dict.fromkeys(padded.Call._fields) | tensors | {
        "q": q, "k": k, "v": k, "causal_by_sequence": by_sequence, "window_left": left, "window_right": right,
        "attention_chunk": given.pop("attention_chunk", 0), "ranges_in_window": given.pop("ranges_in_window", False),
        "softmax_scale": 1.0, "softcap": 0.0, "max_seqlen_q": panel.seqlen_q, "max_seqlen_k": panel.seqlen_k,
        "read_lengths": True,
    }  # fmt: skip
    assert not given, f"{panel.caption}: {given} cannot be drawn"
    call = padded.Call(**values)
    mask = padded.pad(call, padded.locate_call(call)).mask
    result = mask.hidden(0, panel.seqlen_q, 0, panel.seqlen_k, q.device)
    if result is None:
        return torch.zeros(panel.seqlen_q, panel.seqlen_k, dtype=torch.bool)
    return result.expand(batch, 1, 1, panel.seqlen_q, panel.seqlen_k)[panel.sequence, 0, 0]


def load_source(path: str) -> ModuleType:
    """A module of the package, once: those that it imports are then the same, too."""
    name = "broadhead_sources." + path.removesuffix(".py").replace("/", ".")
    return sys.modules.get(name) or load_module(path)


def draw(panels: Sequence[Panel]) -> str:
    """A line for each query with its number and its position, panels side by side, in a block of the page."""
    columns = []
    for panel in panels:
        rows = ["".join(HIDDEN if key else SEEN for key in row) for row in hidden(panel).tolist()]
        width = max(len(panel.caption), panel.seqlen_k)
        columns.append([line.ljust(width) for line in (panel.caption, *rows)])
    (shape,) = {(panel.seqlen_q, panel.seqlen_k) for panel in panels}
    labels = [" i   p", *(f"{i:2}  {i + shape[1] - shape[0]:2}" for i in range(shape[0]))]
    lines = ("   ".join(parts).rstrip() for parts in zip(labels, *columns, strict=True))
    return "\n".join(["```text", *lines, "```"])


def update(path: Path, check: bool) -> int:
    """Puts the pictures between their markers; with `check` only says whether they are there. Returns a status."""
    text = path.read_text(encoding="utf-8")
    names = [match["name"] for match in MARKED.finditer(text)]
    if sorted(names) != sorted(PICTURES):
        wrong = sorted({name for name in {*names, *PICTURES} if names.count(name) != (name in PICTURES)})
        print(f"draw_masks.py: {path} must have each picture once; look at {', '.join(wrong)}", file=sys.stderr)
        return 1
    wanted = MARKED.sub(lambda match: f"{match['begin']}{draw(PICTURES[match['name']])}\n{match['end']}", text)
    if text == wanted:
        return 0
    if check:
        print(f"draw_masks.py: {path}: a picture is out of date: run scripts/draw_masks.py {path}", file=sys.stderr)
        return 1
    path.write_text(wanted, encoding="utf-8")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Draws the masks of the documentation by the reference's predicate.")
    parser.add_argument("path", type=Path, help="the page with the markers: docs/masks.md")
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    options = parser.parse_args()
    return update(options.path, options.check)


if __name__ == "__main__":
    sys.exit(main())
