"""Full GPU set: qv (absorbed MLA) beside what every row is asked: head dims, many heads, few queries, metadata."""

from __future__ import annotations

import random
from collections.abc import Callable

import broadhead
import pytest
import torch
from broadhead import support
from calls import Call, build
from checks import check_against
from gpu_calls import DECODE_ROWS, TORCH_DTYPES, capture, decode_call, prefill_call, row_call, row_id, shortened

pytestmark = [pytest.mark.gpu, pytest.mark.full]

DTYPES = (torch.bfloat16, torch.float16)
#: As MLA models have it: 64 columns of position in q and k, 512 latent ones in qv and v.
MLA = {"head_dim": 64, "head_dim_v": 512, "qv": True}
HEAD_DIMS = ((64, 512), (8, 8), (64, 64), (64, 256), (16, 512), (40, 264), (64, 504), (56, 448))
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (90, 0)},
    "prefix": {"causal": True, "prefix": (70, 0, 3, 300)},
    "chunk_softcap_sinks": {"attention_chunk": 96, "softcap": 20.0, "sinks": "fp32"},
}


@pytest.fixture(autouse=True)
def _needs_row(capability: tuple[int, int]) -> None:
    if not any("qv" in row.requires and capability in row.capabilities for row in DECODE_ROWS):
        pytest.skip(f"compute capability {capability} has no row for qv")


def mla_prefill(**options) -> Call:
    dims = {**MLA, **options}
    return prefill_call(dims.pop("head_dim"), **dims)


def mla_decode(**options) -> Call:
    dims = {**MLA, **options}
    return decode_call(dims.pop("head_dim"), **dims)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim, head_dim_v", HEAD_DIMS)
def test_head_dims(head_dim: int, head_dim_v: int, dtype: torch.dtype, run_call: Callable) -> None:
    """One row serves them all; softmax_scale is that of both parts together."""
    dims = {"head_dim": head_dim, "head_dim_v": head_dim_v, "dtype": dtype}
    _, row = run_call(mla_prefill(**dims))
    assert row.requires == ("qv",)
    run_call(mla_prefill(**dims, page_size=16, k_layout="interleaved", num_splits=2))
    run_call(mla_decode(**dims, softmax_scale=0.05))
    run_call(Call("func", (150,) * 2, (220,) * 2, heads_q=4, qv=True, causal=True, q_layout="gapped", **dims))


@pytest.mark.parametrize("q_layout", ["plain", "packed", "heads_first", "gapped"])
@pytest.mark.parametrize("page_size, k_layout", [(0, "rows"), (1, "rows"), (16, "rows"), (64, "heads_first")])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_and_layouts(mask: str, page_size: int, k_layout: str, q_layout: str, run_call: Callable) -> None:
    """K beside V in the rows of one latent cache, and qv by the strides of q."""
    options = {"heads_q": 16, "heads_kv": 1, "causal": False, **MASKS[mask], "q_layout": q_layout}
    run_call(mla_prefill(page_size=page_size, k_layout=k_layout, seqlens_k=(133, 40, 7, 409), **options))
    run_call(mla_prefill(page_size=page_size, k_layout=k_layout, slack_q=3, tail=2, num_splits=3, **options))


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_few_queries_of_many_heads(tokens: int, heads: int, page_size: int, run_call: Callable) -> None:
    """All query heads share the latent keys: decode and speculative decode."""
    base = {"seqlens_q": (tokens,) * 4, "heads_q": heads, "page_size": page_size, "causal": True, "k_layout": "rows"}
    lengths = {"seqlens_k": (2100, 64, tokens, 500)}
    splits = ({}, {"num_splits": 5}, {"metadata": True, "num_splits": 16}, {"tokens_per_split": 64})
    for options in (*splits, {"pack_gqa": False}):
        run_call(mla_decode(**base, **lengths, **options))
    run_call(mla_decode(**base, **lengths, ragged_q=True, tail=3, sinks="fp32"))


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 448), (64, 192)])
def test_equals_attention_of_the_parts_together(
    head_dim: int, head_dim_v: int, heads: int, cuda: torch.device, row_ran: Callable
) -> None:
    """(q, qv) against (k, v) is one query against one key: the rows without qv compute the same."""
    draw = {"dtype": torch.bfloat16, "device": cuda}
    q, qv = torch.randn(2, 90, heads, head_dim, **draw), torch.randn(2, 90, heads, head_dim_v, **draw)
    k, v = torch.randn(2, 700, 1, head_dim, **draw), torch.randn(2, 700, 1, head_dim_v, **draw)
    out, lse = broadhead.flash_attn_func(q, k, v, qv=qv, causal=True, return_attn_probs=True)
    assert row_ran(dtype=q.dtype).requires == ("qv",)
    joined = (torch.cat((q, qv), dim=-1), torch.cat((k, v), dim=-1), v)
    expected, expected_lse = broadhead.flash_attn_func(*joined, causal=True, return_attn_probs=True)
    assert not row_ran(dtype=q.dtype).requires
    torch.testing.assert_close(out, expected, atol=1e-2, rtol=2e-2)
    torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-4)


