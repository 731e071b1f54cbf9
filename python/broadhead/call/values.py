"""Refuses lengths, offsets, page ids and batch indices out of range by name, where they may be read.

That is on a CPU in eager mode. On a device, and in compiled code, kernels and torch fallback clamp them by one rule
(csrc/common/seqlen_info.h, reference/rows.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgumentError
from . import validation as check
from .mask_values import TREE_KEYS
from .masking import normalize_chunk, normalize_window


def _read(value: Any) -> list[int] | None:
    """The values of an int32 tensor, None where there is none or it may not be read."""
    return value.tolist() if isinstance(value, Tensor) and check.are_checked(value) else None


def _refuse(function: str, name: str, accepted: str, values: Sequence[int], b: int) -> None:
    raise InvalidArgumentError(f"{function}: {name} must be {accepted}, got {values[b]} for sequence {b}")


def _check_range(
    function: str, name: str, values: Sequence[int], low: int, high: int | Sequence[int], accepted: str
) -> None:
    """Each value in [low, high]; ``accepted`` says so with the upper bound as ``{high}``."""
    for b, value in enumerate(values):
        most = high if isinstance(high, int) else high[b]
        if not low <= value <= most:
            _refuse(function, name, accepted.format(high=most), values, b)


def check_attention(
    function: str, args: Any, batch: int, seqlen_k: int, shown: Callable[[str], str], lengths: Tensor | None = None
) -> None:
    """The values that attention of ``args``, an AttentionArgs whose shapes are checked, reads.

    seqlen_k: the most keys that a sequence of a cache can have. shown: what the function calls a canonical argument.
    lengths: instead of ``args.seqused_k``, where keys are appended first.
    """
    if args.q.device.type != "cpu" or not check.are_checked():
        return
    check.check_cu_seqlens_on_cpu(function, shown("cu_seqlens_q"), args.cu_seqlens_q, args.q.shape[0])
    check.check_cu_seqlens_on_cpu(function, shown("cu_seqlens_k"), args.cu_seqlens_k, args.k.shape[0])
    for name in ("seqused_q", "seqused_k", "leftpad_k", "prefix_lens"):
        check.check_lengths_on_cpu(function, shown(name), getattr(args, name))
    seqlens_q = _check_queries(function, args, batch, shown)
    given = args.seqused_k if lengths is None else lengths
    capacity: int | list[int] | None = seqlen_k
    cu_seqlens_k = _read(args.cu_seqlens_k)
    if args.cu_seqlens_k is not None:
        capacity = None if cu_seqlens_k is None else [b - a for a, b in pairwise(cu_seqlens_k)]
    seqlens_k = _read(given)
    if seqlens_k is not None and capacity is not None:
        whose = "rows that cu_seqlens_k gives the sequence" if args.cu_seqlens_k is not None else "length of the cache"
        if args.page_table is not None:
            whose = "page_table.size(1) * page_size"
        _check_range(function, shown("seqused_k"), seqlens_k, 0, capacity, f"in [0, {{high}}], the {whose}")
    if seqlens_k is None and given is None and capacity is not None:
        seqlens_k = [capacity] * batch if isinstance(capacity, int) else capacity
    if cu_seqlens_k is not None and seqlens_k:
        longest = max(seqlens_k)
        if longest > args.max_seqlen_k:
            raise InvalidArgumentError(
                f"{function}: {shown('max_seqlen_k')} must be at least {longest}, the length of sequence"
                f" {seqlens_k.index(longest)}, got {args.max_seqlen_k}"
            )
    owners = _read(args.kv_batch_idx)
    if owners is not None:
        table = args.page_table
        pool, of = (args.k.shape[0], shown("k")) if table is None else (table.shape[0], "page_table")
        _check_range(function, shown("kv_batch_idx"), owners, 0, pool - 1, f"in [0, {{high}}], a row of {of}")
    if args.page_table is None or seqlens_q is None or seqlens_k is None:
        return
    if args.kv_batch_idx is None or owners is not None:
        _check_seen_pages(function, args, seqlens_q, seqlens_k, owners)


def _check_queries(function: str, args: Any, batch: int, shown: Callable[[str], str]) -> list[int] | None:
    """The rows of q of each sequence, None where they can not be read."""
    rows: list[int] | None = [args.q.shape[1]] * batch
    if args.cu_seqlens_q is not None:
        cu_seqlens_q = _read(args.cu_seqlens_q)
        rows = None if cu_seqlens_q is None else [b - a for a, b in pairwise(cu_seqlens_q)]
    used = _read(args.seqused_q)
    if used is not None and rows is not None:
        what = "the rows of q that the sequence has"
        _check_range(function, shown("seqused_q"), used, 0, rows, f"in [0, {{high}}], {what}")
    if args.seqused_q is not None:
        rows = used
    if args.cu_seqlens_q is not None and rows and max(rows) > args.max_seqlen_q:
        longest = max(rows)
        raise InvalidArgumentError(
            f"{function}: {shown('max_seqlen_q')} must be at least {longest}, the length of sequence"
            f" {rows.index(longest)}, got {args.max_seqlen_q}"
        )
    return rows


def _check_seen_pages(
    function: str, args: Any, seqlens_q: list[int], seqlens_k: list[int], owners: list[int] | None
) -> None:
    """The ids of all pages that hold a key that some query sees; freed pages may have any id."""
    if not check.are_checked(args.page_table):
        return
    left, _ = normalize_window(args.window_size, bool(args.causal), function)
    chunk = normalize_chunk(args.attention_chunk or 0)
    pads, prefixes = _read(args.leftpad_k) or [0] * len(seqlens_q), _read(args.prefix_lens) or [0] * len(seqlens_q)
    first_rows = None if args.cu_seqlens_q is None else _read(args.cu_seqlens_q)
    ranges = []
    for b, (seqlen_q, end) in enumerate(zip(seqlens_q, seqlens_k)):
        seqlen_k = end - pads[b]
        if seqlen_q == 0 or seqlen_k <= 0:
            continue
        position = seqlen_k - seqlen_q  # of the first query, whose keys begin first
        begin = max(0, position - left) if left >= 0 else 0
        if chunk > 0:
            begin = max(begin, position // chunk * chunk)
        shown = [(begin, seqlen_k)]
        if prefixes[b] > 0:
            shown.append((0, min(prefixes[b], seqlen_k)))
        rows = slice(first_rows[b], first_rows[b] + seqlen_q) if first_rows is not None else (b, slice(seqlen_q))
        if args.query_ranges is not None and check.are_checked(args.query_ranges):
            shown += _range_keys(args.query_ranges[rows], position, seqlen_k, left if args.ranges_in_window else -1)
        if args.tree_mask is not None and check.are_checked(args.tree_mask):
            tree = max(0, seqlen_k - TREE_KEYS)  # what is said before it holds in front of these keys
            shown = [(begin, tree), *_tree_keys(args.tree_mask[rows], seqlen_k)]
        ranges += [(b, pads[b] + first, pads[b] + last) for first, last in shown]
    check_pages(function, args.page_table, args.k, ranges, owners)


def _range_keys(query_ranges: Tensor, position: int, seqlen_k: int, window_left: int) -> list[tuple[int, int]]:
    """The keys that the ranges of a sequence's queries, ``(Sq, 2)``, show; the first query is at ``position``."""
    begin, end = query_ranges.long().unbind(-1)
    real = begin >= 0
    if window_left >= 0:
        begin = begin.maximum(torch.arange(position, position + len(begin)) - window_left)
    pairs = torch.stack((begin, end.clamp(max=seqlen_k)), dim=-1)[real & (begin < end.clamp(max=seqlen_k))]
    return [(first, last) for first, last in torch.unique(pairs, dim=0).tolist()]


