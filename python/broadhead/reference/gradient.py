"""The gradients of the torch fallback on padded tensors, FlashAttention's way: from out and softmax_lse as given.

P = exp(S - softmax_lse), D = rowsum(dout * out) - dlse, dS = P * (dP - D). Parts of a whole (other keys, a rescaled
output) thus get their share of the gradient of the whole. Scores exist for one chunk of queries at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .core import Operands, ScoreRule, chunk_size, heads_last, load_queries, masked_scores
from .mask import KeyMask

__all__ = ["Gradients", "RowTerms", "attend_backward", "row_terms", "sink_gradient"]


class RowTerms(NamedTuple):
    """What the backward pass needs of each row of q, in the compute dtype. A row without gradient has zeros."""

    grad_out: Tensor  # (B, Sq, Hq, Dv)
    lse: Tensor  # (B, Hq, Sq), +inf where the row has no gradient: its P is 0
    delta: Tensor  # (B, Hq, Sq)


class Gradients(NamedTuple):
    """Gradients in the compute dtype, of Operands."""

    q: Tensor  # (B, Sq, Hq, D)
    k: Tensor  # (N, rows, D)
    v: Tensor  # (N, rows, Dv)
    qv: Tensor | None  # (B, Sq, Hq, Dv)


def row_terms(
    grad_out: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None, live: Tensor | None, compute: torch.dtype
) -> tuple[RowTerms, Tensor]:
    """Terms of rows ``(B, Sq)``, and which rows have a gradient, ``(B, Hq, Sq)``.

    Rows outside ``live`` and rows whose LSE is -inf have none, whatever the tensors hold there.
    """
    alive = lse != float("-inf")
    if live is not None:
        alive = alive & live[:, None, :]
    per_row = alive.transpose(1, 2).unsqueeze(-1)
    grad_out = torch.where(per_row, grad_out.to(compute), 0.0)
    delta = (grad_out * torch.where(per_row, out.to(compute), 0.0)).sum(dim=-1).transpose(1, 2)
    if grad_lse is not None:
        delta = delta - torch.where(alive, grad_lse.to(compute), 0.0)
    return RowTerms(grad_out, torch.where(alive, lse.to(compute), float("inf")), delta), alive


def sink_gradient(sinks: Tensor, terms: RowTerms) -> Tensor:
    """``(Hq,)`` in the compute dtype: a sink takes weight from the values and adds to the LSE."""
    weight = torch.exp(sinks.to(terms.lse.dtype)[None, :, None] - terms.lse)
    return -(weight * terms.delta).sum(dim=(0, 2))


def attend_backward(x: Operands, mask: KeyMask, rule: ScoreRule, terms: RowTerms) -> Gradients:
    """Gradients of q, k, v and qv, chunk by chunk as in ``core.attend``.

    q and qv must be finite in rows without a gradient, k and v wherever ``mask.unused`` is true: the products multiply
    them by zeros.
    """
    if torch.is_autocast_enabled(x.q.device.type):
        with torch.autocast(x.q.device.type, enabled=False):
            return attend_backward(x, mask, rule, terms)
    compute, num_heads_kv = x.k.dtype, x.num_heads_kv
    batch, seqlen_q, num_heads_q = x.q.shape[:3]
    scale = rule.softmax_scale
    grad_k, grad_v = torch.zeros_like(x.k), torch.zeros_like(x.v)
    parts_q: list[Tensor] = []
    parts_qv: list[Tensor] = []
    chunk = chunk_size(x, mask)
    for i0 in range(0, seqlen_q, chunk):
        i1 = min(i0 + chunk, seqlen_q)
        j0, j1 = mask.rows_read(i0, i1)
        k, v = x.k[:, j0:j1], x.v[:, j0:j1]
        scores, capped = masked_scores(x, mask, rule, i0, i1, j0, j1)
        rows = (scores.shape[0], scores.shape[1], 1)
        p = scores.sub_(terms.lse[:, :, i0:i1].reshape(rows)).exp_()
        grad_o = load_queries(terms.grad_out, i0, i1, num_heads_kv, compute)
        grad_v[:, j0:j1] += torch.bmm(p.transpose(1, 2), grad_o)
        grad_s = torch.bmm(grad_o, v.transpose(1, 2)).sub_(terms.delta[:, :, i0:i1].reshape(rows)).mul_(p)
        if capped is not None:
            grad_s = grad_s * (1.0 - capped.square())

        shape = (batch, i1 - i0, num_heads_q)
        parts_q.append(heads_last(torch.bmm(grad_s, k) * scale, (*shape, k.shape[2])))
        q = load_queries(x.q, i0, i1, num_heads_kv, compute) * scale
        grad_k[:, j0:j1] += torch.bmm(grad_s.transpose(1, 2), q)
        if x.qv is not None:
            parts_qv.append(heads_last(torch.bmm(grad_s, v) * scale, (*shape, v.shape[2])))
            qv = load_queries(x.qv, i0, i1, num_heads_kv, compute) * scale
            grad_v[:, j0:j1] += torch.bmm(grad_s.transpose(1, 2), qv)
    grad_q = torch.cat(parts_q, dim=1) if parts_q else torch.zeros_like(x.q, dtype=compute)
    grad_qv = None
    if x.qv is not None:
        grad_qv = torch.cat(parts_qv, dim=1) if parts_qv else torch.zeros_like(x.qv, dtype=compute)
    return Gradients(grad_q, grad_k, grad_v, grad_qv)