DECODE_QV_ROWS = tuple(row for row in DECODE_ROWS if "qv" in row.requires)


@pytest.mark.parametrize("row", DECODE_QV_ROWS, ids=row_id)
@pytest.mark.parametrize("head_dim, head_dim_v", HEAD_DIMS)
def test_decode_rows(row: support.KernelRow, head_dim: int, head_dim_v: int, run_row: Callable) -> None:
    """Each on its own: a tile and a bit of heads, columns at their edges, whole blocks of keys and parts of one."""
    n = row.tile.tile_n
    lengths = {"seqlens_q": (1, 2, 0, 1, 3), "seqlens_k": (40 * n, 17, 9, 0, 3 * n + 1)}
    dims = {"head_dim": head_dim, "head_dim_v": head_dim_v, "heads_q": row.tile.tile_m + 3, "heads_kv": 1}
    for options in (
        {"page_size": 64}, {"page_size": 4, "k_layout": "rows", "num_splits": 4}, {"pack_gqa": False},
        {"causal": True, "q_layout": "heads_first", "sinks": "fp32", "softcap": 20.0},
        {"tokens_per_split": 64, "heads_q": 8},
    ):  # fmt: skip
        run_row(row, row_call(row, "varlen", **lengths, **{**dims, **options}))


@pytest.mark.parametrize("heads", [1, 16, 40])
@pytest.mark.parametrize("row", DECODE_QV_ROWS, ids=row_id)
def test_only_qv_or_only_q(
    row: support.KernelRow, heads: int, only_row: Callable, row_ran: Callable, cuda: torch.device
) -> None:
    """Without the one half of the scores the other remains: as attention by it alone, on other rows."""
    draw = {"dtype": TORCH_DTYPES[row.dtype], "device": cuda}
    q, qv = torch.randn(3, 1, heads, 64, **draw), torch.randn(3, 1, heads, 512, **draw)
    k, v = torch.randn(3, 999, 1, 64, **draw), torch.randn(3, 999, 1, 512, **draw)
    expected = [
        broadhead.flash_attn_func(*parts, softmax_scale=0.05, return_attn_probs=True)
        for parts in ((q, k, v), (qv, v, v))
    ]
    only_row(row)
    for (out, lse), (a, b) in zip(expected, ((q, 0 * qv), (0 * q, qv))):
        got, got_lse = broadhead.flash_attn_func(a, k, v, qv=b, softmax_scale=0.05, return_attn_probs=True)
        assert row_ran(dtype=q.dtype).id == row.id
        torch.testing.assert_close(got, out, atol=1e-2, rtol=2e-2)
        torch.testing.assert_close(got_lse, lse, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("said", [True, False], ids=["said", "unsaid"])
def test_graph_with_metadata(said: bool, cuda: torch.device, rng: random.Random) -> None:
    """Metadata of get_scheduler_metadata's own arguments serves MLA: qv is guessed from the head dims."""
    call = mla_decode(heads_q=16, seqlens_k=(1500, 700, 1, 1200), num_splits=16, causal=True)
    built = build(call, cuda, rng)
    buffer = torch.zeros(17, dtype=torch.int32, device=cuda)

    def step() -> None:
        built.scheduler_metadata(out=buffer, has_qv=True if said else None)
        broadhead.flash_attn_with_kvcache(**built.kwargs, scheduler_metadata=buffer)

    graph = capture(step)
    for lengths in ([1500, 700, 1, 1200], [16, 3, 0, 900], [0, 0, 0, 0]):
        built.kwargs["cache_seqlens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        built.out.fill_(float("nan"))
        graph.replay()
        check_against(shortened(built, lengths), built.out)


def test_what_no_row_takes_is_refused(cuda: torch.device) -> None:
    def tensor(head_dim: int) -> torch.Tensor:
        return torch.zeros(1, 64, 2, head_dim, device=cuda, dtype=torch.bfloat16)

    for head_dim, head_dim_v, words in ((72, 512, "head_dim 72 exceeds 64"), (64, 520, "head_dim_v 520 exceeds 512")):
        q, v = tensor(head_dim), tensor(head_dim_v)
        with pytest.raises(broadhead.UnsupportedError, match=words):
            broadhead.flash_attn_func(q, q, v, qv=v)
