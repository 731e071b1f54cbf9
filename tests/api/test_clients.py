"""The calls of vLLM, SGLang, lmdeploy, Hugging Face, Transformer Engine and HRM-Text, spelt as they spell them."""

from __future__ import annotations

import inspect
import math

import broadhead
import oracle
import pytest
import torch
from calls import Call, build
from checks import check_against, check_equal, check_split

CPU = torch.device("cpu")


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@pytest.mark.parametrize("page_size", [16, 48])
@pytest.mark.parametrize("window", [None, [63, 0]])
def test_vllm(page_size: int, window: list[int] | None) -> None:
    """varlen with block_table, interleaved head-major K|V, preallocated out, expanded descales and copied metadata."""
    call = Call(
        "varlen",
        (1, 5, 1),
        (33, 70, 9),
        heads_q=4,
        head_dim=32,
        page_size=page_size,
        k_layout="interleaved",
        causal=True,
        window=window,
        tail=2,
        slack_k=20,
    )
    built = build(call, CPU)
    kw = built.kwargs
    buffer = torch.zeros(1 + round_up(max(8, 3), 4) * 4, dtype=torch.int32)
    metadata = broadhead.get_scheduler_metadata(
        batch_size=3,
        max_seqlen_q=5,
        max_seqlen_k=70,
        num_heads_q=4,
        num_heads_kv=2,
        headdim=32,
        cache_seqlens=kw["seqused_k"],
        qkv_dtype=call.dtype,
        cu_seqlens_q=kw["cu_seqlens_q"],
        page_size=page_size,
        causal=True,
        window_size=window,
        num_splits=32,
    )
    n = metadata.shape[0]
    buffer[:n] = metadata
    buffer[n:] = 0
    descale = torch.ones(1).expand(3, 2)
    broadhead.flash_attn_varlen_func(
        q=kw["q"],
        k=kw["k"],
        v=kw["v"],
        out=kw["out"],
        cu_seqlens_q=kw["cu_seqlens_q"],
        max_seqlen_q=5,
        seqused_k=kw["seqused_k"],
        max_seqlen_k=70,
        softmax_scale=32**-0.5,
        causal=True,
        window_size=window,
        block_table=kw["page_table"],
        softcap=0.0,
        scheduler_metadata=buffer[:n],
        q_descale=descale,
        k_descale=descale,
        v_descale=descale,
        num_splits=32,
        s_aux=None,
    )
    check_against(built, built.out)


@pytest.mark.parametrize("page_size", [1, 16])
def test_sglang(page_size: int) -> None:
    """kvcache with ragged q; cu_seqlens_k_new without k and v; metadata by num_heads= and num_heads_k=, in a buffer."""
    call = Call("kvcache", (1, 1, 1, 1), (33, 7, 0, 64), heads_q=8, page_size=page_size, ragged_q=True, causal=True)
    built = build(call, CPU)
    kw = built.kwargs
    metadata = broadhead.get_scheduler_metadata(
        batch_size=4,
        max_seqlen_q=1,
        max_seqlen_k=50,
        cache_seqlens=kw["cache_seqlens"],
        num_heads=8,
        num_heads_k=2,
        headdim=64,
        headdim_v=64,
        qkv_dtype=call.dtype,
        page_size=page_size,
        causal=True,
        has_softcap=False,
        num_splits=0,
    )
    buffer = torch.zeros(1 + round_up(20, 4) * 4, dtype=torch.int32)
    buffer[: metadata.numel()].copy_(metadata)
    out, lse, *_ = broadhead.flash_attn_with_kvcache(
        q=kw["q"],
        k_cache=kw["k_cache"],
        v_cache=kw["v_cache"],
        page_table=kw["page_table"],
        cache_seqlens=kw["cache_seqlens"],
        cu_seqlens_q=kw["cu_seqlens_q"],
        cu_seqlens_k_new=torch.tensor([0, 33, 40, 40, 104], dtype=torch.int32),
        max_seqlen_q=1,
        softmax_scale=0.125,
        causal=True,
        window_size=(-1, -1),
        softcap=0.0,
        k_descale=None,
        v_descale=None,
        return_softmax_lse=True,
        num_splits=0,
        scheduler_metadata=buffer[: metadata.numel()],
        sinks=None,
    )
    assert lse.shape == (8, 4)
    check_against(built, out, lse)


