"""How a case of masks is prepared, checked and timed, each beside the same call without the mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import broadhead
import torch

from broadhead_bench import accuracy_masks, timing
from broadhead_bench.accuracy import MAX_ERROR, worst
from broadhead_bench.accuracy_backward import GradientReference
from broadhead_bench.cases_masks import AREA, CausalityCase, ChunkCase, ImagesCase, MaskCase, TreeCase
from broadhead_bench.inputs import dense_inputs
from broadhead_bench.inputs_masks import chunk_inputs, images_inputs, tree_sets
from broadhead_bench.measure_backward import BackwardTask
from broadhead_bench.measure_decode import CHECKED_SETS
from broadhead_bench.peers.base import Peer, Skip
from broadhead_bench.task import Prepared, Task, one_by_one

Case = TypeVar("Case", ImagesCase, ChunkCase, TreeCase, CausalityCase)
ErrorOf = Callable[[Any], float]


class MaskTask(Task, Generic[Case]):
    """What the tasks share: a baseline computes another case, whose reference is made once as well."""

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(AREA, device)
        if not hasattr(broadhead, "make_query_ranges"):
            raise Skip("this version of broadhead has no masks that are given as values")
        self.case: Case = case
        self._errors: dict[Any, ErrorOf] = {}

    def reference(self, case: Case) -> ErrorOf:
        """What tells the error of a result of this case."""
        raise NotImplementedError

    def error_of(self, peer: Peer) -> ErrorOf:
        """What tells the error of a result of this implementation."""
        measured: Any = peer.measured_masks(self.case)
        if measured not in self._errors:
            self._errors[measured] = self.reference(measured)
        return self._errors[measured]


class ImagesTask(MaskTask[ImagesCase]):
    """A layer over images: forward, the gradients after it, or both in one call."""

    def __init__(self, case: ImagesCase, device: torch.device) -> None:
        super().__init__(case, device)
        self.inputs = images_inputs(case, device)
        if case.direction != "fwd":
            self.max_error = MAX_ERROR["backward"]
            self.measures_memory, self.head_start = BackwardTask.measures_memory, BackwardTask.head_start

    def reference(self, case: ImagesCase) -> ErrorOf:
        if case.direction == "fwd":
            return accuracy_masks.images_error(case, self.inputs)
        q, k, v, dout, _ = self.inputs
        return GradientReference(case.plain, q, k, v, dout, accuracy_masks.images_mask(case)).error

    def prepare(self, peer: Peer) -> Prepared:
        case, inputs = self.case, self.inputs
        call: Callable[[], Any]
        if case.direction == "fwd":
            call = peer.images(case, inputs)
        elif case.direction == "bwd":
            call = peer.backward(case, inputs, inputs.dout)
        else:
            call = peer.forward_backward(case, inputs, inputs.dout)
        return self.checked(peer, call, self.error_of(peer), work=0.0)


class ChunkTask(MaskTask[ChunkCase]):
    """Chunked prefill of images over an e4m3 cache."""

    def __init__(self, case: ChunkCase, device: torch.device) -> None:
        super().__init__(case, device)
        self.inputs = chunk_inputs(case, device)
        self.max_error = MAX_ERROR["fp8"]

    def reference(self, case: ChunkCase) -> ErrorOf:
        return accuracy_masks.chunk_error(case, self.inputs.fp8)

    def prepare(self, peer: Peer) -> Prepared:
        return self.checked(peer, peer.images_chunk(self.case, self.inputs), self.error_of(peer), work=0.0)


class TreeTask(MaskTask[TreeCase]):
    """A step of drafts, in a CUDA graph over input sets as those of decode."""

    def __init__(self, case: TreeCase, device: torch.device) -> None:
        super().__init__(case, device)
        self.sets = tree_sets(case, device)

    def reference(self, case: TreeCase) -> ErrorOf:
        errors = [accuracy_masks.tree_error(case, inputs) for inputs in self.sets[:CHECKED_SETS]]
        return lambda results: worst([error(result) for error, result in zip(errors, results, strict=False)])

    def prepare(self, peer: Peer) -> Prepared:
        calls = [peer.tree(self.case, inputs) for inputs in self.sets]
        error = self.error_of(peer)([call() for call in calls])
        return Prepared(peer, list(calls), error, 0.0, peer.kernel(), peer.versions())

    def time(self, prepared: list[Prepared], budget: float) -> list[float | Exception]:
        if not self.on_gpu:
            return super().time(prepared, budget)
        return one_by_one(prepared, lambda item: timing.time_graph(item.calls, self.device, budget))


class CausalityTask(MaskTask[CausalityCase]):
    """Forward of sequences of which some are causal."""

    def __init__(self, case: CausalityCase, device: torch.device) -> None:
        super().__init__(case, device)
        self.inputs = dense_inputs(case.plain, device)

    def reference(self, case: CausalityCase) -> ErrorOf:
        return accuracy_masks.causality_error(case, self.inputs)

    def prepare(self, peer: Peer) -> Prepared:
        return self.checked(peer, peer.causal_by_sequence(self.case, self.inputs), self.error_of(peer), work=0.0)


def task_of_masks(case: MaskCase, device: torch.device) -> Task:
    """The task of a case of the area, its inputs made."""
    if isinstance(case, ImagesCase):
        return ImagesTask(case, device)
    if isinstance(case, ChunkCase):
        return ChunkTask(case, device)
    return TreeTask(case, device) if isinstance(case, TreeCase) else CausalityTask(case, device)
