"""Full GPU set: e4m3 inputs beside what every row is asked: rows, factors, few queries, long sums, refusals."""

from __future__ import annotations

import random
from collections.abc import Callable

import broadhead
import pytest
import torch
from broadhead import support
from calls import Call, build
from checks import check_against, check_call, check_equal
from gpu_calls import PREFILL_ROWS, capture, decode_call, prefill_call, row_call, row_id, shortened
from judge import judge
from layouts import E4M3_NAN, bytes_of

pytestmark = [pytest.mark.gpu, pytest.mark.full]

FP8 = {"dtype": torch.float8_e4m3fn, "descale": "each"}
FP8_ROWS = tuple(row for row in PREFILL_ROWS if row.dtype == "float8_e4m3fn")
HEAD_DIMS = (16, 48, 64, 80, 96, 128, 144, 192, 208, 256)
PAIRS = ((192, 128), (128, 192), (64, 256), (256, 64), (16, 256), (240, 16), (144, 128), (96, 48))

each_row = pytest.mark.parametrize("row", FP8_ROWS, ids=row_id)


@pytest.fixture(autouse=True)
def _needs_rows(capability: tuple[int, int]) -> None:
    if not any(capability in row.capabilities for row in FP8_ROWS):
        pytest.skip(f"compute capability {capability} has no row of 8-bit inputs")


# --- which row runs what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim, head_dim_v", [*((d, d) for d in HEAD_DIMS), *PAIRS])
def test_head_dims(head_dim: int, head_dim_v: int, run_call: Callable) -> None:
    """The row with the fewest padded columns runs, whatever the layout of the keys."""
    dims = {"head_dim_v": head_dim_v, **FP8}
    run_call(Call("func", (133,) * 2, (260,) * 2, heads_q=4, head_dim=head_dim, **dims))
    run_call(prefill_call(head_dim, **dims, slack_q=3, slack_k=5, tail=4))
    run_call(prefill_call(head_dim, **dims, page_size=16, k_layout="interleaved", window=(70, 0)))


