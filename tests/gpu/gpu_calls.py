"""Small calls for the GPU tests, the phase each must run in, and CUDA-graph capture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from calls import Built, Call

#: Packed rows (tokens x query heads of one KV head) up to which decode rows, and from which prefill rows, must run.
SURELY_DECODE, SURELY_PREFILL = 16, 128


def expected_phase(built: Built) -> str | None:
    """The phase whose rows must run; None between the two, where the choice is a matter of speed."""
    call = built.call
    seqlen_q = built.kwargs.get("max_seqlen_q") or max(call.seqlens_q, default=0)
    rows = seqlen_q * call.heads_q // call.heads_kv
    return "decode" if rows <= SURELY_DECODE else "prefill" if rows >= SURELY_PREFILL else None


def decode_call(head_dim: int, **options) -> Call:
    """A small paged decode step: ragged lengths, one empty, garbage past the pages."""
    defaults = {
        "seqlens_q": (1, 1, 1, 1),
        "seqlens_k": (300, 17, 0, 129),
        "heads_q": 4,
        "heads_kv": 1,
        "page_size": 16,
        "slack_k": 33,
    }
    return Call("kvcache", head_dim=head_dim, **{**defaults, **options})


def prefill_call(head_dim: int, **options) -> Call:
    """A small packed prefill: a tile and a bit, one row, nothing, and a long prefix."""
    defaults = {
        "seqlens_q": (133, 1, 0, 65),
        "seqlens_k": (133, 40, 7, 209),
        "heads_q": 4,
        "heads_kv": 2,
        "causal": True,
    }
    return Call("varlen", head_dim=head_dim, **{**defaults, **options})


def shortened(built: Built, lengths: list[int]) -> Built:
    """The same pages with other cache_seqlens (at most the built ones)."""
    return dataclasses.replace(
        built,
        call=built.call.with_(seqlens_k=tuple(lengths)),
        k=[k[:n] for k, n in zip(built.k, lengths, strict=False)],
        v=[v[:n] for v, n in zip(built.v, lengths, strict=False)],
    )


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Warm up on a side stream, then record ``work``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph
