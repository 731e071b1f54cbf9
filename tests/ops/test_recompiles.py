"""New lengths take the graphs that there are: torch.compile(fullgraph=True, dynamic=True), forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import broadhead
import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

#: Query and key lengths of the sequences of a batch.
Lengths = list[tuple[int, int]]
# Sizes that are equal in the first call torch takes for one size: none is, of those that change later.
DENSE: list[Lengths] = [[(5, 7)] * 3, [(9, 9)] * 3, [(64, 200)] * 2]
PACKED: list[Lengths] = [
    [(5, 7), (3, 3)],
    [(9, 4), (11, 30)],
    [(6, 12), (4, 4), (3, 3), (64, 200)],
]

#: More sequences than a range has sides or q has heads.
MASKED: list[Lengths] = [
    [(5, 7), (3, 3), (1, 2), (4, 6), (6, 9)],
    [(9, 4), (11, 30), (2, 2), (1, 1), (7, 8), (3, 12)],
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Graphs:
    """A backend that counts the graphs that it compiles."""

    def __init__(self) -> None:
        self.forward, self.backward = 0, 0
        self.backend = aot_autograd(fw_compiler=self._forward, bw_compiler=self._backward)

    def _forward(self, module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.forward += 1
        return make_boxed_func(module.forward)

    def _backward(self, module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.backward += 1
        return make_boxed_func(module.forward)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def dense(lengths: Lengths) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    (queries, keys), batch = lengths[0], len(lengths)
    return (leaf(batch, queries, 4, 16), leaf(batch, keys, 2, 16), leaf(batch, keys, 2, 16)), {}


def used(lengths: Lengths) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Dense tensors whose sequences are shorter than they are."""
    tensors, _ = dense(lengths)
    counts = [torch.tensor([n - b % 2 for b, n in enumerate(side)], dtype=torch.int32) for side in zip(*lengths)]
    return tensors, {"seqused_q": counts[0], "seqused_k": counts[1]}


def packed(lengths: Lengths) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    queries, keys = ([*side] for side in zip(*lengths))
    tensors = (leaf(sum(queries), 4, 16), leaf(sum(keys), 2, 16), leaf(sum(keys), 2, 16))
    return tensors, {
        "cu_seqlens_q": offsets(queries),
        "cu_seqlens_k": offsets(keys),
        "max_seqlen_q": max(queries),
        "max_seqlen_k": max(keys),
    }


def masked(lengths: Lengths) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Packed sequences with a range of keys for each query, every other one causal."""
    tensors, options = packed(lengths)
    ranges = [(2, 1 + 2 * (i % 3)) for queries, _ in lengths for i in range(queries)]
    each = torch.tensor([b % 2 for b in range(len(lengths))], dtype=torch.int32)
    return tensors, {**options, "query_ranges": torch.tensor(ranges, dtype=torch.int32), "causal": each}


CASES: dict[str, tuple[Callable[..., Any], Callable[[Lengths], Any], list[Lengths], dict[str, Any]]] = {
    "func": (broadhead.flash_attn_func, dense, DENSE, {}),
    "func options": (broadhead.flash_attn_func, dense, DENSE, {"window_size": (4, 0), "deterministic": True}),
    "varlen": (broadhead.flash_attn_varlen_func, packed, PACKED, {"causal": True, "sinks": torch.randn(4)}),
    "mha_fwd": (broadhead.mha_fwd, used, DENSE, {}),
    "masks": (broadhead.flash_attn_varlen_func, masked, MASKED, {"window_size": (2, -1), "ranges_in_window": True}),
}


def results(function: Callable[..., Any], tensors: tuple[Tensor, ...], options: dict[str, Any]) -> tuple[Tensor, ...]:
    found = function(*tensors, **options)
    out = found[0] if isinstance(found, tuple) else found
    if "seqused_q" in options:  # rows that no sequence owns are undefined
        live = torch.arange(out.shape[1]) < options["seqused_q"][:, None]
        out = torch.where(live[:, :, None, None], out, 0.0)
    return (out, *torch.autograd.grad(out.square().sum(), tensors))


@pytest.mark.parametrize("name", CASES)
def test_new_lengths_take_the_same_two_graphs(name: str) -> None:
    function, make, batches, options = CASES[name]
    graphs = Graphs()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs.backend)
    for i, lengths in enumerate(batches):
        tensors, layout = make(lengths)
        how = {**options, **layout}
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = results(compiled, tensors, how)
        assert (graphs.forward, graphs.backward) == (1, 1), lengths
        torch.testing.assert_close(got, results(function, tensors, how))


@pytest.mark.parametrize("make", [dense, packed])
def test_mha_bwd_of_new_lengths_takes_one_graph(make: Callable[[Lengths], Any]) -> None:
    graphs = Graphs()
    compiled = torch.compile(broadhead.mha_bwd, fullgraph=True, dynamic=True, backend=graphs.backend)
    for i, lengths in enumerate(DENSE if make is dense else PACKED):
        tensors, layout = make(lengths)
        q, k, v = (x.detach() for x in tensors)
        out, lse = broadhead.mha_fwd(q, k, v, **layout)
        given = (torch.randn_like(out), q, k, v, out, lse)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = compiled(*given, **layout)
        assert graphs.forward == 1
        torch.testing.assert_close(got, broadhead.mha_bwd(*given, **layout))


def test_the_count_sees_a_new_graph() -> None:
    """A flag of the mask is part of a graph."""
    graphs = Graphs()
    compiled = torch.compile(broadhead.flash_attn_func, fullgraph=True, dynamic=True, backend=graphs.backend)
    tensors, _ = dense(DENSE[0])
    for causal in (False, True):
        results(compiled, tensors, {"causal": causal})
    assert (graphs.forward, graphs.backward) == (2, 2)
