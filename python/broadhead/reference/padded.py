"""The operands of the torch fallback: the arguments of one call, and the sequences of a call padded to the longest."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..call.validation import MAX_SEQLEN_K
from .core import Operands
from .keys import KeyPlace, place_keys, take_keys
from .layout import heads_first, select_rows, take_rows
from .mask import KeyMask, MaskValues
from .rows import Rows, locate, split_keys

__all__ = [
    "Call",
    "Padded",
    "choose",
    "compute_dtype",
    "descale",
    "live_queries",
    "locate_call",
    "output_dtype",
    "pad",
    "take_queries",
    "take_values",
]


class Call(NamedTuple):
    """The arguments of ``attention``, flat: tensors inside of containers are unknown to autograd."""

    q: Tensor
    k: Tensor
    v: Tensor
    qv: Tensor | None
    sinks: Tensor | None
    prefix_lens: Tensor | None
    query_ranges: Tensor | None
    causal_by_sequence: Tensor | None
    tree_mask: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seqused_q: Tensor | None
    seqused_k: Tensor | None
    leftpad_k: Tensor | None
    kv_batch_idx: Tensor | None
    page_table: Tensor | None
    q_descale: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None
    softmax_scale: float
    window_left: int
    window_right: int
    attention_chunk: int
    ranges_in_window: bool
    softcap: float
    max_seqlen_q: int
    max_seqlen_k: int
    read_lengths: bool


# Functions: torch 2.6 can not trace a property of a tuple.
def compute_dtype(call: Call) -> torch.dtype:
    """What the arithmetic of a call is done in."""
    return torch.float64 if call.q.dtype == torch.float64 else torch.float32


def output_dtype(call: Call) -> torch.dtype:
    return torch.bfloat16 if call.q.dtype.itemsize == 1 else call.q.dtype


class Padded(NamedTuple):
    """The operands of some sequences, padded to the longest of them."""

    x: Operands  # N sequences, or parts of sequences
    mask: KeyMask
    place: KeyPlace
    sequence: Tensor | None  # (N,): whose part of the keys it is; None: every sequence is whole


def locate_call(call: Call) -> Rows:
    return locate(
        call.q,
        call.k,
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_k=call.cu_seqlens_k,
        max_seqlen_q=call.max_seqlen_q,
        seqused_q=call.seqused_q,
        seqused_k=call.seqused_k,
        leftpad_k=call.leftpad_k,
        kv_batch_idx=call.kv_batch_idx,
        page_table=call.page_table,
    )


def pad(call: Call, rows: Rows, alive: Tensor | None = None) -> Padded:
    """alive: ``(B, Hq, Sq)``, for the backward pass: rows of q that have a gradient; the others are read as 0."""
    compute, num_queries = compute_dtype(call), rows.max_queries
    q = take_queries(call.q, rows)
    qv = None if call.qv is None else take_queries(call.qv, rows)
    if alive is not None:
        per_row = alive.transpose(1, 2).unsqueeze(-1)
        q = torch.where(per_row, q, 0.0)
        qv = None if qv is None else torch.where(per_row, qv, 0.0)
    q = descale(q, choose(call.q_descale, rows.sequences), compute)
    k_factor, v_factor = choose(call.k_descale, rows.sequences), choose(call.v_descale, rows.sequences)
    values = take_values(call, rows)

    sequence = None
    key_rows = rows
    parts = None if call.read_lengths else split_keys(rows, call.max_seqlen_k)
    if parts is not None:
        sequence, key_rows = parts
        q, qv = select_rows(q, sequence), None if qv is None else select_rows(qv, sequence)
        k_factor, v_factor = choose(k_factor, sequence), choose(v_factor, sequence)
        values = MaskValues(*(choose(x, sequence) for x in values))
    place, absent = place_keys(key_rows, call.k, call.page_table, shared=call.kv_batch_idx is not None)
    if absent is not None and call.read_lengths and not bool(absent.any()):
        absent = None
    k, v = take_keys(call.k, place), take_keys(call.v, place)

    row_begin, row_end, seqlen_q = key_rows.row_begin, key_rows.row_end, key_rows.seqlen_q
    if isinstance(row_begin, int) and isinstance(row_end, int):
        row_begin, row_end = 0, row_end - place.first
    mask = KeyMask(
        row_begin=_per_sequence(row_begin),
        row_end=_per_sequence(row_end),
        offset=_per_sequence(row_end - seqlen_q),
        values=values,
        window_left=call.window_left,
        window_right=call.window_right,
        attention_chunk=call.attention_chunk,
        ranges_in_window=call.ranges_in_window,
        num_queries=num_queries,
        num_rows=k.shape[1],
        seqlen_q=_per_sequence(seqlen_q),
        absent=None if absent is None else absent[:, None, None, None, :],
    )
    unused = mask.unused(k.device)
    # Forward, what an unused row of k holds is hidden among the scores.
    x = Operands(
        q=q,
        k=heads_first(descale(k, k_factor, compute), compute, None if alive is None else unused),
        v=heads_first(descale(v, v_factor, compute), compute, unused),
        qv=qv,
        sinks=call.sinks,
        num_heads_kv=k.shape[2],
    )
    return Padded(x, mask, place, sequence)


def take_queries(x: Tensor, rows: Rows) -> Tensor:
    """Rows of q, or of what is laid out like it, ``(B, Sq, ...)``."""
    return take_rows(x, rows.begin_q, rows.sequences, 0, rows.max_queries)


def take_values(call: Call, rows: Rows) -> MaskValues:
    """The masks that the call gives as values, of the padded queries of these sequences."""
    prefix_lens, causal = (choose(x, rows.sequences) for x in (call.prefix_lens, call.causal_by_sequence))
    ranges = tree = None
    if prefix_lens is not None:
        prefix_lens = prefix_lens.clamp(0, MAX_SEQLEN_K).view(-1, 1, 1, 1, 1)
    if causal is not None:
        causal = (causal != 0).view(-1, 1, 1, 1, 1)
    if call.query_ranges is not None:
        ranges = take_queries(call.query_ranges, rows).long()[:, None, None]
        ranges = torch.where(ranges[..., :1] < 0, 0, ranges)  # [0, 0) is none, too
    if call.tree_mask is not None:
        tree = take_queries(call.tree_mask, rows)[:, None, None, :, None]
    return MaskValues(
        prefix_lens=prefix_lens,
        causal=causal,
        ranges=ranges,
        tree=tree,
    )


def live_queries(rows: Rows, device: torch.device) -> Tensor | None:
    """Which padded rows of q have a result, ``(B, Sq)``; None: all."""
    if isinstance(rows.seqlen_q, int):
        return None
    return torch.arange(rows.max_queries, device=device) < rows.seqlen_q[:, None]


def choose(per_sequence: Tensor | None, index: Tensor | int | None) -> Tensor | None:
    """``(B, ...)`` of the chosen sequences."""
    if per_sequence is None or index is None:
        return per_sequence
    return per_sequence[index : index + 1] if isinstance(index, int) else per_sequence[index]


def _per_sequence(x: Tensor | int) -> Tensor | int:
    """``(B,)`` shaped to broadcast against scores ``(B, Hkv, G, Sq, Sk)``; an int as it is."""
    return x.view(-1, 1, 1, 1, 1) if isinstance(x, Tensor) else x


def descale(x: Tensor, factor: Tensor | None, compute: torch.dtype) -> Tensor:
    """``x`` ``(B, S, H, D)`` times factor ``(B, Hkv)``, each factor for its H / Hkv heads."""
    if factor is None:
        return x
    factor = factor.to(compute)
    if x.shape[2] != factor.shape[1]:
        factor = factor.repeat_interleave(x.shape[2] // factor.shape[1], dim=1)
    return x.to(compute) * factor[:, None, :, None]
