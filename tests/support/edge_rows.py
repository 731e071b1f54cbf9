"""How a row of the table meets the edges: the shapes it takes, the launches it offers, one checked run."""

from __future__ import annotations

import random
import time

import torch
from broadhead import support
from edge_calls import Shape, build, check
from edges import Edge
from gpu_calls import ROWS, TORCH_DTYPES, cache_dtype, column_step, supports

#: How a call may be launched; metadata only over a cache.
LAUNCHES = (
    {},
    {"num_splits": 3},
    {"pack_gqa": False},
    {"num_splits": 8, "metadata": True},
    {"num_splits": 2, "pack_gqa": True},
)
#: A row of every kind of kernel, the smallest there is: for runs that take seconds a call.
ONE_OF_A_KIND = tuple({(type(row.tile), row.kv_dtype): row for row in reversed(ROWS) if row.dtype != "fp16"}.values())
#: Seconds after which a launch counts as hanging.
PATIENCE = 60.0


def takes(row: support.KernelRow, edge: Edge) -> bool:
    """Whether the row computes the call at all."""
    mask = {"causal": edge.causal, "window": max(edge.window) >= 0, "attention_chunk": edge.attention_chunk > 0}
    mask |= {name: bool(getattr(edge, name)) for name in ("ranges", "tree", "causal_each")}
    mixed = bool(row.kv_dtype)  # keys of another dtype are a cache
    return supports(row, {name: True for name, used in mask.items() if used}) and not (mixed and edge.packed_k)


def suited(row: support.KernelRow, edge: Edge) -> Edge:
    """The call with the mask that the row is for: at least a window wider than any sequence."""
    if "window" in row.requires and edge.window[0] < 0:
        return edge.with_(window=(1 << 20, edge.window[1]))
    return edge


def shape_of(row: support.KernelRow, turn: int, edge: Edge | None = None, **options) -> Shape:
    """A shape of the row: its largest head dims, or odd ones; launches in turn."""
    step = column_step(row)
    odd = (row.head_dim - step, max(step, row.head_dim // 128 * 64 + step), row.head_dim)
    launch = dict(LAUNCHES[turn % len(LAUNCHES)])
    if edge is None or edge.function != "kvcache" or row.kv_dtype:
        launch.pop("metadata", None)
    keys = TORCH_DTYPES[cache_dtype(row)]
    dtype = TORCH_DTYPES[row.dtype]
    groups = ((4, 2), (2, 2), (6, 1), (8, 1))
    heads_q, heads_kv = groups[turn // 2 % len(groups)]
    return Shape(
        head_dim=odd[turn % 3],
        head_dim_v=row.head_dim_v - (step if turn % 4 == 1 else 0),
        heads_q=heads_q,
        heads_kv=heads_kv,
        dtype=dtype,
        kv_dtype=keys if keys != dtype else None,
        qv="qv" in row.requires,
        **launch,
        **options,
    )


def run_edge(edge: Edge, shape: Shape, device: torch.device, rng: random.Random, **overrides) -> None:
    """Build, run and check one call; what goes wrong names it, a fault of the device too."""
    try:
        call = build(edge, shape, device, rng)
        result = call.run(**overrides)
        wait(device)
    except Exception as error:
        raise AssertionError(f"{edge} {shape}: {type(error).__name__}: {error}") from error
    check(call, *result)


def wait(device: torch.device) -> None:
    """Wait for the current stream as long as PATIENCE: a test that hangs must fail, not stand."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    start = time.monotonic()
    while not event.query():
        assert time.monotonic() - start < PATIENCE, f"the device has not answered for {PATIENCE} seconds: a hang"
        time.sleep(0.0002)