def _tree_keys(tree_mask: Tensor, seqlen_k: int) -> list[tuple[int, int]]:
    """The keys that the words of a sequence's queries, ``(Sq,)``, show."""
    shown = (tree_mask[:, None] >> torch.arange(TREE_KEYS)).bitwise_and(1).any(dim=0)
    keys = (shown.nonzero().flatten() + (seqlen_k - TREE_KEYS)).tolist()
    return [(key, key + 1) for key in keys if key >= 0]


def check_pages(
    function: str,
    page_table: Tensor,
    cache: Tensor,
    ranges: Sequence[tuple[int, int, int]],
    owners: Sequence[int] | None,
    name: str = "page_table",
) -> None:
    """The ids of the pages of ranges ``(sequence, first row, last row + 1)`` exist in ``cache``."""
    pool, page_size = cache.shape[:2]
    exists = (page_table >= 0) & (page_table < pool)
    if not ranges or bool(exists.all()):
        return
    for b, begin, end in ranges:
        row = b if owners is None else owners[b]
        first, last = begin // page_size, -(-end // page_size)
        found = exists[row, first:last]
        if end > begin and not bool(found.all()):
            column = first + int(found.to(torch.uint8).argmin())
            raise InvalidArgumentError(
                f"{function}: {name} must hold ids in [0, {pool - 1}], the pages of the cache, where the lengths reach,"
                f" got {int(page_table[row, column])} at [{row}, {column}]"
            )


