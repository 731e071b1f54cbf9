"""What check_forward reads into a problem; refusals name function, argument, what came and what is accepted."""

from __future__ import annotations

import re
from typing import Any

import broadhead
import pytest
import torch
from broadhead import InvalidArgumentError, InvalidTypeError
from broadhead.call.arguments import AttentionArgs
from broadhead.call.check import check_forward
from broadhead.call.masking import UNBOUNDED_WINDOW, mask_width, normalize_window, visible_interval
from torch import Tensor

NAN = float("nan")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense(**changes: Any) -> AttentionArgs:
    return AttentionArgs(**{"q": randn(2, 5, 4, 16), "k": randn(2, 7, 2, 16), "v": randn(2, 7, 2, 24), **changes})


def varlen(**changes: Any) -> AttentionArgs:
    values: dict[str, Any] = {
        "q": randn(9, 4, 16), "k": randn(11, 2, 16), "v": randn(11, 2, 16), "cu_seqlens_q": int32(0, 3, 9),
        "cu_seqlens_k": int32(0, 6, 11), "max_seqlen_q": 6, "max_seqlen_k": 6,
    }  # fmt: skip
    return AttentionArgs(**{**values, **changes})


def paged(**changes: Any) -> AttentionArgs:
    values: dict[str, Any] = {
        "q": randn(2, 1, 4, 16), "k": randn(6, 4, 2, 16), "v": randn(6, 4, 2, 16), "seqused_k": int32(9, 3),
        "page_table": int32(5, 0, 1, 2, 4, 3).view(2, 3),
    }  # fmt: skip
    return AttentionArgs(**{**values, **changes})


# --- the problem ------------------------------------------------------------------------------------------------------


def test_dense_problem() -> None:
    problem, total_q, scale, softcap = check_forward("f", dense(causal=True, window_size=(3, 5), softcap=2))
    assert (problem.batch, problem.seqlen_q, problem.seqlen_k, total_q) == (2, 5, 7, 10)
    assert (problem.num_heads_q, problem.num_heads_kv, problem.head_dim, problem.head_dim_v) == (4, 2, 16, 24)
    assert (problem.window_left, problem.window_right, softcap) == (3, 0, 2.0) and scale == 0.25
    assert problem.features == ("causal", "gqa", "lse", "softcap", "window") and problem.dtype == "fp32"
    assert problem.page_size == 0 and problem.obstacles == ()
    hash(problem)


def test_varlen_and_paged_problems() -> None:
    problem, total_q, *_ = check_forward("f", varlen(seqused_k=int32(2, 3)))
    assert (problem.batch, problem.seqlen_q, problem.seqlen_k, total_q) == (2, 6, 6, 9)
    assert problem.features == ("gqa", "lse", "seqused", "varlen")
    problem, *_ = check_forward("f", paged(max_seqlen_k=5, leftpad_k=int32(0, 1), num_splits=4))
    assert (problem.seqlen_k, problem.page_size) == (12, 4), "the length rule: page_table.size(1) * page_size"
    assert problem.features == ("gqa", "leftpad", "lse", "paged", "seqused", "split_kv")


def test_features_that_few_kernels_or_none_have() -> None:
    features = check_forward("f", dense(qv=randn(2, 5, 4, 24), q_descale=torch.ones(2, 2))).problem.features
    assert {"qv", "descale"} <= set(features)
    grad = dense(q=randn(2, 5, 4, 16).requires_grad_(True))
    assert "gradients" in check_forward("f", grad).problem.features
    with torch.no_grad():
        assert "gradients" not in check_forward("f", grad).problem.features


def test_sinks_of_8_bit_calls_are_of_the_dtype_of_out() -> None:
    e4m3 = torch.float8_e4m3fn
    given = {name: x.to(e4m3) for name, x in (("q", randn(2, 5, 4, 16)), ("k", randn(2, 7, 2, 16)))}
    given["v"] = randn(2, 7, 2, 24).to(e4m3)
    for dtype in (torch.float32, torch.bfloat16):
        out, _ = broadhead.mha_fwd(**given, sinks=randn(4).to(dtype))[:2]
        assert out.dtype == torch.bfloat16
    for dtype in (torch.float16, e4m3):
        with pytest.raises(InvalidTypeError, match=r"sinks must be fp32 or of the dtype of out, torch.bfloat16, got"):
            check_forward("f", dense(**given, sinks=randn(4).to(dtype)))


