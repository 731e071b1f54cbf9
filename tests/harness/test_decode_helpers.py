"""What the GPU tests of decode are built on, on the CPU by the fallback: large batches, replays, engines, places.

Each of them must take what is right and tell what is wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from calls import Built, Call, build
from checks import check_call, check_equal, check_split
from decode_batch import DecodeBatch, check_replays
from decode_lengths import PATTERNS, PLACES, lengths_of, place, sample_of
from judge import judge
from layouts import bytes_of, int32
from random_calls import random_call
from server_flows import FLOW_CASES, FLOW_STEPS, FLOWS, check_steps
from tolerance import max_error

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
BATCHES = {
    "one": {"seqlens_q": (1,), "seqlens_k": (70,)},
    "pages": {"heads_q": 8, "heads_kv": 2, "seqlens_q": (3,) * 5, "window": (40, 0), "k_layout": "interleaved"},
    "packed": {"ragged_q": True, "out_layout": "guarded", "head_dim_v": 32, "page_size": 1},
    "fp16": {"dtype": torch.float16, "page_size": 7, "k_layout": "heads_first", "num_splits": 3, "sm_margin": 2},
}


def batch_of(name: str = "pages", **changes: object) -> DecodeBatch:
    defaults = {"seqlens_q": (1,) * 5, "seqlens_k": (300, 17, 0, 129, 64), "page_size": 16, "heads_q": 4, "heads_kv": 1}
    return DecodeBatch(Call("kvcache", **{**defaults, "causal": True, **BATCHES[name], **changes}), CPU)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small operations: threads would wait for each other longer than they work."""
    torch.set_num_threads(1)


# --- large batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BATCHES)
def test_a_right_batch_passes(name: str, seed: int) -> None:
    batch = batch_of(name)
    everything = range(batch.call.batch)
    for _ in range(4):
        for metadata in (None, batch.scheduler_metadata()):
            out, lse = batch.run(scheduler_metadata=metadata)
            batch.check(everything, out, lse)
            batch.check_all(out, lse)
            batch.check_surroundings(out)
            assert not batch.wrong(out, lse).any() and not batch.wrong(out, None).any()
        batch.draw_random()


