"""How a case of each area is prepared, checked and timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from broadhead.bench import accuracy, timing
from broadhead.bench.cases import Case, DecodeCase, DenseCase, HostCase, PagedCase, VarlenCase
from broadhead.bench.inputs import dense_inputs, fp8_inputs, paged_inputs, varlen_inputs
from broadhead.bench.peers import Peer

MAX_INPUT_SETS = 8
#: Input sets of a decode case hold at least this many times the L2.
L2_MULTIPLE = 4

Call = Callable[[], Any]


class Prepared(NamedTuple):
    """A call of one implementation that has run once and been checked."""

    peer: Peer
    calls: list[Call]  # the same on several input sets (decode), else one
    error: float
    work: float  # what one call does, in the unit of the rate: floating-point operations or bytes
    kernel: str | None
    versions: dict[str, str]


class Measurement(NamedTuple):
    value: float
    seconds: float
    prepared: Prepared


class Task:
    """One case on one device: ``prepare`` is called with each implementation, ``time`` with those that are right."""

    scale = 1e12

    def __init__(self, area: str, device: torch.device) -> None:
        self.area = area
        self.device = device
        self.on_gpu = device.type == "cuda"

    def prepare(self, peer: Peer) -> Prepared:
        """Run the implementation once and compare with fp32."""
        raise NotImplementedError

    def time(self, prepared: list[Prepared], budget: float) -> list[float | Exception]:
        """Seconds of a call of each implementation; they take turns where the device is timed."""
        if not self.on_gpu:
            return _one_by_one(prepared, lambda item: timing.time_cpu(item.calls[0], budget))
        flush = timing.L2Flusher(self.device)
        return timing.time_interleaved([_within(item.peer, item.calls[0]) for item in prepared], flush, budget)

    def value(self, item: Prepared, seconds: float) -> float:
        """The result in the unit of the area."""
        return item.work / seconds / self.scale

    def _checked(self, peer: Peer, call: Call, error_of: Callable[[Any], float], work: float) -> Prepared:
        result = call()
        kernel = peer.kernel()
        return Prepared(peer, [call], error_of(result), work, kernel, peer.versions())


def _within(peer: Peer, call: Call) -> Call:
    """The call inside what the implementation wants around it, for calls that take turns with others."""

    def run() -> None:
        with peer.context():
            call()

    return run


def _one_by_one(prepared: list[Prepared], time: Callable[[Prepared], float]) -> list[float | Exception]:
    """Time each implementation on its own."""
    results: list[float | Exception] = []
    for item in prepared:
        try:
            with item.peer.context():
                results.append(time(item))
        except Exception as error:  # a peer may fail in any way; the others are timed all the same
            results.append(error)
    return results


class ForwardTask(Task):
    """Dense forward, with a window or without."""

    def __init__(self, case: DenseCase, device: torch.device) -> None:
        super().__init__(case.area, device)
        self.case = case
        self.inputs = dense_inputs(case, device)[:3]

    def prepare(self, peer: Peer) -> Prepared:
        case = peer.measured(self.case)
        call = peer.forward(self.case, *self.inputs)
        return self._checked(peer, call, lambda out: accuracy.forward_error(case, *self.inputs, out), case.flops)


class BackwardTask(Task):
    """Dense backward after one forward pass."""

    def __init__(self, case: DenseCase, device: torch.device) -> None:
        super().__init__(case.area, device)
        self.case = case
        self.inputs = dense_inputs(case, device)

    def prepare(self, peer: Peer) -> Prepared:
        call = peer.backward(self.case, *self.inputs)
        return self._checked(
            peer, call, lambda grads: accuracy.backward_error(self.case, *self.inputs, grads), self.case.flops
        )


class Fp8Task(Task):
    """Dense forward of e4m3 inputs."""

    def __init__(self, case: DenseCase, device: torch.device) -> None:
        super().__init__(case.area, device)
        self.case = case
        self.inputs = fp8_inputs(case, device)
        self.wide = self.inputs.widened()

    def prepare(self, peer: Peer) -> Prepared:
        call = peer.fp8(self.case, self.inputs)
        return self._checked(
            peer, call, lambda out: accuracy.forward_error(self.case, *self.wide, out), self.case.flops
        )


class VarlenTask(Task):
    """Forward of packed sequences."""

    def __init__(self, case: VarlenCase, device: torch.device) -> None:
        super().__init__("varlen", device)
        self.case = case
        self.inputs = varlen_inputs(case, device)

    def prepare(self, peer: Peer) -> Prepared:
        call = peer.varlen(self.case, self.inputs)
        return self._checked(
            peer, call, lambda out: accuracy.varlen_error(self.case, self.inputs, out), self.case.flops
        )


class PagedTask(Task):
    """Prefill over a paged cache."""

    def __init__(self, case: PagedCase, device: torch.device) -> None:
        super().__init__(case.area, device)
        self.case = case
        self.inputs = paged_inputs(case, device)

    def prepare(self, peer: Peer) -> Prepared:
        call = peer.paged(self.case, self.inputs)
        return self._checked(peer, call, lambda out: accuracy.paged_error(self.case, self.inputs, out), self.case.flops)


class DecodeTask(Task):
    """Paged decode in a CUDA graph, over input sets that together do not fit the L2."""

    scale = 1e9

    def __init__(self, case: DecodeCase, device: torch.device) -> None:
        super().__init__("decode", device)
        self.case = case
        count = 1
        if self.on_gpu:
            needed = -(-L2_MULTIPLE * timing.l2_bytes(device) // case.kv_bytes)
            count = max(2, min(MAX_INPUT_SETS, needed))
        self.sets = [paged_inputs(case, device) for _ in range(count)]

    def prepare(self, peer: Peer) -> Prepared:
        calls = [peer.decode(self.case, inputs) for inputs in self.sets]
        errors = [accuracy.paged_error(self.case, inputs, call()) for call, inputs in zip(calls, self.sets)]
        error = max(errors) if all(e == e for e in errors) else float("nan")
        return Prepared(peer, calls, error, self.case.kv_bytes, peer.kernel(), peer.versions())

    def time(self, prepared: list[Prepared], budget: float) -> list[float | Exception]:
        if not self.on_gpu:
            return super().time(prepared, budget)
        return _one_by_one(prepared, lambda item: timing.time_graph(item.calls, self.device, budget))


class HostTask(Task):
    """Host time of one eager call."""

    def __init__(self, case: HostCase, device: torch.device) -> None:
        super().__init__("host", device)
        self.inner: DecodeCase | DenseCase
        if case.decode is not None:
            self.inner, self.paged = case.decode, paged_inputs(case.decode, device)
        else:
            assert case.dense is not None
            self.inner, self.dense = case.dense, dense_inputs(case.dense, device)[:3]

    def prepare(self, peer: Peer) -> Prepared:
        inner = self.inner
        if isinstance(inner, DecodeCase):
            call = peer.decode(inner, self.paged)
            return self._checked(peer, call, lambda out: accuracy.paged_error(inner, self.paged, out), 0.0)
        call = peer.forward(inner, *self.dense)
        return self._checked(peer, call, lambda out: accuracy.forward_error(inner, *self.dense, out), 0.0)

    def time(self, prepared: list[Prepared], budget: float) -> list[float | Exception]:
        def synchronize() -> None:
            if self.on_gpu:
                torch.cuda.synchronize(self.device)

        return _one_by_one(prepared, lambda item: timing.time_host(item.calls[0], synchronize, budget))

    def value(self, item: Prepared, seconds: float) -> float:
        return seconds * 1e6


def task_of(case: Case, device: torch.device) -> Task:
    """The task of a case, its inputs made."""
    if isinstance(case, HostCase):
        return HostTask(case, device)
    if isinstance(case, DecodeCase):
        return DecodeTask(case, device)
    if isinstance(case, PagedCase):
        return PagedTask(case, device)
    if isinstance(case, VarlenCase):
        return VarlenTask(case, device)
    if case.area == "fp8":
        return Fp8Task(case, device)
    return BackwardTask(case, device) if case.area == "backward" else ForwardTask(case, device)