def check_append(function: str, args: Any, new: Any, batch: int, shown: Callable[[str], str], name_k: str) -> None:
    """The values that an append, and the attention behind it, reads: keys that do not fit are refused.

    new: NewKeys, checked as ``args`` is; name_k: what the function calls new.k.
    """
    if args.q.device.type != "cpu" or not check.are_checked():
        return
    page_size = args.k.shape[1]
    capacity = page_size if args.page_table is None else args.page_table.shape[1] * page_size
    starts, offsets, owners = _read(args.seqused_k), _read(new.cu_seqlens_k_new), _read(args.kv_batch_idx)
    added: list[int] | None = [new.k.shape[1]] * batch
    if new.cu_seqlens_k_new is not None:
        added = None if offsets is None else [b - a for a, b in pairwise(offsets)]
    if starts is None or added is None:
        return
    ends = [start + more for start, more in zip(starts, added)]
    for b, (start, more) in enumerate(zip(starts, added)):
        if not 0 <= start <= capacity - more:
            whose = "the length of the cache" if args.page_table is None else "page_table.size(1) * page_size"
            raise InvalidArgumentError(
                f"{function}: {shown('seqused_k')} plus the keys that {name_k} appends must be at most {capacity},"
                f" {whose}, got {start} + {more} for sequence {b}"
            )
    check_attention(
        function, args, batch, capacity, shown, torch.tensor(ends, dtype=torch.int32) if ends else args.seqused_k
    )
    if args.page_table is not None and check.are_checked(args.page_table):
        ranges = [(b, start, end) for b, (start, end) in enumerate(zip(starts, ends))]
        check_pages(function, args.page_table, args.k, ranges, owners)
    if new.rotary_cos is not None:
        _check_positions(function, args, new, batch, starts, added)


def _check_positions(
    function: str, args: Any, new: Any, batch: int, starts: Sequence[int], added: Sequence[int]
) -> None:
    """Positions that are looked up in the rotary table, where rotary_seqlens or long q lead past it."""
    name, values = ("rotary_seqlens", _read(new.rotary_seqlens)) if new.rotary_seqlens is not None else ("", starts)
    moves = max(normalize_window(args.window_size, bool(args.causal), function)) >= 0
    moves = moves or args.causal_by_sequence is not None
    rows_q = _check_queries(function, args, batch, lambda given: given) if moves else [1] * batch
    if values is None or rows_q is None:
        return
    table = new.rotary_cos.shape[0]
    for b, start in enumerate(values):
        last = start + max(added[b], rows_q[b]) - 1
        if start < 0 or last >= table:
            what = f"{name} must be in [0, {table - max(added[b], rows_q[b])}]" if name else "rotary_cos is too short"
            raise InvalidArgumentError(
                f"{function}: {what}: q and k of sequence {b} are at positions {start} to {last}, and rotary_cos and"
                f" rotary_sin have {table} rows; pass longer tables"
            )