def test_scale_defaults() -> None:
    assert check_forward("f", dense()).softmax_scale == 16**-0.5
    assert check_forward("f", dense(qv=randn(2, 5, 4, 24))).softmax_scale == 40**-0.5
    for scale in (1.0, 1, 0.0, -0.5):
        assert check_forward("f", dense(softmax_scale=scale)).softmax_scale == scale


def test_layouts_that_kernels_do_not_take_are_obstacles_not_errors() -> None:
    odd = randn(2, 5, 4, 17, dtype=torch.bfloat16)[..., :16]
    k = randn(2, 7, 2, 16, dtype=torch.bfloat16)
    (obstacle,) = check_forward("f", AttentionArgs(odd, k, k)).problem.obstacles
    assert "strides of q" in obstacle and "8 elements" in obstacle
    one_token = randn(2, 1, 4, 16, dtype=torch.bfloat16).as_strided((2, 1, 4, 16), (64, 3, 16, 1))
    assert check_forward("f", AttentionArgs(one_token, k, k)).problem.obstacles == (), "strides of size 1 do not matter"
    out = torch.empty(2, 5, 4, 20, dtype=torch.bfloat16)[..., :16]
    (obstacle,) = check_forward("f", AttentionArgs(randn(2, 5, 4, 16).bfloat16(), k, k, out=out)).problem.obstacles
    assert "strides of out" in obstacle


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "window, causal, expected",
    [
        (None, False, (-1, -1)),
        ((None, 3), False, (-1, 3)),
        ([-5, 0], False, (-1, 0)),
        (4, False, (4, 4)),
        (4, True, (4, 0)),
        ((2, 7), True, (2, 0)),
        (None, True, (-1, 0)),
        ((2**31 - 1, UNBOUNDED_WINDOW), False, (-1, -1)),
        ((UNBOUNDED_WINDOW - 1, 2**40), False, (UNBOUNDED_WINDOW - 1, -1)),
    ],
)
def test_normalize_window(window: Any, causal: bool, expected: tuple[int, int]) -> None:
    assert normalize_window(window, causal) == expected


@pytest.mark.parametrize(
    "window", [(1,), (1, 2, 3), (1.5, 2), "1", (True, 1), True, {1: 2}, torch.tensor([1.0, 2.0]), torch.zeros(3), 3.0]
)
def test_bad_windows(window: Any) -> None:
    with pytest.raises(broadhead.BroadheadError, match="f: window_size must be"):
        check_forward("f", dense(window_size=window))


