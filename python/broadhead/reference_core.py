"""The arithmetic of the torch fallback on padded tensors: softmax attention in chunks of queries, and its gradient.

Scores exist for one chunk at a time, forward and backward: the backward pass recomputes them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference_mask import KeyMask

__all__ = ["Operands", "ScoreRule", "attend", "attend_differentiable"]

#: Scores held at once (fp32: 128 MiB): bounds the memory of a call, whatever its length.
MAX_SCORES = 2**25
#: What a CPU's caches like better. PERF(2-core x86 server, 4096 x 4096, 9 heads, head_dim 64: 0.73 -> 0.43 s a call)
CPU_SCORES = 2**22
#: Fewer queries than this a chunk, and the products read K and V too often.
CPU_QUERIES = 32


class ScoreRule(NamedTuple):
    """How a score comes from a dot product, and what the output is stored as."""

    softmax_scale: float
    softcap: float  # 0: off
    out_dtype: torch.dtype


class Operands(NamedTuple):
    """Padded operands; N = B * Hkv. The arithmetic runs in the dtype of k and v."""

    q: Tensor  # (B, Sq, Hq, D)
    k: Tensor  # (N, rows, D)
    v: Tensor  # (N, rows, Dv)
    qv: Tensor | None  # (B, Sq, Hq, Dv)
    sinks: Tensor | None  # (Hq,)
    num_heads_kv: int


class _Softmax(NamedTuple):
    """Softmax of one chunk of C queries; G = Hq / Hkv."""

    weights: Tensor  # (N, G * C, keys): exp(score - row_max), not yet divided by row_sum
    row_sum: Tensor  # (N, G * C, 1), at least 1: the row maximum is among the summands
    lse: Tensor  # (N, G * C, 1), -inf where a query sees no key
    sink_weights: Tensor | None  # (N, G * C, 1): exp(sink - row_max)
    capped: Tensor | None  # (N, G * C, keys): score / softcap, in (-1, 1)


def attend(x: Operands, mask: KeyMask, rule: ScoreRule) -> tuple[Tensor, Tensor]:
    """Returns out ``(B, Sq, Hq, Dv)`` of ``rule.out_dtype`` and the fp32 LSE ``(B, Hq, Sq)``. No gradient flows.

    Needs ``mask.num_rows >= 1``, and finite v wherever ``mask.unused`` is true.
    """
    batch, seqlen_q, num_heads_q = x.q.shape[:3]
    shape = (batch, seqlen_q, num_heads_q, x.v.shape[2])
    if torch.is_autocast_enabled(x.q.device.type):
        with torch.autocast(x.q.device.type, enabled=False):
            return attend(x, mask, rule)
    chunk = _chunk_size(x, mask)
    if seqlen_q > 0 and chunk >= seqlen_q:
        out, lse = _attend_chunk(x, mask, rule, 0, seqlen_q)
        out = _heads_last(out, shape).to(rule.out_dtype, memory_format=torch.contiguous_format).contiguous()
        return out, lse.view(batch, num_heads_q, seqlen_q).float()
    result = x.q.new_empty(shape, dtype=rule.out_dtype)
    softmax_lse = x.q.new_empty((batch, num_heads_q, seqlen_q), dtype=torch.float32)
    for i0 in range(0, seqlen_q, chunk):
        i1 = min(i0 + chunk, seqlen_q)
        out, lse = _attend_chunk(x, mask, rule, i0, i1)
        result[:, i0:i1] = _heads_last(out, (batch, i1 - i0, *shape[2:]))
        softmax_lse[:, :, i0:i1] = lse.view(batch, num_heads_q, i1 - i0)
    return result, softmax_lse


def attend_differentiable(x: Operands, mask: KeyMask, rule: ScoreRule) -> tuple[Tensor, Tensor]:
    """``attend`` with gradients for q, k, v, qv and sinks, through out and LSE.

    q, k, v and qv must be finite wherever no query or key is: the backward pass multiplies them by zeros.
    """
    out, softmax_lse = _Attend.apply(*x, *mask, *rule)
    return out, softmax_lse


class _Attend(torch.autograd.Function):
    """Takes the fields of Operands, KeyMask and ScoreRule one by one: tensors inside tuples are unknown to autograd."""

    @staticmethod
    def forward(ctx: Any, *fields: Any) -> tuple[Tensor, Tensor]:
        x, mask, rule = _regroup(fields)
        ctx.tensor_places = [place for place, field in enumerate(fields) if isinstance(field, Tensor)]
        ctx.constants = [None if isinstance(field, Tensor) else field for field in fields]
        ctx.save_for_backward(*[field for field in fields if isinstance(field, Tensor)])
        return attend(x, mask, rule)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        fields = list(ctx.constants)
        for place, tensor in zip(ctx.tensor_places, ctx.saved_tensors):
            fields[place] = tensor
        x, mask, rule = _regroup(tuple(fields))
        gradients = _attend_backward(x, mask, rule, grads[0], grads[1])
        return (*gradients, *([None] * (len(fields) - len(gradients))))


def _regroup(fields: tuple[Any, ...]) -> tuple[Operands, KeyMask, ScoreRule]:
    """Undoes the flattening of ``attend_differentiable``."""
    a = len(Operands._fields)
    b = a + len(KeyMask._fields)
    return Operands(*fields[:a]), KeyMask(*fields[a:b]), ScoreRule(*fields[b:])


def _chunk_size(x: Operands, mask: KeyMask) -> int:
    """Queries a chunk, so that it has at most MAX_SCORES scores (but at least one query)."""
    scores_per_query = max(1, x.q.shape[0] * x.q.shape[2] * mask.num_rows)
    most = max(1, MAX_SCORES // scores_per_query)
    # The compiler unrolls the chunks: there, few are better.
    if x.q.device.type != "cpu" or torch.compiler.is_compiling():
        return most
    return min(most, max(CPU_QUERIES, CPU_SCORES // scores_per_query))


def _attend_chunk(x: Operands, mask: KeyMask, rule: ScoreRule, i0: int, i1: int) -> tuple[Tensor, Tensor]:
    """Output ``(N, G * C, Dv)`` and LSE ``(N, G * C, 1)`` of queries ``[i0, i1)``, in the compute dtype."""
    j0, j1 = mask.rows_read(i0, i1)
    softmax = _softmax(x, mask, rule, i0, i1, j0, j1)
    return torch.bmm(softmax.weights, x.v[:, j0:j1]).div_(softmax.row_sum), softmax.lse


def _softmax(x: Operands, mask: KeyMask, rule: ScoreRule, i0: int, i1: int, j0: int, j1: int) -> _Softmax:
    """Scores and softmax of queries ``[i0, i1)`` over rows ``[j0, j1)``."""
    compute, num_heads_kv = x.k.dtype, x.num_heads_kv
    batch, rows = x.q.shape[0], i1 - i0
    group = x.q.shape[2] // num_heads_kv
    factor = rule.softmax_scale / rule.softcap if rule.softcap > 0 else rule.softmax_scale
    scores = torch.bmm(_load_queries(x.q, i0, i1, num_heads_kv, compute) * factor, x.k[:, j0:j1].transpose(1, 2))
    if x.qv is not None:
        qv = _load_queries(x.qv, i0, i1, num_heads_kv, compute) * factor
        scores = torch.baddbmm(scores, qv, x.v[:, j0:j1].transpose(1, 2))
    capped = None
    if rule.softcap > 0:
        capped = scores.tanh_()
        scores = capped * rule.softcap
    hidden = mask.hidden(i0, i1, j0, j1, x.q.device)
    if hidden is not None:
        # Filling, unlike adding -inf, also takes out the NaN that a key nobody sees may have made.
        scores.view(batch, num_heads_kv, group, rows, j1 - j0).masked_fill_(hidden, float("-inf"))

    top = scores.amax(dim=-1, keepdim=True)
    # A finite maximum even for a row that sees nothing: its weights become exp(-inf) = 0, not NaN.
    row_max = top.clamp(min=torch.finfo(compute).min)
    sink = None
    if x.sinks is not None:
        sink = _per_row(x.sinks.to(compute), batch, num_heads_kv, rows)
        row_max = torch.maximum(row_max, sink)
    weights = scores.sub_(row_max).exp_()
    row_sum = weights.sum(dim=-1, keepdim=True)
    sink_weights = None
    if sink is not None:
        sink_weights = torch.exp(sink - row_max)
        row_sum = row_sum + sink_weights
    lse = row_sum.log() + row_max
    if sink is not None:
        lse = lse.masked_fill(top == float("-inf"), float("-inf"))
    return _Softmax(weights, row_sum.clamp_(min=1.0), lse, sink_weights, capped)


def _attend_backward(
    x: Operands, mask: KeyMask, rule: ScoreRule, grad_out: Tensor, grad_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, qv and sinks, chunk by chunk as in ``attend``."""
    if torch.is_autocast_enabled(x.q.device.type):
        with torch.autocast(x.q.device.type, enabled=False):
            return _attend_backward(x, mask, rule, grad_out, grad_lse)
    compute, num_heads_kv = x.k.dtype, x.num_heads_kv
    batch, seqlen_q, num_heads_q = x.q.shape[:3]
    scale = rule.softmax_scale
    grad_q, grad_k, grad_v = torch.empty_like(x.q), torch.zeros_like(x.k), torch.zeros_like(x.v)
    grad_qv = None if x.qv is None else torch.empty_like(x.qv)
    grad_sinks = None if x.sinks is None else x.sinks.new_zeros(x.sinks.shape, dtype=compute)
    chunk = _chunk_size(x, mask)
    for i0 in range(0, seqlen_q, chunk):
        i1 = min(i0 + chunk, seqlen_q)
        j0, j1 = mask.rows_read(i0, i1)
        k, v = x.k[:, j0:j1], x.v[:, j0:j1]
        softmax = _softmax(x, mask, rule, i0, i1, j0, j1)
        p = softmax.weights / softmax.row_sum
        grad_o = _load_queries(grad_out, i0, i1, num_heads_kv, compute)
        grad_l = grad_lse[:, :, i0:i1].to(compute).reshape(p.shape[0], p.shape[1], 1)
        # The LSE of a row that sees nothing is the constant -inf.
        grad_l = grad_l.masked_fill(softmax.lse == float("-inf"), 0.0)

        grad_v[:, j0:j1] += torch.bmm(p.transpose(1, 2), grad_o)
        grad_p = torch.bmm(grad_o, v.transpose(1, 2))
        delta = (p * grad_p).sum(dim=-1, keepdim=True) - grad_l
        grad_s = p * (grad_p - delta)
        if softmax.capped is not None:
            grad_s = grad_s * (1.0 - softmax.capped.square())
        if grad_sinks is not None and softmax.sink_weights is not None:
            per_row = softmax.sink_weights / softmax.row_sum * -delta
            grad_sinks += per_row.view(batch, num_heads_q, i1 - i0).sum(dim=(0, 2))

        shape = (batch, i1 - i0, num_heads_q)
        grad_q[:, i0:i1] = _heads_last(torch.bmm(grad_s, k) * scale, (*shape, k.shape[2]))
        q = _load_queries(x.q, i0, i1, num_heads_kv, compute) * scale
        grad_k[:, j0:j1] += torch.bmm(grad_s.transpose(1, 2), q)
        if x.qv is not None and grad_qv is not None:
            grad_qv[:, i0:i1] = _heads_last(torch.bmm(grad_s, v) * scale, (*shape, v.shape[2]))
            qv = _load_queries(x.qv, i0, i1, num_heads_kv, compute) * scale
            grad_v[:, j0:j1] += torch.bmm(grad_s.transpose(1, 2), qv)
    if grad_sinks is not None and x.sinks is not None:
        grad_sinks = grad_sinks.to(x.sinks.dtype)
    return grad_q, grad_k, grad_v, grad_qv, grad_sinks


