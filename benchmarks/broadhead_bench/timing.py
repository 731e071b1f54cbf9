"""How things are timed: device events with a flushed L2, CUDA graphs, and the host clock."""

from __future__ import annotations

import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

MIN_REPETITIONS = 20
MAX_REPETITIONS = 400
WARM_UP_SECONDS = 0.05
#: Cycles a second of a GPU, about.
CLOCK = 1.8e9
#: A call may launch 20 kernels: far below the 1024 launches that a CUDA queue holds, so no call waits for a slot.
HOST_CALLS_PER_BATCH = 25


def l2_bytes(device: torch.device) -> int:
    """The size of a CUDA device's L2; 64 MiB where torch does not say."""
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or (64 << 20)


class L2Flusher:
    """Overwrites more memory than the L2 holds, so that the next kernel finds none of its inputs in it.

    Args of the constructor: head_start: then the device idles for so many seconds, about, in which the host can enqueue
    all launches of a call that is timed, as it does where it runs ahead of the device.
    """

    def __init__(self, device: torch.device, head_start: float = 0.0) -> None:
        self._cycles = int(head_start * CLOCK)
        size = max(4 * l2_bytes(device), 256 << 20)
        self._buffer = torch.empty(size // 4, dtype=torch.int32, device=device)

    def __call__(self) -> None:
        self._buffer.zero_()
        if self._cycles:
            torch.cuda._sleep(self._cycles)


def time_interleaved(
    functions: list[Callable[[], Any]],
    flush: Callable[[], None],
    budget: float,
    least: int = MIN_REPETITIONS,
    warm_up: float = WARM_UP_SECONDS,
) -> list[float | Exception]:
    """Median seconds of each function on the device, each run after a flushed L2.

    The functions take turns, in an order shuffled for each round, so that a clock that drifts over seconds, or that the
    function before has pulled down, favours none of them.

    Args:
        functions: each enqueues its work on the current stream.
        flush: overwrites the L2.
        budget: seconds to spend on the timed runs of one function, as far as ``least`` allows.
        least: timed runs of one function.
        warm_up: seconds that each function runs before it is timed, in at most three runs where this is 0.

    Returns:
        For each function its seconds, or what it raised while warming up.
    """
    results: list[float | Exception] = [0.0] * len(functions)
    repetitions = [0] * len(functions)
    for index, function in enumerate(functions):
        try:
            repetitions[index] = _repetitions(function, flush, budget, least, warm_up)
        except Exception as error:  # any implementation may fail in any way; the others are timed all the same
            results[index] = error
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in functions]
    for turn in spread_turns(repetitions):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush()
        begin.record()
        functions[turn]()
        end.record()
        events[turn].append((begin, end))
    torch.cuda.synchronize()
    for index, pairs in enumerate(events):
        if pairs:
            results[index] = statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3
    return results


def _repetitions(
    function: Callable[[], Any], flush: Callable[[], None], budget: float, least: int, warm_up: float
) -> int:
    """Warm up, and say how many runs fit the budget."""
    function()
    torch.cuda.synchronize()
    start, runs = time.perf_counter(), 0
    while runs < min(3, least) or time.perf_counter() - start < warm_up:
        flush()
        function()
        torch.cuda.synchronize()
        runs += 1
    estimate = (time.perf_counter() - start) / runs
    return max(least, min(MAX_REPETITIONS, int(budget / estimate)))


def spread_turns(repetitions: list[int]) -> list[int]:
    """Indices in the order of their runs: index i comes ``repetitions[i]`` times, spread evenly, rounds shuffled."""
    shuffle = random.Random(0)
    rounds = max(repetitions, default=0)
    order: list[int] = []
    for turn in range(rounds):
        due = [i for i, count in enumerate(repetitions) if (turn + 1) * count // rounds > turn * count // rounds]
        shuffle.shuffle(due)
        order += due
    return order


def time_graph(functions: list[Callable[[], Any]], device: torch.device, budget: float, min_calls: int = 8) -> float:
    """Median seconds of one call when ``functions`` run one after the other in a CUDA graph.

    Args:
        functions: the same call on different inputs, together larger than the L2, so that none finds its own there.
        min_calls: calls a graph holds at least.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for function in functions * 2:
            function()
    stream.synchronize()
    rounds = max(1, -(-min_calls // len(functions)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for function in functions * rounds:
            function()
    torch.cuda.synchronize()
    start, runs = time.perf_counter(), 0
    while runs < 3 or time.perf_counter() - start < WARM_UP_SECONDS:
        graph.replay()
        torch.cuda.synchronize()
        runs += 1
    estimate = (time.perf_counter() - start) / runs
    repetitions = max(MIN_REPETITIONS, min(MAX_REPETITIONS, int(budget / estimate)))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return statistics.median(times) / 1e3 / (rounds * len(functions))


def time_host(function: Callable[[], Any], synchronize: Callable[[], None], budget: float) -> float:
    """Median seconds that one call of ``function`` keeps the host busy; the device catches up between batches."""
    for _ in range(HOST_CALLS_PER_BATCH):
        function()
    synchronize()
    samples: list[float] = []
    clock = time.perf_counter
    enabled = gc.isenabled()
    gc.disable()
    try:
        deadline = clock() + budget
        while len(samples) < MIN_REPETITIONS or (clock() < deadline and len(samples) < 100_000):
            for _ in range(HOST_CALLS_PER_BATCH):
                start = clock()
                function()
                samples.append(clock() - start)
            synchronize()
    finally:
        if enabled:
            gc.enable()
    return statistics.median(samples)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that one call takes on the device at its peak, beyond what lay there before and what it returns."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return max(0, peak - before - held_bytes(result))


def held_bytes(result: Any) -> int:
    """Bytes of the memory that a result's tensors hold, each piece once."""
    tensors = [result] if isinstance(result, torch.Tensor) else [t for t in result if isinstance(t, torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def time_cpu(function: Callable[[], Any], budget: float) -> float:
    """Median seconds of a call that works on the CPU."""
    function()
    samples: list[float] = []
    deadline = time.perf_counter() + budget
    while len(samples) < 3 or (time.perf_counter() < deadline and len(samples) < MAX_REPETITIONS):
        start = time.perf_counter()
        function()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """The call in a CUDA graph of its own: running it costs the host next to nothing.

    Raises:
        RuntimeError: it can not be captured.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    # The graph's parameters hold addresses of the inputs, which the call keeps.
    return lambda kept=call: graph.replay()  # type: ignore[misc]
