"""Full GPU set: decode over an e4m3 cache, with queries of 16 bits or e4m3 too: numbers, factors, layouts, graphs.

The truth is fp64 on what the cache's numbers times their factors are; with queries of 16 bits the error may be twice
that of attention in their dtype on the dequantised cache (judge.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable

import broadhead
import pytest
import torch
from broadhead import support
from calls import Built, Call, build
from checks import check_against, check_equal
from gpu_calls import capture, decode_call, shortened
from layouts import E4M3_NAN, bytes_of, int32
from server_flows import FLOWS, check_steps

pytestmark = [pytest.mark.gpu, pytest.mark.full, pytest.mark.usefixtures("first_rows")]

E4M3 = torch.float8_e4m3fn
HEAD_DIMS = (64, 96, 128, 192, 256, 320, 512)
PAIRS = ((192, 128), (128, 192), (64, 512), (512, 64), (48, 80), (16, 256))
#: Tokens and heads that share a KV head: up to 32 packed rows.
QUERIES = ((1, 8), (1, 16), (4, 4), (16, 2))
#: By the dtype of q: what makes a call read an e4m3 cache.
CACHES = {
    "bf16": {"dtype": torch.bfloat16, "kv_dtype": E4M3, "descale": "kv"},
    "fp16": {"dtype": torch.float16, "kv_dtype": E4M3, "descale": "kv"},
    "e4m3": {"dtype": E4M3, "descale": "each"},
}

each_cache = pytest.mark.parametrize("cache", CACHES)


@pytest.fixture
def run_cached(run_call: Callable) -> Callable[[Call | Built], support.KernelRow]:
    """`run_cached(call)`: run and check; a decode row ran."""

    def run(call: Call | Built) -> support.KernelRow:
        built, row = run_call(call)
        assert row.phase == "decode", f"{row.id} ran: {built.call}"
        return row

    return run


def step(head_dim: int, cache: str, **options) -> Call:
    return decode_call(head_dim, **{**CACHES[cache], **options})


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [0, 1, 16, 64])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@each_cache
def test_queries(cache: str, head_dim: int, page_size: int, run_cached: Callable) -> None:
    for seqlen_q, group in QUERIES:
        options = {"seqlens_q": (seqlen_q,) * 4, "heads_q": 2 * group, "heads_kv": 2, "page_size": page_size}
        run_cached(step(head_dim, cache, **options, causal=True))
        run_cached(step(head_dim, cache, **options, num_splits=3, pack_gqa=False, sinks="fp32"))


@pytest.mark.parametrize("head_dim, head_dim_v", PAIRS)
@each_cache
def test_unequal_head_dims(cache: str, head_dim: int, head_dim_v: int, run_cached: Callable) -> None:
    run_cached(step(head_dim, cache, head_dim_v=head_dim_v, k_layout="interleaved", causal=True))
    run_cached(step(head_dim, cache, head_dim_v=head_dim_v, page_size=0, k_layout="rows", num_splits=5))


@pytest.mark.parametrize("k_layout", ["plain", "rows", "interleaved", "heads_first", "gapped", "overlapping"])
@pytest.mark.parametrize("head_dim", [64, 192, 512])
@each_cache
def test_layouts(cache: str, head_dim: int, k_layout: str, run_cached: Callable) -> None:
    """Pages, slices and views of one pool; left padding, caches by index, ragged queries, strides of q and out."""
    options = {"k_layout": k_layout, "page_size": 48, "causal": True}
    run_cached(step(head_dim, cache, **options, leftpad=(5, 0, 0, 40), batch_idx=True))
    run_cached(step(head_dim, cache, **options, seqlens_q=(1, 3, 0, 4), ragged_q=True, tail=2, out_layout="guarded"))
    call = step(head_dim, cache, **options, seqlens_q=(2, 1, 3, 4), slack_q=2, q_layout="gapped")
    run_cached(call.with_(function="varlen"))


@pytest.mark.parametrize(
    "mask",
    [
        {"window": (100, 0), "causal": True},
        {"window": (17, 8)},
        {"attention_chunk": 50, "causal": True},
        {"prefix": (40, 1, 3, 64), "causal": True, "window": (20, 0)},
        {"softcap": 15.0, "sinks": "q"},
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [128, 512])
@each_cache
def test_masks(cache: str, head_dim: int, mask: dict, run_cached: Callable) -> None:
    run_cached(step(head_dim, cache, **mask, freed_entries=True))
    run_cached(step(head_dim, cache, **mask, seqlens_q=(3,) * 4, page_size=0, num_splits=2))


@pytest.mark.parametrize("num_splits", [0, 1, 2, 7, 128])
@each_cache
def test_splits(cache: str, num_splits: int, run_cached: Callable) -> None:
    for head_dim in (64, 256):
        options = {"seqlens_k": (2100, 64, 0, 500), "num_splits": num_splits, "causal": True}
        run_cached(step(head_dim, cache, **options))
        run_cached(step(head_dim, cache, **options, seqlens_q=(4,) * 4, metadata=True))
    if num_splits <= 1:
        run_cached(step(128, cache, **options, tokens_per_split=64))


# --- numbers ----------------------------------------------------------------------------------------------------------


def one_key_each(cache: str, head_dim: int, device: torch.device) -> tuple[Built, torch.Tensor]:
    """As many sequences of one key as e4m3 has finite numbers, which fill its key and value; and those numbers."""
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    codes = codes[(codes & 0x7F) != E4M3_NAN]
    options = {"page_size": 16, "heads_q": 8, "heads_kv": 2, "softmax_scale": 1.0}
    lengths = {"seqlens_q": (1,) * len(codes), "seqlens_k": (1,) * len(codes)}
    built = build(Call("kvcache", **lengths, head_dim=head_dim, **{**CACHES[cache], **options}), device)
    for b, code in enumerate(codes):
        page = int(built.kwargs["page_table"][b, 0])
        for name, logical in (("k_cache", built.k), ("v_cache", built.v)):
            bytes_of(built.kwargs[name])[page, 0] = code
            bytes_of(logical[b])[:] = code
    return built, codes.view(E4M3)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@each_cache
def test_every_number(cache: str, head_dim: int, cuda: torch.device, row_ran: Callable) -> None:
    """One key has the weight 1: its value comes out exactly, and its score is the sum of the query times its number."""
    built, numbers = one_key_each(cache, head_dim, cuda)
    for name in ("q_descale", "k_descale", "v_descale"):
        if name in built.descales:
            built.descales[name].fill_(2.0)  # exact in every dtype
    q = bytes_of(built.kwargs["q"])
    q.zero_()
    q[..., head_dim - 1] = bytes_of(torch.ones(1, device=cuda).to(built.call.dtype))[0]
    out, lse = built.run()
    row_ran(phase="decode", head_dim=head_dim)
    exact = numbers.float() * 2
    check_equal(out.float(), exact[:, None, None, None].expand(out.shape))
    factor = 2.0 if "q_descale" in built.descales else 1.0
    torch.testing.assert_close(lse, (factor * exact)[:, None, None].expand(lse.shape), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("descale", ["", "one", "kv", "each"])
@each_cache
def test_factors(cache: str, descale: str, run_cached: Callable) -> None:
    """None, one expanded to all, one for each sequence and KV head."""
    for head_dim in (64, 256):
        options = {"heads_q": 6, "heads_kv": 3, "descale": descale, "causal": True}
        run_cached(step(head_dim, cache, **options))
        run_cached(step(head_dim, cache, **options, seqlens_q=(4,) * 4, num_splits=3, pack_gqa=False))


@each_cache
def test_factors_of_all_sizes_and_strides(
    cache: str, cuda: torch.device, rng: random.Random, run_cached: Callable
) -> None:
    """Columns of a wider tensor; tiny and huge factors: scores are small however large their parts are."""
    call = step(128, cache, heads_q=6, heads_kv=3, causal=True, softmax_scale=128**-0.5 * 2.0**-9)
    built = build(call, cuda, rng)
    for name, size in (("k_descale", 2.0**9), ("v_descale", 300.0)):
        wide = torch.full((call.heads_kv, call.batch, 2), float("nan"), device=cuda).transpose(0, 1)[..., 0]
        wide.copy_(built.descales[name] * size)
        built.kwargs[name] = built.descales[name] = wide
        assert not wide.is_contiguous()
    run_cached(built)


@pytest.mark.parametrize("page_size", [0, 1, 16])
@each_cache
def test_nan_of_either_sign_in_padding(
    cache: str, page_size: int, cuda: torch.device, rng: random.Random, run_cached: Callable
) -> None:
    """0xff is NaN as 0x7f is, which all other tests have in every slot that no query sees."""
    for head_dim in (64, 512):
        options = {"page_size": page_size, "causal": True, "window": (60, 0), "slack_k": 70}
        built = build(step(head_dim, cache, **options, seqlens_q=(2,) * 4, num_splits=2), cuda, rng)
        for name in ("k_cache", "v_cache"):
            stored = bytes_of(built.kwargs[name])
            assert bool((stored == E4M3_NAN).any())
            stored.masked_fill_(stored == E4M3_NAN, 0xFF)
        run_cached(built)


@each_cache
def test_largest_and_smallest_numbers(cache: str, cuda: torch.device, run_cached: Callable) -> None:
    """Keys and values of 448 and of the smallest subnormals, 2^-9: sums leave the range of e4m3, not that of fp32."""
    call = step(128, cache, page_size=0, descale="", softmax_scale=1e-5, seqlens_k=(400, 130, 0, 33), num_splits=2)
    built = build(call, cuda)
    for name, logical in (("k_cache", built.k), ("v_cache", built.v)):
        for b, x in enumerate(logical):
            sign = torch.where(torch.rand(x.shape, device=cuda) < 0.5, -1.0, 1.0)
            size = torch.where(torch.rand(x.shape, device=cuda) < 0.5, 448.0, 2.0**-9)
            logical[b] = (sign * size).to(E4M3)
            bytes_of(built.kwargs[name])[b, : len(x)] = bytes_of(logical[b])
    run_cached(built)


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 128, 512])
@each_cache
def test_factors_may_change_between_replays(
    cache: str, head_dim: int, cuda: torch.device, rng: random.Random, row_ran: Callable
) -> None:
    """Lengths, metadata and factors are read when the graph runs."""
    most = (1500, 700, 1, 1200)
    built = build(step(head_dim, cache, heads_q=8, heads_kv=2, seqlens_k=most, num_splits=8, causal=True), cuda, rng)
    buffer = torch.zeros(17, dtype=torch.int32, device=cuda)

    def work() -> None:
        built.scheduler_metadata(out=buffer)
        broadhead.flash_attn_with_kvcache(**built.kwargs, scheduler_metadata=buffer)

    graph = capture(work)
    row_ran(phase="decode", head_dim=head_dim)
    for lengths in (most, (16, 3, 0, 900), (0, 0, 0, 0), (1, 700, 1, 64)):
        built.kwargs["cache_seqlens"].copy_(int32(lengths, cuda))
        for factor in built.descales.values():
            factor.uniform_(0.5, 2.0)
        built.out.fill_(float("nan"))
        graph.replay()
        check_against(shortened(built, list(lengths)), built.out)


@pytest.mark.parametrize("padding", FLOWS["vllm"].paddings)
def test_vllm(padding: str, cuda: torch.device, row_ran: Callable) -> None:
    """Its step with an e4m3 cache and expanded factors."""
    flow = FLOWS["vllm"](128, padding, cuda, kv_dtype=E4M3)
    flow.advance((700, 1, 1200))
    graph = capture(flow.step)
    row_ran(phase="decode", head_dim=128)
    check_steps(flow, graph.replay)
