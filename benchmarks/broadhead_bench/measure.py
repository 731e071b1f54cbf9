"""How a case of prefill is prepared, checked and timed; task_of knows the task of every case."""

from __future__ import annotations

import torch

from broadhead_bench import accuracy
from broadhead_bench.cases import CascadeCase, Case, DecodeCase, DenseCase, HostCase, PagedCase, VarlenCase
from broadhead_bench.cases_backward import TRAINING_AREAS, StepCase
from broadhead_bench.cases_landscape import LandscapeCase
from broadhead_bench.cases_masks import MaskCase
from broadhead_bench.cases_model import InferenceCase
from broadhead_bench.cases_prefill import BACKWARD_AREAS
from broadhead_bench.inputs import dense_inputs, fp8_inputs, paged_inputs, varlen_inputs
from broadhead_bench.measure_backward import BackwardTask, LayerTask
from broadhead_bench.measure_decode import STEP_TASKS, CascadeTask, DecodeTask, HostTask
from broadhead_bench.measure_inference import task_of_inference
from broadhead_bench.measure_landscape import LandscapeTask
from broadhead_bench.measure_masks import task_of_masks
from broadhead_bench.measure_model import StepTask
from broadhead_bench.peers.base import Peer
from broadhead_bench.task import Prepared, Task


class ForwardTask(Task):
    """Dense forward, with a window or without."""

    def __init__(self, case: DenseCase, device: torch.device) -> None:
        super().__init__(case.area, device)
        self.case = case
        self.inputs = dense_inputs(case, device)[:3]

    def prepare(self, peer: Peer) -> Prepared:
        case = peer.measured(self.case)
        call = peer.forward(self.case, *self.inputs)
        return self.checked(peer, call, lambda out: accuracy.forward_error(case, *self.inputs, out), case.flops)


class Fp8Task(Task):
    """Dense forward of e4m3 inputs."""

    def __init__(self, case: DenseCase, device: torch.device) -> None:
        super().__init__(case.area, device)
        self.case = case
        self.inputs = fp8_inputs(case, device)
        self.wide = self.inputs.widened()

    def prepare(self, peer: Peer) -> Prepared:
        call = peer.fp8(self.case, self.inputs)
        return self.checked(peer, call, lambda out: accuracy.forward_error(self.case, *self.wide, out), self.case.flops)


class VarlenTask(Task):
    """Forward of packed sequences."""

    def __init__(self, case: VarlenCase, device: torch.device) -> None:
        super().__init__(case.area, device)
        self.case = case
        self.inputs = varlen_inputs(case, device)

    def prepare(self, peer: Peer) -> Prepared:
        call = peer.varlen(self.case, self.inputs)
        return self.checked(peer, call, lambda out: accuracy.varlen_error(self.case, self.inputs, out), self.case.flops)


class PagedTask(Task):
    """Prefill over a paged cache."""

    def __init__(self, case: PagedCase, device: torch.device) -> None:
        super().__init__(case.area, device)
        self.case = case
        self.inputs = paged_inputs(case, device)
        self.reference = accuracy.PagedReference(case, self.inputs)

    def prepare(self, peer: Peer) -> Prepared:
        call = peer.paged(self.case, self.inputs)
        return self.checked(peer, call, self.reference.error, self.case.flops)


def task_of(case: Case, device: torch.device) -> Task:
    """The task of a case, its inputs made."""
    if isinstance(case, HostCase):
        return HostTask(case, device)
    if isinstance(case, DecodeCase):
        return STEP_TASKS.get(case.area, DecodeTask)(case, device)
    if isinstance(case, CascadeCase):
        return CascadeTask(case, device)
    if isinstance(case, StepCase):
        return StepTask(case, device)
    if isinstance(case, InferenceCase):
        return task_of_inference(case, device)
    if isinstance(case, LandscapeCase):
        return LandscapeTask(case, device)
    if isinstance(case, MaskCase):
        return task_of_masks(case, device)
    if case.area in TRAINING_AREAS:
        assert isinstance(case, (DenseCase, VarlenCase))
        return BackwardTask(case, device) if case.area in BACKWARD_AREAS else LayerTask(case, device)
    if isinstance(case, PagedCase):
        return PagedTask(case, device)
    if isinstance(case, VarlenCase):
        return VarlenTask(case, device)
    return Fp8Task(case, device) if case.area == "fp8" else ForwardTask(case, device)
