"""Keys and values of the torch fallback: padded rows of every layout, and gradients back to where they lie."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import accumulate, find_pages, put_rows, spread_rows, take_pages, take_rows
from .rows import Rows

__all__ = ["KeyPlace", "add_keys", "new_gradient", "place_keys", "take_keys"]


class KeyPlace(NamedTuple):
    """Where the padded keys of some sequences come from: rows ``[first, last)`` of each."""

    begin: Tensor | int | None  # first rows in packed k
    owner: Tensor | int | None  # rows of the cache
    pages: Tensor | None  # (B, P): ids of the pages that hold these rows
    first: int
    last: int
    skipped: int  # rows of the first page before row ``first``
    length: Tensor | None  # (B,): rows of each sequence that are its own, where others may follow; None: all
    shared: bool  # a row may belong to several sequences


def place_keys(rows: Rows, k: Tensor, page_table: Tensor | None, *, shared: bool) -> tuple[KeyPlace, Tensor | None]:
    """Where the keys of ``rows`` lie, and which of these places do not exist: ``(B, rows)``, None for none of them."""
    first, last = 0, rows.max_rows
    if isinstance(rows.row_begin, int) and isinstance(rows.row_end, int):
        first, last = min(max(rows.row_begin, 0), rows.row_end), rows.row_end
    if page_table is None:
        length = rows.row_end.clamp(0, last) if isinstance(rows.row_end, Tensor) else None
        return KeyPlace(rows.begin_k, rows.owner, None, first, last, 0, length, shared), None
    page_size = k.shape[1]
    column, columns = first // page_size, -(-last // page_size)
    pages, exists = find_pages(page_table, rows.owner, columns, k.shape[0])
    pages, exists = pages[:, column:], exists[:, column:]
    skipped = first - column * page_size
    absent = ~exists.repeat_interleave(page_size, dim=1)[:, skipped : skipped + last - first]
    return KeyPlace(None, rows.owner, pages, first, last, skipped, None, True), absent


def take_keys(x: Tensor, place: KeyPlace) -> Tensor:
    """Rows of k or v as ``(B, rows, H, D)``, at least one: of zeros if there is none."""
    if place.last == place.first:
        batch = _batch_of(place, x)
        return x.new_zeros((batch, 1, *x.shape[-2:]), dtype=torch.float32).to(x.dtype)
    if place.pages is None:
        return take_rows(x, place.begin, place.owner, place.first, place.last)
    padded = take_pages(x, place.pages)
    if place.skipped == 0 and padded.shape[1] == place.last - place.first:
        return padded
    return padded[:, place.skipped : place.skipped + place.last - place.first]


def _batch_of(place: KeyPlace, x: Tensor) -> int:
    for held in (place.pages, place.begin, place.owner):
        if isinstance(held, Tensor):
            return held.shape[0]
        if held is not None:
            return 1
    return x.shape[0]


def new_gradient(x: Tensor, compute: torch.dtype, *, shared: bool) -> Tensor:
    """Zeros for the gradient of k or v. What several sequences add to is rounded to the dtype of x at the end."""
    return x.new_zeros(x.shape, dtype=compute if shared else x.dtype)


def add_keys(target: Tensor, values: Tensor, place: KeyPlace, *, read_lengths: bool) -> Tensor:
    """``target``, of the shape of k or v, with the gradients ``(B, rows, H, D)`` of padded keys added in their places.

    Writes into target where it can. Without read_lengths no tensor is read, and ``values`` are all there is.
    """
    if place.last == place.first:
        return target
    if place.pages is not None:
        page_size = target.shape[1]
        behind = place.pages.shape[1] * page_size - place.skipped - values.shape[1]
        if place.skipped or behind:
            values = F.pad(values, (0, 0, 0, 0, place.skipped, behind))
        if target.shape[0] > 0:
            accumulate(target, place.pages.reshape(-1), values.reshape(-1, page_size, *values.shape[2:]))
        return target
    if place.shared:
        owner = place.owner
        if isinstance(owner, int):
            target[owner, place.first : place.last] += values[0]
        elif isinstance(owner, Tensor) and target.shape[0] > 0:
            accumulate(target[:, place.first : place.last], owner, values)
        return target
    if read_lengths:
        live = None
        if isinstance(place.begin, Tensor) and place.length is not None:
            live = torch.arange(place.first, place.last, device=values.device) < place.length[:, None]
        put_rows(target, values, place.begin, place.owner, place.first, live)
        return target
    if place.begin is None:
        return values.to(target.dtype)
    assert isinstance(place.begin, Tensor) and place.length is not None
    packed, live = spread_rows(values, place.begin, place.length, target.shape[0])
    return torch.where(live[:, None, None], packed, 0.0).to(target.dtype)
