"""Attention and its gradient through torch's own CPU kernels, where they can express a call of the torch fallback.

These are the operators behind torch.nn.functional.scaled_dot_product_attention that return the LSE. They know a square
causal mask or none: other calls are put together from two of them, and what they do not know runs by hand.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .gradient import Gradients, RowTerms
from .keys import KeyPlace, place_keys, take_keys
from .padded import Call, compute_dtype, output_dtype, take_queries
from .rows import Rows

__all__ = ["attend", "differentiate"]


class _Part(NamedTuple):
    """Queries from ``first_row`` on over keys ``[begin, end)``; causal: as many of both, query i sees keys to i."""

    first_row: int
    begin: int
    end: int
    causal: bool


class _Plan(NamedTuple):
    place: KeyPlace
    parts: tuple[_Part, ...]


def attend(call: Call, rows: Rows) -> tuple[Tensor, Tensor] | None:
    """``(B, Sq, Hq, Dv)`` and ``(B, Hq, Sq)`` as ``core.attend`` gives; None: run it by hand."""
    plan = _plan(call, rows)
    if plan is None:
        return None
    # In 16 bits the kernels take a coarse exponential, which shows in the LSE.
    q = take_queries(call.q, rows).to(compute_dtype(call))
    k, v = (take_keys(x, plan.place).to(compute_dtype(call)) for x in (call.k, call.v))
    # The kernels make a row of NaN scores 0 with an LSE of 0; infinite or NaN keys show in the LSE.
    if not bool(q.isfinite().all()):
        return None
    out: Tensor | None = None
    lse: Tensor | None = None
    for part in plan.parts:
        part_out, part_lse = _attend_part(q[:, part.first_row :], k, v, part, call.softmax_scale)
        if not bool((part_lse.isfinite() & (part_lse != 0.0)).all()):
            return None
        out, lse = (part_out, part_lse) if out is None or lse is None else _merge(out, lse, part_out, part_lse)
    assert out is not None and lse is not None
    if call.sinks is not None:
        whole = torch.logaddexp(lse, call.sinks.to(lse.dtype)[None, :, None])
        out = out * torch.exp(lse - whole).transpose(1, 2).unsqueeze(-1)
        lse = whole
    blind = plan.parts[0].first_row  # rows before the first key see none
    if blind:
        out = torch.nn.functional.pad(out, (0, 0, 0, 0, blind, 0))
        lse = torch.nn.functional.pad(lse, (blind, 0), value=float("-inf"))
    return out.to(output_dtype(call)).contiguous(), lse.contiguous()


def differentiate(call: Call, rows: Rows, terms: RowTerms, out: Tensor) -> tuple[Gradients, KeyPlace] | None:
    """Gradients as ``gradient.attend_backward`` gives, and where the keys lie; None: run it by hand.

    out: ``(B, Sq, Hq, Dv)`` as it was given, of a loss that does not depend on the LSE.
    """
    plan = _plan(call, rows)
    if plan is None:
        return None
    blind = plan.parts[0].first_row
    if not bool(terms.lse[:, :, blind:].isfinite().all()):
        return None
    compute = compute_dtype(call)
    q, out = take_queries(call.q, rows).to(compute), out.to(compute)
    k, v = take_keys(call.k, plan.place).to(compute), take_keys(call.v, plan.place).to(compute)
    # Sums over several queries, heads and parts are of the compute dtype.
    grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for part in plan.parts:
        keys = slice(part.begin, part.end)
        found = _differentiate_part(
            terms.grad_out[:, part.first_row :],
            q[:, part.first_row :],
            k[:, keys],
            v[:, keys],
            out[:, part.first_row :],
            terms.lse[:, :, part.first_row :],
            causal=part.causal,
            scale=call.softmax_scale,
        )
        grad_q[:, part.first_row :] += found[0]
        grad_k[:, keys] += found[1]
        grad_v[:, keys] += found[2]
    of_k, of_v = (x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (grad_k, grad_v))
    return Gradients(grad_q, of_k, of_v, None), plan.place


def _plan(call: Call, rows: Rows) -> _Plan | None:
    """How torch's kernels compute these sequences, None if they can not."""
    masks = (call.prefix_lens, call.query_ranges, call.causal_by_sequence, call.tree_mask)
    options = (call.qv, *masks, call.q_descale, call.k_descale, call.v_descale)
    if not call.read_lengths or call.softcap > 0 or any(option is not None for option in options):
        return None
    seqlen_q = rows.seqlen_q
    if not (isinstance(seqlen_q, int) and isinstance(rows.row_begin, int) and isinstance(rows.row_end, int)):
        return None
    seqlen_k = rows.row_end - rows.row_begin
    same_dims = call.q.shape[-1] == call.v.shape[-1]
    if not same_dims or rows.batch == 0 or seqlen_q < 1 or seqlen_k < 1 or not _is_available(compute_dtype(call)):
        return None
    parts = _cut(seqlen_q, seqlen_k, call.window_left, call.window_right, call.attention_chunk)
    if not parts:
        return None
    place, absent = place_keys(rows, call.k, call.page_table, shared=call.kv_batch_idx is not None)
    if absent is not None and bool(absent.any()):
        return None
    return _Plan(place, parts)


