"""Runs a call of the torch fallback, forward and backward: groups of sequences, and their results to their rows."""

from __future__ import annotations

import torch
from torch import Tensor

from . import sdpa
from .core import ScoreRule, attend
from .gradient import Gradients, RowTerms, attend_backward, row_terms, sink_gradient
from .keys import KeyPlace, add_keys, new_gradient
from .layout import accumulate, put_rows, spread_rows
from .padded import Call, choose, compute_dtype, descale, live_queries, locate_call, output_dtype, pad, take_queries
from .parts import merge_key_parts
from .rows import Rows, group_by_length

__all__ = ["backward", "forward"]


def forward(call: Call, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(out, softmax_lse)``, the LSE of the compute dtype; ``out`` is written if given."""
    rows = locate_call(call)
    if call.read_lengths:
        return _forward_groups(call, rows, out)
    result, lse = _attend(call, rows)
    if rows.begin_q is None:
        live = live_queries(rows, call.q.device)
        if live is not None:
            lse = lse.masked_fill(~live[:, None, :], float("-inf"))
            live = live[:, :, None, None]
        return _write(result, live, out), lse
    assert isinstance(rows.begin_q, Tensor) and isinstance(rows.seqlen_q, Tensor)
    packed, live = spread_rows(result, rows.begin_q, rows.seqlen_q, call.q.shape[0])
    lse, _ = spread_rows(lse.transpose(1, 2), rows.begin_q, rows.seqlen_q, call.q.shape[0])
    lse = lse.masked_fill(~live[:, None], float("-inf")).transpose(0, 1).contiguous()
    return _write(packed, live[:, None, None], out), lse


def _write(result: Tensor, live: Tensor | None, out: Tensor | None) -> Tensor:
    """Live rows of result, in ``out`` if there is one; new ones have zeros elsewhere."""
    if out is None:
        return result if live is None else torch.where(live, result, 0.0)
    return out.copy_(result if live is None else torch.where(live, result.to(out.dtype), out))


def _forward_groups(call: Call, rows: Rows, out: Tensor | None) -> tuple[Tensor, Tensor]:
    groups = _group(call, rows)
    whole = len(groups) == 1 and groups[0].sequences is None and rows.begin_q is None
    if whole and out is None and _covers(groups[0], call.q.shape[1]):
        return _attend(call, groups[0])
    if out is None:
        out = call.q.new_zeros((*call.q.shape[:-1], call.v.shape[-1]), dtype=output_dtype(call))
    *batch, total, heads = call.q.shape[:-1]
    lse = call.q.new_full((*batch, heads, total), float("-inf"), dtype=compute_dtype(call))
    rows_first = lse.transpose(-1, -2)
    for group in groups:
        result, result_lse = _attend(call, group)
        live = live_queries(group, call.q.device)
        put_rows(out, result, group.begin_q, group.sequences, 0, live)
        put_rows(rows_first, result_lse.transpose(1, 2), group.begin_q, group.sequences, 0, live)
    return out, lse


def _covers(rows: Rows, seqlen_q: int) -> bool:
    return isinstance(rows.seqlen_q, int) and rows.seqlen_q == seqlen_q


def _group(call: Call, rows: Rows) -> list[Rows]:
    row_elements = call.k.shape[-2] * (call.k.shape[-1] + call.v.shape[-1])
    return group_by_length(rows, call.q.shape[-2], row_elements)


def _attend(call: Call, rows: Rows) -> tuple[Tensor, Tensor]:
    """Padded results ``(B, Sq, Hq, Dv)`` and ``(B, Hq, Sq)``."""
    found = sdpa.attend(call, rows)
    if found is not None:
        return found
    padded = pad(call, rows)
    rule = ScoreRule(call.softmax_scale, call.softcap, output_dtype(call))
    if padded.sequence is None:
        return attend(padded.x, padded.mask, rule)
    outs, lses = attend(padded.x._replace(sinks=None), padded.mask, rule._replace(out_dtype=compute_dtype(call)))
    result, lse = merge_key_parts(outs, lses, padded.sequence, rows.batch, call.sinks)
    return result.to(output_dtype(call)), lse


def backward(
    call: Call, grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor | None, lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, qv and sinks in their dtypes; see ``reference.gradients``."""
    if out is None or lse is None:
        computed_out, computed_lse = forward(call, None)
        out = computed_out if out is None else out
        lse = computed_lse if lse is None else lse
    compute, q, qv, sinks = compute_dtype(call), call.q, call.qv, call.sinks
    if grad_out is None:
        grad_out = out.new_zeros(()).expand(out.shape)
    lse = lse.transpose(-1, -2)
    grad_lse = None if grad_lse is None else grad_lse.transpose(-1, -2)
    shared = call.page_table is not None or call.kv_batch_idx is not None

    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dqv = None if qv is None else torch.zeros_like(qv, memory_format=torch.contiguous_format)
    dk, dv = new_gradient(call.k, compute, shared=shared), new_gradient(call.v, compute, shared=shared)
    dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=compute)
    rows = locate_call(call)
    for group in _group(call, rows) if call.read_lengths else [rows]:
        live = live_queries(group, q.device)
        terms, alive = row_terms(
            take_queries(grad_out, group),
            take_queries(out, group),
            take_queries(lse, group).transpose(1, 2),
            None if grad_lse is None else take_queries(grad_lse, group).transpose(1, 2),
            live,
            compute,
        )
        if dsinks is not None and sinks is not None:
            dsinks = dsinks + sink_gradient(sinks, terms)
        found, place, sequence = _differentiate(call, group, terms, alive, out if grad_lse is None else None)

        grad_q = descale(_whole(found.q, sequence, group.batch), choose(call.q_descale, group.sequences), compute)
        dq = _put_queries(dq, grad_q, group, live, read_lengths=call.read_lengths)
        if dqv is not None and found.qv is not None:
            dqv = _put_queries(
                dqv, _whole(found.qv, sequence, group.batch), group, live, read_lengths=call.read_lengths
            )
        of_part = group.sequences if sequence is None else sequence
        grad_k = descale(_rows_first(found.k, call.k.shape[-2]), choose(call.k_descale, of_part), compute)
        grad_v = descale(_rows_first(found.v, call.v.shape[-2]), choose(call.v_descale, of_part), compute)
        dk = add_keys(dk, grad_k, place, read_lengths=call.read_lengths)
        dv = add_keys(dv, grad_v, place, read_lengths=call.read_lengths)
    dsinks = None if dsinks is None or sinks is None else dsinks.to(sinks.dtype)
    return dq, dk.to(call.k.dtype), dv.to(call.v.dtype), dqv, dsinks


