"""SGLang's attention functions, called as SGLang spells them: decode, extend, cascade, qv, and what is refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from broadhead.errors import BroadheadError, InvalidArgumentError, UnsupportedError
from broadhead.integrations.sglang import calls
from broadhead.integrations.sglang.backend import exclusive_ranges
from on_device import DEVICE, WIDE
from oracle import Rule, attention
from sglang_batch import Requests, assert_near, make_requests
from tolerance import OUT_FACTOR, assert_close

PAGES = [1, 16, 64]


def call(requests: Requests, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "q": requests.q,
        "k_cache": requests.paged(requests.k_pool),
        "v_cache": requests.paged(requests.v_pool),
        "page_table": requests.page_table,
        "cache_seqlens": requests.cache_seqlens,
        "cu_seqlens_q": requests.cu_seqlens_q,
        "cu_seqlens_k_new": requests.cache_seqlens.cumsum(0, dtype=torch.int32),
        "max_seqlen_q": max(requests.q_lens),
        "softmax_scale": requests.q.shape[-1] ** -0.5,
        "causal": True,
        "window_size": (-1, -1),
        "attention_chunk": None,
        "softcap": 0.0,
        "num_splits": 0,
        "ver": 3,
        **changes,
    }
    given["cu_seqlens_k_new"] = torch.nn.functional.pad(given["cu_seqlens_k_new"], (1, 0))
    return calls.flash_attn_with_kvcache(**given)


@pytest.mark.attends("forward")
@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize("head_dim", [64, 512])
@pytest.mark.parametrize("window", [-1, 9])
def test_decode(page_size: int, head_dim: int, window: int) -> None:
    requests = make_requests(page_size, head_dims=(head_dim, head_dim))
    out = torch.full_like(requests.q, float("nan"))
    got = call(requests, window_size=(window, 0 if window >= 0 else -1), out=out)
    assert got is out
    assert_near(got, requests, Rule(head_dim**-0.5, (window, 0)))


@pytest.mark.attends("forward")
@pytest.mark.parametrize("page_size", PAGES)
def test_extend(page_size: int) -> None:
    requests = make_requests(page_size, [7, 1, 30, 12])
    sinks = torch.randn(4, dtype=torch.bfloat16, device=DEVICE)
    got, lse, *rest = call(requests, softcap=20.0, sinks=sinks, return_softmax_lse=True)
    assert rest == [] and lse.shape == (4, 50)
    assert_near(got, requests, Rule(64**-0.5, (-1, 0), softcap=20.0), sinks)


@pytest.mark.attends("forward")
@pytest.mark.parametrize("page_size", PAGES)
def test_cascade(page_size: int) -> None:
    """A prefix without a mask, a token of its own for each branch on pages of one, and their merge: as one call."""
    requests = make_requests(page_size, [4, 4, 4])
    prefix = [slots[:-4] for slots in requests.slots]
    prefix_lens = torch.tensor([len(each) for each in prefix], dtype=torch.int32, device=DEVICE)
    first, lse_first = call(requests, cache_seqlens=prefix_lens, causal=False, return_softmax_lse=True)
    branches = torch.cat([slots[-4:] for slots in requests.slots]).int()
    second, lse_second = calls.flash_attn_with_kvcache(
        q=requests.q,
        k_cache=requests.k_pool[:, None],
        v_cache=requests.v_pool[:, None],
        page_table=branches[:, None],
        cache_seqlens=torch.ones(12, dtype=torch.int32, device=DEVICE),
        cu_seqlens_q=torch.arange(13, dtype=torch.int32, device=DEVICE),
        cu_seqlens_k_new=torch.arange(13, dtype=torch.int32, device=DEVICE),
        max_seqlen_q=1,
        softmax_scale=64**-0.5,
        causal=False,
        return_softmax_lse=True,
        ver=3,
    )
    out, lse = calls.merge_state_v2(first, lse_first.T.contiguous(), second, lse_second.T.contiguous())
    assert lse.shape == (12, 4)
    keys = [torch.cat((prefix[i // 4], branches[i : i + 1].long())) for i in range(12)]
    alone = Requests(requests.q, requests.k_pool, requests.v_pool, keys, [1] * 12, page_size, requests.page_table)
    assert_near(out, alone, Rule(64**-0.5))
    torch.testing.assert_close(lse.T.double(), alone.judge(Rule(64**-0.5))[1], rtol=1e-2, atol=1e-2)


@pytest.mark.attends()
def test_merge_writes_what_is_given() -> None:
    a, b = torch.randn(2, 5, 3, 16, device=DEVICE)
    lse_a, lse_b = torch.randn(2, 5, 3, device=DEVICE)
    want, lse = calls.merge_state_v2(a, lse_a, b, lse_b)
    out, merged = torch.empty_like(a), torch.empty_like(lse_a)
    got = calls.merge_state_v2(a, lse_a, b, lse_b, out, merged)
    assert got[0] is out and got[1] is merged
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(merged, torch.logaddexp(lse_a, lse_b))
    torch.testing.assert_close(lse, merged)


@pytest.mark.attends("forward")
@pytest.mark.parametrize("only_qv", [False, True])
def test_absorbed_mla(only_qv: bool) -> None:
    requests = make_requests(16, [1, 3], heads=(4, 1), head_dims=(64, 512), dtype=WIDE)
    qv = torch.randn(4, 4, 512, dtype=WIDE, device=DEVICE)
    keys = {"k_cache": None, "only_qv": True} if only_qv else {}
    got = call(requests, qv=qv, softmax_scale=0.1, **keys)
    rows: dict[torch.dtype, list[torch.Tensor]] = {torch.float64: [], WIDE: []}
    for slots, q, latent in zip(requests.slots, requests.q.split([1, 3]), qv.split([1, 3])):
        rope = torch.zeros_like(q) if only_qv else q
        for dtype, parts in rows.items():
            given = (x.to(dtype) for x in (rope, requests.k_pool[slots], requests.v_pool[slots]))
            parts.append(attention(*given, Rule(0.1, (-1, 0)), qv=latent.to(dtype))[0])
    assert_close("out", got, *(torch.cat(x) for x in rows.values()), WIDE, OUT_FACTOR, "absorbed")


@pytest.mark.attends("forward")
def test_scales_of_another_batch() -> None:
    """A scale of the layer is expanded for the requests; a cascade's second call has more sequences."""
    requests = make_requests(16, heads=(4, 2), dtype=torch.float32)
    wide = requests.k_pool.clone(), requests.v_pool.clone()
    requests.k_pool, requests.v_pool = (pool.to(torch.float8_e4m3fn) for pool in wide)
    requests.q = requests.q.bfloat16()
    scale = torch.tensor([2.0], device=DEVICE)
    got = call(requests, k_descale=scale.expand(2, 2), v_descale=scale.expand(2, 2))
    requests.k_pool, requests.v_pool = (pool.float() * 2 for pool in (requests.k_pool, requests.v_pool))
    requests.q = requests.q.float()
    truth, _ = requests.judge(Rule(64**-0.5, (-1, 0)))
    torch.testing.assert_close(got.double(), truth, rtol=5e-2, atol=5e-2)


