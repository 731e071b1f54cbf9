"""make_query_ranges: spans of tokens that see each other, such as images, as the query_ranges of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..call import validation as check
from ..errors import InvalidArgumentError, InvalidTypeError

FUNCTION = "make_query_ranges"


def make_query_ranges(
    spans: Sequence[Sequence[tuple[int, int]] | Tensor],
    seqlens_q: int | Sequence[int] | Tensor | None = None,
    seqlens_k: int | Sequence[int] | Tensor | None = None,
    *,
    cu_seqlens_q: Sequence[int] | Tensor | None = None,
    total_q: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The query_ranges of sequences in which the tokens of a span see each other, such as those of an image.

    A query inside a span gets the span as its range, and all others get none, ``(0, 0)``. The tensor is made on the
    CPU from values that are there, so that nothing waits for a device; with ``device`` it is then copied there.

    Args:
        spans: for each sequence its spans ``(start, end)``, a list of pairs of ints or an integer tensor ``(n, 2)`` on
            the CPU: the tokens from start to before end, counted from the first token of the sequence. Spans of a
            sequence are disjoint, in any order. One that goes on behind the keys that there are so far is kept as it
            is; attention clamps it.
        seqlens_q: query tokens of the sequences. An int for all of them: the result is that of dense q. A list, or a
            CPU tensor ``(B,)``: that of packed q. None: cu_seqlens_q says it.
        seqlens_k: keys of the sequences, of which the queries are the last: more than queries where earlier tokens are
            in a cache (chunked prefill, decode). An int, a list or a CPU tensor ``(B,)``; None: seqlens_q.
        cu_seqlens_q: ``(B + 1,)`` offsets of packed q, a list or a CPU tensor, instead of seqlens_q.
        total_q: rows of packed q, at least those of the sequences; None: as many. Rows behind them get ``(0, 0)``.
        device: of the result; None: the CPU.

    Returns:
        int32 ``(B, Sq, 2)`` where seqlens_q is an int, else ``(total_q, 2)``.

    Raises:
        InvalidArgumentError: a value, shape or device is wrong, or spans overlap; the text names the argument.
        InvalidTypeError: an argument has a wrong type or dtype; the text names it.
    """
    if not isinstance(spans, (list, tuple)):
        raise InvalidTypeError(
            f"{FUNCTION}: spans must be a list with an item for each sequence, got {check.describe_value(spans)}"
        )
    batch = len(spans)
    dense = isinstance(seqlens_q, int)
    if (seqlens_q is None) == (cu_seqlens_q is None):
        given = "neither" if seqlens_q is None else "both"
        raise InvalidArgumentError(f"{FUNCTION}: one of seqlens_q and cu_seqlens_q must be given, got {given}")
    if cu_seqlens_q is None:
        rows = _lengths("seqlens_q", seqlens_q, batch)
        first_row = rows.cumsum(0) - rows
    else:
        offsets = _integers("cu_seqlens_q", cu_seqlens_q, (batch + 1,), "(batch + 1,)")
        first_row, rows = offsets[:-1], offsets.diff()
        if int(offsets[0]) < 0 or bool((rows < 0).any()):
            raise InvalidArgumentError(f"{FUNCTION}: cu_seqlens_q must hold offsets >= 0 that never decrease")
    keys = rows if seqlens_k is None else _lengths("seqlens_k", seqlens_k, batch)
    if bool((keys < rows).any()):
        b = int((keys < rows).nonzero()[0])
        raise InvalidArgumentError(
            f"{FUNCTION}: seqlens_k must be at least the queries of each sequence, which are its last tokens, got"
            f" {int(keys[b])} keys and {int(rows[b])} queries for sequence {b}"
        )
    needed = int((first_row + rows).max()) if batch else 0
    total = needed if total_q is None else check.check_int(FUNCTION, "total_q", total_q)
    if total < needed or (dense and total_q is not None):
        accepted = "None with an int as seqlens_q" if dense else f"at least {needed}, the rows of the sequences"
        raise InvalidArgumentError(f"{FUNCTION}: total_q must be {accepted}, got {total}")
    found = _fill(*_flatten(spans), first_row, rows, keys, total)
    if isinstance(seqlens_q, int):
        found = found.view(batch, seqlens_q, 2)
    return found.to(device)