def test_lmdeploy() -> None:
    """Speculative decoding: dense q of several tokens, metadata with seven positional arguments, int64 lengths cast."""
    call = Call("kvcache", (3, 3), (33, 70), heads_q=4, page_size=16, causal=True, slack_k=30)
    built = build(call, CPU)
    kw = built.kwargs
    width = kw["page_table"].shape[1] * 16
    metadata = broadhead.get_scheduler_metadata(
        2,
        3,
        width,
        4,
        2,
        64,
        kw["cache_seqlens"].long().to(torch.int32),
        qkv_dtype=call.dtype,
        headdim_v=64,
        cu_seqlens_q=None,
        cu_seqlens_k_new=None,
        page_size=16,
        causal=True,
        window_size=(-1, -1),
        has_softcap=False,
        num_splits=0,
    )
    out = broadhead.flash_attn_with_kvcache(
        kw["q"],
        kw["k_cache"],
        kw["v_cache"],
        cache_seqlens=kw["cache_seqlens"],
        max_seqlen_q=3,
        scheduler_metadata=metadata,
        page_table=kw["page_table"],
        softmax_scale=0.125,
        causal=True,
        window_size=(-1, -1),
        softcap=-0.0,
    )
    check_against(built, out)


def test_lmdeploy_window_int_and_mla() -> None:
    """Prefill passes an int window; MLA passes the latent part as qv with head_dim 64 and head_dim_v 512."""
    built = build(Call("varlen", (9, 4), (9, 4), window=3, causal=True, tail=5), CPU)
    kw = built.kwargs
    out = broadhead.flash_attn_varlen_func(
        kw["q"],
        kw["k"],
        kw["v"],
        cu_seqlens_q=kw["cu_seqlens_q"],
        cu_seqlens_k=kw["cu_seqlens_k"],
        max_seqlen_q=9,
        max_seqlen_k=9,
        softmax_scale=0.125,
        causal=True,
        window_size=3,
        softcap=0.0,
    )
    check_against(built, out)

    q, qv, k, v = (torch.randn(6, h, d) for h, d in ((4, 64), (4, 512), (1, 64), (1, 512)))
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    out = broadhead.flash_attn_varlen_func(q, k, v, cu, cu, 4, 4, softmax_scale=0.05, causal=True, qv=qv)
    for rows in (slice(0, 2), slice(2, 6)):
        expected, _ = oracle.attention(q[rows], k[rows], v[rows], oracle.Rule(0.05, (-1, 0)), qv=qv[rows])
        torch.testing.assert_close(out[rows], expected, atol=1e-5, rtol=1e-4)


def test_hugging_face_signature_driven() -> None:
    """Hugging Face passes what inspect.signature shows; a name that is missing is dropped in silence."""
    wanted = {
        "flash_attn_func": {"causal", "softmax_scale", "window_size", "deterministic", "softcap", "s_aux"},
        "flash_attn_varlen_func": {
            "cu_seqlens_q",
            "cu_seqlens_k",
            "max_seqlen_q",
            "max_seqlen_k",
            "block_table",
            "s_aux",
            "deterministic",
        },
        "flash_attn_with_kvcache": {"cache_seqlens", "page_table", "block_table", "causal", "softmax_scale", "s_aux"},
    }
    for name, names in wanted.items():
        assert names <= set(inspect.signature(getattr(broadhead, name)).parameters), name


@pytest.mark.parametrize("window", [(-1, -1), (7, 7)])
def test_hugging_face_continuous_batching(window: tuple[int, int]) -> None:
    """kvcache positional (q, k_cache, v_cache, k, v): appends one token a sequence; K and V overlap in one pool."""
    call = Call(
        "kvcache",
        (1, 1, 1),
        (33, 70, 1),
        heads_q=4,
        page_size=16,
        num_new=(1, 1, 1),
        k_layout="overlapping",
        causal=True,
        window=window,
    )
    built = build(call, CPU)
    kw = built.kwargs
    out = broadhead.flash_attn_with_kvcache(
        kw["q"],
        kw["k_cache"],
        kw["v_cache"],
        kw["k"],
        kw["v"],
        cache_seqlens=kw["cache_seqlens"],
        page_table=kw["page_table"],
        causal=True,
        softmax_scale=0.125,
        window_size=window,
    )
    check_against(built, out)


def test_hugging_face_window_when_causal() -> None:
    """window_size=(w - 1, w - 1) with causal=True means (w - 1, 0)."""
    built = build(Call("func", (9, 9), (9, 9), causal=True, window=(3, 3)), CPU)
    kw = built.kwargs
    out = broadhead.flash_attn_func(
        kw["q"], kw["k"], kw["v"], causal=True, softmax_scale=None, window_size=(3, 3), deterministic=True, softcap=0.0
    )
    check_against(built, out)


def test_transformer_engine_padded_thd() -> None:
    """cu_seqlens of padded sequences together with seqused_q and seqused_k."""
    built = build(Call("varlen", (3, 0, 7), (3, 1, 9), slack_q=4, slack_k=4, causal=True), CPU)
    kw = built.kwargs
    out, lse, *_ = broadhead.flash_attn_varlen_func(
        kw["q"],
        kw["k"],
        kw["v"],
        cu_seqlens_q=kw["cu_seqlens_q"],
        cu_seqlens_k=kw["cu_seqlens_k"],
        max_seqlen_q=kw["max_seqlen_q"],
        max_seqlen_k=kw["max_seqlen_k"],
        seqused_q=kw["seqused_q"],
        seqused_k=kw["seqused_k"],
        causal=True,
        window_size=(-1, 0),
        num_splits=1,
        deterministic=True,
        return_attn_probs=True,
    )
    check_against(built, out, lse)


