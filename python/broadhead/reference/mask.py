"""Which keys a query of the torch fallback sees: one object for the per-element mask and the range of rows read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["KeyMask"]


class KeyMask(NamedTuple):
    """The mask rule over the key *rows* of a sequence (rows of its cache; row ``row_begin`` is key 0).

    Query i sits at row ``i + offset`` where ``offset = row_end - seqlen_q``, so the alignment is bottom-right. A value
    that is the same for every sequence is an int; otherwise it is an integer tensor of shape ``(B, 1, 1, 1, 1)``, which
    makes every mask broadcast against scores ``(B, Hkv, G, Sq, Sk)``.
    """

    row_begin: Tensor | int  # first row of the sequence: the left padding
    row_end: Tensor | int  # one past its last row
    offset: Tensor | int  # row of query 0
    prefix_lens: Tensor | None  # keys below it are visible to every query
    window_left: int  # -1: unbounded
    window_right: int  # -1: unbounded
    attention_chunk: int  # 0: off
    num_queries: int  # most queries of a sequence
    num_rows: int  # rows of the gathered keys
    has_queries: Tensor | None  # whether the sequence has a query; None: every one has
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
        # The last query sits on the last row, so the end of the sequence bounds it already.
        bounded_right = self.window_right >= 0 and self.num_queries > 1
        result: Tensor | None = None
        if self.window_left >= 0 or bounded_right or self.attention_chunk > 0:
            position = torch.arange(i0, i1, device=device)[:, None] + self.offset
            if self.window_left >= 0:
                result = row < position - self.window_left
            if bounded_right:
                result = _either(result, row > position + self.window_right)
            if self.attention_chunk > 0:
                begin = self._chunk_begin(position)
                result = _either(result, (row < begin) | (row >= begin + self.attention_chunk))
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
        result = self._outside_sequence(row, 0, self.num_rows, result)
        if self.has_queries is not None:
            result = _either(result, ~self.has_queries)
        if result is None:
            return None
        return result if result.dim() == 5 else result.view(1, 1, 1, 1, self.num_rows)

    def _is_static(self) -> bool:
        """Whether the mask is the same for every sequence and known without reading tensors."""
        lengths = (self.row_begin, self.row_end, self.offset)
        return self.prefix_lens is self.absent is None and not any(isinstance(x, Tensor) for x in lengths)

    def _chunk_begin(self, position: Tensor | int) -> Tensor | int:
        """First row of the attention chunk that holds row ``position``."""
        chunk, key = self.attention_chunk, position - self.row_begin
        if isinstance(key, Tensor):
            return torch.div(key, chunk, rounding_mode="floor") * chunk + self.row_begin
        return key // chunk * chunk + self.row_begin

    def _outside_sequence(self, row: Tensor, j0: int, j1: int, hidden: Tensor | None) -> Tensor | None:
        """Adds to ``hidden`` of rows ``[j0, j1)`` what the prefix shows and what is no key of the sequence."""
        if hidden is not None and self.prefix_lens is not None:
            hidden = hidden & (row >= self.prefix_lens + self.row_begin)
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
