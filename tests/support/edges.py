"""Values out of range in the arguments that the host does not see, and the rule by which every backend takes them.

On a device, and in compiled code, nobody reads these values beforehand: they are clamped, or what they point at does
not exist. `Edge` describes a call by plain numbers and `answer` says by loops over them which keys each query sees and
what an append writes. edge_cases.py has the table, edge_calls.py the tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Edge:
    """One call of flash_attn_varlen_func or flash_attn_with_kvcache, by numbers alone. Empty tuples: not given."""

    name: str
    group: str  # "lengths", "offsets", "pages", "append"
    function: str  # "varlen", "kvcache"
    blocks: int  # of k and v: sequences of a cache, pages; 1 where keys are packed
    block_rows: int  # keys of a block
    #: What an eager call on the CPU must name when it refuses; "": it may refuse, or it must be right.
    refused: str = ""
    seqlen_q: int = 0  # of every sequence of a dense q
    cu_seqlens_q: tuple[int, ...] = ()  # of a packed one
    total_q: int = 0
    max_seqlen_q: int = 0
    seqused_q: tuple[int, ...] = ()
    cu_seqlens_k: tuple[int, ...] = ()
    max_seqlen_k: int = 0
    lengths: tuple[int, ...] = ()  # cache_seqlens, seqused_k
    page_table: tuple[tuple[int, ...], ...] = ()
    batch_idx: tuple[int, ...] = ()
    leftpad: tuple[int, ...] = ()
    seqlen_new: int = 0  # keys that each sequence appends
    cu_seqlens_k_new: tuple[int, ...] = ()
    total_new: int = 0
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    attention_chunk: int = 0
    ranges: tuple[tuple[int, int], ...] = ()  # of every row of q, owned or not
    ranges_in_window: bool = False
    tree: tuple[int, ...] = ()  # likewise
    causal_each: tuple[int, ...] = ()  # causality by sequence

    @property
    def batch(self) -> int:
        given = self.lengths or self.batch_idx or self.cu_seqlens_q[1:] or self.cu_seqlens_k[1:]
        return len(given)

    @property
    def rows_q(self) -> int:
        return self.total_q if self.cu_seqlens_q else self.batch * self.seqlen_q

    @property
    def packed_k(self) -> bool:
        return bool(self.cu_seqlens_k)

    @property
    def appends(self) -> bool:
        return self.seqlen_new > 0 or bool(self.cu_seqlens_k_new)

    def with_(self, **changes: Any) -> Edge:
        return dataclasses.replace(self, **changes)


# --- the rule ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a call must give. A key is known by its slot: block * block_rows + its row there."""

    seen: dict[int, list[int]]  # of each query row that a sequence owns: slots of the keys that it sees
    contested: frozenset[int]  # query rows that several sequences own: any of them may have written last
    written: dict[int, int]  # slot -> the new key that the call appends there
    live: frozenset[int]  # slots of keys that some sequence holds, seen or not


def clamp(x: int, low: int, high: int) -> int:
    return max(low, min(x, high))


def span(offsets: tuple[int, ...], b: int, total: int) -> tuple[int, int]:
    """First row and rows of a packed sequence: offsets are clamped to the rows that exist."""
    first = clamp(offsets[b], 0, total)
    return first, max(0, clamp(offsets[b + 1], 0, total) - first)


def query_span(edge: Edge, b: int) -> tuple[int, int]:
    """First row and rows of the queries of sequence b."""
    if not edge.cu_seqlens_q:
        return b * edge.seqlen_q, edge.seqlen_q
    first, count = span(edge.cu_seqlens_q, b, edge.total_q)
    if edge.seqused_q:
        count = clamp(edge.seqused_q[b], 0, count)
    return first, min(count, edge.max_seqlen_q)


def new_span(edge: Edge, b: int) -> tuple[int, int]:
    """First row and rows of the keys that sequence b appends."""
    if edge.cu_seqlens_k_new:
        return span(edge.cu_seqlens_k_new, b, edge.total_new)
    return b * edge.seqlen_new, edge.seqlen_new


def place_of(edge: Edge, b: int) -> tuple[int, Callable[[int], int | None]]:
    """How many keys sequence b has room for, and the slot of each of its rows: None where there is nothing."""
    if edge.packed_k:
        first, capacity = span(edge.cu_seqlens_k, b, edge.block_rows)
        return capacity, lambda row: first + row
    owner = edge.batch_idx[b] if edge.batch_idx else b
    if not edge.page_table:
        inside = 0 <= owner < edge.blocks
        return edge.block_rows, lambda row: owner * edge.block_rows + row if inside else None
    if not 0 <= owner < len(edge.page_table):
        return len(edge.page_table[0]) * edge.block_rows, lambda row: None
    pages = edge.page_table[owner]

    def slot(row: int) -> int | None:
        page = pages[row // edge.block_rows]
        return page * edge.block_rows + row % edge.block_rows if 0 <= page < edge.blocks else None

    return len(pages) * edge.block_rows, slot


def key_slots(edge: Edge, b: int) -> list[int | None]:
    """The slots of the keys of sequence b in their order; None for a key behind a page or index out of range."""
    capacity, slot = place_of(edge, b)
    length = capacity
    if edge.lengths:
        length = clamp(edge.lengths[b] + new_span(edge, b)[1], 0, capacity)
    pad = max(0, edge.leftpad[b]) if edge.leftpad else 0
    return [slot(row) for row in range(pad, length)]


def sees(edge: Edge, b: int, row: int, position: int, key: int, count: int) -> bool:
    """Whether row ``row`` of q, of sequence b and at ``position`` of its ``count`` keys, sees a key."""
    if edge.tree and key >= count - 64:
        return edge.tree[row] >> key - (count - 64) & 1 == 1
    left, right = edge.window
    right = 0 if edge.causal or (edge.causal_each and edge.causal_each[b]) else right
    behind = left >= 0 and position - key > left
    if edge.ranges:
        begin, end = edge.ranges[row]
        if 0 <= begin <= key < end and not (edge.ranges_in_window and behind):
            return True
    if behind or (right >= 0 and key - position > right):
        return False
    chunk = edge.attention_chunk
    return chunk == 0 or position // chunk == key // chunk


def answer(edge: Edge) -> Answer:
    """What the call must give on a device."""
    seen: dict[int, list[int]] = {}
    contested, written, live = set(), {}, set()
    for b in range(edge.batch):
        keys = key_slots(edge, b)
        live.update(slot for slot in keys if slot is not None)
        first, count = query_span(edge, b)
        for i in range(count):
            position = i + len(keys) - count
            row = first + i
            if row in seen:
                contested.add(row)
            seen[row] = [
                slot
                for key, slot in enumerate(keys)
                if slot is not None and sees(edge, b, row, position, key, len(keys))
            ]
        if edge.appends:
            capacity, slot_of = place_of(edge, b)
            begin, added = new_span(edge, b)
            for i in range(added):
                row_k = edge.lengths[b] + i
                slot = slot_of(row_k) if 0 <= row_k < capacity else None
                if slot is not None:
                    assert slot not in written, f"{edge.name}: two new keys have one place"
                    written[slot] = begin + i
    return Answer(seen, frozenset(contested), written, frozenset(live))
