"""Full GPU set: decode in captured graphs: thousands of replays of random steps, and the steps of the engines.

BROADHEAD_REPLAYS sets the replays of each kind of call: the default, 12,000 in all, is for every run.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from calls import Call
from decode_batch import DecodeBatch, check_replays
from gpu_calls import capture, expected_phase
from layouts import NAN
from server_flows import FLOW_CASES, FLOWS, LONGEST, check_steps

pytestmark = [pytest.mark.gpu, pytest.mark.full, pytest.mark.usefixtures("first_rows")]

REPLAYS = int(os.environ.get("BROADHEAD_REPLAYS", "2000"))
#: The call, and its metadata: none, computed in the graph, or of the first lengths for ever.
STEPS = {
    "vllm_128": (
        {"head_dim": 128, "heads_q": 8, "heads_kv": 2, "k_layout": "interleaved", "num_splits": 32, "ragged_q": True},
        "in_graph",
    ),
    "pages_of_one_64": ({"head_dim": 64, "heads_q": 8, "heads_kv": 1, "page_size": 1, "batch": 3}, "stale"),
    "tokens_256": ({"head_dim": 256, "heads_q": 8, "heads_kv": 1, "seqlen_q": 4, "page_size": 64}, "none"),
    "rows_24_128": ({"head_dim": 128, "heads_q": 16, "heads_kv": 2, "seqlen_q": 3, "num_splits": 32}, "in_graph"),
    "window_192": ({"head_dim": 192, "heads_q": 2, "heads_kv": 2, "window": (200, 0), "batch": 33}, "in_graph"),
    "one_512": ({"head_dim": 512, "heads_q": 8, "heads_kv": 1, "batch": 1, "longest": 20000, "page_size": 64}, "stale"),
}


def step_of(name: str, device: torch.device, longest: int = 0) -> tuple[DecodeBatch, str]:
    options, metadata = STEPS[name]
    options = {"batch": 8, "seqlen_q": 1, "longest": 2000, "page_size": 16, "causal": True, **options}
    size, seqlen_q, most = (options.pop(key) for key in ("batch", "seqlen_q", "longest"))
    call = Call("kvcache", (seqlen_q,) * size, (longest or most,) * size, **options)
    return DecodeBatch(call, device), metadata


@pytest.mark.parametrize("name", STEPS)
def test_random_replays(name: str, cuda: torch.device, row_ran: Callable) -> None:
    """One graph for steps of all lengths: short and long, empty, of other pages each."""
    batch, kind = step_of(name, cuda)
    metadata = None if kind == "none" else batch.scheduler_metadata()
    results: list[tuple[torch.Tensor, torch.Tensor]] = []

    def step() -> None:
        if kind == "in_graph":
            batch.scheduler_metadata(out=metadata)
        results.append(batch.run(scheduler_metadata=metadata))

    graph = capture(step)
    call = batch.call
    row_ran(phase=expected_phase(call, planned=kind != "none"), dtype=call.dtype, head_dim=call.head_dim)
    out, lse = results[-1]

    def replay() -> tuple[torch.Tensor, torch.Tensor]:
        lse.fill_(NAN)
        graph.replay()
        return out, lse

    check_replays(batch, replay, REPLAYS)


@pytest.mark.parametrize("engine, padding", FLOW_CASES)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_engine_flow(engine: str, padding: str, head_dim: int, cuda: torch.device, row_ran: Callable) -> None:
    """A graph of eight requests serves fewer; what the engines leave in the rest of the batch reaches no result."""
    flow = FLOWS[engine](head_dim, padding, cuda)
    flow.advance((LONGEST, 700, 1, 1200, 33))
    graph = capture(flow.step)
    row_ran(phase="decode", dtype=flow.batch.call.dtype, head_dim=head_dim)
    check_steps(flow, graph.replay)
    # Once more eagerly, as an engine does above its largest graph: the buffers are the same.
    check_steps(flow, flow.step)


@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_speculative_flow_of_24_rows(head_dim: int, cuda: torch.device, row_ran: Callable) -> None:
    """Three tokens of eight heads of a KV head: with metadata a kernel written for the device, where there is one."""
    flow = FLOWS["lmdeploy"](head_dim, "dummy_page", cuda, heads_q=16)
    flow.advance((LONGEST, 700, 3, 1200, 33))
    graph = capture(flow.step)
    phase = expected_phase(flow.batch.call, planned=True)
    row_ran(phase=phase, dtype=flow.batch.call.dtype, head_dim=head_dim)
    check_steps(flow, graph.replay)
    check_steps(flow, flow.step)


@pytest.mark.parametrize("engine, padding", FLOW_CASES)
def test_engine_flow_of_many(engine: str, padding: str, cuda: torch.device, row_ran: Callable) -> None:
    """A graph of 512 requests with a handful, with all but one, with none."""
    flow = FLOWS[engine](128, padding, cuda, batch=512, heads_q=16, heads_kv=4)
    flow.advance((LONGEST,) * 3)
    graph = capture(flow.step)
    row_ran(phase="decode", dtype=flow.batch.call.dtype, head_dim=128)
    steps = (tuple(range(1, 1300, 260)), (*(n % 70 for n in range(510)), LONGEST), (), (LONGEST,))
    check_steps(flow, graph.replay, steps)
