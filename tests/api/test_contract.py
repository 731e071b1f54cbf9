"""The call contract through the public functions: signatures, spellings, windows, LSE and what is never written."""

from __future__ import annotations

import inspect
import math

import broadhead
import pytest
import torch
from calls import Call, build
from checks import check_call, check_equal

FUNC = (
    "q k v softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk softcap num_splits"
    " pack_gqa deterministic sm_margin return_attn_probs"
)
VARLEN = (
    "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q seqused_k softmax_scale causal qv q_descale"
    " k_descale v_descale window_size attention_chunk softcap num_splits pack_gqa deterministic sm_margin"
    " return_attn_probs"
)
KVCACHE = (
    "q k_cache v_cache k v qv rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad page_table cu_seqlens_q"
    " cu_seqlens_k_new max_seqlen_q rotary_seqlens q_descale k_descale v_descale softmax_scale causal window_size"
    " attention_chunk softcap rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin return_softmax_lse"
)
METADATA = (
    "batch_size max_seqlen_q max_seqlen_k num_heads_q num_heads_kv headdim cache_seqlens qkv_dtype headdim_v"
    " cu_seqlens_q cu_seqlens_k_new cache_leftpad page_size max_seqlen_k_new causal window_size attention_chunk"
    " has_softcap num_splits pack_gqa sm_margin"
)
MASKS = "query_ranges ranges_in_window tree_mask"
SIGNATURES = {
    "flash_attn_func": (FUNC, f"sinks prefix_lens out backend {MASKS}"),
    "flash_attn_varlen_func": (
        VARLEN,
        f"page_table scheduler_metadata sinks prefix_lens out backend {MASKS} tokens_per_split",
    ),
    "flash_attn_with_kvcache": (KVCACHE, f"sinks out {MASKS} tokens_per_split"),
    "get_scheduler_metadata": (METADATA, "out page_table num_heads num_heads_k kv_dtype tokens_per_split"),
    "flash_attn_combine": ("out_partial lse_partial out out_dtype", ""),
    "merge_attn_states": ("out_a lse_a out_b lse_b out", ""),
}
EXPORTED = [
    "flash_attn_qkvpacked_func",
    "flash_attn_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "mha_fwd",
    "mha_bwd",
    "is_supported",
    "explain",
    "support_matrix",
    "last_dispatch",
    "make_query_ranges",
    "_validate_head_dims",
    "maybe_contiguous",
    "BroadheadError",
    "InvalidArgumentError",
    "InvalidTypeError",
    "UnsupportedError",
    "KernelError",
    "FallbackWarning",
]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# --- names and spellings ---


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    positional, keywords = (text.split() for text in SIGNATURES[name])
    parameters = inspect.signature(getattr(broadhead, name)).parameters
    assert list(parameters)[: len(positional)] == positional
    assert set(keywords) <= set(parameters)
    kinds = {p.kind for p in parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}, "clients inspect signatures"


@pytest.mark.parametrize("name", [*SIGNATURES, *EXPORTED])
def test_exported(name: str) -> None:
    assert callable(getattr(broadhead, name))
    if not name.startswith("_"):
        assert getattr(broadhead, name).__doc__, f"{name} has no docstring"


@pytest.mark.parametrize(
    "function, synonyms",
    [
        ("flash_attn_func", "s_aux learnable_sink q_v return_softmax_lse"),
        ("flash_attn_varlen_func", "s_aux learnable_sink q_v return_softmax_lse block_table"),
        ("flash_attn_with_kvcache", "s_aux learnable_sink q_v return_attn_probs block_table"),
    ],
)
def test_synonyms_are_named_parameters(function: str, synonyms: str) -> None:
    parameters = inspect.signature(getattr(broadhead, function)).parameters
    assert set(synonyms.split()) <= set(parameters), (
        "a name that is not in the signature is silently dropped by clients"
    )


@pytest.mark.parametrize("name", ["s_aux", "learnable_sink"])
def test_sinks_synonyms(name: str) -> None:
    q, k, v, sinks = randn(1, 5, 4, 16), randn(1, 7, 2, 16), randn(1, 7, 2, 16), randn(4)
    expected = broadhead.flash_attn_func(q, k, v, sinks=sinks)
    check_equal(broadhead.flash_attn_func(q, k, v, **{name: sinks}), expected)
    assert not torch.allclose(expected, broadhead.flash_attn_func(q, k, v))
    with pytest.raises(broadhead.InvalidArgumentError, match="sinks"):
        broadhead.flash_attn_func(q, k, v, sinks=sinks, **{name: randn(4)})


