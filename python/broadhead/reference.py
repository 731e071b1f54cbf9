"""The torch fallback: exact attention of every layout on torch ops, on any device, with gradients.

Pads the layout (linear in the number of tokens), runs reference_core, and puts the rows back. No host sync, no loop
over sequences or heads, traceable by torch.compile(fullgraph=True).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference_core import Operands, ScoreRule, attend, attend_differentiable
from .reference_layout import gather, heads_first, key_rows, packed_rows, per_sequence, scatter_dense, scatter_packed
from .reference_mask import KeyMask

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    qv: Tensor | None = None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    page_table: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns ``(out, softmax_lse)``; arguments are normalised and validated by the caller.

    q: ``(B, Sq, Hq, D)``, or ``(T, Hq, D)`` with cu_seqlens_q; qv as q with Dv. k, v: ``(B, Sk, Hkv, D | Dv)``,
    ``(Tk, Hkv, D | Dv)`` with cu_seqlens_k, or ``(pages, page_size, Hkv, D | Dv)`` with page_table ``(B, max_pages)``.
    fp16, bf16, fp32, fp64 or float8_e4m3fn; any strides. Index tensors are int32; a window of -1 is unbounded.
    out: q's dtype (bf16 for fp8 q), ``(B, Sq, Hq, Dv)`` or ``(T, Hq, Dv)``; softmax_lse: fp32, natural log,
    ``(B, Hq, Sq)`` or ``(Hq, T)``. The arithmetic is fp32 (fp64 for fp64 q).

    Rows that no sequence owns are 0 with LSE -inf; a given ``out`` keeps what it holds there. Differentiable in q, k,
    v, qv and sinks unless ``out`` is given.
    """
    wanted = out is None and torch.is_grad_enabled()
    differentiable = wanted and any(x is not None and x.requires_grad for x in (q, k, v, qv, sinks))
    with torch.set_grad_enabled(differentiable):
        batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        rule = ScoreRule(softmax_scale, softcap, torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype)

        total_q = q.shape[0]
        seqlen_q: Tensor | int = q.shape[1]
        if cu_seqlens_q is not None:
            seqlen_q = cu_seqlens_q[1:] - cu_seqlens_q[:-1]
            index_q = packed_rows(cu_seqlens_q, max(max_seqlen_q, 1), total_q)
            q = gather(q, index_q)
            qv = None if qv is None else gather(qv, index_q)
        if seqused_q is not None:
            seqlen_q = seqused_q
        num_queries = q.shape[1]
        live = None
        if isinstance(seqlen_q, Tensor) and (differentiable or cu_seqlens_q is None):
            live = torch.arange(num_queries, device=q.device) < seqlen_q[:, None]
        if live is not None and differentiable:
            # The backward pass multiplies what a dead row holds by zero; forward, a row keeps its NaN to itself.
            dead = ~live[:, :, None, None]
            q = q.masked_fill(dead, 0.0)
            qv = None if qv is None else qv.masked_fill(dead, 0.0)

        index, row_end = key_rows(k, batch, max_seqlen_k, cu_seqlens_k, seqused_k, leftpad_k, kv_batch_idx, page_table)
        k, v = gather(k, index), gather(v, index)
        mask = KeyMask(
            row_begin=0 if leftpad_k is None else per_sequence(leftpad_k),
            row_end=per_sequence(row_end),
            offset=per_sequence(row_end - seqlen_q),
            prefix_lens=None if prefix_lens is None else prefix_lens.view(-1, 1, 1, 1, 1),
            window_left=window_left,
            window_right=window_right,
            attention_chunk=attention_chunk,
            num_queries=num_queries,
            num_rows=k.shape[1],
            has_queries=seqlen_q.view(-1, 1, 1, 1, 1) > 0 if isinstance(seqlen_q, Tensor) else None,
        )
        unused = mask.unused(k.device)
        x = Operands(
            q=q if q_descale is None else _descale(q, q_descale, compute),
            # Forward, what an unused row of k holds is hidden among the scores.
            k=heads_first(_descale(k, k_descale, compute), compute, unused if differentiable else None),
            v=heads_first(_descale(v, v_descale, compute), compute, unused),
            qv=qv,
            sinks=sinks,
            num_heads_kv=k.shape[2],
        )
        result, softmax_lse = attend_differentiable(x, mask, rule) if differentiable else attend(x, mask, rule)
        if cu_seqlens_q is None:
            return scatter_dense(result, softmax_lse, live, out)
        assert isinstance(seqlen_q, Tensor)
        return scatter_packed(result, softmax_lse, cu_seqlens_q, seqlen_q, total_q, out)


def _descale(x: Tensor, descale: Tensor | None, compute: torch.dtype) -> Tensor:
    """``x`` ``(B, S, H, D)`` times descale ``(B, Hkv)``, each factor for its H / Hkv heads."""
    if descale is None:
        return x
    factor = descale.to(compute)
    if x.shape[2] != factor.shape[1]:
        factor = factor.repeat_interleave(x.shape[2] // factor.shape[1], dim=1)
    return x.to(compute) * factor[:, None, :, None]