@pytest.mark.parametrize("start", [0, 4])
def test_hrm_contiguous_cache_with_int_length(start: int) -> None:
    """cache_seqlens as a Python int; k and v appended; num_splits=1."""
    q, k, v = (torch.randn(2, 3, 2, 16) for _ in range(3))
    k_cache, v_cache = (torch.full((2, 12, 2, 16), math.nan) for _ in range(2))
    k_cache[:, :start], v_cache[:, :start] = torch.randn(2, start, 2, 16), torch.randn(2, start, 2, 16)
    before = k_cache.clone()
    out = broadhead.flash_attn_with_kvcache(
        q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, cache_seqlens=start, num_splits=1, causal=True
    )
    end = start + 3
    check_equal(k_cache[:, start:end], k)
    check_equal(v_cache[:, start:end], v)
    check_equal(k_cache[:, :start], before[:, :start])
    assert k_cache[:, end:].isnan().all(), "rows past the appended ones were written"
    expected = broadhead.flash_attn_func(q, k_cache[:, :end], v_cache[:, :end], causal=True)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_append_with_rotary(interleaved: bool, causal: bool) -> None:
    """New keys rotate at cache_seqlens + i; queries too under a causal mask, all at cache_seqlens otherwise."""
    rotary = 8  # of 16 columns
    angle = torch.randn(32, rotary // 2)
    cos, sin = angle.cos(), angle.sin()

    def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
        x = x.clone()
        pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + rotary // 2) for i in range(rotary // 2)]
        for i, (first, second) in enumerate(pairs):
            a, b = x[..., first].clone(), x[..., second].clone()
            x[..., first] = a * cos[position, i] - b * sin[position, i]
            x[..., second] = a * sin[position, i] + b * cos[position, i]
        return x

    lengths, new, page_size = [5, 0, 11], 3, 4
    q, k, v = torch.randn(3, new, 4, 16), torch.randn(3, new, 2, 16), torch.randn(3, new, 2, 16)
    k_cache, v_cache = (torch.full((16, page_size, 2, 16), math.nan) for _ in range(2))
    table = torch.randperm(16)[:12].view(3, 4).to(torch.int32)
    old = [(torch.randn(n, 2, 16), torch.randn(n, 2, 16)) for n in lengths]
    for b, (n, (old_k, old_v)) in enumerate(zip(lengths, old, strict=False)):
        for row in range(n):
            page, slot = int(table[b, row // page_size]), row % page_size
            k_cache[page, slot], v_cache[page, slot] = old_k[row], old_v[row]
    out = broadhead.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos=cos,
        rotary_sin=sin,
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
        page_table=table,
        causal=causal,
        rotary_interleaved=interleaved,
    )
    for b, n in enumerate(lengths):
        new_k = torch.stack([rotate(k[b, i], n + i) for i in range(new)])
        new_q = torch.stack([rotate(q[b, i], n + i if causal else n) for i in range(new)])
        all_k, all_v = torch.cat((old[b][0], new_k)), torch.cat((old[b][1], v[b]))
        expected = broadhead.flash_attn_func(new_q[None], all_k[None], all_v[None], causal=causal)
        torch.testing.assert_close(out[b], expected[0], atol=1e-5, rtol=1e-4)
        for i in range(new):
            page, slot = int(table[b, (n + i) // page_size]), (n + i) % page_size
            torch.testing.assert_close(k_cache[page, slot], new_k[i], atol=1e-5, rtol=1e-4)


def test_cascade_merge() -> None:
    """vLLM's cascade and context parallelism: partial results merge by their LSE into the whole."""
    built = build(Call("func", (5, 5), (24, 24), heads_q=4, dtype=torch.float32), CPU)
    kw = {**built.kwargs, "out": None}
    k, v = kw.pop("k"), kw.pop("v")
    parts = [
        broadhead.flash_attn_func(**kw, k=k[:, a:b], v=v[:, a:b], return_attn_probs=True)
        for a, b in ((0, 9), (9, 24), (24, 24))
    ]
    (out_a, lse_a), (out_b, lse_b), (out_c, lse_c) = [
        (o.flatten(0, 1), s.transpose(0, 1).flatten(1).contiguous()) for o, s in parts
    ]
    assert (lse_c == -math.inf).all() and (out_c == 0).all()
    merged, lse = broadhead.merge_attn_states(out_a, lse_a, out_b, lse_b)[:2]
    check_split(built, merged, lse)
    merged, lse = broadhead.merge_attn_states(merged, lse, out_c, lse_c)[:2]
    check_split(built, merged, lse)