def test_other_synonyms() -> None:
    q, k, v, qv = randn(2, 3, 4, 16), randn(2, 9, 2, 16), randn(2, 9, 2, 32), randn(2, 3, 4, 32)
    check_equal(broadhead.flash_attn_func(q, k, v, q_v=qv), broadhead.flash_attn_func(q, k, v, qv=qv))
    first, second = (
        broadhead.flash_attn_func(q, k, v, **{name: True}) for name in ("return_softmax_lse", "return_attn_probs")
    )
    for a, b in zip(first, second, strict=False):
        check_equal(a, b)

    cache_k, cache_v, table, lengths = (
        randn(6, 4, 2, 16),
        randn(6, 4, 2, 32),
        int32(5, 1, 0, 2, 4, 3).view(2, 3),
        int32(9, 11),
    )
    expected = broadhead.flash_attn_with_kvcache(q, cache_k, cache_v, cache_seqlens=lengths, page_table=table)
    check_equal(
        broadhead.flash_attn_with_kvcache(q, cache_k, cache_v, cache_seqlens=lengths, block_table=table), expected
    )
    packed = broadhead.flash_attn_varlen_func(
        q.flatten(0, 1), cache_k, cache_v, int32(0, 3, 6), None, 3, 12, seqused_k=lengths, block_table=table
    )
    check_equal(packed, expected.flatten(0, 1))


# --- returns, packed forms, masks ---


def test_returns() -> None:
    q, k, v = randn(2, 5, 4, 16), randn(2, 7, 2, 16), randn(2, 7, 2, 24)
    out = broadhead.flash_attn_func(q, k, v)
    assert isinstance(out, torch.Tensor) and out.shape == (2, 5, 4, 24) and out.dtype == q.dtype
    out, lse = broadhead.flash_attn_func(q, k, v, return_attn_probs=True)
    assert lse.shape == (2, 4, 5) and lse.dtype == torch.float32
    out, lse = broadhead.flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        int32(0, 5, 10),
        int32(0, 7, 14),
        5,
        7,
        return_attn_probs=True,
    )
    assert out.shape == (10, 4, 24) and lse.shape == (4, 10) and lse.dtype == torch.float32
    assert isinstance(broadhead.flash_attn_with_kvcache(q, k, v), torch.Tensor)
    given = torch.full((2, 5, 4, 24), math.nan)
    assert broadhead.flash_attn_func(q, k, v, out=given) is given
    check_equal(given, broadhead.flash_attn_func(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    check_call(build(Call("func", (9, 9), (13, 13), heads_q=4, dtype=dtype, causal=True), torch.device("cpu")))


def test_packed_forms_take_views(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    original = broadhead.reference.attention

    def spy(q, k, v, **kwargs):
        seen[:] = [q, k, v]
        return original(q, k, v, **kwargs)

    monkeypatch.setattr(broadhead.reference, "attention", spy)
    qkv = randn(2, 6, 3, 4, 16)
    expected = broadhead.flash_attn_func(*qkv.unbind(2), causal=True)
    check_equal(broadhead.flash_attn_qkvpacked_func(qkv, causal=True), expected)
    assert all(x.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() for x in seen), "qkv was copied"

    check_equal(broadhead.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], causal=True), expected)
    assert all(x.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() for x in seen), "kv was copied"

    packed = broadhead.flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), int32(0, 6, 12), 6, causal=True)
    check_equal(packed, expected.flatten(0, 1))
    assert all(x.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() for x in seen), (
        "varlen qkv was copied"
    )


