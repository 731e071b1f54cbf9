"""How a case of the landscape is prepared, checked and timed: each implementation's call alone in a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from broadhead_bench import timing
from broadhead_bench.accuracy import (
    attention,
    causal_visible,
    checked_rows,
    checked_sequences,
    relative_error,
    worst,
)
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
        for index in checked_sequences(case.seqlens_k):
            q, k, v = self.inputs.of_sequence(case, index)
            rows = checked_rows(case.seqlens_q[index], self.device)
            visible = None
            if case.causal:
                visible = causal_visible(rows + len(k) - len(q), len(k), case.window)
            found[index] = rows, attention(q[rows], k, v, visible, self.inputs.sinks)
        return found
