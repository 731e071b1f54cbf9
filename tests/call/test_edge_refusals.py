"""Values out of range on the CPU: eager calls are refused by name before anything is written, compiled ones are right.

Of the refusals `Edge.refused` says the argument; what is in range is right.
"""

from __future__ import annotations

import random
import re

import broadhead
import pytest
import torch
from edge_calls import Shape, build, check
from edge_cases import BASE
from edges import Edge
from random_edges import random_edge


def refused_or_right(edge: Edge, seed: int) -> None:
    call = build(edge, Shape(64, 128), torch.device("cpu"), random.Random(seed))
    try:
        result = call.run()
    except broadhead.InvalidArgumentError as error:
        assert re.search(edge.refused or r"cache_\w+|seqused_\w|cu_seqlens_\w+|page_table|max_seqlen_\w", str(error))
        assert str(error).startswith("flash_attn_"), error
        assert call.out_store.isnan().all()
        for name, cache in call.before.items():
            assert torch.equal(cache.view(torch.int32), call.kwargs[name].view(torch.int32)), f"{name} was written"
        return
    assert not edge.refused, f"{edge.name} was accepted; {edge.refused} is out of range"
    check(call, *result)


@pytest.mark.parametrize("edge", BASE, ids=lambda edge: edge.name)
def test_eager(edge: Edge, seed: int) -> None:
    refused_or_right(edge, seed)


@pytest.mark.parametrize("chunk", range(4))
def test_eager_of_random_values(chunk: int, seed: int) -> None:
    for i in range(15):
        number = seed + 15 * chunk + i
        edge = random_edge(random.Random(number)).with_(name=f"case {i} (seed {number})")
        refused_or_right(edge, number)


#: Of each argument some that are out of range.
COMPILED = (
    "cache_seqlens_past_the_cache", "cache_seqlens_negative", "leftpad_beyond_the_cache", "batch_idx_extreme",
    "seqused_k_beyond_the_rows", "seqused_q_extreme", "cu_seqlens_q_256_beyond", "cu_seqlens_q_extreme",
    "cu_seqlens_k_extreme", "max_seqlen_q_below", "max_seqlen_k_below", "bad_first_middle_last_16",
    "past_the_table_and_bad_64", "varlen_16", "append_in_part", "append_to_a_bad_page_16", "append_offsets_beyond",
)  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str, seed: int) -> None:
    """Compiled code obeys the rule of a device: nothing is refused."""
    edge = next(edge for edge in BASE if edge.name == name)
    call = build(edge.with_(causal=True), Shape(16, 128), torch.device("cpu"), random.Random(seed))
    cached = edge.function == "kvcache"
    function = broadhead.flash_attn_with_kvcache if cached else broadhead.flash_attn_varlen_func
    wanted = {"return_softmax_lse" if cached else "return_attn_probs": True}
    torch._dynamo.reset()
    compiled = torch.compile(lambda **kwargs: function(**kwargs, **wanted), fullgraph=True, backend="eager")
    check(call, *compiled(**call.kwargs))
