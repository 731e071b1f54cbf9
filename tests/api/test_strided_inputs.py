"""Tensors whose last dimension is not contiguous: what is only read is copied, a cache or an output is refused."""

from __future__ import annotations

import broadhead
import pytest
import torch
from spelled_calls import CALLS, clone, dense, function_of, int32, metadata, randn, same, strided, varlen

#: Arguments that are only read; a function that lacks one is not asked for it.
READ = (
    "q", "k", "v", "kv", "qkv", "dout", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "cache_seqlens", "page_table",
    "prefix_page_table", "rotary_cos", "rotary_sin",
)  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_strided_tensors_are_copied(name: str) -> None:
    arguments = CALLS[name][1]()
    expected = function_of(name)(**clone(arguments))
    for key in READ:
        if isinstance(arguments.get(key), torch.Tensor):
            same(function_of(name)(**{**clone(arguments), key: strided(arguments[key])}), expected)


def test_other_strided_tensors_are_copied() -> None:
    more = {
        "sinks": randn(4), "seqused_q": int32(5, 3), "seqused_k": int32(8, 3), "prefix_lens": int32(2, 3),
        "leftpad_k": int32(1, 2), "kv_batch_idx": int32(1, 0), "qv": randn(2, 6, 4, 16), "causal": True,
    }  # fmt: skip
    arguments = {**dense(), **more}
    expected = broadhead.mha_fwd(**arguments)
    for key, value in more.items():
        if isinstance(value, torch.Tensor):
            got, lse = broadhead.mha_fwd(**{**arguments, key: strided(value)})
            same(
                (got[0, :5], got[1, :3], lse[0, :, :5]), (expected[0][0, :5], expected[0][1, :3], expected[1][0, :, :5])
            )


def test_strided_masks_are_copied_or_read() -> None:
    ranges, each = int32(*[0, 5] * 6, *[3, 9] * 6).view(2, 6, 2), torch.tensor([True, False])
    words = torch.arange(12).view(2, 6) - 5
    options = {"query_ranges": ranges, "causal": each, "window_size": (1, 0)}
    tensors = dense()
    for masks in (options, {"tree_mask": words, "causal": each}):
        expected = broadhead.mha_fwd(**tensors, **masks)
        for name, value in masks.items():
            if isinstance(value, torch.Tensor):
                same(broadhead.mha_fwd(**tensors, **{**masks, name: strided(value)}), expected)


def test_strided_tensors_without_elements() -> None:
    q, k, v = randn(2, 0, 4, 16), randn(2, 0, 2, 16), randn(2, 0, 2, 16)
    assert broadhead.flash_attn_func(strided(q), strided(k), strided(v)).shape == q.shape
    assert broadhead.flash_attn_func(randn(2, 3, 4, 16), strided(k), v).eq(0).all()
    assert broadhead.merge_attn_states(strided(q), randn(2, 4, 0), q, randn(2, 4, 0))[0].shape == q.shape


def test_gradients_pass_through_the_copy() -> None:
    q, k, v = (x.requires_grad_(True) for x in dense().values())
    expected = torch.autograd.grad(broadhead.flash_attn_func(q, k, v).square().sum(), (q, k, v))
    wide = [strided(x.detach()).requires_grad_(True) for x in (q, k, v)]
    assert all(x.stride(-1) == 2 for x in wide)
    same(torch.autograd.grad(broadhead.flash_attn_func(*wide).square().sum(), wide), expected)


@pytest.mark.parametrize("name", ["kvcache", "append", "shared prefix"])
@pytest.mark.parametrize("key", ["k_cache", "v_cache"])
def test_caches_are_never_copied(name: str, key: str) -> None:
    arguments = CALLS[name][1]()
    arguments[key] = strided(arguments[key])
    before = clone(arguments)
    with pytest.raises(broadhead.InvalidArgumentError, match=f"{CALLS[name][0]}: {key} must be contiguous .*strides"):
        function_of(name)(**arguments)
    same(list(arguments.values())[1:3], list(before.values())[1:3])


def test_what_is_written_is_never_copied() -> None:
    arguments = dense()
    for function in ("flash_attn_func", "mha_fwd"):
        with pytest.raises(broadhead.InvalidArgumentError, match=f"{function}: out must be contiguous"):
            getattr(broadhead, function)(**arguments, out=strided(randn(2, 6, 4, 16)))
    for name, like in (("dq", "q"), ("dk", "k"), ("dv", "v")):
        given = strided(arguments[like])
        with pytest.raises(broadhead.InvalidArgumentError, match=f"mha_bwd: {name} must be contiguous .*strides"):
            broadhead.mha_bwd(randn(2, 6, 4, 16), **arguments, **{name: given})
        same(given, arguments[like])
    paged = {
        **varlen(),
        "k": strided(randn(6, 4, 2, 16)),
        "v": randn(6, 4, 2, 16),
        "page_table": int32(0, 1, 2, 3).view(2, 2),
    }
    with pytest.raises(broadhead.InvalidArgumentError, match="flash_attn_varlen_func: k must be contiguous"):
        broadhead.flash_attn_varlen_func(**paged)


def test_metadata_of_strided_lengths() -> None:
    arguments = metadata()
    expected = broadhead.get_scheduler_metadata(**arguments)
    same(
        broadhead.get_scheduler_metadata(**{**arguments, "cache_seqlens": strided(arguments["cache_seqlens"])}),
        expected,
    )


def test_merges_copy_what_they_read_and_nothing_else() -> None:
    outs, lses = randn(3, 5, 4, 16), randn(3, 5, 4)
    expected = broadhead.flash_attn_combine(outs, lses)
    same(broadhead.flash_attn_combine(strided(outs), strided(lses)), expected)
    states = [outs[0], lses[0].T.contiguous(), outs[1], lses[1].T.contiguous()]
    merged = broadhead.merge_attn_states(*states)
    same(broadhead.merge_attn_states(*map(strided, states)), merged)
    with pytest.raises(broadhead.InvalidArgumentError, match="flash_attn_combine: out must be contiguous"):
        broadhead.flash_attn_combine(outs, lses, strided(outs[0]))
    with pytest.raises(broadhead.InvalidArgumentError, match="merge_attn_states: out must be contiguous"):
        broadhead.merge_attn_states(*states, strided(outs[0]))


def test_explain_tells_the_copy() -> None:
    q, k, v = dense().values()
    assert "copied" not in broadhead.explain(q, k, v)
    text = broadhead.explain(strided(q), k, strided(v))
    assert "copied: q, in every call: its last dimension is not contiguous, it has strides (768, 128, 32, 2)" in text
    assert "copied: v" in text and "copied: k" not in text
    first = broadhead.explain(q, strided(k), v, page_size=9).splitlines()[0]
    assert first.startswith("runs on: nothing, the call is refused: k is a cache, which is never copied")