def test_visible_interval_and_mask_width(rng) -> None:
    """The pure functions against the rule written out, and the width against the union of what the queries see."""
    for _ in range(300):
        sq, sk = rng.randint(1, 9), rng.randint(1, 12)
        left, right, chunk = rng.choice([-1, 0, 2, 5]), rng.choice([-1, 0, 2, 5]), rng.choice([0, 0, 1, 3, 4])
        union = set()
        for i in range(sq):
            p = i + sk - sq
            seen = {
                j
                for j in range(sk)
                if (left < 0 or j >= p - left)
                and (right < 0 or j <= p + right)
                and (chunk == 0 or j // chunk == p // chunk)
            }
            begin, end = visible_interval(i, sq, sk, left, right, chunk)
            assert set(range(begin, end)) == seen
            union |= seen
        assert len(union) <= mask_width(sq, sk, left, right, chunk) <= sk


# --- refusals ---------------------------------------------------------------------------------------------------------

INT64 = torch.int64
BAD_DENSE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q is no tensor": ({"q": [1.0]}, InvalidTypeError, r"q must be a tensor.*list"),
    "q rank": ({"q": randn(5, 4, 16)}, InvalidArgumentError, r"q must be \(batch, seqlen_q.*\(5, 4, 16\)"),
    "q dtype": ({"q": torch.ones(2, 5, 4, 16, dtype=INT64)}, InvalidTypeError, r"q must be bf16.*int64"),
    "k dtype": ({"k": randn(2, 7, 2, 16).half()}, InvalidTypeError, r"k must have the dtype of q.*float16"),
    "v dtype": ({"v": randn(2, 7, 2, 24).double()}, InvalidTypeError, r"v must have the dtype of k.*float64"),
    "k device": ({"k": torch.empty(2, 7, 2, 16, device="meta")}, InvalidArgumentError, r"k must be on.*meta"),
    "k rank": ({"k": randn(7, 2, 16)}, InvalidArgumentError, r"k must be \(batch, seqlen_k"),
    "k batch": (
        {"k": randn(3, 7, 2, 16), "v": randn(3, 7, 2, 24)},
        InvalidArgumentError,
        r"batch of q, 2, got 3",
    ),
    "k head_dim": ({"k": randn(2, 7, 2, 24)}, InvalidArgumentError, r"head_dim of q, 16, got 24"),
    "v length": ({"v": randn(2, 8, 2, 24)}, InvalidArgumentError, r"v must agree with k"),
    "heads": ({"k": randn(2, 7, 3, 16), "v": randn(2, 7, 3, 24)}, InvalidArgumentError, r"multiple.*4 and 3"),
    "no heads": ({"k": randn(2, 7, 0, 16), "v": randn(2, 7, 0, 24)}, InvalidArgumentError, r"heads of k"),
    "no query heads": ({"q": randn(2, 5, 0, 16)}, InvalidArgumentError, r"q must have 1 to"),
    "head_dim": (
        {"q": randn(2, 5, 4, 12), "k": randn(2, 7, 2, 12)},
        InvalidArgumentError,
        r"multiple of 8, got 12",
    ),
    "head_dim 0": (
        {"q": randn(2, 5, 4, 0), "k": randn(2, 7, 2, 0)},
        InvalidArgumentError,
        r"positive.*got 0",
    ),
    "head_dim_v": ({"v": randn(2, 7, 2, 20)}, InvalidArgumentError, r"of v must be.*multiple of 8, got 20"),
    "last dim": (
        {"q": randn(2, 5, 16, 4).mT},
        InvalidArgumentError,
        r"q must be contiguous.*maybe_contiguous",
    ),
    "scale NaN": ({"softmax_scale": NAN}, InvalidArgumentError, r"softmax_scale must be a finite.*nan"),
    "scale inf": ({"softmax_scale": float("inf")}, InvalidArgumentError, r"softmax_scale.*inf"),
    "scale tensor": ({"softmax_scale": torch.tensor([1.0])}, InvalidTypeError, r"softmax_scale.*tensor"),
    "scale text": (
        {"softmax_scale": "1"},
        InvalidTypeError,
        r"softmax_scale must be a Python number, got '1'",
    ),
    "softcap": ({"softcap": -1.0}, InvalidArgumentError, r"softcap must be.*>= 0.0, got -1.0"),
    "softcap NaN": ({"softcap": NAN}, InvalidArgumentError, r"softcap.*nan"),
    "causal": ({"causal": int32(1)}, InvalidTypeError, r"causal must be True or False"),
    "chunk": ({"attention_chunk": -2}, InvalidArgumentError, r"attention_chunk.*-2"),
    "splits high": (
        {"num_splits": 257},
        InvalidArgumentError,
        r"num_splits must be an int in \[0, 256\], got 257",
    ),
    "splits low": ({"num_splits": -1}, InvalidArgumentError, r"num_splits.*-1"),
    "splits float": ({"num_splits": 2.0}, InvalidTypeError, r"num_splits must be a Python int"),
    "pack_gqa": ({"pack_gqa": 1.0}, InvalidTypeError, r"pack_gqa must be True or False"),
    "sm_margin": ({"sm_margin": -1}, InvalidArgumentError, r"sm_margin.*-1"),
    "sinks shape": (
        {"sinks": randn(2)},
        InvalidArgumentError,
        r"sinks must have shape \(heads_q,\) = \(4,\)",
    ),
    "sinks dtype": ({"sinks": randn(4).half()}, InvalidTypeError, r"sinks must be fp32 or.*float16"),
    "sinks type": ({"sinks": [0.0] * 4}, InvalidTypeError, r"sinks must be a tensor"),
    "sinks strides": ({"sinks": randn(8)[::2]}, InvalidArgumentError, r"sinks must be contiguous"),
    "prefix": ({"prefix_lens": int32(1, 2)}, InvalidArgumentError, r"prefix_lens requires causal=True"),
    "prefix shape": ({"prefix_lens": int32(1), "causal": True}, InvalidArgumentError, r"prefix_lens.*\(2,\)"),
    "prefix negative": (
        {"prefix_lens": int32(1, -1), "causal": True},
        InvalidArgumentError,
        r"prefix_lens.*-1",
    ),
    "seqused dtype": ({"seqused_k": torch.tensor([3, 4])}, InvalidTypeError, r"seqused_k.*int32.*int64"),
    "seqused negative": ({"seqused_k": int32(3, -4)}, InvalidArgumentError, r"seqused_k.*>= 0, got -4"),
    "seqused device": ({"seqused_q": int32(1, 1).to("meta")}, InvalidArgumentError, r"seqused_q must be on"),
    "leftpad": ({"leftpad_k": int32(1, 2, 3)}, InvalidArgumentError, r"leftpad_k.*\(3,\)"),
    "batch index": ({"kv_batch_idx": torch.ones(2)}, InvalidTypeError, r"kv_batch_idx.*float32"),
    "qv shape": ({"qv": randn(2, 5, 4, 16)}, InvalidArgumentError, r"qv must have shape"),
    "descale dtype": ({"k_descale": torch.ones(2, 2).half()}, InvalidTypeError, r"k_descale must be fp32"),
    "descale shape": ({"v_descale": torch.ones(2)}, InvalidArgumentError, r"v_descale must have shape"),
    "out shape": ({"out": randn(2, 5, 4, 16)}, InvalidArgumentError, r"out must have shape.*\(2, 5, 4, 24\)"),
    "out dtype": ({"out": randn(2, 5, 4, 24).half()}, InvalidTypeError, r"out must have dtype.*float16"),
    "out strides": (
        {"out": randn(1, 5, 4, 24).expand(2, 5, 4, 24)},
        InvalidArgumentError,
        r"every element once",
    ),
}
BAD_VARLEN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q rank": ({"q": randn(1, 9, 4, 16)}, InvalidArgumentError, r"q must be \(total_q, heads"),
    "cu dtype": ({"cu_seqlens_q": torch.tensor([0, 3, 9])}, InvalidTypeError, r"cu_seqlens_q.*int32.*int64"),
    "cu rank": ({"cu_seqlens_q": int32(0, 3, 9).view(1, 3)}, InvalidArgumentError, r"cu_seqlens_q.*\(1, 3\)"),
    "cu empty": ({"cu_seqlens_q": int32()}, InvalidArgumentError, r"cu_seqlens_q"),
    "cu strides": (
        {"cu_seqlens_q": int32(0, 1, 3, 5, 9)[::2]},
        InvalidArgumentError,
        r"cu_seqlens_q must be cont",
    ),
    "cu decreasing": ({"cu_seqlens_q": int32(0, 5, 3)}, InvalidArgumentError, r"never decrease"),
    "cu past the end": ({"cu_seqlens_k": int32(0, 5, 12)}, InvalidArgumentError, r"at most at 11"),
    "cu_k batch": ({"cu_seqlens_k": int32(0, 11)}, InvalidArgumentError, r"cu_seqlens_k.*\(3,\).*\(2,\)"),
    "max_q missing": ({"max_seqlen_q": None}, InvalidArgumentError, r"max_seqlen_q must be given"),
    "max_k missing": ({"max_seqlen_k": None}, InvalidArgumentError, r"max_seqlen_k must be given"),
    "max_q tensor": ({"max_seqlen_q": torch.tensor(6, device="meta")}, InvalidTypeError, r"max_seqlen_q.*read back"),
    "max_k negative": ({"max_seqlen_k": -1}, InvalidArgumentError, r"max_seqlen_k.*-1"),
    "batch index": ({"kv_batch_idx": int32(0, 1)}, InvalidArgumentError, r"kv_batch_idx"),
}
BAD_PAGED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "table int64": ({"page_table": torch.zeros(2, 3, dtype=INT64)}, InvalidTypeError, r"page_table.*int32.*int64"),
    "table float": ({"page_table": torch.zeros(2, 3)}, InvalidTypeError, r"page_table.*float32"),
    "table rank": ({"page_table": int32(0, 1)}, InvalidArgumentError, r"page_table.*\(batch, max_pages\)"),
    "table batch": ({"page_table": int32(0, 1, 2).view(3, 1)}, InvalidArgumentError, r"page_table.*\(3, 1\)"),
    "table strides": (
        {"page_table": torch.zeros(3, 2, dtype=torch.int32).T},
        InvalidArgumentError,
        r"page_table.*strides",
    ),
    "page_size 0": ({"k": randn(6, 0, 2, 16), "v": randn(6, 0, 2, 16)}, InvalidArgumentError, r"page_size.*got 0"),
    "k rank": ({"k": randn(24, 2, 16), "v": randn(24, 2, 16)}, InvalidArgumentError, r"k must be \(num_pages"),
}


