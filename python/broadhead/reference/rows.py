"""Which rows belong to each sequence of a call of the torch fallback: lengths and offsets clamped to what exists.

The rule is that of csrc/common/seqlen_info.h, so that kernels and fallback agree on every value that the host does not
see. It is pure tensor code. Where the lengths may be read (a CPU in eager mode), sequences of like lengths are grouped,
so that the time follows the tokens and not the bounds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..call.validation import MAX_SEQLEN_K

__all__ = ["Rows", "group_by_length", "locate", "packed_offsets", "split_keys"]

#: A sequence of this many scores, or elements of k and v, is worth operations of its own; smaller ones share them.
LARGE_SEQUENCE = 2**18
#: Rows of a part of a packed sequence, at least: parts of fewer rows take more memory than they hold.
MIN_PART_ROWS = 128


class Rows(NamedTuple):
    """Rows of the sequences that are computed together. An int holds for all of them; a tensor has shape ``(B,)``."""

    batch: int
    sequences: Tensor | int | None  # which sequences of the call; None: all of them, in order
    begin_q: Tensor | int | None  # first row in packed q; None: q is (B, Sq, Hq, D)
    seqlen_q: Tensor | int  # rows of q with a result
    max_queries: int  # at least every seqlen_q; equal to it where that is an int
    begin_k: Tensor | int | None  # first row in packed k; None: k is not packed
    owner: Tensor | int | None  # row of the cache or of the page table; None: that of the sequence's own number
    row_begin: Tensor | int  # left padding: rows of the sequence that are no keys
    row_end: Tensor | int  # one past the row of the last key
    max_rows: int  # at least every row_end


def locate(
    q: Tensor,
    k: Tensor,
    *,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    kv_batch_idx: Tensor | None,
    page_table: Tensor | None,
) -> Rows:
    """The rows of every sequence. No value of an index tensor leads outside the tensors that it indexes."""
    begin_q: Tensor | None = None
    seqlen_q: Tensor | int
    if cu_seqlens_q is None:
        batch, max_queries = q.shape[0], q.shape[1]
        seqlen_q = max_queries
    else:
        batch, max_queries = cu_seqlens_q.shape[0] - 1, min(max_seqlen_q, q.shape[0])
        begin_q, seqlen_q = packed_offsets(cu_seqlens_q, q.shape[0])
    if seqused_q is not None:
        seqlen_q = _at_most(seqused_q, seqlen_q)
    if begin_q is not None:
        seqlen_q = _at_most(seqlen_q, max_queries)

    begin_k: Tensor | None = None
    row_end: Tensor | int
    if page_table is not None:
        row_end = max_rows = min(page_table.shape[1] * k.shape[1], MAX_SEQLEN_K)
    elif cu_seqlens_k is not None:
        max_rows = k.shape[0]
        begin_k, row_end = packed_offsets(cu_seqlens_k, k.shape[0])
    else:
        row_end = max_rows = k.shape[1]
    if seqused_k is not None:
        row_end = _at_most(seqused_k, row_end)
    owner = None
    if kv_batch_idx is not None:
        pool = k.shape[0] if page_table is None else page_table.shape[0]
        owner = kv_batch_idx.clamp(0, max(pool - 1, 0))
        exists = (kv_batch_idx >= 0) & (kv_batch_idx < pool)
        row_end = exists * row_end
    row_begin = 0 if leftpad_k is None else leftpad_k.clamp(0, MAX_SEQLEN_K)
    return Rows(batch, None, begin_q, seqlen_q, max_queries, begin_k, owner, row_begin, row_end, max_rows)


def packed_offsets(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """First rows and numbers of rows, ``(B,)`` each, within ``total`` rows."""
    inside = cu_seqlens.clamp(0, total)
    return inside[:-1], (inside[1:] - inside[:-1]).clamp(min=0)


def _at_most(length: Tensor | int, capacity: Tensor | int) -> Tensor:
    assert isinstance(length, Tensor)
    if isinstance(capacity, Tensor):
        return torch.minimum(length.clamp(min=0), capacity)
    return length.clamp(0, capacity)


def group_by_length(rows: Rows, heads_q: int, row_elements: int) -> list[Rows]:
    """Sequences of like lengths together; reads the lengths. Sequences without a query are left out.

    row_elements: elements of k and v in a row. A group whose sequences have one length has ints for it.
    """
    fields = {name: _values(getattr(rows, name), rows.batch) for name in ("seqlen_q", "row_begin", "row_end")}
    lengths = list(zip(*fields.values()))
    groups: dict[object, list[int]] = {}
    if len(set(lengths)) == 1 and rows.begin_q is None and rows.begin_k is None:
        groups[0] = list(range(rows.batch)) if lengths[0][0] > 0 else []
    else:
        for b, (seqlen_q, row_begin, row_end) in enumerate(lengths):
            keys = max(row_end - row_begin, 0)
            if seqlen_q == 0:
                continue
            if keys * max(seqlen_q * heads_q, row_elements) >= LARGE_SEQUENCE:
                groups[("alone", b)] = [b]
            else:
                groups.setdefault((seqlen_q.bit_length(), row_end.bit_length(), keys == 0), []).append(b)
    return [_subset(rows, fields, members) for members in groups.values() if members]


def _values(x: Tensor | int, batch: int) -> list[int]:
    return x.tolist() if isinstance(x, Tensor) else [x] * batch


def _subset(rows: Rows, fields: dict[str, list[int]], members: list[int]) -> Rows:
    batch = len(members)
    device = next((x.device for x in rows if isinstance(x, Tensor)), None)
    whole = batch == rows.batch
    chosen = {name: [values[b] for b in members] for name, values in fields.items()}
    index: Tensor | int | None = None
    if not whole:
        index = members[0] if batch == 1 else torch.tensor(members, device=device)

    def pick(x: Tensor | int | None) -> Tensor | int | None:
        """Offsets of the members."""
        if not isinstance(x, Tensor):
            return x
        if batch == 1:
            return int(x[members[0]])
        return x if whole else x.index_select(0, index)  # type: ignore[arg-type]

    def same(name: str) -> Tensor | int:
        values = chosen[name]
        return values[0] if len(set(values)) == 1 else torch.tensor(values, device=device)

    return Rows(
        batch=batch,
        sequences=index,
        begin_q=pick(rows.begin_q),
        seqlen_q=same("seqlen_q"),
        max_queries=max(chosen["seqlen_q"]),
        begin_k=pick(rows.begin_k),
        owner=index if rows.owner is None else pick(rows.owner),
        row_begin=same("row_begin"),
        row_end=same("row_end"),
        max_rows=max(chosen["row_end"]),
    )


def split_keys(rows: Rows, max_seqlen_k: int) -> tuple[Tensor, Rows] | None:
    """Packed sequences in parts of max_seqlen_k rows; None where a sequence can not be longer.

    max_seqlen_k bounds no sequence, but lengths that nobody has read are mostly within it. The parts are as many as any
    lengths may need, at most one a sequence more than the rows fill. Returns the sequence of each part, ``(N,)``, and
    the rows of the parts as if each were a sequence over keys of its own; those that no sequence needs have none.
    """
    if not isinstance(rows.begin_k, Tensor):
        return None
    size = max(max_seqlen_k, MIN_PART_ROWS)
    if rows.max_rows <= size or rows.batch == 0:
        return None
    assert isinstance(rows.row_end, Tensor) and rows.sequences is None and rows.owner is None
    count = (rows.max_rows + rows.batch * (size - 1)) // size
    parts = torch.div(rows.row_end + (size - 1), size, rounding_mode="floor")
    ends = parts.cumsum(0)
    number = torch.arange(count, device=ends.device)
    sequence = torch.searchsorted(ends, number, right=True).clamp(max=rows.batch - 1)
    first = (number - (ends - parts)[sequence]) * size
    needed = number < ends[-1]
    row_begin = rows.row_begin if isinstance(rows.row_begin, int) else rows.row_begin[sequence]
    return sequence, rows._replace(
        batch=count,
        seqlen_q=rows.seqlen_q if isinstance(rows.seqlen_q, int) else rows.seqlen_q[sequence],
        begin_k=torch.where(needed, rows.begin_k[sequence] + first, rows.max_rows),
        row_begin=row_begin - first,
        row_end=torch.where(needed, rows.row_end[sequence] - first, 0),
        max_rows=size,
    )
