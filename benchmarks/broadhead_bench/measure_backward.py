"""How a case of training is prepared, checked and timed: gradients alone, and a layer in both directions."""

from __future__ import annotations

import torch

from broadhead_bench.accuracy_backward import GradientReference
from broadhead_bench.cases import DenseCase, VarlenCase
from broadhead_bench.inputs import DenseInputs, VarlenInputs, dense_inputs, normal, varlen_inputs
from broadhead_bench.peers.base import Peer
from broadhead_bench.task import Prepared, Task


class BackwardTask(Task):
    """The gradients of q, k and v, after one forward pass."""

    measures_memory = True
    #: Autograd costs the host some tenths of a millisecond, which a training loop hides behind the layers before.
    head_start = 1e-3

    def __init__(self, case: DenseCase | VarlenCase, device: torch.device) -> None:
        super().__init__(case.area, device)
        self.case = case
        self.inputs: DenseInputs | VarlenInputs
        if isinstance(case, VarlenCase):
            self.inputs = varlen_inputs(case, device)
            self.dout = normal(*self.inputs.q.shape, device=device)
        else:
            self.inputs = dense_inputs(case, device)
            self.dout = self.inputs.dout
        with torch.no_grad():
            self.reference = GradientReference(case, *self.inputs[:3], self.dout)

    def prepare(self, peer: Peer) -> Prepared:
        call = peer.backward(self.case, self.inputs, self.dout)
        return self.checked(peer, call, self.reference.error, self.case.flops)


class LayerTask(BackwardTask):
    """The attention of a layer, forward and backward in one call. What it does is counted in tokens."""

    def prepare(self, peer: Peer) -> Prepared:
        assert isinstance(self.case, DenseCase)
        call = peer.forward_backward(self.case, self.inputs, self.dout)
        return self.checked(peer, call, self.reference.error, self.case.batch * self.case.seqlen)