def check_refused(args: AttentionArgs, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        check_forward("some_function", args)
    text = str(caught.value)
    assert text.startswith("some_function: ") and re.search(words, text), text
    assert isinstance(caught.value, (ValueError, TypeError, NotImplementedError))


@pytest.mark.parametrize("case", BAD_DENSE)
def test_bad_dense(case: str) -> None:
    changes, error, words = BAD_DENSE[case]
    check_refused(dense(**changes), error, words)


@pytest.mark.parametrize("case", BAD_VARLEN)
def test_bad_varlen(case: str) -> None:
    changes, error, words = BAD_VARLEN[case]
    check_refused(varlen(**changes), error, words)


@pytest.mark.parametrize("case", BAD_PAGED)
def test_bad_paged(case: str) -> None:
    changes, error, words = BAD_PAGED[case]
    check_refused(paged(**changes), error, words)


def test_refusal_comes_before_anything_is_written() -> None:
    out = torch.full((2, 5, 4, 24), 7.0)
    args = dense()
    with pytest.raises(broadhead.BroadheadError):
        broadhead.mha_fwd(args.q, args.k, args.v, out=out, softmax_scale=NAN)
    assert (out == 7).all()


def test_wrong_rotary_and_append_arguments() -> None:
    q, cache, new = randn(2, 1, 4, 16), randn(2, 9, 2, 16), randn(2, 1, 2, 16)
    good: dict[str, Any] = {"k": new, "v": new, "cache_seqlens": int32(3, 4)}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"v": None}, "v must be given"),
        ({"cache_seqlens": None}, "cache_seqlens must be given"),
        ({"cache_seqlens": -1}, "cache_seqlens must be an int in"),
        ({"cache_seqlens": 1.0}, "cache_seqlens must be an int or"),
        ({"cache_seqlens": torch.tensor([3, 4])}, "cache_seqlens.*int64"),
        ({"k": randn(2, 1, 2, 24)}, "k must have the heads and head_dim of k_cache"),
        ({"k": randn(3, 1, 2, 16), "v": randn(3, 1, 2, 16)}, "k must have the batch of q"),
        ({"v": randn(2, 2, 2, 16)}, "v must agree with k"),
        ({"k": new.half()}, "k must have the dtype"),
        ({"rotary_cos": randn(9, 4)}, "rotary_cos and rotary_sin must be given together"),
        ({"rotary_cos": randn(9, 9), "rotary_sin": randn(9, 9)}, "rotary_dim <= head_dim 16"),
        ({"rotary_cos": randn(9, 4), "rotary_sin": randn(8, 4)}, "rotary_sin must have the shape of rotary_cos"),
        ({"rotary_cos": int32(1, 2).view(1, 2), "rotary_sin": randn(1, 2)}, "rotary_cos.*int32"),
        ({"cu_seqlens_k_new": int32(0, 1, 2)}, "k must be .total_new"),
        ({"k": new.clone().requires_grad_(True)}, "no gradient"),
        ({"out": randn(2, 1, 4, 24)}, "out must"),  # refused by attention, which comes after the append
        ({"num_splits": -1}, "num_splits must"),
    ]
    before = cache.clone()
    for changes, words in cases:
        with pytest.raises(broadhead.BroadheadError, match=f"flash_attn_with_kvcache: .*{words}"):
            broadhead.flash_attn_with_kvcache(q, cache, cache, **{**good, **changes})
    torch.testing.assert_close(cache, before, msg="a refused call wrote into the cache")
    with pytest.raises(InvalidArgumentError, match="k and v must be given"):
        broadhead.flash_attn_with_kvcache(q, cache, cache, rotary_cos=randn(9, 4), rotary_sin=randn(9, 4))


