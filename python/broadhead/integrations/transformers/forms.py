"""What a mask function hands to the attention function: the forms of the mask, and how each is told from the others.

Each form is one int32 tensor of four dimensions, because models pass masks on, move them between devices, and cut
their third dimension (the queries) to the last ones; here it has size 1, so that such a cut changes nothing. None of
the forms reads back from the device. No form is the concatenation of two others along the last dimension: a model that
joins masks is refused.

- ranges ``(B, 1, 1, C)``: row b sees keys ``[begin, end)`` of its cache. Columns: end; rows of padding behind the last
  live query; begin (from C = 6 on); prefix (C = 7): keys after begin that every query sees.
- unless packed ``(B, 1, 1, 4)``: column 0 counts the packed sequences that start inside row b, column 1 the tokens that
  see the next one. Only traced code has it, where nothing may depend on values: all keys are live, the counts are 0.
- gathered ``(B, 2, 1, Sk + 1)``: padding lies between live keys. Row 0 is the order that brings the live keys to the
  front, and ends with their number; row 1 is its inverse, and ends with one past the position of the last query.
- packed ``(1, 3, 1, N + 1)`` or ``(1, 4, 1, N + 1)``: the rows hold N sequences. Row 0 is cu_seqlens over all rows of
  the batch, row 3 the prefix of each sequence.
- blocks ``(B, R, 1, 4 + 2 S)``: S queries see ranges of keys besides. All rows hold the same: end, dead and begin as in
  the ranges form, 0, and begin and end of the range of each query. R tells what no value may: `BlockRows`. S is 0 where
  no query sees more; such a form still says that the mask is causal.
- packed blocks ``(1, R, 1, 2 T + N + 1)``: the range of each of the T tokens of the batch, and cu_seqlens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

COUNT_COLUMNS = 4
END_COLUMNS = 5
BEGIN_COLUMNS = 6
PREFIX_COLUMNS = 7
GATHERED_ROWS = 2
PACKED_ROWS = 3
PACKED_PREFIX_ROWS = 4
#: R of the forms with blocks, less what `BlockRows` adds up.
_BLOCK_ROWS = 5
_BLOCK_COLUMNS = 4
#: An attribute of the packed form: the length of its longest sequence. Lost in a copy, it is bounded by the row.
_LONGEST = "_broadhead_longest"


class BlockRows(NamedTuple):
    """What the number of rows says of a form with blocks."""

    packed: bool
    in_window: bool  # the window of the layer bounds the ranges
    has_end: bool  # keys behind end are not seen, and queries may be dead; else every key is live
    has_begin: bool  # keys before begin are not seen


class Keys(NamedTuple):
    """The live keys of each row, all ``(B,)``: ``[begin, end)`` holds them; holes: it holds padding, too."""

    begin: Tensor
    end: Tensor
    holes: Tensor


def find_keys(real: Tensor) -> Keys:
    """Where the live keys ``real``, bool ``(B, Sk)``, of each row lie; an empty row is ``[0, 0)``."""
    length = real.shape[1]
    place = torch.arange(length, device=real.device)
    end = (real * (place + 1)).amax(1)
    begin = torch.minimum(length - (real * (length - place)).amax(1), end)
    return Keys(begin, end, real.sum(1) != end - begin)


def make_ranges(batch: int, columns: int, *values: Tensor) -> Tensor:
    """The ranges form, or the unless-packed form, of ``values``, each ``(B,)`` or broadcastable to it."""
    full = [value.to(torch.int32).expand(batch) for value in values]
    full += [torch.zeros_like(full[0])] * (columns - len(full))
    # Columns are contiguous each, as the kernels take lengths.
    return torch.stack(full).t()[:, None, None, :]


def make_gathered(real: Tensor, query_end: Tensor | int) -> Tensor:
    """The gathered form of the live keys ``real``, bool ``(B, Sk)``."""
    order = torch.argsort(~real, dim=1, stable=True)
    inverse = torch.argsort(order, dim=1)
    count = real.sum(1, keepdim=True)
    rows = torch.stack([torch.cat([order, count], 1), torch.cat([inverse, torch.zeros_like(count) + query_end], 1)], 1)
    return rows.to(torch.int32)[:, :, None, :]


def make_packed(starts: Tensor, prefix_lens: Tensor | None) -> Tensor:
    """The packed form. It waits for the device.

    Args:
        starts: bool ``(B, S)``, True where a sequence starts; column 0 is True.
        prefix_lens: int ``(N,)``.
    """
    places = torch.nonzero(starts.flatten()).flatten()
    cu_seqlens = torch.cat([places, places.new_full((1,), starts.numel())])
    longest = int(cu_seqlens.diff().max())
    if prefix_lens is None:
        form = cu_seqlens.to(torch.int32).expand(1, PACKED_ROWS, 1, -1)
    else:
        zeros = torch.zeros_like(cu_seqlens)
        prefix = torch.cat([prefix_lens.to(cu_seqlens.dtype), zeros[:1]])
        form = torch.stack([cu_seqlens, zeros, zeros, prefix]).to(torch.int32)[None, :, None, :]
    setattr(form, _LONGEST, longest)
    return form


def make_blocks(keys: Keys, dead: Tensor, ranges: Tensor | None, rows: BlockRows) -> Tensor:
    """The blocks form of live keys, of dead queries ``(B,)``, and of the ranges ``(B, S, 2)``."""
    full = torch.stack([keys.end, dead, keys.begin, torch.zeros_like(dead)], dim=1).to(torch.int32)
    ranges = full[:, :0] if ranges is None else ranges
    form = torch.cat([full, ranges.flatten(1)], dim=1)
    return form[:, None, None, :].expand(-1, _count_of(rows), -1, -1)


def has_ranges(blocks: Tensor) -> bool:
    """Whether queries see ranges, by the blocks form."""
    return blocks.shape[3] > _BLOCK_COLUMNS


def make_packed_blocks(packed: Tensor, ranges: Tensor, in_window: bool) -> Tensor:
    """The packed blocks form of a packed form and of the ranges ``(B, S, 2)``."""
    form = torch.cat([ranges.flatten(), packed[0, 0, 0]])
    rows = BlockRows(packed=True, in_window=in_window, has_end=False, has_begin=False)
    form = form.expand(1, _count_of(rows), 1, -1)
    setattr(form, _LONGEST, getattr(packed, _LONGEST))
    return form


def ranges_in(blocks: Tensor, seqlen_q: int) -> Tensor:
    """int32 ``(B, seqlen_q, 2)``: the ranges of the last queries, from the blocks form."""
    return blocks[:, 0, 0, _BLOCK_COLUMNS:].unflatten(1, (-1, 2))[:, -seqlen_q:]


def split_packed_blocks(blocks: Tensor, batch: int, num_keys: int) -> tuple[Tensor, Tensor]:
    """cu_seqlens, and the ranges of all tokens, int32 ``(B, num_keys, 2)``, of the packed blocks form."""
    form, numbers = blocks[0, 0, 0], 2 * batch * num_keys
    return form[numbers:], form[:numbers].view(batch, num_keys, 2)


def _count_of(rows: BlockRows) -> int:
    return _BLOCK_ROWS + 8 * rows.packed + 4 * rows.in_window + 2 * rows.has_end + rows.has_begin


def block_rows(mask: Tensor) -> BlockRows:
    """What the rows of a form with blocks say."""
    code = mask.shape[1] - _BLOCK_ROWS
    return BlockRows(bool(code & 8), bool(code & 4), bool(code & 2), bool(code & 1))


def tells(mask: Tensor, kind: str | None) -> tuple[bool, bool]:
    """``(has_blocks, causal)``: whether tokens see later ones, and that the rest is causal whatever the layer says."""
    if kind == "blocks":
        return has_ranges(mask), True
    prefix = (kind == "packed" and mask.shape[1] == PACKED_PREFIX_ROWS) or (
        kind == "ranges" and mask.shape[3] == PREFIX_COLUMNS
    )
    return (True, True) if prefix or kind == "packed blocks" else (False, False)


def longest_of(packed: Tensor, bound: int) -> int:
    """The length of the longest sequence of a packed form, at most ``bound``."""
    return min(int(getattr(packed, _LONGEST, bound)), bound)


def kind_of(mask: Any, batch: int, num_keys: int) -> str | None:
    """Which form ``mask`` is, by the name that the head of this file gives it; None for anything else."""
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.dtype != torch.int32 or mask.shape[2] != 1:
        return None
    rows, columns = mask.shape[1], mask.shape[3]
    if rows in (PACKED_ROWS, PACKED_PREFIX_ROWS) and mask.shape[0] == 1:
        return "packed"
    has_blocks = _BLOCK_ROWS <= rows <= _count_of(BlockRows(True, True, True, True))
    if has_blocks and block_rows(mask).packed:
        return "packed blocks" if mask.shape[0] == 1 and columns > 2 * batch * num_keys else None
    if mask.shape[0] != batch:
        return None
    if rows == GATHERED_ROWS and columns == num_keys + 1:
        return "gathered"
    if rows == 1 and columns == COUNT_COLUMNS:
        return "unless packed"
    if rows == 1 and columns in (END_COLUMNS, BEGIN_COLUMNS, PREFIX_COLUMNS):
        return "ranges"
    return "blocks" if has_blocks and columns >= _BLOCK_COLUMNS else None
