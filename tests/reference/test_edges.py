"""Values out of range: the torch reference obeys the rule of a device, table and random values alike."""

from __future__ import annotations

import random

import pytest
import torch
from edge_calls import EdgeCall, Shape, build, check, run_reference
from edge_cases import BASE, EDGES, GROUPS, VALUE_EDGES, VALUE_MASKS
from edges import Edge, answer
from random_edges import random_edge

#: Head dims: of 64 columns, of none, and wide; with qv.
SHAPES = {
    "64": Shape(64, 128),
    "72": Shape(72, 136, heads_q=3, heads_kv=1, dtype=torch.bfloat16),
    "512": Shape(8, 512, heads_q=2, heads_kv=2, dtype=torch.float64),
    "qv": Shape(16, 128, heads_q=2, heads_kv=1, qv=True),
}


def make(edge: Edge, shape: Shape, seed: int) -> EdgeCall:
    return build(edge, shape, torch.device("cpu"), random.Random(seed))


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.name)
def test_reference(edge: Edge, seed: int) -> None:
    """What a device runs where it has no kernel. The table's cases take turns with the shapes."""
    shape = list(SHAPES.values())[EDGES.index(edge) % len(SHAPES)]
    call = make(edge, shape, seed)
    check(call, *run_reference(call))


@pytest.mark.parametrize("edge", VALUE_EDGES, ids=lambda edge: edge.name)
def test_masks_that_are_values(edge: Edge, seed: int) -> None:
    shape = list(SHAPES.values())[VALUE_EDGES.index(edge) % len(SHAPES)]
    call = make(edge, shape, seed)
    check(call, *run_reference(call))


@pytest.mark.parametrize("chunk", range(8))
def test_random_values(chunk: int, seed: int) -> None:
    """Calls of random form with random values, many of them out of range."""
    for i in range(15):
        rng = random.Random(seed + i)
        shape = list(SHAPES.values())[(chunk + i) % len(SHAPES)]
        edge = random_edge(rng).with_(name=f"case {i} (seed {seed + i})")
        call = build(edge, shape, torch.device("cpu"), rng)
        check(call, *run_reference(call))


def test_the_table_covers_its_subject() -> None:
    """Every group has cases, and every rule shows in some: rows of nobody, rows without a key, appends cut short."""
    assert set(GROUPS) == {"lengths", "offsets", "pages", "append"}
    answers = {edge.name: answer(edge) for edge in BASE}
    assert len(answers) == len(BASE), "two edges have one name"
    assert any(len(answers[e.name].seen) < e.rows_q for e in BASE), "no rows of nobody"
    assert any(not slots for a in answers.values() for slots in a.seen.values()), "no row without a key"
    for edge in BASE:
        if edge.appends:
            wanted = edge.total_new if edge.cu_seqlens_k_new else edge.batch * edge.seqlen_new
            cut = len(answers[edge.name].written) < wanted
            assert cut or edge.leftpad or edge.cu_seqlens_k_new, f"{edge.name}: all new keys fit"
    assert not any(a.contested for a in answers.values())


def test_values_of_masks_matter() -> None:
    """Of each mask that is values some edge shows other keys than without it, and sees keys at all."""
    for name in VALUE_MASKS:
        edges = [edge for edge in VALUE_EDGES if edge.name.endswith(f"-{name}")]
        plain = [edge.with_(ranges=(), tree=(), causal_each=()) for edge in edges]
        changed = [a for a, b in zip(edges, plain, strict=True) if answer(a).seen != answer(b).seen]
        assert len(changed) > len(edges) // 5, name


def test_the_check_finds_what_is_wrong(seed: int) -> None:
    """A key too many or too few, a row of nobody, a cache slot: each is told."""
    edge = next(edge for edge in BASE if edge.name == "append_in_part")
    call = make(edge, SHAPES["64"], seed)
    out, lse = run_reference(call)
    check(call, out, lse)
    for spoil in (
        lambda: out.view(-1)[0].add_(0.5),
        lambda: lse.view(-1)[0].sub_(1e-2),
        lambda: call.out_store[0].zero_(),
        lambda: call.out_store[-1].zero_(),
        lambda: call.kwargs["k_cache"][0, 0].zero_(),
        lambda: call.kwargs["v_cache"][1, 70].zero_(),
    ):
        kept = [x.clone() for x in (call.out_store, lse, call.kwargs["k_cache"], call.kwargs["v_cache"])]
        spoil()
        with pytest.raises(AssertionError, match="append_in_part"):
            check(call, out, lse)
        for x, old in zip((call.out_store, lse, call.kwargs["k_cache"], call.kwargs["v_cache"]), kept, strict=True):
            x.copy_(old)
    check(call, out, lse)