def test_combine_and_merge_refuse_by_name() -> None:
    partial, lse = randn(3, 2, 5, 4, 16), randn(3, 2, 5, 4)
    for arguments, words in (
        ((partial[0, 0], lse[0, 0]), "out_partial must be"),
        ((partial, lse[:2]), "lse_partial must have shape"),
        ((partial, None), "lse_partial must be"),
        ((partial, lse, randn(2, 5, 4, 8)), "out must have shape"),
        ((partial, lse, None, torch.int32), "out_dtype"),
    ):
        with pytest.raises(broadhead.BroadheadError, match=f"flash_attn_combine: .*{words}"):
            broadhead.flash_attn_combine(*arguments)  # type: ignore[arg-type]
    out, lse = randn(5, 4, 16), randn(4, 5)
    for arguments, words in (
        ((out, lse.T, out, lse), "lse_a must have shape"),
        ((out, lse, out[:3], lse), "out_b must have shape"),
        ((out, lse, out.half(), lse), "out_b must have the dtype"),
        ((out[0], lse, out[0], lse), "out_a must be"),
    ):
        with pytest.raises(broadhead.BroadheadError, match=f"merge_attn_states: .*{words}"):
            broadhead.merge_attn_states(*arguments)


def test_combine_is_merge() -> None:
    """Split results merge into the whole, empty splits may hold NaN, and rows that see nothing are 0 with LSE -inf."""
    q, k, v = randn(2, 3, 4, 16), randn(2, 12, 4, 16), randn(2, 12, 4, 16)
    whole, whole_lse = broadhead.flash_attn_func(q, k, v, return_attn_probs=True)
    parts = [
        broadhead.flash_attn_func(q, k[:, a:b], v[:, a:b], return_attn_probs=True) for a, b in ((0, 5), (5, 6), (6, 12))
    ]
    outs = torch.stack([out for out, _ in parts] + [torch.full_like(whole, NAN)])
    lses = torch.stack([lse.transpose(1, 2) for _, lse in parts] + [torch.full((2, 3, 4), float("-inf"))])
    out, lse = broadhead.flash_attn_combine(outs, lses)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse.transpose(1, 2))
    given = torch.empty_like(whole).bfloat16()
    assert broadhead.flash_attn_combine(outs, lses, out=given)[0] is given
    torch.testing.assert_close(given, whole.bfloat16())
    flat, flat_lse = broadhead.flash_attn_combine(outs.flatten(1, 2), lses.flatten(1, 2), out_dtype=torch.float16)
    torch.testing.assert_close(flat, whole.flatten(0, 1).half())
    torch.testing.assert_close(flat_lse, lse.flatten(0, 1))

    empty, empty_lse = torch.full((3, 4, 16), NAN), torch.full((4, 3), float("-inf"))
    out, lse = broadhead.merge_attn_states(empty, empty_lse, empty, empty_lse)
    assert (out == 0).all() and (lse == float("-inf")).all()
    (out_a, lse_a), (out_b, lse_b) = parts[0], parts[2]
    first, second = (
        broadhead.merge_attn_states(out_a, lse_a, out_b, lse_b),
        broadhead.merge_attn_states(*parts[2], *parts[0]),
    )
    torch.testing.assert_close(first, second)