@pytest.mark.parametrize("name", BATCHES)
def test_fp32_reference_equals_the_judge(name: str) -> None:
    """What `wrong` compares with is the truth but for the rounding of fp32."""
    batch = batch_of(name)
    out, lse, _ = batch._reference(torch.arange(batch.call.batch), None)
    truth, truth_lse = judge(batch.sample(range(batch.call.batch)))
    assert max_error(out.flatten(0, 1), torch.cat(truth)) < 1e-5
    torch.testing.assert_close(lse.flatten(0, 1).T.double(), torch.cat(truth_lse, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pages", "packed", "fp16"])
def test_pages_of_a_batch(name: str) -> None:
    """Page 0 is nobody's; entries behind the used ones name no page; all slots but the live ones are NaN."""
    batch = batch_of(name)
    size, call = batch.call.page_size, batch.call
    for _ in range(3):
        lengths, table = batch.cache_seqlens.tolist(), batch.page_table
        used = torch.arange(table.shape[1]) * size < batch.cache_seqlens[:, None]
        assert bool((table[used] > 0).all() and (table[used] < len(batch.k_cache)).all())
        assert bool(((table[~used] < 0) | (table[~used] >= len(batch.k_cache))).all())
        live = len(batch.shared) * size + sum(n % size for n in lengths)
        for cache, dim in ((batch.k_cache, call.head_dim), (batch.v_cache, call.dim_v)):
            assert int((~cache.isnan()).sum()) == live * call.heads_kv * dim
            assert cache[0].isnan().all()
        batch.draw_random()
        assert bool((batch.cache_seqlens >= 0).all() and (batch.cache_seqlens <= batch.longest).all())


def _double_row(out: torch.Tensor, lse: torch.Tensor) -> None:
    out.reshape(-1, *out.shape[-2:])[-1, -1] *= 2


def _shift_lse(out: torch.Tensor, lse: torch.Tensor) -> None:
    lse.flatten()[-1:].add_(1e-3)


def _swap_heads(out: torch.Tensor, lse: torch.Tensor) -> None:
    out[...] = out.flip(-2)


def _nan(out: torch.Tensor, lse: torch.Tensor) -> None:
    out.reshape(-1, *out.shape[-2:])[-1, 0, 3] = float("nan")


@pytest.mark.parametrize("spoil", [_double_row, _shift_lse, _swap_heads, _nan], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", BATCHES)
def test_a_wrong_batch_is_told(name: str, spoil: Callable) -> None:
    """Of the last sequence at least, by either check."""
    batch = batch_of(name)
    out, lse = (x.clone() for x in batch.run())
    spoil(out, lse)
    assert batch.wrong(out, lse)[-1]
    with pytest.raises(AssertionError, match="are off"):
        batch.check_all(out, lse)
    with pytest.raises(AssertionError):
        batch.check(range(batch.call.batch), out, lse)


def test_a_missing_or_foreign_key_is_told() -> None:
    """One key too few or too many of 64; the keys of another sequence; the pages of the step before."""
    batch = batch_of("fp16", page_size=16)
    last = batch.call.batch - 1
    for change in (-1, 1):
        lengths = batch.cache_seqlens.clone()
        lengths[last] += change
        table = batch.page_table.clamp(0, len(batch.k_cache) - 1)
        table[last, 4] = batch.shared[0]
        out, lse = batch.run(cache_seqlens=lengths, page_table=table)
        assert batch.wrong(out, lse).tolist() == [False] * last + [True]
    table = batch.page_table.clone()
    table[last, :4] = table[0, :4]
    out, lse = batch.run(page_table=table)
    assert batch.wrong(out, lse).tolist() == [False] * last + [True]
    stale = batch.page_table.clone()
    batch.draw(batch.cache_seqlens.clone())
    out, lse = batch.run(page_table=stale)
    assert batch.wrong(out, lse)[[0, 1, 3, 4]].all()


def test_writes_around_the_output_are_told() -> None:
    batch = batch_of("packed")
    out, _ = batch.run()
    batch.check_surroundings(out)
    for place_of_harm in ((0, 0, 0), (-1, 0, 0), (2, -1, 0), (2, 0, -1)):
        kept = batch.out_store[place_of_harm].clone()
        batch.out_store[place_of_harm] = 0.0
        with pytest.raises(AssertionError, match="memory around out"):
            batch.check_surroundings(out)
        batch.out_store[place_of_harm] = kept
    with pytest.raises(AssertionError, match="no sequence owns"):
        batch.check_surroundings(out, live=3)


# --- replays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BATCHES)
def test_replays_pass(name: str) -> None:
    batch = batch_of(name)
    check_replays(batch, batch.run, count=8, every=3)


def test_a_wrong_replay_is_told() -> None:
    """One of half the lengths, not among those that the judge sees."""
    batch, count = batch_of("fp16"), 0
    batch.draw_random = lambda: batch.draw(batch.longest)  # all but one are long enough to be told from their half

    def replay() -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal count
        count += 1
        return batch.run(**({"cache_seqlens": batch.cache_seqlens // 2} if count == 6 else {}))

    with pytest.raises(AssertionError, match="1 of 8 replays are off, the first is 5"):
        check_replays(batch, replay, count=8, every=4)


# --- engines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine, padding", FLOW_CASES)
def test_engine_flow(engine: str, padding: str) -> None:
    flow = FLOWS[engine](16, padding, CPU)
    check_steps(flow, flow.step)


@pytest.mark.parametrize("engine, padding", FLOW_CASES)
def test_an_engine_flow_that_does_nothing_is_told(engine: str, padding: str) -> None:
    """A graph that holds nothing leaves the poison."""
    flow = FLOWS[engine](16, padding, CPU)
    flow.advance(FLOW_STEPS[0])
    flow.step()
    with pytest.raises(AssertionError, match="live rows hold NaN"):
        check_steps(flow, lambda: None)


# --- lengths and places -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [1, 3, 200])
def test_patterns(pattern: str, size: int, rng: random.Random) -> None:
    lengths = lengths_of(pattern, size, rng)
    assert len(lengths) == size and min(lengths) >= 0
    assert (sum(lengths) == 0) == (pattern == "empty") or pattern == "mixed"
    sample = sample_of(lengths, rng)
    assert sample == sorted(set(sample)) and set(sample) <= set(range(size)) and lengths.index(max(lengths)) in sample
    if pattern == "padding" and size == 200:
        assert sum(n > 0 for n in lengths) <= 8 and lengths[0] and lengths[-1]


@pytest.mark.parametrize("name", PLACES)
def test_a_place_among_others(name: str, rng: random.Random) -> None:
    """The same sequence, bit for bit, on other pages; and the call is right."""
    call = Call("kvcache", (2,), (65,), page_size=16, heads_q=4, head_dim=16, causal=True)
    alone = build(call, CPU, rng)
    built, at = place(call, name, alone, CPU, rng)
    for given, own in ((built.q, alone.q), (built.k, alone.k), (built.v, alone.v)):
        check_equal(given[at], own[0])
    out, _ = check_call(built)
    table, cache = built.kwargs["page_table"], built.kwargs["k_cache"]
    check_equal(cache[table[at, :5]].flatten(0, 1)[:65], alone.k[0])
    torch.testing.assert_close(out[at], check_call(alone)[0][0], rtol=1e-2, atol=1e-2)


# --- calls of the fuzz ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_calls_for_decode_kernels(dtype: torch.dtype, seed: int) -> None:
    """Splits of so many tokens and e4m3 caches are asked of decode kernels only; the latter can be built and judged."""
    seen: set[str] = set()
    for i in range(150):
        rng = random.Random(seed + i)
        call = random_call(rng, (dtype,), 40, (8, 24, 64), decode=1.0, invariant=0.5, e4m3_cache=0.5)
        assert max(call.seqlens_q, default=0) <= 16 and call.batch <= 64
        assert not call.tokens_per_split or (call.packed_rows <= 32 and call.tokens_per_split % 64 == 0)
        seen |= {"tokens_per_split"} if call.tokens_per_split else set()
        seen |= {"batch"} if call.batch > 5 else set()
        if call.kv_dtype is None:
            continue
        seen.add("e4m3_cache")
        assert call.packed_rows <= 32 and not call.num_new and call.function != "func"
        assert call.head_dim % 16 == 0 and call.dim_v % 16 == 0
        if i % 5 == 0:
            built = build(call, CPU, rng)
            assert all(x.dtype == FP8 for x in built.k + built.v) and all(x.dtype == dtype for x in built.q)
            assert not any(x.isnan().any() for x in judge(built)[0] + judge(built, dtype)[0])
    assert seen == {"tokens_per_split", "e4m3_cache", "batch"}


# --- e4m3 caches ------------------------------------------------------------------------------------------------------


def dequantised(call: Call) -> tuple[Built, torch.Tensor, torch.Tensor]:
    """The call, built, and its result by a 16-bit cache that holds the dequantised numbers."""
    built = build(call, CPU)
    kwargs = {name: x for name, x in built.kwargs.items() if "descale" not in name}
    for name in ("k", "v"):
        cache = built.kwargs[f"{name}_cache"].float()
        factor = built.descales.get(f"{name}_descale")
        kwargs[f"{name}_cache"] = (cache if factor is None else cache * factor[:, None, :, None]).to(call.dtype)
    built.kwargs = kwargs
    out, lse = built.run()
    return built, out, lse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("descale", ["", "kv", "one"])
def test_judge_of_an_e4m3_cache(descale: str, dtype: torch.dtype) -> None:
    """Attention on the dequantised cache passes, and a wrong factor does not."""
    call = Call("kvcache", (2,) * 3, (70, 9, 300), heads_q=4, dtype=dtype, kv_dtype=FP8, descale=descale, causal=True)
    built, out, lse = dequantised(call)
    assert built.k[0].dtype == FP8 and built.q[0].dtype == dtype and "q_descale" not in built.descales
    # The LSE is of keys that were rounded to 16 bits, which a kernel's are not.
    check_split(built, out, lse if not descale else None)
    for name in built.descales:
        right = built.descales[name]
        built.descales[name] = right.flip(1) * 1.5
        with pytest.raises(AssertionError, match="off by"):
            check_split(built, out)
        built.descales[name] = right


def test_e4m3_cache_of_a_batch() -> None:
    """DecodeBatch draws one as well, NaN and all."""
    batch = batch_of("one", kv_dtype=FP8, page_size=16)
    assert batch.k_cache.dtype == FP8 and batch.k_cache[0].isnan().all()
    caches = {name: getattr(batch, name).to(torch.bfloat16) for name in ("k_cache", "v_cache")}
    out, lse = batch.run(**caches)
    batch.check((0,), out, lse)
    batch.check_all(out, lse)
    batch.draw(int32((33,), CPU))
    assert int((bytes_of(batch.k_cache) & 0x7F != 0x7F).sum()) == (len(batch.shared) * 16 + 1) * 64
