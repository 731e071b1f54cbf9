"""Which page ids a CPU in eager mode looks at, under masks that are values: those of keys that some query sees."""

from __future__ import annotations

import random
from typing import Any

import broadhead
import pytest
import torch
from torch import Tensor

PAGE, PAGES = 4, 24
KEYS = PAGE * PAGES


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def sees(sq: int, window: tuple[int, int], masks: dict[str, Any]) -> list[bool]:
    """Which keys some of the queries sees, by a loop over queries and keys."""
    seen = [False] * KEYS
    for i in range(sq):
        position = i + KEYS - sq
        left, right = window
        for key in range(KEYS):
            shown = (left < 0 or key >= position - left) and (right < 0 or key <= position + right)
            if "query_ranges" in masks:
                begin, end = masks["query_ranges"][0, i].tolist()
                near = not masks.get("ranges_in_window") or left < 0 or key >= position - left
                shown = shown or (begin >= 0 and begin <= key < end and near)
            if "tree_mask" in masks and key >= KEYS - 64:
                shown = bool(int(masks["tree_mask"][0, i]) >> (key - KEYS + 64) & 1)
            seen[key] = seen[key] or shown
    return seen


def drawn(rng: random.Random, sq: int) -> dict[str, Any]:
    if rng.random() < 0.4:
        words = [sum(1 << bit for bit in rng.sample(range(63), rng.randint(0, 3))) for _ in range(sq)]
        return {"tree_mask": torch.tensor([words])}
    ranges = [(begin := rng.randint(-2, KEYS), begin + rng.randint(-1, 6)) for _ in range(sq)]
    return {
        "query_ranges": torch.tensor([ranges], dtype=torch.int32),
        "ranges_in_window": rng.random() < 0.4,
        "causal": torch.tensor([rng.random() < 0.5]),
    }


@pytest.mark.parametrize("number", range(12))
def test_pages_of_keys_that_are_seen(number: int, rng: random.Random) -> None:
    """A wrong id is refused exactly where some query sees a key of its page."""
    sq = rng.randint(1, 4)
    q, cache = torch.randn(1, sq, 2, 16), torch.randn(PAGES, PAGE, 1, 16)
    masks, window = drawn(rng, sq), (rng.randint(0, 9), 0)
    seen = sees(sq, window, masks)
    for page in range(PAGES):
        table = torch.arange(PAGES, dtype=torch.int32)[None].clone()
        table[0, page] = PAGES + 5
        call = {"page_table": table, "cache_seqlens": int32(KEYS), "window_size": window, **masks}
        if any(seen[page * PAGE : (page + 1) * PAGE]):
            with pytest.raises(broadhead.InvalidArgumentError, match=rf"page_table must hold ids.*\[0, {page}\]"):
                broadhead.flash_attn_with_kvcache(q, cache, cache, **call)
        else:
            broadhead.flash_attn_with_kvcache(q, cache, cache, **call)


def test_packed_queries_have_their_own_ranges() -> None:
    """The rows of a sequence begin at its offset, and rows that nobody owns are not looked at."""
    q, cache = torch.randn(5, 2, 16), torch.randn(PAGES, PAGE, 1, 16)
    ranges = int32(0, 99, 4, 6, 0, 0, 8, 9, 0, 99).view(5, 2)
    table = torch.arange(PAGES, dtype=torch.int32).expand(2, PAGES).contiguous()
    call: dict[str, Any] = {
        "cu_seqlens_q": int32(1, 3, 4), "max_seqlen_q": 2, "cache_seqlens": int32(KEYS, KEYS), "page_table": table,
        "window_size": (2, 0), "query_ranges": ranges,
    }  # fmt: skip
    for sequence, column, refused in ((0, 1, True), (0, 2, False), (1, 1, False), (1, 2, True), (0, 0, False)):
        table[sequence, column] = -1
        if refused:
            with pytest.raises(broadhead.InvalidArgumentError, match=rf"got -1 at \[{sequence}, {column}\]"):
                broadhead.flash_attn_with_kvcache(q, cache, cache, **call)
        else:
            broadhead.flash_attn_with_kvcache(q, cache, cache, **call)
        table[sequence, column] = column