def _cut(seqlen_q: int, seqlen_k: int, left: int, right: int, chunk: int) -> tuple[_Part, ...]:
    """The parts of a mask that is full or causal; none if it is another."""
    if seqlen_q == 1:
        # One query at the end of its sequence: what it sees is a range of keys.
        begin = max(0, seqlen_k - 1 - left) if left >= 0 else 0
        begin = max(begin, (seqlen_k - 1) // chunk * chunk) if chunk > 0 else begin
        return (_Part(0, begin, seqlen_k, False),)
    if chunk > 0 or 0 <= left < seqlen_k - 1:
        return ()
    if right < 0 or right >= seqlen_q - 1:
        return (_Part(0, 0, seqlen_k, False),)
    if right > 0:
        return ()
    if seqlen_k <= seqlen_q:
        return (_Part(seqlen_q - seqlen_k, 0, seqlen_k, True),)
    before = seqlen_k - seqlen_q
    return _Part(0, 0, before, False), _Part(0, before, seqlen_k, True)


@functools.cache
def _is_available(dtype: torch.dtype) -> bool:
    """Whether this torch has the kernels for ``dtype``, forward and backward."""
    x = torch.ones(1, 2, 1, 8, dtype=dtype)
    try:
        out, lse = _attend_part(x, x, x, _Part(0, 0, 2, True), 1.0)
        _differentiate_part(x, x, x, x, out, lse, causal=True, scale=1.0)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return True


def _attend_part(q: Tensor, k: Tensor, v: Tensor, part: _Part, scale: float) -> tuple[Tensor, Tensor]:
    """``(B, Sq, Hq, Dv)`` and ``(B, Hq, Sq)`` of a part's queries."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    k, v = (x[:, part.begin : part.end].transpose(1, 2) for x in (k, v))
    batch, seqlen_q, num_heads_q = q.shape[:3]
    num_heads_kv = k.shape[1]
    group = num_heads_q // num_heads_kv
    if not part.causal:
        out, lse = kernel(_fold(q, num_heads_kv), k, v, 0.0, False, scale=scale)
        return _unfold(out, seqlen_q), lse.reshape(batch, num_heads_q, seqlen_q)
    out = q.new_empty((batch, seqlen_q, num_heads_q, v.shape[3]))
    lse = q.new_empty((batch, num_heads_q, seqlen_q))
    for i in range(group):
        head_out, head_lse = kernel(q[:, :, i::group].transpose(1, 2), k, v, 0.0, True, scale=scale)
        out[:, :, i::group] = head_out.transpose(1, 2)
        lse[:, i::group] = head_lse
    return out, lse


def _differentiate_part(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of one part, shaped as these."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    batch, seqlen_q, num_heads_q = q.shape[:3]
    num_heads_kv = k.shape[2]
    group = num_heads_q // num_heads_kv
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if not causal:
        rows = [_fold(x, num_heads_kv) for x in (grad_out, q, out)]
        folded_lse = lse.reshape(batch, num_heads_kv, group * seqlen_q)
        grad_q, grad_k, grad_v = kernel(rows[0], rows[1], k, v, rows[2], folded_lse, 0.0, False, scale=scale)
        return _unfold(grad_q, seqlen_q), grad_k.transpose(1, 2), grad_v.transpose(1, 2)
    total_q, total_k, total_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for i in range(group):
        rows = [x[:, :, i::group].transpose(1, 2) for x in (grad_out, q, out)]
        head_lse = lse[:, i::group].contiguous()
        grad_q, grad_k, grad_v = kernel(rows[0], rows[1], k, v, rows[2], head_lse, 0.0, True, scale=scale)
        total_q[:, :, i::group] = grad_q.transpose(1, 2)
        total_k += grad_k
        total_v += grad_v
    return total_q, total_k.transpose(1, 2), total_v.transpose(1, 2)


def _fold(x: Tensor, num_heads_kv: int) -> Tensor:
    """``(B, Sq, Hq, D)`` as ``(B, Hkv, G * Sq, D)``: the heads that share K and V become rows."""
    batch, seqlen_q, num_heads_q, head_dim = x.shape
    group = num_heads_q // num_heads_kv
    x = x.reshape(batch, seqlen_q, num_heads_kv, group, head_dim).permute(0, 2, 3, 1, 4)
    return x.reshape(batch, num_heads_kv, group * seqlen_q, head_dim)


def _unfold(x: Tensor, seqlen_q: int) -> Tensor:
    """Undoes ``_fold``."""
    batch, num_heads_kv, rows, head_dim = x.shape
    group = rows // seqlen_q
    x = x.reshape(batch, num_heads_kv, group, seqlen_q, head_dim).permute(0, 3, 1, 2, 4)
    return x.reshape(batch, seqlen_q, num_heads_kv * group, head_dim)


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Results of the same queries over two ranges of keys, put together."""
    lse = torch.logaddexp(lse_a, lse_b)
    share = torch.exp(lse_a - lse).transpose(1, 2).unsqueeze(-1)
    return torch.lerp(out_b, out_a, share), lse
