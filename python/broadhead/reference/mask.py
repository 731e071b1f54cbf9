"""Which keys a query of the torch fallback sees: one object for the per-element mask and the range of rows read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..call.mask_values import TREE_KEYS
from .layout import accumulate

__all__ = ["KeyMask", "MaskValues"]


class MaskValues(NamedTuple):
    """What a call says of its mask by values of tensors, shaped to broadcast against scores ``(B, Hkv, G, Sq, Sk)``.

    None: nothing.
    """

    prefix_lens: Tensor | None  # (B, 1, 1, 1, 1): keys below it are visible to every query
    causal: Tensor | None  # (B, 1, 1, 1, 1), bool: where true, the window's right side is 0
    ranges: Tensor | None  # (B, 1, 1, Sq, 2), int64: the query also sees the keys [begin, end)
    tree: Tensor | None  # (B, 1, 1, Sq, 1), int64: a bit for each of the last keys says whether the query sees it


class KeyMask(NamedTuple):
    """The mask rule over the key *rows* of a sequence (rows of its cache; row ``row_begin`` is key 0).

    Query i sits at row ``i + offset`` where ``offset = row_end - seqlen_q``, so the alignment is bottom-right. A value
    that is the same for every sequence is an int; otherwise it is an integer tensor of shape ``(B, 1, 1, 1, 1)``, which
    makes every mask broadcast against scores ``(B, Hkv, G, Sq, Sk)``.
    """

    row_begin: Tensor | int  # first row of the sequence: the left padding
    row_end: Tensor | int  # one past its last row
    offset: Tensor | int  # row of query 0
    values: MaskValues
    window_left: int  # -1: unbounded
    window_right: int  # -1: unbounded
    attention_chunk: int  # 0: off
    ranges_in_window: bool  # a range keeps only keys no further back than window_left
    num_queries: int  # most queries of a sequence
    seqlen_q: Tensor | int  # queries of each sequence; what the values say of others means nothing
    num_rows: int  # rows of the gathered keys
    absent: Tensor | None  # rows of pages that do not exist, (B, 1, 1, 1, num_rows); None: every row exists

    def rows_read(self, i0: int, i1: int) -> tuple[int, int]:
        """The rows ``[j0, j1)`` that some query in ``[i0, i1)`` may see, as far as is known without reading tensors."""
        if isinstance(self.offset, Tensor) or isinstance(self.row_end, Tensor) or not self._is_static():
            return 0, self.num_rows
        first, last = i0 + self.offset, i1 - 1 + self.offset
        j0, j1 = 0, min(self.num_rows, self.row_end)
        if self.window_left >= 0:
            j0 = max(j0, first - self.window_left)
        if self.window_right >= 0:
            j1 = min(j1, last + self.window_right + 1)
        if self.attention_chunk > 0:
            j0 = max(j0, first // self.attention_chunk * self.attention_chunk)
            j1 = min(j1, (last // self.attention_chunk + 1) * self.attention_chunk)
        # At least one row, hidden if need be: a maximum over no keys does not exist.
        j0 = min(j0, self.num_rows - 1)
        return j0, max(j1, j0 + 1)

    def hidden(self, i0: int, i1: int, j0: int, j1: int, device: torch.device) -> Tensor | None:
        """True where query i of ``[i0, i1)`` must not see row j of ``[j0, j1)``; None if each sees all of them.

        Shape ``(Sq, Sk)`` or ``(B, 1, 1, Sq, Sk)``, Sq perhaps 1.
        """
        row = torch.arange(j0, j1, device=device)
        values = self.values
        # The last query sits on the last row, so the end of the sequence bounds it already.
        several = self.num_queries > 1
        result: Tensor | None = None
        if self.window_left >= 0 or several or self.attention_chunk > 0:
            position = torch.arange(i0, i1, device=device)[:, None] + self.offset
            if self.window_left >= 0:
                result = row < position - self.window_left
            if self.window_right >= 0 and several:
                result = _either(result, row > position + self.window_right)
            if values.causal is not None and several:
                result = _either(result, values.causal & (row > position))
            if self.attention_chunk > 0:
                chunk = self._chunk_begin(position)
                result = _either(result, (row < chunk) | (row >= chunk + self.attention_chunk))
            result = self._without_prefix(row, result)
            if result is not None and values.ranges is not None:
                begin, end = self._range_rows(values.ranges[:, :, :, i0:i1], position)
                result = result & ~((row >= begin) & (row < end))
        if values.tree is not None:
            bit = row - self.row_end + TREE_KEYS
            others = torch.zeros_like(row, dtype=torch.bool) if result is None else result
            result = torch.where(bit < 0, others, _bit(values.tree[:, :, :, i0:i1], bit) == 0)
        return self._outside_sequence(row, j0, j1, result)

    def unused(self, device: torch.device) -> Tensor | None:
        """True at rows that no query of the sequence sees, ``(B | 1, 1, 1, 1, num_rows | 1)``; None if there is none.

        What is stored in such a row (NaN in a page that was freed, say) must not take part in any product.
        """
        if self._is_static():
            return None  # rows_read leaves them out
        row = torch.arange(self.num_rows, device=device)
        result: Tensor | None = None
        # Rows from the first query's lowest one to the end are all seen: neighbouring queries' intervals touch.
        if self.window_left >= 0:
            result = row < self.offset - self.window_left
        if self.attention_chunk > 0:
            result = _either(result, row < self._chunk_begin(self.offset))
        result = self._without_prefix(row, result)
        if result is not None and self.values.ranges is not None:
            result = result & ~self._in_ranges(device)
        if self.values.tree is not None:
            result = self._without_tree(row, result)
        result = self._outside_sequence(row, 0, self.num_rows, result)
        if isinstance(self.seqlen_q, Tensor):
            result = _either(result, self.seqlen_q <= 0)
        if result is None:
            return None
        return result if result.dim() == 5 else result.view(1, 1, 1, 1, self.num_rows)

    def _is_static(self) -> bool:
        """Whether the mask is the same for every sequence and known without reading tensors."""
        lengths, values = (self.row_begin, self.row_end, self.offset), self.values
        given = (values.prefix_lens, values.causal, values.ranges, values.tree, self.absent)
        return not any(x is not None for x in given) and not any(isinstance(x, Tensor) for x in lengths)

    def _chunk_begin(self, position: Tensor | int) -> Tensor | int:
        """First row of the attention chunk that holds row ``position``."""
        chunk, key = self.attention_chunk, position - self.row_begin
        if isinstance(key, Tensor):
            return torch.div(key, chunk, rounding_mode="floor") * chunk + self.row_begin
        return key // chunk * chunk + self.row_begin

    def _without_prefix(self, row: Tensor, hidden: Tensor | None) -> Tensor | None:
        """What stays hidden besides the prefix."""
        if hidden is None or self.values.prefix_lens is None:
            return hidden
        return hidden & (row >= self.values.prefix_lens + self.row_begin)

    def _range_rows(self, ranges: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """The rows ``[begin, end)``, ``(B, 1, 1, Sq, 1)`` each, of the ranges of the queries at ``position``."""
        begin, end = ranges[..., :1] + self.row_begin, ranges[..., 1:] + self.row_begin
        if self.ranges_in_window and self.window_left >= 0:
            begin = torch.maximum(begin, position - self.window_left)
        return begin, end

    def _live(self, device: torch.device) -> Tensor:
        """Which queries the sequence has, ``(Sq, 1)`` or ``(B, 1, 1, Sq, 1)``."""
        return torch.arange(self.num_queries, device=device)[:, None] < self.seqlen_q

    def _in_ranges(self, device: torch.device) -> Tensor:
        """Which rows lie in the range of some query, ``(B, 1, 1, 1, num_rows)``, without a mask of queries by keys."""
        assert self.values.ranges is not None
        position = torch.arange(self.num_queries, device=device)[:, None] + self.offset
        begin, end = self._range_rows(self.values.ranges, position)
        real = ((begin < end) & self._live(device)).long()
        # Where ranges begin and end; their sum up to a row counts the ranges that it lies in.
        batch, places = begin.shape[0], self.num_rows + 1
        steps = torch.zeros(batch * places, dtype=torch.long, device=device)
        first = (torch.arange(batch, device=device) * places).view(-1, 1, 1, 1, 1)
        for edge, step in ((begin, real), (end, -real)):
            accumulate(steps, (first + edge.clamp(0, self.num_rows)).flatten(), step.flatten())
        counts = steps.view(batch, places).cumsum(dim=1)[:, : self.num_rows]
        return (counts > 0)[:, None, None, None, :]

    def _without_tree(self, row: Tensor, unused: Tensor | None) -> Tensor:
        """Rows that nobody uses where the words of the queries say it of the last keys."""
        assert self.values.tree is not None
        number = torch.arange(TREE_KEYS, device=row.device)
        words = torch.where(self._live(row.device), self.values.tree, 0)
        is_shown = (_bit(words, number) != 0).any(dim=3, keepdim=True)
        bit = row - self.row_end + TREE_KEYS
        shape = (is_shown.shape[0], 1, 1, 1, self.num_rows)
        shown = is_shown.expand(*shape[:4], TREE_KEYS).gather(4, bit.clamp(0, TREE_KEYS - 1).expand(shape))
        others = torch.zeros_like(row, dtype=torch.bool) if unused is None else unused
        return torch.where(bit < 0, others, ~shown)

    def _outside_sequence(self, row: Tensor, j0: int, j1: int, hidden: Tensor | None) -> Tensor | None:
        """Adds to ``hidden`` of rows ``[j0, j1)`` what is no key of the sequence."""
        if isinstance(self.row_end, Tensor) or self.row_end < self.num_rows:
            hidden = _either(hidden, row >= self.row_end)
        if isinstance(self.row_begin, Tensor) or self.row_begin > 0:
            hidden = _either(hidden, row < self.row_begin)
        if self.absent is not None:
            hidden = _either(hidden, self.absent[..., j0:j1])
        return hidden


def _either(a: Tensor | None, b: Tensor) -> Tensor:
    """``a | b`` where a None hides nothing."""
    return b if a is None else a | b


def _bit(words: Tensor, number: Tensor) -> Tensor:
    """Bit ``number`` of words, 0 or 1; of numbers that a word has not, that of the nearest one."""
    return (words >> number.clamp(0, TREE_KEYS - 1)) & 1