@pytest.mark.parametrize("page_size", [0, 1, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_few_queries(head_dim: int, page_size: int, run_call: Callable) -> None:
    """The prefill rows serve decode too: one token, several, ragged, split with metadata."""
    for options in (
        {},
        {"num_splits": 3, "sinks": "fp32"},
        {"metadata": True, "causal": True, "seqlens_k": (2100, 64, 0, 500)},
        {"seqlens_q": (3,) * 4, "causal": True, "heads_q": 16, "window": (100, 0)},
        {"seqlens_q": (1, 0, 2, 3), "ragged_q": True, "tail": 2, "metadata": True, "num_splits": 8, "causal": True},
    ):
        built, row = run_call(decode_call(head_dim, page_size=page_size, **FP8, **options))
        assert row.dtype == "float8_e4m3fn" and row.head_dim == head_dim, built.call


# --- factors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("descale", ["", "each", "one", "kv"])
@each_row
def test_factors(row: support.KernelRow, descale: str, run_row: Callable) -> None:
    """None, one for each sequence and KV head, one expanded to all, none for q; packed tiles and splits too."""
    m, n = row.tile.tile_m, row.tile.tile_n
    lengths = {"seqlens_q": (m + 5, 1, 0, 70), "seqlens_k": (2 * n + 3, 40, 9, 5 * n + 1)}
    for options in (
        {"heads_q": 3, "heads_kv": 3, "causal": True},
        {"heads_q": 12, "heads_kv": 2, "pack_gqa": True, "softcap": 15.0},
        {"heads_q": 12, "heads_kv": 2, "pack_gqa": False, "num_splits": 3, "sinks": "q"},
    ):
        run_row(row, row_call(row, "varlen", **lengths, **options, descale=descale))


@each_row
def test_factors_of_all_sizes_and_strides(
    row: support.KernelRow, run_row: Callable, cuda: torch.device, rng: random.Random
) -> None:
    """Columns of a wider tensor; tiny and huge factors: S is small however large its parts are, and V's is exact."""
    call = row_call(row, "varlen", (200, 9, 70), (300, 40, 200), heads_q=6, heads_kv=3, causal=True)
    built = build(call, cuda, rng)
    for name, size in (("q_descale", 2.0**-9), ("k_descale", 2.0**9), ("v_descale", 3000.0)):
        wide = torch.full((3, 5, 2), float("nan"), device=cuda).transpose(0, 1)[..., 0]  # strides (2, 10)
        view = wide[:3, :3] if wide.shape[0] >= 3 else wide
        view.copy_(built.descales[name] * size)
        built.kwargs[name] = built.descales[name] = view
        assert view.stride() not in ((3, 1), (1, 3))
    run_row(row, built)


@each_row
def test_factors_may_change_between_replays(
    row: support.KernelRow, only_row: Callable, cuda: torch.device, rng: random.Random
) -> None:
    """Serving in a CUDA graph: metadata, lengths and factors are read when the graph runs."""
    only_row(row)
    options = {"page_size": 16, "causal": True, "num_splits": 8, "seqlens_k": (1500, 700, 1, 1200)}
    call = decode_call(row.head_dim, head_dim_v=row.head_dim_v, heads_q=8, heads_kv=2, **FP8, **options)
    built = build(call, cuda, rng)
    buffer = torch.zeros(17, dtype=torch.int32, device=cuda)

    def step() -> None:
        built.scheduler_metadata(out=buffer)
        broadhead.flash_attn_with_kvcache(**built.kwargs, scheduler_metadata=buffer)

    graph = capture(step)
    assert broadhead.last_dispatch()[1] == row.id
    for lengths in ([1500, 700, 1, 1200], [16, 3, 0, 900], [0, 0, 0, 0], [1, 700, 1, 64]):
        built.kwargs["cache_seqlens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        for factor in built.descales.values():
            factor.uniform_(0.5, 2.0)
        built.out.fill_(float("nan"))
        graph.replay()
        check_against(shortened(built, lengths), built.out)


# --- NaN, extremes, outputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [0, 1, 16, 64])
@each_row
def test_nan_of_either_sign_in_padding(
    row: support.KernelRow, page_size: int, run_row: Callable, cuda: torch.device, rng: random.Random
) -> None:
    """0xff is NaN as 0x7f is, which all other tests have in every slot that no query sees."""
    n = row.tile.tile_n
    options = {"page_size": page_size, "causal": True, "window": (n, 0), "slack_k": 9, "freed_entries": bool(page_size)}
    built = build(row_call(row, "varlen", (70, 3, 200), (3 * n + 1, n, 200), heads_q=4, **options), cuda, rng)
    for name in ("k", "v"):
        stored = bytes_of(built.kwargs[name])
        assert bool((stored == E4M3_NAN).any())
        stored.masked_fill_(stored == E4M3_NAN, 0xFF)
    run_row(row, built)


@pytest.mark.parametrize("num_splits", [1, 3])
@each_row
def test_nan_in_a_query(row: support.KernelRow, num_splits: int, only_row: Callable, cuda: torch.device) -> None:
    """NaN comes out in that row alone."""
    only_row(row)
    q, k, v = (
        torch.randn(2, n, h, d, device=cuda).to(torch.float8_e4m3fn)
        for n, h, d in ((150, 4, row.head_dim), (700, 2, row.head_dim), (700, 2, row.head_dim_v))
    )
    bytes_of(q)[1, 77, 2, 3] = E4M3_NAN
    out, lse = broadhead.flash_attn_func(q, k, v, num_splits=num_splits, return_attn_probs=True)
    broken = torch.zeros(2, 150, 4, dtype=torch.bool, device=cuda)
    broken[1, 77, 2] = True
    assert torch.equal(out.isnan().all(-1), broken) and torch.equal(out.isnan().any(-1), broken)
    assert torch.equal(lse.isnan(), broken.transpose(1, 2))


@each_row
def test_largest_and_smallest_numbers(row: support.KernelRow, run_row: Callable, cuda: torch.device) -> None:
    """Keys and values of 448 and of the smallest subnormals, 2^-9: sums leave the range of e4m3, not that of fp32."""
    call = row_call(row, "varlen", (130, 9), (400, 130), heads_q=4, descale="", softmax_scale=1e-6, causal=True)
    built = build(call, cuda)
    for name, logical in (("q", built.q), ("k", built.k), ("v", built.v)):
        for b, x in enumerate(logical):
            sign = torch.where(torch.rand(x.shape, device=cuda) < 0.5, -1.0, 1.0)
            size = torch.where(torch.rand(x.shape, device=cuda) < 0.5, 448.0, 2.0**-9)
            logical[b] = (sign * size).to(x.dtype)
        bytes_of(built.kwargs[name])[: sum(map(len, logical))] = bytes_of(torch.cat(logical))
    run_row(row, built)


@each_row
def test_outputs(row: support.KernelRow, only_row: Callable, cuda: torch.device, rng: random.Random) -> None:
    """bf16 whether given or not, the same without softmax_lse, of no query too; out of another dtype raises."""
    only_row(row)
    built = build(row_call(row, "varlen", (200, 0, 9), (300, 5, 40), heads_q=4, causal=True), cuda, rng)
    given, lse = (x.clone() for x in check_call(built))
    out, again = built.run(out=None)
    assert out.dtype == torch.bfloat16
    check_equal(out, given)
    check_equal(again, lse)
    check_equal(broadhead.flash_attn_varlen_func(**{**built.kwargs, "out": None}), given)
    for dtype in (torch.float8_e4m3fn, torch.float16, torch.float32):
        with pytest.raises(broadhead.InvalidTypeError, match=r"out must have dtype torch.bfloat16"):
            built.run(out=torch.empty_like(given).to(dtype))
    empty = torch.empty(2, 0, 4, row.head_dim, device=cuda).to(torch.float8_e4m3fn)
    keys, values = (torch.zeros(2, 9, 2, d, device=cuda).to(empty.dtype) for d in (row.head_dim, row.head_dim_v))
    out, lse = broadhead.flash_attn_func(empty, keys, values, return_attn_probs=True)
    assert out.dtype == torch.bfloat16 and out.shape == (2, 0, 4, row.head_dim_v) and lse.shape == (2, 4, 0)


# --- long sums --------------------------------------------------------------------------------------------------------

LONG, MEAN_RTOL, LONG_LSE_ATOL = 131072, 3e-3, 1e-3


@pytest.mark.parametrize("num_splits", [1, 0])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_long_sums_do_not_drift(
    head_dim: int, num_splits: int, cuda: torch.device, rng: random.Random, row_ran: Callable
) -> None:
    """Tensor cores add products of 8-bit numbers with few bits: over many keys whose values do not cancel it shows
    unless a step's sum is added to the output in fp32."""
    call = Call("func", (130,), (LONG,), heads_kv=1, head_dim=head_dim, num_splits=num_splits, **FP8)
    built = build(call, cuda, rng)
    shifted = (built.v[0].float() * 0.5 + 1.0).to(call.dtype)
    built.v[0] = shifted
    bytes_of(built.kwargs["v"])[0] = bytes_of(shifted)
    out, lse = built.run()
    row_ran(phase="prefill", dtype=call.dtype, head_dim=head_dim)
    (truth,), (truth_lse,) = judge(built)
    assert float(truth.mean().abs()) > 0.4, "the mean is what drifts"
    drift = float((out[0].double().mean() - truth.mean()).abs() / truth.mean().abs())
    assert drift < MEAN_RTOL, f"the mean of the output is off by {drift:.2g} of itself"
    by_head = (out[0].double().mean(dim=(0, 2)) - truth.mean(dim=(0, 2))).abs() / truth.mean(dim=(0, 2)).abs()
    assert float(by_head.max()) < MEAN_RTOL, by_head.tolist()
    error = float((lse[0].double() - truth_lse).abs().max())
    assert error < LONG_LSE_ATOL, f"softmax_lse is off by {error:.2g}"


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_no_row_takes_is_refused(cuda: torch.device) -> None:
    def tensor(head_dim: int, dtype: torch.dtype = torch.float8_e4m3fn, width: int = 0) -> torch.Tensor:
        return torch.zeros(1, 64, 2, width or head_dim, device=cuda).to(dtype)[..., :head_dim]

    for q, words in (
        (tensor(72), "multiples of 16"),
        (tensor(64, width=72), "multiples of 16 elements"),
        (tensor(528), "head_dim 528 exceeds 512"),
        (tensor(64, torch.float8_e5m2), "float8_e5m2 has no CUDA kernel"),
    ):
        with pytest.raises(broadhead.UnsupportedError, match=words):
            broadhead.flash_attn_func(q, q, q)
    q, wide = tensor(64), tensor(64, torch.bfloat16)
    with pytest.raises(broadhead.UnsupportedError, match="float8_e4m3fn with qv"):
        broadhead.flash_attn_func(q, q, q, qv=q)
    with pytest.raises(broadhead.UnsupportedError, match="bf16 with descale"):
        broadhead.flash_attn_func(wide, wide, wide, k_descale=torch.ones(1, 2, device=cuda))
    for mixed in ((wide, q, wide), (wide, wide, q), (q, wide, q), (q, q, wide)):
        with pytest.raises(broadhead.InvalidTypeError, match="must have the dtype of"):
            broadhead.flash_attn_func(*mixed)
