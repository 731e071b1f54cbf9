"""Rotary embedding and the append of new keys against a loop over tokens."""

from __future__ import annotations

import random
from typing import Any

import broadhead
import pytest
import torch
from appends import CACHES, HEAD_DIM, POSITIONS, ROTARY, Append, build, expected_caches, rotate
from broadhead.reference import append as append_kv
from torch import Tensor


def check(call: Append, append: Any = append_kv.append) -> None:
    before_k, before_v = call.k_cache.clone(), call.v_cache.clone()
    expected_k, expected_v, written = expected_caches(call)
    append(call.k_cache, call.v_cache, call.k_new, call.v_new, **call.options)
    tolerance = 4 * torch.finfo(torch.float16 if call.k_cache.dtype.itemsize == 2 else torch.float32).eps
    if call.k_cache.dtype == torch.bfloat16:
        tolerance = 2 * torch.finfo(torch.bfloat16).eps
    mine = slice(None, None, call.block_step)
    for cache, before, expected in ((call.k_cache, before_k, expected_k), (call.v_cache, before_v, expected_v)):
        is_new, stale = written[mine], ~written[mine]
        torch.testing.assert_close(cache[mine][is_new].double(), expected[mine][is_new], rtol=tolerance, atol=tolerance)
        assert torch.equal(cache[mine][stale], before[mine][stale]), "a slot that no new key belongs to was written"


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("cache", CACHES)
def test_append(cache: str, rotary: str, ragged: bool, seed: int) -> None:
    check(build(seed, cache, rotary, ragged))


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("cache", CACHES)
def test_rows_without_a_place_are_dropped(cache: str, ragged: bool, seed: int) -> None:
    for number in range(5):
        check(build(seed + number, cache, "halves", ragged, overflow=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_caches(dtype: torch.dtype, seed: int) -> None:
    for cache in CACHES:
        check(build(seed, cache, "partial_interleaved", True, dtype))


# --- values out of range, which a device does not refuse ---


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
def test_batch_indices_that_do_not_exist(paged: bool, seed: int) -> None:
    """Their sequences are written nowhere; the others are."""
    k_cache, v_cache = torch.zeros(3, 4, 1, 8), torch.zeros(3, 4, 1, 8)
    new = torch.randn(5, 1, 1, 8)
    options: dict[str, Any] = {"page_table": torch.arange(3, dtype=torch.int32)[:, None]} if paged else {}
    index = int32(1, 3, -1, 2**31 - 1, 0)
    append_kv.append(k_cache, v_cache, new, new, cache_seqlens=int32(2, 0, 0, 1, 3), cache_batch_idx=index, **options)
    expected = torch.zeros(3, 4, 1, 8)
    expected[1, 2], expected[0, 3] = new[0, 0], new[4, 0]
    assert torch.equal(k_cache, expected) and torch.equal(v_cache, expected)


@pytest.mark.parametrize("pages", [0, 3])
def test_lengths_behind_an_append_are_those_of_the_cache(pages: int) -> None:
    cache, new = torch.zeros(4, 4, 1, 8), torch.zeros(4, 3, 1, 8)
    table = torch.zeros(4, pages, dtype=torch.int32) if pages else None
    capacity = 4 * max(pages, 1)
    before = int32(0, capacity - 1, capacity + 9, 2**31 - 1)
    lengths = append_kv.appended_lengths(cache, before, new, None, table)
    assert lengths.dtype == torch.int32 and lengths.tolist() == [3, capacity, capacity, capacity]
    offsets = int32(-2, 2, 1, 99, 12)
    packed = append_kv.appended_lengths(cache, before, new.flatten(0, 1), offsets, table)
    assert packed.tolist() == [2, capacity - 1, capacity, capacity]


def test_offsets_out_of_order_write_only_what_they_own() -> None:
    k_cache, v_cache = torch.zeros(3, 8, 1, 8), torch.zeros(3, 8, 1, 8)
    new = torch.arange(1.0, 9).view(8, 1, 1).expand(8, 1, 8)
    append_kv.append(k_cache, v_cache, new, new, cache_seqlens=int32(0, 0, 0), cu_seqlens_k_new=int32(0, 2, 1, 8))
    assert torch.equal(k_cache, v_cache) and not k_cache[1].any()
    assert torch.equal(k_cache[2, 1:7, 0, 0], torch.arange(3.0, 9)), "rows 2 to 7 are the third sequence's alone"


@pytest.mark.parametrize("name", ["flash_attn_with_kvcache", "mha_fwd"])
@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
def test_rotary_tables_shorter_than_the_cache_are_refused(paged: bool, name: str) -> None:
    q, cache, new = torch.randn(2, 1, 2, 16), torch.zeros(4, 8, 2, 16), torch.randn(2, 1, 2, 16)
    table = int32(0, 1, 2, 3).view(2, 2) if paged else None
    capacity = 16 if paged else 8
    cache = cache if paged else cache[:2].clone()
    angle = torch.rand(capacity, 4)
    lengths = int32(0, capacity - 1)
    for rows, words in (
        (capacity, ""),
        (capacity - 1, f"rotary_cos and rotary_sin must have a row .* {capacity}.* got {capacity - 1}"),
    ):
        tables = {"rotary_cos": angle[:rows], "rotary_sin": angle[:rows]}
        k_cache, v_cache = cache.clone(), cache.clone()
        if name == "mha_fwd":
            call = dict(q=q, k=k_cache, v=v_cache, k_new=new, v_new=new, seqused_k=lengths, page_table=table, **tables)
        else:
            call = dict(
                q=q, k_cache=k_cache, v_cache=v_cache, k=new, v=new, cache_seqlens=lengths, page_table=table, **tables
            )
        if not words:
            getattr(broadhead, name)(**call)
            assert k_cache.any()
            continue
        with pytest.raises(broadhead.InvalidArgumentError, match=f"{name}: {words}"):
            getattr(broadhead, name)(**call)
        assert not k_cache.any(), "a refused call wrote into the cache"


@pytest.mark.parametrize("cache", ["contiguous", "paged"])
def test_nothing_to_append(cache: str, seed: int) -> None:
    """Every sequence appends nothing, but the packed tensors have padding rows; and no rows at all."""
    call = build(seed, cache, "none", True)
    call.num_new = [0] * 4
    call.options["cu_seqlens_k_new"].zero_()
    check(call)
    call.k_new, call.v_new = call.k_new[:0], call.v_new[:0]
    check(call)


def test_dead_rows_never_undo_a_write(seed: int) -> None:
    """Many padding rows and one live row whose slot they could hit: the live one wins, whatever the order."""
    cache_k, cache_v = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8)
    new = torch.full((64, 1, 8), float("nan"))
    for live_slot in (0, 1):
        new[0] = live_slot + 1
        append_kv.append(
            cache_k,
            cache_v,
            new,
            new,
            cache_seqlens=torch.tensor([live_slot], dtype=torch.int32),
            cu_seqlens_k_new=torch.tensor([0, 1], dtype=torch.int32),
        )
    expected = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, 1, 8)
    assert torch.equal(cache_k, expected) and torch.equal(cache_v, expected)


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("causal_or_local", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("own_positions", [False, True])
def test_rotary_of_queries(
    ragged: bool, causal_or_local: bool, interleaved: bool, own_positions: bool, seed: int
) -> None:
    rng = random.Random(seed)
    batch, heads = 3, 2
    lengths = [rng.randint(0, 6) for _ in range(batch)] if ragged else [5] * batch
    starts = [rng.randint(0, 90) for _ in range(batch)]
    angle = torch.rand(POSITIONS, rng.choice([4, 16])) * 6.28
    cos, sin = angle.cos(), angle.sin()
    options: dict[str, Any] = {"cache_seqlens": torch.tensor(starts, dtype=torch.int32)}
    if own_positions:
        options = {"cache_seqlens": torch.tensor([0] * batch, dtype=torch.int32)}
        options["rotary_seqlens"] = torch.tensor(starts, dtype=torch.int32)
    begins = [sum(lengths[:b]) for b in range(batch + 1)]
    q = torch.randn(begins[-1] + (2 if ragged else 0), heads, HEAD_DIM)
    if ragged:
        options["cu_seqlens_q"] = torch.tensor(begins, dtype=torch.int32)
    result = append_kv.apply_rotary_q(
        q if ragged else q.unflatten(0, (batch, 5)),
        cos,
        sin,
        causal_or_local=causal_or_local,
        rotary_interleaved=interleaved,
        **options,
    )
    assert result.shape == (q.shape if ragged else (batch, 5, heads, HEAD_DIM))
    flat = result.flatten(0, -3)
    for b in range(batch):
        for i in range(lengths[b]):
            position = starts[b] + (i if causal_or_local else 0)
            expected = rotate(q[begins[b] + i], cos[position], sin[position], interleaved)
            torch.testing.assert_close(flat[begins[b] + i].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", ["contiguous_batch_idx", "paged"])
def test_compiles_in_one_graph(cache: str, seed: int) -> None:
    torch._dynamo.reset()
    for ragged in (False, True):
        compiled = torch.compile(append_kv.append, fullgraph=True, backend="aot_eager", dynamic=False)
        check(build(seed, cache, "partial", ragged), compiled)
