"""Relative errors of gradients against fp32 mathematics, computed once a case, a block of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from broadhead_bench.accuracy import relative_error, worst
from broadhead_bench.cases import DenseCase, VarlenCase

Gradients = tuple[Tensor, Tensor, Tensor]

#: Query rows, those of all heads of a group together, whose scores are held at a time.
BLOCK_ROWS = 2048


class KeyMask(Protocol):
    """Which keys a query of self-attention sees."""

    def keys(self, first: int, behind: int, seqlen: int) -> tuple[int, int]: ...

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor | None: ...


class Mask(NamedTuple):
    """The masks of the arguments."""

    causal: bool
    window: int | None = None  # keys at most, itself included
    prefix: int = 0  # keys that every query sees

    def keys(self, first: int, behind: int, seqlen: int) -> tuple[int, int]:
        """Bounds of what the queries from ``first`` to below ``behind`` see."""
        low = 0 if self.window is None or self.prefix else max(0, first - self.window + 1)
        return low, max(behind, self.prefix) if self.causal else seqlen

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor | None:
        """``(rows, keys)``; None: all."""
        if not self.causal:
            return None
        distance = rows[:, None] - keys[None, :]
        seen = distance >= 0
        if self.window is not None:
            seen = seen & (distance < self.window)
        return seen | (keys < self.prefix)


def blocks(seqlen: int, group: int) -> Iterator[tuple[int, int]]:
    """Bounds of blocks of queries."""
    step = max(1, BLOCK_ROWS // group)
    for first in range(0, seqlen, step):
        yield first, min(first + step, seqlen)


class Block(NamedTuple):
    """The queries of a block, all heads of a KV head, and what they see."""

    rows: slice
    keys: slice
    p: Tensor  # (R, G, S'), fp32


def probabilities(q: Tensor, k: Tensor, mask: KeyMask, scale: float) -> Iterator[Block]:
    """P of queries ``(S, G, D)`` over keys ``(S, D)``, both fp32."""
    seqlen, group, _ = q.shape
    positions = torch.arange(seqlen, device=q.device)
    for first, behind in blocks(seqlen, group):
        low, high = mask.keys(first, behind, seqlen)
        scores = torch.einsum("rgd,sd->rgs", q[first:behind], k[low:high]) * scale
        visible = mask.visible(positions[first:behind], positions[low:high])
        if visible is not None:
            scores.masked_fill_(~visible[:, None, :], float("-inf"))
        yield Block(slice(first, behind), slice(low, high), scores.softmax(-1))


def gradients_of_group(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: KeyMask, scale: float) -> Gradients:
    """fp32 dq ``(S, G, D)``, dk ``(S, D)`` and dv ``(S, Dv)`` of the query heads of one KV head."""
    q, k, v, dout = q.float(), k.float(), v.float(), dout.float()
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys, p in probabilities(q, k, mask, scale):
        upstream = dout[rows]
        dv[keys] += torch.einsum("rgs,rgd->sd", p, upstream)
        dp = torch.einsum("rgd,sd->rgs", upstream, v[keys])
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq[rows] = torch.einsum("rgs,sd->rgd", ds, k[keys])
        dk[keys] += torch.einsum("rgs,rgd->sd", ds, q[rows])
    return dq, dk, dv


class GradientReference:
    """What a backward call should return: of two sequences one KV head with its query heads each. Of a dense batch the
    first sequence's last KV head and the last one's first, of a packed one the longest and the shortest sequence.

    Args of the constructor: mask: None: that of the case.
    """

    def __init__(
        self,
        case: DenseCase | VarlenCase,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dout: Tensor,
        mask: KeyMask | None = None,
    ) -> None:
        self._group = case.num_heads_q // case.num_heads_kv
        if mask is None:
            mask = Mask(case.causal, case.window, case.prefix if isinstance(case, DenseCase) else 0)
        last = case.num_heads_kv - 1
        self._expected = []
        for sequence, head in dict.fromkeys(((_sequences(case)[0], last), (_sequences(case)[-1], 0))):
            parts = [_part(t, sequence) for t in (q, k, v, dout)]
            heads = slice(head * self._group, (head + 1) * self._group)
            expected = gradients_of_group(
                parts[0][:, heads], parts[1][:, head], parts[2][:, head], parts[3][:, heads], mask, case.head_dim**-0.5
            )
            self._expected.append((sequence, head, expected))

    def error(self, gradients: Gradients) -> float:
        """The largest of the errors of dq, a head at a time, dk and dv."""
        errors = []
        for sequence, head, (dq, dk, dv) in self._expected:
            found = [_part(t, sequence) for t in gradients]
            first = head * self._group
            errors += [relative_error(found[0][:, first + i], dq[:, i]) for i in range(self._group)]
            errors += [relative_error(found[1][:, head], dk), relative_error(found[2][:, head], dv)]
        return worst(errors)


#: An index of the batch, or the tokens of a packed sequence.
Sequence = int | tuple[int, int]


def _sequences(case: DenseCase | VarlenCase) -> list[Sequence]:
    if isinstance(case, DenseCase):
        return list(range(case.batch))
    starts = [sum(case.seqlens[:i]) for i in range(len(case.seqlens))]
    spans = sorted(zip(starts, case.seqlens), key=lambda span: -span[1])
    return [(start, start + length) for start, length in spans]


def _part(tensor: Tensor, sequence: Sequence) -> Tensor:
    """The tokens of a sequence, ``(S, H, D)``."""
    return tensor[sequence] if isinstance(sequence, int) else tensor[sequence[0] : sequence[1]]
