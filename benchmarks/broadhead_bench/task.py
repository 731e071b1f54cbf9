"""What the measurement of a case consists of: each implementation is prepared, checked against fp32, and timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from broadhead_bench import accuracy, timing
from broadhead_bench.peers.base import Peer
from broadhead_bench.records import UNITS

Call = Callable[[], Any]

#: Work in a unit of each rate.
SCALES = {"TFLOP/s": 1e12, "GB/s": 1e9, "tokens/s": 1.0}


class Prepared(NamedTuple):
    """A call of one implementation that has run once and been checked."""

    peer: Peer
    calls: list[Call]  # the same on several input sets (decode), else one
    error: float
    work: float  # what one call does: floating-point operations or bytes; not used where the unit is a time
    kernel: str | None
    versions: dict[str, str]
    peak_bytes: int | None = None  # memory of one call beyond its inputs and outputs, where the area measures that


class Measurement(NamedTuple):
    value: float
    seconds: float
    prepared: Prepared


class Task:
    """One case on one device: ``prepare`` is called with each implementation, ``time`` with those that are right."""

    #: Timed runs of each implementation at least.
    repetitions = timing.MIN_REPETITIONS
    #: Seconds that the host has to enqueue a call before the device begins it.
    head_start = 0.0
    #: Whether the memory of a call is measured.
    measures_memory = False

    def __init__(self, area: str, device: torch.device) -> None:
        self.area = area
        self.device = device
        self.on_gpu = device.type == "cuda"
        #: The largest relative error of a right result.
        self.max_error = accuracy.MAX_ERROR[area]

    def prepare(self, peer: Peer) -> Prepared:
        """Run the implementation once and compare with fp32."""
        raise NotImplementedError

    def time(self, prepared: list[Prepared], budget: float) -> list[float | Exception]:
        """Seconds of a call of each implementation; they take turns where the device is timed."""
        if not self.on_gpu:
            return one_by_one(prepared, lambda item: timing.time_cpu(item.calls[0], budget))
        flush = timing.L2Flusher(self.device, self.head_start)
        calls = [_within(item.peer, item.calls[0]) for item in prepared]
        return timing.time_interleaved(calls, flush, budget, self.repetitions)

    def value(self, item: Prepared, seconds: float) -> float:
        """The result in the unit of the area."""
        unit = UNITS[self.area]
        return seconds * 1e6 if unit == "us" else item.work / seconds / SCALES[unit]

    def checked(self, peer: Peer, call: Call, error_of: Callable[[Any], float], work: float) -> Prepared:
        """The call after its first run."""
        result = call()
        kernel = peer.kernel()
        error, versions, peak = error_of(result), peer.versions(), None
        del result
        if self.measures_memory and self.on_gpu:
            peak = timing.peak_bytes(call, self.device)
        return Prepared(peer, [call], error, work, kernel, versions, peak)


def _within(peer: Peer, call: Call) -> Call:
    """The call inside what the implementation wants around it, for calls that take turns with others."""

    def run() -> None:
        with peer.context():
            call()

    return run


def one_by_one(prepared: list[Prepared], time: Callable[[Prepared], float]) -> list[float | Exception]:
    """Time each implementation on its own."""
    results: list[float | Exception] = []
    for item in prepared:
        try:
            with item.peer.context():
                results.append(time(item))
        except Exception as error:  # a peer may fail in any way; the others are timed all the same
            results.append(error)
    return results
