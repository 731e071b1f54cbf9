"""The arithmetic of the torch fallback on padded tensors: softmax attention in chunks of queries.

Scores exist for one chunk at a time; the backward pass (gradient.py) computes them again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .mask import KeyMask

__all__ = [
    "Operands",
    "ScoreRule",
    "attend",
    "chunk_size",
    "heads_last",
    "load_queries",
    "masked_scores",
]

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


def attend(x: Operands, mask: KeyMask, rule: ScoreRule) -> tuple[Tensor, Tensor]:
    """Returns out ``(B, Sq, Hq, Dv)`` of ``rule.out_dtype`` and the LSE ``(B, Hq, Sq)`` of the compute dtype.

    Needs ``mask.num_rows >= 1``, and finite v wherever ``mask.unused`` is true.
    """
    batch, seqlen_q, num_heads_q = x.q.shape[:3]
    shape = (batch, seqlen_q, num_heads_q, x.v.shape[2])
    if torch.is_autocast_enabled(x.q.device.type):
        with torch.autocast(x.q.device.type, enabled=False):
            return attend(x, mask, rule)
    chunk = chunk_size(x, mask)
    if seqlen_q > 0 and chunk >= seqlen_q:
        out, lse = _attend_chunk(x, mask, rule, 0, seqlen_q)
        out = heads_last(out, shape).to(rule.out_dtype, memory_format=torch.contiguous_format).contiguous()
        return out, lse.view(batch, num_heads_q, seqlen_q)
    result = x.q.new_empty(shape, dtype=rule.out_dtype)
    softmax_lse = x.k.new_empty((batch, num_heads_q, seqlen_q))
    for i0 in range(0, seqlen_q, chunk):
        i1 = min(i0 + chunk, seqlen_q)
        out, lse = _attend_chunk(x, mask, rule, i0, i1)
        result[:, i0:i1] = heads_last(out, (batch, i1 - i0, *shape[2:]))
        softmax_lse[:, :, i0:i1] = lse.view(batch, num_heads_q, i1 - i0)
    return result, softmax_lse


def chunk_size(x: Operands, mask: KeyMask) -> int:
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
    scores, _ = masked_scores(x, mask, rule, i0, i1, j0, j1)
    top = scores.amax(dim=-1, keepdim=True)
    # A finite maximum even for a row that sees nothing: its weights become exp(-inf) = 0, not NaN.
    row_max = top.clamp(min=torch.finfo(x.k.dtype).min)
    sink = None
    if x.sinks is not None:
        sink = _per_row(x.sinks.to(x.k.dtype), x.q.shape[0], x.num_heads_kv, i1 - i0)
        row_max = torch.maximum(row_max, sink)
    weights = scores.sub_(row_max).exp_()
    row_sum = weights.sum(dim=-1, keepdim=True)
    if sink is not None:
        row_sum = row_sum + torch.exp(sink - row_max)
    lse = row_sum.log() + row_max
    if sink is not None:
        lse = lse.masked_fill(top == float("-inf"), float("-inf"))
    # The row maximum is among the summands: less than 1 is the sum of a row that sees nothing.
    return torch.bmm(weights, x.v[:, j0:j1]).div_(row_sum.clamp_(min=1.0)), lse


def masked_scores(
    x: Operands, mask: KeyMask, rule: ScoreRule, i0: int, i1: int, j0: int, j1: int
) -> tuple[Tensor, Tensor | None]:
    """Scores of queries ``[i0, i1)`` over rows ``[j0, j1)``, ``(N, G * C, keys)``, -inf where a key is hidden.

    The second is what the softcap's slope needs: score / softcap before hiding, in (-1, 1); None without a softcap.
    """
    compute, num_heads_kv = x.k.dtype, x.num_heads_kv
    batch, rows = x.q.shape[0], i1 - i0
    group = x.q.shape[2] // num_heads_kv
    factor = rule.softmax_scale / rule.softcap if rule.softcap > 0 else rule.softmax_scale
    scores = torch.bmm(load_queries(x.q, i0, i1, num_heads_kv, compute) * factor, x.k[:, j0:j1].transpose(1, 2))
    if x.qv is not None:
        qv = load_queries(x.qv, i0, i1, num_heads_kv, compute) * factor
        scores = torch.baddbmm(scores, qv, x.v[:, j0:j1].transpose(1, 2))
    capped = None
    if rule.softcap > 0:
        capped = scores.tanh_()
        scores = capped * rule.softcap
    hidden = mask.hidden(i0, i1, j0, j1, x.q.device)
    if hidden is not None:
        # Filling, unlike adding -inf, also takes out the NaN that a key nobody sees may have made.
        scores.view(batch, num_heads_kv, group, rows, j1 - j0).masked_fill_(hidden, float("-inf"))
    return scores, capped


def load_queries(x: Tensor, i0: int, i1: int, num_heads_kv: int, dtype: torch.dtype) -> Tensor:
    """Rows ``[i0, i1)`` of ``(B, Sq, Hq, D)`` as ``(B * Hkv, G * C, D)``: the heads that share K/V become rows."""
    batch, seqlen_q, num_heads_q, head_dim = x.shape
    group, rows = num_heads_q // num_heads_kv, i1 - i0
    if rows != seqlen_q:
        x = x[:, i0:i1]
    if rows > 1:
        x = x.reshape(batch, rows, num_heads_kv, group, head_dim).permute(0, 2, 3, 1, 4)
    return x.reshape(batch * num_heads_kv, group * rows, head_dim).to(dtype)


def heads_last(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``(B * Hkv, G * C, D)`` back to ``shape = (B, C, Hq, D)``."""
    batch, rows, num_heads_q, head_dim = shape
    return x.view(batch, num_heads_q, rows, head_dim).transpose(1, 2)


def _per_row(per_head: Tensor, batch: int, num_heads_kv: int, rows: int) -> Tensor:
    """``(Hq,)`` to one value a row, ``(B * Hkv, G * C, 1)``."""
    num_heads_q = per_head.shape[0]
    shape = (batch * num_heads_kv, num_heads_q // num_heads_kv * rows, 1)
    return per_head.view(1, num_heads_q, 1).expand(batch, num_heads_q, rows).reshape(shape)