@pytest.mark.attends("forward")
def test_images() -> None:
    """SGLang's inclusive ends, -1 for text, within the window of the layer."""
    requests = make_requests(16, [20, 9], most=1, dtype=WIDE)
    requests.slots = [slots[-length:] for slots, length in zip(requests.slots, requests.q_lens)]
    ranges = torch.full((29, 2), -1, dtype=torch.int32, device=DEVICE)
    ranges[3:9] = torch.tensor([3, 8], device=DEVICE)
    ranges[20 + 2 : 20 + 5] = torch.tensor([2, 4], device=DEVICE)
    got = call(requests, window_size=(4, 0), query_ranges=exclusive_ranges(ranges))
    wanted: dict[torch.dtype, list[torch.Tensor]] = {torch.float64: [], WIDE: []}
    for q, slots, images in zip(requests.q.split([20, 9]), requests.slots, ranges.split([20, 9])):
        ends = tuple((max(begin, 0), end + 1) for begin, end in images.tolist())
        rule = Rule(64**-0.5, (4, 0), ranges=ends, ranges_in_window=True)
        for dtype, parts in wanted.items():
            parts.append(
                attention(*(x.to(dtype) for x in (q, requests.k_pool[slots], requests.v_pool[slots])), rule)[0]
            )
    assert_close("out", got, *(torch.cat(x) for x in wanted.values()), WIDE, OUT_FACTOR, "images")


@pytest.mark.attends("forward")
def test_varlen() -> None:
    lengths = [5, 1, 17]
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    q, k, v = (torch.randn(23, heads, 64, dtype=WIDE, device=DEVICE) for heads in (4, 2, 2))
    got = calls.flash_attn_varlen_func(
        q=q, k=k, v=v, cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=17, max_seqlen_k=17,
        softmax_scale=0.2, causal=True, window_size=(-1, -1), softcap=0.0, num_splits=0, attention_chunk=None, ver=3,
    )  # fmt: skip
    want = []
    for dtype in (torch.float64, WIDE):
        parts = zip(*(x.to(dtype).split(lengths) for x in (q, k, v)))
        want.append(torch.cat([attention(*each, Rule(0.2, (-1, 0)))[0] for each in parts]))
    assert_close("out", got, *want, WIDE, OUT_FACTOR, "varlen")


@pytest.mark.parametrize("name", ["score_mod", "mask_mod", "aux_tensors", "rel_bias", "sfq", "sfk", "sfv"])
def test_arguments_of_version_4_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} .*--attention-backend fa4"):
        call(make_requests(1), **{name: object()})


def test_qv_alone_needs_qv() -> None:
    with pytest.raises(InvalidArgumentError, match="only_qv"):
        call(make_requests(1), only_qv=True)
    with pytest.raises(BroadheadError, match="k_cache"):
        call(make_requests(1), k_cache=None)


def test_names_are_plain_parameters() -> None:
    for name in ("flash_attn_with_kvcache", "flash_attn_varlen_func"):
        kinds = {each.kind for each in inspect.signature(getattr(calls, name)).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
