"""How a case of decode is prepared, checked and timed: in a CUDA graph over many input sets; and the host's cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

from broadhead_bench import accuracy, timing
from broadhead_bench.cases import CascadeCase, DecodeCase, DenseCase, HostCase
from broadhead_bench.inputs import PagedInputs, dense_inputs
from broadhead_bench.inputs_decode import (
    AppendInputs,
    CascadeInputs,
    Fp8PagedInputs,
    LatentInputs,
    append_sets,
    cascade_sets,
    decode_sets,
    fp8_decode_sets,
    latent_sets,
)
from broadhead_bench.peers.base import Peer
from broadhead_bench.task import Call, Prepared, Task, one_by_one

#: Input sets whose results are compared with fp32.
CHECKED_SETS = 3

Case = TypeVar("Case", DecodeCase, CascadeCase)
Inputs = TypeVar("Inputs")


class GraphTask(Task, Generic[Case, Inputs]):
    """Calls in a CUDA graph, over input sets that together do not fit the L2.

    Args of the constructor: sets; plain: the same step without what the area is about; plain_of: its inputs of a set.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device,
        sets: Sequence[Inputs],
        plain: DecodeCase,
        plain_of: Callable[[Inputs], PagedInputs],
    ) -> None:
        super().__init__(case.area, device)
        self.case: Case = case
        self.sets = sets
        self.references = [accuracy.PagedReference(plain, plain_of(inputs)) for inputs in sets[:CHECKED_SETS]]

    def call_of(self, peer: Peer, inputs: Inputs) -> Call:
        """The call of one implementation on one set."""
        raise NotImplementedError

    def work_of(self, peer: Peer) -> float:
        """Bytes of K and V that one call reads."""
        return self.case.kv_bytes

    def prepare(self, peer: Peer) -> Prepared:
        calls = [self.call_of(peer, inputs) for inputs in self.sets]
        results = [call() for call in calls]
        error = accuracy.worst([r.error(result) for r, result in zip(self.references, results, strict=False)])
        return Prepared(peer, calls, error, self.work_of(peer), peer.kernel(), peer.versions())

    def time(self, prepared: list[Prepared], budget: float) -> list[float | Exception]:
        if not self.on_gpu:
            return super().time(prepared, budget)
        return one_by_one(prepared, lambda item: timing.time_graph(item.calls, self.device, budget))


class DecodeTask(GraphTask[DecodeCase, PagedInputs]):
    """A step over a paged cache."""

    def __init__(self, case: DecodeCase, device: torch.device) -> None:
        super().__init__(case, device, decode_sets(case, device), case, lambda inputs: inputs)

    def call_of(self, peer: Peer, inputs: PagedInputs) -> Call:
        return peer.decode(self.case, inputs)


class Fp8DecodeTask(GraphTask[DecodeCase, Fp8PagedInputs]):
    """A step over an e4m3 cache."""

    def __init__(self, case: DecodeCase, device: torch.device) -> None:
        super().__init__(case, device, fp8_decode_sets(case, device), case, lambda inputs: inputs.wide)

    def call_of(self, peer: Peer, inputs: Fp8PagedInputs) -> Call:
        return peer.decode_fp8(self.case, inputs)

    def work_of(self, peer: Peer) -> float:
        return peer.measured_decode(self.case).kv_bytes


class MlaTask(GraphTask[DecodeCase, LatentInputs]):
    """A step of absorbed MLA."""

    def __init__(self, case: DecodeCase, device: torch.device) -> None:
        super().__init__(case, device, latent_sets(case, device), case, lambda inputs: inputs.paged)

    def call_of(self, peer: Peer, inputs: LatentInputs) -> Call:
        return peer.decode_mla(self.case, inputs)


class CascadeTask(GraphTask[CascadeCase, CascadeInputs]):
    """A step over a shared prefix."""

    def __init__(self, case: CascadeCase, device: torch.device) -> None:
        super().__init__(case, device, cascade_sets(case, device), case.plain, lambda inputs: inputs.plain)

    def call_of(self, peer: Peer, inputs: CascadeInputs) -> Call:
        return peer.cascade(self.case, inputs)


class AppendTask(GraphTask[DecodeCase, AppendInputs]):
    """A step that rotates its token and puts it into the cache first."""

    def __init__(self, case: DecodeCase, device: torch.device) -> None:
        super().__init__(case, device, append_sets(case, device), case, AppendInputs.appended)

    def prepare(self, peer: Peer) -> Prepared:
        for inputs in self.sets:
            inputs.poison()
        return super().prepare(peer)

    def call_of(self, peer: Peer, inputs: AppendInputs) -> Call:
        return peer.append(self.case, inputs)


#: Of areas whose steps are not plain ones.
STEP_TASKS: dict[str, Callable[[DecodeCase, torch.device], Task]] = {
    "append": AppendTask,
    "decode-fp8": Fp8DecodeTask,
    "decode-mla": MlaTask,
}


class HostTask(Task):
    """Host time of one eager call."""

    def __init__(self, case: HostCase, device: torch.device) -> None:
        super().__init__("host", device)
        self.kind = case.kind
        inner = case.inner
        if isinstance(inner, DenseCase):
            self.dense_case, self.dense = inner, dense_inputs(inner, device)[:3]
            return
        self.case = inner
        self.appending = append_sets(inner, device)[0]
        self.paged = self.appending.appended()
        self.reference = accuracy.PagedReference(inner, self.paged)

    def prepare(self, peer: Peer) -> Prepared:
        if self.kind == "dense":
            call = peer.forward(self.dense_case, *self.dense)
            return self.checked(
                peer, call, lambda out: accuracy.forward_error(self.dense_case, *self.dense, out), work=0.0
            )
        if self.kind == "append":
            self.appending.poison()
            return self.checked(peer, peer.append(self.case, self.appending), self.reference.error, work=0.0)
        step = self.checked(peer, peer.decode(self.case, self.paged), self.reference.error, work=0.0)
        return step._replace(calls=[peer.plan(self.case, self.paged)]) if self.kind == "plan" else step

    def time(self, prepared: list[Prepared], budget: float) -> list[float | Exception]:
        def synchronize() -> None:
            if self.on_gpu:
                torch.cuda.synchronize(self.device)

        return one_by_one(prepared, lambda item: timing.time_host(item.calls[0], synchronize, budget))
