"""The one oracle of the tests: textbook attention of one sequence, one mask predicate, differentiable by autograd.

It shares no code with broadhead. In fp64 it is the truth; in the dtype of the inputs it is the naive implementation
whose error sets the tolerance (tolerance.py). tests/harness/test_judge.py holds it against arithmetic on plain numbers.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

#: Kernels of 8-bit inputs hand P to the tensor cores in e4m3, whose smallest normal number is 2^-6. P, at most 1
#: against the row maximum, is scaled by this much beforehand: weights down to 2^-14 keep their three bits.
E4M3_P_SCALE = 256.0
#: The most scores that are held at once: longer sequences take some query rows at a time.
MAX_SCORES = 1 << 25
#: The last keys of a sequence, of which a word of a tree has one bit each.
TREE_KEYS = 64


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a score becomes, and which keys a query sees. Windows and chunks as in the reference: -1, 0 are none.

    A sequence that is causal has 0 as the right side of its window. ``ranges`` are ``(begin, end)`` of each query.
    ``tree`` has a word of each query, whose bits say which of the last 64 keys it sees.
    """

    scale: float
    window: tuple[int, int] = (-1, -1)
    chunk: int = 0
    prefix: int | None = None
    softcap: float = 0.0
    ranges: tuple[tuple[int, int], ...] | None = None
    ranges_in_window: bool = False
    tree: tuple[int, ...] | None = None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule,
    *,
    qv: Tensor | None = None,
    sinks: Tensor | None = None,
    e4m3: bool = False,
) -> tuple[Tensor, Tensor]:
    """``(out, softmax_lse)`` of one sequence, ``(sq, Hq, Dv)`` and ``(Hq, sq)`` in the dtype of its arguments.

    q: ``(sq, Hq, D)``; k, v: ``(sk, Hkv, D | Dv)``; qv: ``(sq, Hq, Dv)``; sinks: ``(Hq,)``. Rows that see no key are 0
    and -inf. e4m3: emulate what any kernel on 8-bit tensor cores does: P against the row maximum times E4M3_P_SCALE is
    rounded to e4m3, and the row sum is that of the P that was not rounded.
    """
    heads, sq, sk = q.shape[1], len(q), len(k)
    if sq == 0 or sk == 0:
        return q.new_zeros(sq, heads, v.shape[-1]), q.new_full((heads, sq), float("-inf"))
    keys, values = (x.repeat_interleave(heads // x.shape[1], dim=1).transpose(0, 1) for x in (k, v))
    mask = visible(sq, sk, rule, q.device)
    outs, lses = [], []
    for rows in torch.arange(sq, device=q.device).split(max(1, MAX_SCORES // (heads * sk))):
        scores = q[rows].transpose(0, 1) @ keys.transpose(1, 2)
        if qv is not None:
            scores = scores + qv[rows].transpose(0, 1) @ values.transpose(1, 2)
        scores = scores * rule.scale
        if rule.softcap > 0:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        scores = scores.masked_fill(~mask[rows], float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.to(q.dtype)[:, None, None].expand(-1, len(rows), 1)), dim=2)
        empty = ~mask[rows].any(dim=1)
        softmax = _softmax_of_e4m3(scores, sk) if e4m3 else torch.softmax(scores, dim=2)
        weights = softmax.masked_fill(empty[None, :, None], 0.0)[:, :, :sk]
        outs.append((weights @ values).transpose(0, 1))
        lses.append(torch.logsumexp(scores, dim=2).masked_fill(empty, float("-inf")))
    return torch.cat(outs), torch.cat(lses, dim=1)


def dense(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, *, qv: Tensor | None = None, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`attention` of each sequence of a batch: ``(B, sq, Hq, Dv)`` and ``(B, Hq, sq)``."""
    results = [attention(q[b], k[b], v[b], rule, qv=None if qv is None else qv[b], sinks=sinks) for b in range(len(q))]
    outs, lses = zip(*results)
    return torch.stack(outs), torch.stack(lses)


def visible(sq: int, sk: int, rule: Rule, device: torch.device) -> Tensor:
    """``(sq, sk)``: whether query i sees key j."""
    position = torch.arange(sq, device=device)[:, None] + sk - sq
    key = torch.arange(sk, device=device)[None, :]
    mask = torch.ones(sq, sk, dtype=torch.bool, device=device)
    left, right = rule.window
    if left >= 0:
        mask &= position - key <= left
    if right >= 0:
        mask &= key - position <= right
    if rule.chunk > 0:
        # Integers: CUDA divides floats by a scalar through its reciprocal, which puts key 97 of chunk 97 into chunk 0.
        mask &= position // rule.chunk == key // rule.chunk
    if rule.prefix is not None:
        mask |= key < rule.prefix
    if rule.ranges is not None:
        begin, end = torch.tensor(rule.ranges, dtype=torch.int64, device=device).reshape(sq, 2, 1).unbind(1)
        inside = (begin >= 0) & (begin <= key) & (key < end)
        if rule.ranges_in_window and left >= 0:
            inside &= position - key <= left
        mask |= inside
    if rule.tree is not None:
        words = torch.tensor(rule.tree, dtype=torch.int64, device=device)[:, None]
        bit = (key - (sk - TREE_KEYS)).clamp(min=0)
        mask = torch.where(key >= sk - TREE_KEYS, (words >> bit) & 1 == 1, mask)
    return mask


def _softmax_of_e4m3(scores: Tensor, sk: int) -> Tensor:
    """Softmax weights of scores ``(H, sq, sk)``, or one column more for a sink, as e4m3 holds them."""
    row_max = scores[:, :, :sk].amax(dim=2, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    p = torch.exp(scores - row_max)
    rounded = (p * E4M3_P_SCALE).clamp(max=448.0).to(torch.float8_e4m3fn).to(scores.dtype) / E4M3_P_SCALE
    return rounded / p.sum(dim=2, keepdim=True)