def _differentiate(
    call: Call, rows: Rows, terms: RowTerms, alive: Tensor, out: Tensor | None
) -> tuple[Gradients, KeyPlace, Tensor | None]:
    """Gradients of the padded operands, where the keys lie, and whose part of the keys each is (None: all are whole).

    out: the output of the whole call, None where the loss depends on the LSE as well.
    """
    if out is not None:
        by_torch = sdpa.differentiate(call, rows, terms, take_queries(out, rows))
        if by_torch is not None:
            return (*by_torch, None)
    padded = pad(call, rows, alive)
    if padded.sequence is not None:
        terms = RowTerms(*(x[padded.sequence] for x in terms))
    rule = ScoreRule(call.softmax_scale, call.softcap, output_dtype(call))
    return attend_backward(padded.x, padded.mask, rule, terms), padded.place, padded.sequence


def _whole(grad: Tensor, sequence: Tensor | None, batch: int) -> Tensor:
    """The gradients of queries over parts of the keys, added up for each sequence."""
    if sequence is None:
        return grad
    total = grad.new_zeros((batch, *grad.shape[1:]))
    accumulate(total, sequence, grad)
    return total


def _rows_first(x: Tensor, num_heads: int) -> Tensor:
    """``(B * H, rows, D)`` as ``(B, rows, H, D)``."""
    return x.view(-1, num_heads, *x.shape[1:]).transpose(1, 2)


def _put_queries(target: Tensor, grad: Tensor, rows: Rows, live: Tensor | None, *, read_lengths: bool) -> Tensor:
    """``target``, of the shape of q, with the gradients ``(B, Sq, ...)`` of the group's rows."""
    if read_lengths:
        put_rows(target, grad, rows.begin_q, rows.sequences, 0, live)
        return target
    if rows.begin_q is None:
        return (grad if live is None else torch.where(live[:, :, None, None], grad, 0.0)).to(target.dtype)
    assert isinstance(rows.begin_q, Tensor) and isinstance(rows.seqlen_q, Tensor)
    packed, owned = spread_rows(grad, rows.begin_q, rows.seqlen_q, target.shape[0])
    return torch.where(owned[:, None, None], packed, 0.0).to(target.dtype)