def _fill(spans: Tensor, sequence: Tensor, first_row: Tensor, rows: Tensor, keys: Tensor, total: int) -> Tensor:
    """int32 ``(total, 2)`` with the spans ``(n, 2)`` of sequences ``(n,)`` at the rows of the queries inside them."""
    position = (keys - rows)[sequence]  # of the first query
    begin = (spans[:, 0] - position).clamp(min=0)
    end = (spans[:, 1] - position).minimum(rows[sequence])
    count = (end - begin).clamp(min=0)
    index = torch.arange(len(spans)).repeat_interleave(count)
    within = torch.arange(len(index)) - (count.cumsum(0) - count)[index]
    found = torch.zeros(total, 2, dtype=torch.int32)
    found[(first_row[sequence] + begin)[index] + within] = spans[index].to(torch.int32)
    return found


def _flatten(spans: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The spans of all sequences, ``(n, 2)``, and the sequence of each, ``(n,)``."""
    found = [_integers(f"spans[{b}]", one, (None, 2), "(n, 2)") for b, one in enumerate(spans)]
    counts = torch.tensor([len(one) for one in found], dtype=torch.long)
    sequence = torch.arange(len(found)).repeat_interleave(counts)
    flat = torch.cat(found) if found else torch.zeros(0, 2, dtype=torch.long)
    start, end = flat.unbind(1)
    outside = (start < 0) | (end < start) | (end > check.INT32_MAX)
    _refuse(spans, sequence, outside, "hold pairs 0 <= start <= end of 32 bits", flat)
    order = (sequence * (check.INT32_MAX + 1) + start).argsort(stable=True)
    ordered, owner = flat[order], sequence[order]
    real = ordered[:, 1] > ordered[:, 0]
    ordered, owner = ordered[real], owner[real]
    overlap = (owner[1:] == owner[:-1]) & (ordered[1:, 0] < ordered[:-1, 1])
    _refuse(spans, owner[1:], overlap, "hold disjoint spans", ordered[1:])
    return flat, sequence


def _refuse(spans: Sequence[Any], sequence: Tensor, wrong: Tensor, accepted: str, values: Tensor) -> None:
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        b, pair = int(sequence[i]), tuple(values[i].tolist())
        raise InvalidArgumentError(f"{FUNCTION}: spans[{b}] must {accepted}, got {pair} among {spans[b]}")


def _lengths(name: str, value: Any, batch: int) -> Tensor:
    """int64 ``(batch,)``, at least 0; an int is that of all sequences."""
    if isinstance(value, int):
        value = [check.check_int(FUNCTION, name, value)] * batch
    lengths = _integers(name, value, (batch,), "(batch,)")
    if bool((lengths < 0).any()):
        raise InvalidArgumentError(f"{FUNCTION}: {name} must hold lengths >= 0, got {int(lengths.min())}")
    return lengths


def _integers(name: str, value: Any, shape: tuple[int | None, ...], spelled: str) -> Tensor:
    """Integers as int64 on the CPU, of ``shape`` (None: any size)."""
    accepted = f"ints of shape {spelled}, in a list or a CPU tensor"
    if isinstance(value, Tensor) and value.device.type != "cpu":
        raise InvalidTypeError(
            f"{FUNCTION}: {name} must be {accepted}, got {check.describe_value(value)}: it would have to be read back"
            " from the device, which waits for it"
        )
    try:
        tensor = torch.as_tensor(value) if len(value) else torch.zeros([size or 0 for size in shape], dtype=torch.long)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidTypeError(f"{FUNCTION}: {name} must be {accepted}, got {check.describe_value(value)}") from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise InvalidTypeError(f"{FUNCTION}: {name} must be {accepted}, got dtype {tensor.dtype}")
    fits = tensor.dim() == len(shape) and all(
        want in (None, got) for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = tuple("any" if want is None else want for want in shape)
        raise InvalidArgumentError(f"{FUNCTION}: {name} must be {accepted} = {wanted}, got {tuple(tensor.shape)}")
    return tensor.long()