@pytest.mark.parametrize("gqa", [1, 2])
def test_packed_gqa_heads(gqa: int) -> None:
    """FA3's fused projection: (B, S, Hq + 2 Hkv, D) with num_heads_q."""
    qkv = randn(2, 6, 4 + 2 * (4 // gqa), 16)
    q, k, v = qkv.split([4, 4 // gqa, 4 // gqa], dim=2)
    check_equal(broadhead.flash_attn_qkvpacked_func(qkv, num_heads_q=4), broadhead.flash_attn_func(q, k, v))


@pytest.mark.parametrize(
    "spelling, causal, meaning",
    [
        (None, False, (-1, -1)),
        ((-1, -1), False, (-1, -1)),
        ((None, None), False, (-1, -1)),
        ([-7, -2], False, (-1, -1)),
        (3, False, (3, 3)),
        ([3, 2], False, (3, 2)),
        ((3, None), False, (3, -1)),
        ((None, 0), False, (-1, 0)),
        (None, True, (-1, 0)),
        (3, True, (3, 0)),
        ((3, 3), True, (3, 0)),
        ([3, 0], True, (3, 0)),
        ((-1, 5), True, (-1, 0)),
        (0, False, (0, 0)),
    ],
)
def test_window_spellings(spelling, causal: bool, meaning: tuple[int, int]) -> None:
    q, k, v = randn(1, 9, 2, 16), randn(1, 12, 2, 16), randn(1, 12, 2, 16)
    got = broadhead.flash_attn_func(q, k, v, window_size=spelling, causal=causal)
    position, key = torch.arange(9)[:, None] + 3, torch.arange(12)[None, :]
    left, right = (n if n >= 0 else 99 for n in meaning)
    mask = (key >= position - left) & (key <= position + right)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    torch.testing.assert_close(got, expected.transpose(1, 2))
    metadata = broadhead.get_scheduler_metadata(1, 9, 12, 2, 2, 16, int32(12), causal=causal, window_size=spelling)
    same = broadhead.get_scheduler_metadata(1, 9, 12, 2, 2, 16, int32(12), causal=False, window_size=meaning)
    check_equal(metadata, same)


def test_bottom_right_alignment_and_empty_rows() -> None:
    """More queries than keys under a causal mask: the first rows see nothing and are 0 with LSE -inf, sinks or not."""
    q, k, v = randn(1, 8, 2, 16), randn(1, 5, 2, 16), randn(1, 5, 2, 16)
    for sinks in (None, randn(2)):
        out, lse = broadhead.flash_attn_func(q, k, v, causal=True, sinks=sinks, return_attn_probs=True)
        assert (out[:, :3] == 0).all() and (lse[..., :3] == -math.inf).all()
        assert out[:, 3:].abs().amin(dim=-1).gt(0).all() and lse[..., 3:].isfinite().all()
    out, _ = broadhead.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    torch.testing.assert_close(out[:, 3], v[:, 0])  # the first row with a key sees key 0 alone


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0, -0.5])
def test_softmax_scale(scale: float) -> None:
    check_call(
        build(Call("func", (7,), (11,), head_dim=32, softmax_scale=scale, dtype=torch.float32), torch.device("cpu"))
    )


def test_lse_is_natural_log() -> None:
    q, k, v = torch.zeros(1, 1, 1, 16), torch.zeros(1, 32, 1, 16), randn(1, 32, 1, 16)
    _, lse = broadhead.flash_attn_func(q, k, v, return_attn_probs=True)
    torch.testing.assert_close(lse, torch.full((1, 1, 1), math.log(32)))
    _, lse = broadhead.flash_attn_func(q, k, v, sinks=torch.zeros(1), return_attn_probs=True)
    torch.testing.assert_close(lse, torch.full((1, 1, 1), math.log(33)))


# --- layouts: every live element is right, nothing else is written ---

LAYOUTS = {
    "dense": Call("func", (5, 5), (9, 9), heads_q=4),
    "dense_v": Call("func", (5, 5), (9, 9), heads_q=4, head_dim=32, head_dim_v=48, causal=True),
    "dense_strides": Call("func", (5, 5), (9, 9), q_layout="packed", k_layout="rows"),
    "dense_heads_first": Call("func", (5, 5), (9, 9), q_layout="heads_first", k_layout="heads_first", window=(2, 3)),
    "dense_all": Call("func", (9, 9), (9, 9), heads_q=6, window=(3, 0), softcap=5.0, sinks="fp32"),
    "chunk": Call("func", (11,), (17,), attention_chunk=4),
    "chunk_causal": Call("func", (17,), (11,), attention_chunk=4, causal=True, sinks="q"),
    "prefix": Call("func", (9, 9, 9), (9, 9, 9), causal=True, prefix=(0, 4, 99)),
    "prefix_window": Call("func", (9, 9), (9, 9), causal=True, window=(2, 0), prefix=(3, 0)),
    "varlen": Call("varlen", (3, 0, 7, 1), (5, 4, 0, 9), heads_q=4, causal=True, tail=3),
    "varlen_used": Call("varlen", (3, 0, 7), (5, 4, 8), slack_q=2, slack_k=3, tail=3, window=(3, 1)),
    "varlen_prefix": Call("varlen", (6, 8), (6, 8), causal=True, prefix=(2, 5), slack_q=2, slack_k=2),
    "varlen_loose_max": Call("varlen", (3, 5), (5, 9), max_seqlen_slack=7, causal=True),
    "varlen_paged": Call("varlen", (3, 0, 7), (5, 4, 19), page_size=4, causal=True, tail=1, slack_k=9),
    "cache": Call("kvcache", (2, 2, 2), (9, 2, 0), slack_k=4, causal=True, heads_q=4),
    "cache_idx_leftpad": Call("kvcache", (2, 2), (9, 5), slack_k=3, batch_idx=True, leftpad=(3, 0), causal=True),
    "paged_1": Call("kvcache", (1, 1, 1), (9, 1, 0), page_size=1, heads_q=4, slack_k=2),
    "paged_3_vllm": Call("kvcache", (3, 3), (10, 4), page_size=3, k_layout="interleaved", causal=True),
    "paged_16_hf": Call("kvcache", (1, 1), (40, 17), page_size=16, k_layout="overlapping", slack_k=20),
    "paged_leftpad": Call("kvcache", (2, 2), (9, 5), page_size=4, leftpad=(5, 2), causal=True, window=(4, 0)),
    "paged_idx_leftpad": Call("kvcache", (2, 2), (9, 5), page_size=4, batch_idx=True, leftpad=(1, 4), causal=True),
    "ragged": Call("kvcache", (4, 0, 1), (9, 5, 20), page_size=8, ragged_q=True, causal=True, tail=2),
    "append": Call("kvcache", (2, 2), (9, 2), num_new=(2, 2), slack_k=2, causal=True),
    "append_paged": Call("kvcache", (3, 3), (9, 3), num_new=(3, 3), page_size=4, causal=True, batch_idx=True),
    "append_ragged": Call("kvcache", (3, 0, 1), (9, 4, 1), num_new=(3, 0, 1), page_size=4, causal=True, ragged_q=True),
    "append_leftpad": Call("kvcache", (2, 2), (9, 2), num_new=(2, 2), leftpad=(3, 1), slack_k=2, causal=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str, dtype: torch.dtype) -> None:
    check_call(build(LAYOUTS[name].with_(dtype=dtype), torch.device("cpu")))


@pytest.mark.parametrize("name", [n for n, c in LAYOUTS.items() if not c.num_new])
def test_layout_without_out(name: str) -> None:
    """Allocated outputs: rows that nobody owns are not NaN garbage in the live part, and live rows equal out='s."""
    built = build(LAYOUTS[name].with_(dtype=torch.float32), torch.device("cpu"))
    given, _ = built.run()
    fresh, _ = built.run(out=None)
    for a, b in zip(built.split(given), built.split(fresh), strict=False):
        check_equal(a, b)


def test_batch_of_nothing() -> None:
    for q, k in (((0, 4, 2, 16), (0, 5, 2, 16)), ((2, 0, 2, 16), (2, 5, 2, 16)), ((2, 4, 2, 16), (2, 0, 2, 16))):
        out, lse = broadhead.flash_attn_func(randn(*q), randn(*k), randn(*k), return_attn_probs=True)
        assert out.shape == q and (out == 0).all() and (lse == -math.inf).all()
    cu = int32(0, 0, 0)
    out = broadhead.flash_attn_varlen_func(randn(0, 2, 16), randn(0, 2, 16), randn(0, 2, 16), cu, cu, 0, 0)
    assert out.shape == (0, 2, 16)


def test_two_pass_prefix_lm_equals_one_pass() -> None:
    """Two calls write one out (a full prefix, then the causal rest); prefix_lens does both at once."""
    prefix, total, capacity = [3, 0, 6], [8, 5, 6], [10, 7, 6]
    starts = [0, 10, 17]
    q, k, v = (torch.full((26, 2, 16), math.nan) for _ in range(3))
    for start, n in zip(starts, total, strict=False):
        q[start : start + n], k[start : start + n], v[start : start + n] = (
            randn(n, 2, 16),
            randn(n, 2, 16),
            randn(n, 2, 16),
        )
    cu = int32(0, 10, 17, 23)
    out = torch.full((26, 2, 16), math.nan)
    broadhead.flash_attn_varlen_func(
        q, k, v, cu, cu, max(capacity), max(capacity), seqused_q=int32(*prefix), seqused_k=int32(*prefix), out=out
    )
    for start, n, p in zip(starts, total, prefix, strict=False):
        assert out[start : start + p].isfinite().all() and out[start + p : start + n].isnan().all()
    response = [n - p for n, p in zip(total, prefix, strict=False)]
    cu_response = int32(3, 10, 23, 23)
    broadhead.flash_attn_varlen_func(
        q,
        k,
        v,
        cu_response,
        cu,
        max(capacity),
        max(capacity),
        seqused_q=int32(*response),
        seqused_k=int32(*total),
        causal=True,
        out=out,
    )
    once = torch.full((26, 2, 16), math.nan)
    broadhead.flash_attn_varlen_func(
        q,
        k,
        v,
        cu,
        cu,
        max(capacity),
        max(capacity),
        seqused_q=int32(*total),
        seqused_k=int32(*total),
        causal=True,
        prefix_lens=int32(*prefix),
        out=once,
    )
    torch.testing.assert_close(out, once, equal_nan=True)
    assert out.isnan().all(dim=(1, 2)).sum() == 26 - sum(total)