def _load_queries(x: Tensor, i0: int, i1: int, num_heads_kv: int, dtype: torch.dtype) -> Tensor:
    """Rows ``[i0, i1)`` of ``(B, Sq, Hq, D)`` as ``(B * Hkv, G * C, D)``: the heads that share K/V become rows."""
    batch, seqlen_q, num_heads_q, head_dim = x.shape
    group, rows = num_heads_q // num_heads_kv, i1 - i0
    if rows != seqlen_q:
        x = x[:, i0:i1]
    if rows > 1:
        x = x.reshape(batch, rows, num_heads_kv, group, head_dim).permute(0, 2, 3, 1, 4)
    return x.reshape(batch * num_heads_kv, group * rows, head_dim).to(dtype)


def _heads_last(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``(B * Hkv, G * C, D)`` back to ``shape = (B, C, Hq, D)``."""
    batch, rows, num_heads_q, head_dim = shape
    return x.view(batch, num_heads_q, rows, head_dim).transpose(1, 2)


def _per_row(per_head: Tensor, batch: int, num_heads_kv: int, rows: int) -> Tensor:
    """``(Hq,)`` to one value a row, ``(B * Hkv, G * C, 1)``."""
    num_heads_q = per_head.shape[0]
    shape = (batch * num_heads_kv, num_heads_q // num_heads_kv * rows, 1)
    return per_head.view(1, num_heads_q, 1).expand(batch, num_heads_q, rows).reshape(shape)
