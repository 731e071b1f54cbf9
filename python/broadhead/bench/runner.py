"""Runs the cases of an area: inputs, check against fp32, timing, records."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from broadhead.bench import accuracy, timing
from broadhead.bench.cases import DecodeCase, DenseCase, HostCase, cases_of
from broadhead.bench.peers import DecodeInputs, Peer, Skip, all_peers
from broadhead.bench.records import RunInfo, make_record
from broadhead.errors import UnsupportedError

MAX_INPUT_SETS = 8
#: Input sets of a decode case hold at least this many times the L2.
L2_MULTIPLE = 4


class Options(NamedTuple):
    """What to run: names of implementations, a text that case names contain, seconds a measurement."""

    device: torch.device
    implementations: tuple[str, ...] = ()  # empty: all
    case_filter: str = ""
    budget: float = 0.5


@dataclass
class Outcome:
    """Records and complaints of a run. ``broken`` counts what must not happen: broadhead wrong or raising."""

    records: list[dict[str, Any]] = field(default_factory=list)
    broken: int = 0


class Measurement(NamedTuple):
    value: float
    rel_error: float
    kernel: str | None


def run_area(
    area: str, options: Options, run: RunInfo, log: Callable[[str], None], on_record: Callable[[dict[str, Any]], None]
) -> Outcome:
    """Run every selected case with every available implementation.

    Args:
        area: one of cases.AREAS.
        log: gets one line for whatever is skipped or measured.
        on_record: gets each record at once, so that an interrupted run keeps what it has.
    """
    outcome = Outcome()
    peers = [p for p in all_peers() if not options.implementations or p.name in options.implementations]
    available = []
    for peer in peers:
        reason = peer.why_unavailable(options.device)
        if reason is None:
            available.append(peer)
        else:
            log(f"skip {peer.name}: {reason}")
    cases = [c for c in cases_of(area, options.device.type == "cpu") if options.case_filter in c.name]
    if not cases:
        log(f"no case of {area} contains {options.case_filter!r}")
    for case in cases:
        for peer, measured in _measure_case(area, case, available, options):
            if isinstance(measured, Exception):
                if peer.name == "broadhead" and not isinstance(measured, (Skip, UnsupportedError)):
                    outcome.broken += 1
                log(f"skip {peer.name}, {case.name}: {_one_line(measured)}")
                continue
            record = make_record(
                run, area, case.name, peer.name, measured.value, measured.rel_error, measured.kernel, peer.versions()
            )
            outcome.records.append(record)
            on_record(record)
            log(
                f"{case.name}  {peer.name}  {record['value']:g} {record['unit']}  rel_error {record['rel_error']:.1e}"
                + (f"  {record['kernel']}" if record["kernel"] else "")
            )
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    return outcome


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0][:300] if lines else ""
    return text if isinstance(error, Skip) else f"{type(error).__name__}: {text}"


def _measure_case(
    area: str, case: Any, peers: list[Peer], options: Options
) -> Iterator[tuple[Peer, Measurement | Exception]]:
    """Measure one case with each peer on the same inputs."""
    torch.manual_seed(0)
    if area == "host":
        measure = _host_measure(case, options)
    elif area == "decode":
        measure = _decode_measure(case, options)
    else:
        measure = _dense_measure(case, options)
    for peer in peers:
        try:
            with torch.no_grad(), warnings.catch_warnings(), peer.context():
                warnings.simplefilter("ignore")
                measurement = measure(peer)
            limit = accuracy.MAX_ERROR[area]
            if not measurement.rel_error <= limit:  # also when it is NaN
                raise ArithmeticError(
                    f"wrong result: relative error {measurement.rel_error:.3g} > {limit:g}, not timed"
                )
            yield peer, measurement
        except Exception as error:  # a peer may fail in any way; the runner decides what it means
            yield peer, error


def _dense_measure(case: DenseCase, options: Options) -> Callable[[Peer], Measurement]:
    q, k, v, dout = _dense_inputs(case, options.device)
    flush = timing.L2Flusher(options.device) if options.device.type == "cuda" else None

    def measure(peer: Peer) -> Measurement:
        if case.area == "forward":
            call: Callable[[], Any] = peer.forward(case, q, k, v)
            out = call()
            kernel = peer.kernel()
            error = accuracy.forward_error(case, q, k, v, out)
            del out
        else:
            call = peer.backward(case, q, k, v, dout)
            gradients = call()
            kernel = peer.kernel()
            error = accuracy.backward_error(case, q, k, v, dout, gradients)
            del gradients
        if not error <= accuracy.MAX_ERROR[case.area]:
            return Measurement(0.0, error, kernel)
        if flush is None:
            seconds = timing.time_cpu(call, options.budget)
        else:
            seconds = timing.time_device(call, flush, options.budget)
        return Measurement(case.flops / seconds / 1e12, error, kernel)

    return measure


def _decode_measure(case: DecodeCase, options: Options) -> Callable[[Peer], Measurement]:
    on_gpu = options.device.type == "cuda"
    count = 1
    if on_gpu:
        needed = -(-L2_MULTIPLE * timing.l2_bytes(options.device) // case.kv_bytes)
        count = max(2, min(MAX_INPUT_SETS, needed))
    sets = [_decode_inputs(case, options.device) for _ in range(count)]

    def measure(peer: Peer) -> Measurement:
        calls = [peer.decode(case, inputs) for inputs in sets]
        errors = []
        for call, inputs in zip(calls, sets):
            errors.append(_decode_error(case, inputs, call()))
        kernel = peer.kernel()
        error = max(errors) if all(e == e for e in errors) else float("nan")
        if not error <= accuracy.MAX_ERROR["decode"]:
            return Measurement(0.0, error, kernel)
        if on_gpu:
            seconds = timing.time_graph(calls, options.device, options.budget)
        else:
            seconds = timing.time_cpu(calls[0], options.budget)
        return Measurement(case.kv_bytes / seconds / 1e9, error, kernel)

    return measure


def _host_measure(case: HostCase, options: Options) -> Callable[[Peer], Measurement]:
    on_gpu = options.device.type == "cuda"

    def synchronize() -> None:
        if on_gpu:
            torch.cuda.synchronize(options.device)

    if case.decode is not None:
        decode_case, inputs = case.decode, _decode_inputs(case.decode, options.device)
    else:
        assert case.dense is not None
        dense_case, (q, k, v, _) = case.dense, _dense_inputs(case.dense, options.device)

    def measure(peer: Peer) -> Measurement:
        if case.decode is not None:
            call = peer.decode(decode_case, inputs)
            error = _decode_error(decode_case, inputs, call())
        else:
            call = peer.forward(dense_case, q, k, v)
            error = accuracy.forward_error(dense_case, q, k, v, call())
        kernel = peer.kernel()
        seconds = timing.time_host(call, synchronize, options.budget)
        return Measurement(seconds * 1e6, error, kernel)

    return measure


def _decode_error(case: DecodeCase, inputs: DecodeInputs, out: Tensor) -> float:
    return accuracy.decode_error(case, inputs.q, inputs.k_cache, inputs.v_cache, inputs.page_table, out)


def _dense_inputs(case: DenseCase, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and dout in bf16, random normal."""

    def normal(heads: int) -> Tensor:
        return torch.randn(case.batch, case.seqlen, heads, case.head_dim, device=device, dtype=torch.bfloat16)

    return normal(case.num_heads_q), normal(case.num_heads_kv), normal(case.num_heads_kv), normal(case.num_heads_q)


def _decode_inputs(case: DecodeCase, device: torch.device) -> DecodeInputs:
    """Random normal bf16 caches whose pages are scattered."""
    pages = case.batch * case.pages_per_sequence
    shape = (pages, case.page_size, case.num_heads_kv, case.head_dim)
    return DecodeInputs(
        q=torch.randn(case.batch, 1, case.num_heads_q, case.head_dim, device=device, dtype=torch.bfloat16),
        k_cache=torch.randn(shape, device=device, dtype=torch.bfloat16),
        v_cache=torch.randn(shape, device=device, dtype=torch.bfloat16),
        page_table=torch.randperm(pages, device=device).view(case.batch, -1).to(torch.int32),
        cache_seqlens=torch.full((case.batch,), case.context, dtype=torch.int32, device=device),
    )
