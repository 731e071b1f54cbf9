"""Relative errors against fp32 mathematics, so that a wrong kernel posts no time."""

from __future__ import annotations

import torch
from torch import Tensor

from broadhead.bench.cases import DecodeCase, DenseCase

#: Largest relative L2 error of a bf16 result that is still rounding (of P and of the output: 2e-3 to 5e-3).
MAX_ERROR = {"forward": 1e-2, "decode": 1e-2, "host": 1e-2, "backward": 2e-2}

#: Query rows of each head that are checked.
CHECKED_ROWS = 48
#: Sequences of a decode batch that are checked.
CHECKED_SEQUENCES = 4


def relative_error(value: Tensor, reference: Tensor) -> float:
    """``||value - reference|| / ||reference||`` in fp32; NaN stays NaN."""
    reference = reference.float()
    return ((value.float() - reference).norm() / reference.norm()).item()


def forward_error(case: DenseCase, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> float:
    """Error of ``out (B, S, H, D)`` on rows spread over the sequence, of all heads and sequences."""
    seqlen = case.seqlen
    rows = torch.linspace(0, seqlen - 1, min(CHECKED_ROWS, seqlen), device=q.device).long()
    squares = torch.zeros(2, dtype=torch.float64, device=q.device)
    group = case.num_heads_q // case.num_heads_kv
    for batch in range(case.batch):
        for head in range(case.num_heads_kv):
            queries = q[batch, rows, head * group : (head + 1) * group].float()  # (R, G, D)
            keys, values = k[batch, :, head].float(), v[batch, :, head].float()
            reference = _attention(queries, keys, values, rows if case.causal else None)
            got = out[batch, rows, head * group : (head + 1) * group].float()
            squares[0] += (got - reference).square().sum()
            squares[1] += reference.square().sum()
    return (squares[0] / squares[1]).sqrt().item()


def _attention(queries: Tensor, keys: Tensor, values: Tensor, rows: Tensor | None) -> Tensor:
    """fp32 attention of queries ``(R, G, D)`` over keys, values ``(S, D)``; causal at positions ``rows`` if given."""
    scores = torch.einsum("rgd,sd->rgs", queries, keys) * queries.shape[-1] ** -0.5
    if rows is not None:
        later = torch.arange(keys.shape[0], device=keys.device)[None, :] > rows[:, None]
        scores.masked_fill_(later[:, None, :], float("-inf"))
    return torch.einsum("rgs,sd->rgd", scores.softmax(-1), values)


def backward_error(
    case: DenseCase, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, gradients: tuple[Tensor, Tensor, Tensor]
) -> float:
    """The largest of the errors of dq, dk and dv, on the first sequence and its last KV head."""
    group = case.num_heads_q // case.num_heads_kv
    head = case.num_heads_kv - 1
    keys, values = k[0, :, head].float(), v[0, :, head].float()
    scale = case.head_dim**-0.5
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    dq_errors = []
    for index in range(head * group, (head + 1) * group):
        queries, upstream = q[0, :, index].float(), dout[0, :, index].float()
        scores = queries @ keys.T * scale
        if case.causal:
            scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu_(1), float("-inf"))
        p = scores.softmax(-1)
        dv += p.T @ upstream
        dp = upstream @ values.T
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq_errors.append(relative_error(gradients[0][0, :, index], ds @ keys))
        dk += ds.T @ queries
    errors = [*dq_errors, relative_error(gradients[1][0, :, head], dk), relative_error(gradients[2][0, :, head], dv)]
    return max(errors) if all(e == e for e in errors) else float("nan")


def decode_error(
    case: DecodeCase, q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, out: Tensor
) -> float:
    """Error of ``out (B, 1, H, D)`` on sequences spread over the batch."""
    group = case.num_heads_q // case.num_heads_kv
    count = min(CHECKED_SEQUENCES, case.batch)
    got, expected = [], []
    for batch in torch.linspace(0, case.batch - 1, count).long().tolist():
        pages = page_table[batch].long()
        keys = k_cache[pages].flatten(0, 1)[: case.context]
        values = v_cache[pages].flatten(0, 1)[: case.context]
        for head in range(case.num_heads_kv):
            queries = q[batch, :, head * group : (head + 1) * group].float()
            expected.append(_attention(queries, keys[:, head].float(), values[:, head].float(), None))
            got.append(out[batch, :, head * group : (head + 1) * group])
    return relative_error(torch.stack(got), torch.stack(expected))
