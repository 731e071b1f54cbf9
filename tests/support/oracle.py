"""The plain oracle of the tests: one loop over sequences and heads, one mask predicate, softmax as the textbook has it.

Shares no code with broadhead. In fp64 it is the truth; in the dtype of the inputs it is the naive implementation whose
error sets the tolerance (see compare.py). Differentiable by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    page_table: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """``(out, softmax_lse)`` in ``dtype``, shaped as broadhead returns them; rows of no query are 0 and -inf.

    Takes the normalised arguments of ``broadhead.reference.attention``; max_seqlen_q and max_seqlen_k are not needed.
    """
    batch = q.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    num_heads_q, num_heads_kv = q.shape[-2], k.shape[-2]
    group = num_heads_q // num_heads_kv

    out_shape = (*q.shape[:-1], v.shape[-1])
    lse_shape = (batch, num_heads_q, q.shape[1]) if cu_seqlens_q is None else (num_heads_q, q.shape[0])
    out = torch.zeros(out_shape, dtype=dtype, device=q.device)
    lse = torch.full(lse_shape, float("-inf"), dtype=dtype, device=q.device)

    for b in range(batch):
        q_rows = query_rows(q, b, cu_seqlens_q, seqused_q)
        sequence_q = q_rows(q).to(dtype)
        sequence_k = key_rows(k, b, cu_seqlens_k, seqused_k, leftpad_k, kv_batch_idx, page_table).to(dtype)
        sequence_v = key_rows(v, b, cu_seqlens_k, seqused_k, leftpad_k, kv_batch_idx, page_table).to(dtype)
        sq, sk = len(sequence_q), len(sequence_k)
        if sq == 0 or sk == 0:
            continue
        prefix = None if prefix_lens is None else int(prefix_lens[b])
        mask = visible(sq, sk, window_left, window_right, attention_chunk, prefix, q.device)
        out_b = q_rows(out)
        lse_b = lse[b].T if cu_seqlens_q is None else lse.T[cu_seqlens_q[b] : cu_seqlens_q[b + 1]]
        for h in range(num_heads_q):
            head_q, head_k, head_v = sequence_q[:, h], sequence_k[:, h // group], sequence_v[:, h // group]
            if q_descale is not None:
                head_q = head_q * q_descale[b, h // group].to(dtype)
            if k_descale is not None:
                head_k = head_k * k_descale[b, h // group].to(dtype)
            if v_descale is not None:
                head_v = head_v * v_descale[b, h // group].to(dtype)
            # What no query sees may be NaN and must not matter.
            seen = mask.any(dim=0)[:, None]
            head_k, head_v = head_k.where(seen, 0.0), head_v.where(seen, 0.0)
            scores = head_q @ head_k.T
            if qv is not None:
                scores = scores + q_rows(qv)[:, h].to(dtype) @ head_v.T
            scores = scores * softmax_scale
            if softcap > 0:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~mask, float("-inf"))
            rows = mask.any(dim=1)  # a row that sees no key keeps 0 and -inf
            scores = scores[rows]
            if sinks is not None:
                scores = torch.cat((scores, sinks[h].to(dtype).expand(len(scores), 1)), dim=1)
            weights = torch.softmax(scores, dim=1)[:, :sk]
            live = rows.nonzero()[:, 0]
            out_b[live, h] = weights @ head_v
            lse_b[live, h] = torch.logsumexp(scores, dim=1)
    return out, lse


def visible(sq: int, sk: int, left: int, right: int, chunk: int, prefix: int | None, device: torch.device) -> Tensor:
    """``(sq, sk)``: whether query i sees key j."""
    position = torch.arange(sq, device=device)[:, None] + sk - sq
    key = torch.arange(sk, device=device)[None, :]
    mask = torch.ones(sq, sk, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= position - key <= left
    if right >= 0:
        mask &= key - position <= right
    if chunk > 0:
        # Integers: CUDA divides floats by a scalar through its reciprocal, which puts key 97 of chunk 97 into chunk 0.
        mask &= position // chunk == key // chunk
    if prefix is not None:
        mask |= key < prefix
    return mask


def query_rows(q: Tensor, b: int, cu_seqlens_q: Tensor | None, seqused_q: Tensor | None):
    """The function that takes sequence b's live rows out of q or of what is shaped like it (a view)."""
    if cu_seqlens_q is None:
        begin, length = None, q.shape[1]
    else:
        begin, length = int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1] - cu_seqlens_q[b])
    if seqused_q is not None:
        length = int(seqused_q[b])
    if begin is None:
        return lambda x: x[b, :length]
    return lambda x: x[begin : begin + length]


def key_rows(
    cache: Tensor,
    b: int,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    kv_batch_idx: Tensor | None,
    page_table: Tensor | None,
) -> Tensor:
    """Keys (or values) of sequence b, ``(seqlen_k, Hkv, D)``."""
    owner = b if kv_batch_idx is None else int(kv_batch_idx[b])
    length = None
    if cu_seqlens_k is not None:
        length = int(cu_seqlens_k[b + 1] - cu_seqlens_k[b])
    if seqused_k is not None:
        length = int(seqused_k[b])
    begin = 0 if leftpad_k is None else int(leftpad_k[b])
    if page_table is not None:
        page_size = cache.shape[1]
        if length is None:
            length = page_table.shape[1] * page_size
        pages = page_table[owner].tolist()
        rows = [cache[pages[row // page_size], row % page_size] for row in range(begin, length)]
        return torch.stack(rows) if rows else cache[:0].flatten(0, 1)
    if cu_seqlens_k is not None:
        start = int(cu_seqlens_k[b])
        return cache[start + begin : start + length]
    return cache[owner, begin : cache.shape[1] if length is None else length]
