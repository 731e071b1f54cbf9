"""How a case of the landscape is prepared, checked and timed: each implementation's call alone in a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from broadhead_bench import timing
from broadhead_bench.accuracy import CHECKED_SEQUENCES, causal_visible, checked_rows, relative_error, worst
from broadhead_bench.cases_landscape import LandscapeCase
from broadhead_bench.inputs_landscape import landscape_inputs
from broadhead_bench.peers.base import Peer, Skip
from broadhead_bench.task import Prepared, Task

#: Of e4m3: P has three bits of mantissa as well, which round by 2.6e-2 on average.
MAX_ERROR_E4M3 = 6e-2


class LandscapeTask(Task):
    """A graph holds one call, so that no host is timed: what starts a call costs as much for everybody. A call that
    can not be captured is timed as it is."""

    repetitions = 12

    def __init__(self, case: LandscapeCase, device: torch.device) -> None:
        super().__init__(case.area, device)
        self.case = case
        self.inputs = landscape_inputs(case, device)
        if case.dtype == "e4m3":
            self.max_error = MAX_ERROR_E4M3
        self.references = self._expected()

    def prepare(self, peer: Peer) -> Prepared:
        if peer.compiles_calls and not self.case.compiled and self.on_gpu:
            raise Skip("compiles its calls: is measured on a part of the cases")
        call = peer.landscape(self.case, self.inputs)
        item = self.checked(peer, call, self.error, self.case.flops)
        if not self.on_gpu:
            return item
        try:
            return item._replace(calls=[timing.captured(call, self.device)])
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            return item

    def error(self, out: Tensor) -> float:
        """The largest of a sequence."""
        return worst([
            relative_error(self.inputs.out_of_sequence(self.case, index, out)[rows], expected)
            for index, (rows, expected) in self.references.items()
        ])  # fmt: skip

    def _expected(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Of sequences of all lengths: rows spread over the queries, and what they are in fp32."""
        case, found = self.case, {}
        by_length = sorted(range(case.batch), key=lambda index: case.seqlens_k[index])
        for place in torch.linspace(0, case.batch - 1, min(CHECKED_SEQUENCES, case.batch)).long().tolist():
            index = by_length[place]
            q, k, v = self.inputs.of_sequence(case, index)
            rows = checked_rows(case.seqlens_q[index], self.device)
            visible = None
            if case.causal:
                visible = causal_visible(rows + len(k) - len(q), len(k), case.window)
            found[index] = rows, attention(q[rows], k, v, visible, self.inputs.sinks)
        return found


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, sinks: Tensor | None) -> Tensor:
    """fp32 attention of queries ``(R, Hq, D)`` over k and v ``(S, Hkv, D)``, where ``visible (R, S)`` if given; a sink
    is one more logit of its head."""
    group, heads = q.shape[1] // k.shape[1], []
    for head in range(k.shape[1]):
        mine = slice(head * group, (head + 1) * group)
        scores = torch.einsum("rgd,sd->rgs", q[:, mine], k[:, head]) * q.shape[-1] ** -0.5
        if visible is not None:
            scores.masked_fill_(~visible[:, None, :], float("-inf"))
        if sinks is not None:
            logits = sinks[mine].float()[None, :, None].expand(len(q), group, 1)
            scores = torch.cat((scores, logits), dim=-1)
        weights = scores.softmax(-1)[..., : len(k)]
        heads.append(torch.einsum("rgs,sd->rgd", weights, v[:, head]))
    return torch.cat(heads, dim=1)
