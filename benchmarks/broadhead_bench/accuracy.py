"""Relative errors against fp32 mathematics, so that a wrong kernel posts no time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from broadhead_bench.cases import AREAS, DecodeCase, DenseCase, PagedCase, VarlenCase
from broadhead_bench.cases_backward import TRAINING_AREAS
from broadhead_bench.inputs import PagedInputs, VarlenInputs

#: Largest relative L2 error of a bf16 result that is still rounding (of P and of the output: 2e-3 to 5e-3).
MAX_ERROR = dict.fromkeys(AREAS, 1e-2) | {
    **dict.fromkeys(TRAINING_AREAS, 2e-2),
    "fp8": 6e-2,  # P in e4m3: three bits of mantissa round by 2.6e-2 on average
    "decode-fp8": 6e-2,  # the same, of peers whose queries are e4m3
}

#: Query rows of each head that are checked.
CHECKED_ROWS = 48
#: Sequences of a paged or packed batch that are checked.
CHECKED_SEQUENCES = 4


def relative_error(value: Tensor, reference: Tensor) -> float:
    """``||value - reference|| / ||reference||`` in fp32; NaN stays NaN."""
    reference = reference.float()
    return ((value.float() - reference).norm() / reference.norm()).item()


def worst(errors: list[float]) -> float:
    """The largest; NaN if there is one."""
    return max(errors) if all(e == e for e in errors) else float("nan")


class Squares:
    """Sums of squares of errors and of the reference, over the rows that are checked."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, queries: Tensor, keys: Tensor, values: Tensor, got: Tensor, visible: Tensor | None) -> None:
        """Check ``got (R, Hq, Dv)``, of queries ``(R, Hq, D)`` over keys and values ``(S, Hkv, D)``."""
        reference = attention(queries, keys, values, visible)
        self._sums[0] += (got.float() - reference).square().sum()
        self._sums[1] += reference.square().sum()

    def relative(self) -> float:
        return (self._sums[0] / self._sums[1]).sqrt().item()


def attention(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, sinks: Tensor | None = None
) -> Tensor:
    """Attention in fp32, one KV head at a time.

    Args:
        queries: ``(R, Hq, D)``.
        keys: ``(S, Hkv, D)``.
        values: ``(S, Hkv, Dv)``.
        visible: bool ``(R, S)``, which keys a query sees; None: all.
        sinks: ``(Hq,)``, one more logit of each query head.

    Returns:
        fp32 ``(R, Hq, Dv)``.
    """
    group = queries.shape[1] // keys.shape[1]
    heads = []
    for head in range(keys.shape[1]):
        mine = slice(head * group, (head + 1) * group)
        own_sinks = None if sinks is None else sinks[mine].float()
        heads.append(_attention_of_head(queries[:, mine].float(), keys[:, head], values[:, head], visible, own_sinks))
    return torch.cat(heads, dim=1)


def _attention_of_head(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, sinks: Tensor | None
) -> Tensor:
    """fp32 attention of queries ``(R, G, D)`` over the keys and values ``(S, D)`` of one KV head."""
    scores = torch.einsum("rgd,sd->rgs", queries, keys.float()) * queries.shape[-1] ** -0.5
    if visible is not None:
        scores.masked_fill_(~visible[:, None, :], float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks[None, :, None].expand(*scores.shape[:2], 1)), dim=-1)
    return torch.einsum("rgs,sd->rgd", scores.softmax(-1)[..., : len(keys)], values.float())


def checked_sequences(seqlens: Sequence[int]) -> list[int]:
    """Indices of sequences of all lengths between the shortest and the longest."""
    by_length = sorted(range(len(seqlens)), key=lambda index: seqlens[index])
    places = torch.linspace(0, len(seqlens) - 1, min(CHECKED_SEQUENCES, len(seqlens))).long().tolist()
    return [by_length[place] for place in places]


def checked_rows(count: int, device: torch.device) -> Tensor:
    """Rows spread over so many."""
    return torch.linspace(0, count - 1, min(CHECKED_ROWS, count), device=device).long()


def causal_visible(positions: Tensor, seqlen_k: int, window: int | None = None) -> Tensor:
    """What queries at ``positions`` among the keys see under a causal mask, of the last ``window`` keys if given."""
    distance = positions[:, None] - torch.arange(seqlen_k, device=positions.device)[None, :]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def forward_error(case: DenseCase, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> float:
    """Error of ``out (B, S, H, Dv)`` on rows spread over the sequence, of all heads and sequences."""
    rows = checked_rows(case.seqlen, q.device)
    visible = causal_visible(rows, case.seqlen, case.window) if case.causal else None
    squares = Squares(q.device)
    for batch in range(case.batch):
        squares.add(q[batch, rows], k[batch], v[batch], out[batch, rows], visible)
    return squares.relative()


def varlen_error(case: VarlenCase, inputs: VarlenInputs, out: Tensor) -> float:
    """Error of packed ``out (T, H, D)`` on rows spread over the first, the last, and sequences between."""
    squares = Squares(out.device)
    starts = [sum(case.seqlens[:i]) for i in range(len(case.seqlens))]
    count = min(CHECKED_SEQUENCES, len(starts))
    for index in torch.linspace(0, len(starts) - 1, count).long().tolist():
        tokens = slice(starts[index], starts[index] + case.seqlens[index])
        rows = checked_rows(case.seqlens[index], out.device)
        visible = causal_visible(rows, case.seqlens[index]) if case.causal else None
        squares.add(inputs.q[tokens][rows], inputs.k[tokens], inputs.v[tokens], out[tokens][rows], visible)
    return squares.relative()


class PagedReference:
    """What a paged call should return: rows spread over the queries, of sequences of all lengths between the shortest
    and the longest. Computed once, when it is made.

    Args of the constructor: visible: given a sequence and rows of its queries, which keys these see, ``(rows, keys)``;
    None: what the case says.
    """

    def __init__(
        self,
        case: DecodeCase | PagedCase,
        inputs: PagedInputs,
        visible: Callable[[int, Tensor], Tensor] | None = None,
    ) -> None:
        self._rows = checked_rows(case.seqlen_q, inputs.q.device)
        self._expected: dict[int, Tensor] = {}
        for index in checked_sequences(case.seqlens):
            length = case.seqlens[index]
            pages = inputs.page_table[index, : -(-length // case.page_size)].long()
            keys = inputs.k_cache[pages].flatten(0, 1)[:length]
            values = inputs.v_cache[pages].flatten(0, 1)[:length]
            seen = visible(index, self._rows) if visible else _visible_of(case, self._rows, length)
            self._expected[index] = attention(inputs.q[index, self._rows], keys, values, seen)

    def error(self, out: Tensor) -> float:
        """Of ``out (B, Sq, H, D)``: the largest of a sequence. Together the outputs of short ones, which are larger,
        would hide what is wrong with long ones."""
        return worst([relative_error(out[index, self._rows], expected) for index, expected in self._expected.items()])


def _visible_of(case: DecodeCase | PagedCase, rows: Tensor, length: int) -> Tensor | None:
    if isinstance(case, PagedCase) and not case.causal:
        return None
    return causal_visible(rows + length - case.seqlen_q, length)


def paged_error(case: DecodeCase | PagedCase, inputs: PagedInputs, out: Tensor) -> float:
    """Error of ``out (B, Sq, H, D)`` on rows spread over the queries, of sequences spread over the batch."""
    return PagedReference(case, inputs).error(out)
