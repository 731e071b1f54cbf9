"""Full GPU set: every mask in every bucket, with softcap, sinks and prefixes, on lengths around the tile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from broadhead import support
from calls import Call
from gpu_calls import EXTRAS, MASKS, decode_call, row_call, row_cases

pytestmark = [pytest.mark.gpu, pytest.mark.full]

LENGTHS_Q = (128, 1, 0, 65, 200)
LENGTHS_K = (128, 64, 9, 300, 63)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256, 512])
def test_prefill_mask(head_dim: int, mask: str, extra: str, run_call: Callable) -> None:
    call = Call(
        "varlen", LENGTHS_Q, LENGTHS_K, heads_q=2, heads_kv=1, head_dim=head_dim, **MASKS[mask], **EXTRAS[extra]
    )
    run_call(call)


@pytest.mark.parametrize("row, mask", row_cases(MASKS))
def test_row_mask(row: support.KernelRow, mask: str, run_row: Callable) -> None:
    """Every prefill row: lengths around its own tile, steps wholly inside, at and past the mask's edge."""
    m, n = row.tile.tile_m, row.tile.tile_n
    extras = list(EXTRAS.values())
    extra = extras[(list(MASKS).index(mask) + row.head_dim // 8) % len(extras)]
    lengths = {"seqlens_q": (m, 1, 0, 2 * m + 65, m + 7), "seqlens_k": (m, 64, 9, 5 * n + 3, 63)}
    run_row(row, row_call(row, "varlen", **lengths, heads_q=6, heads_kv=2, **MASKS[mask], **extra))
    options = {"pack_gqa": True, "page_size": n, "k_layout": "interleaved", "freed_entries": True}
    run_row(row, row_call(row, "varlen", **lengths, heads_q=6, heads_kv=2, **MASKS[mask], **extra, **options))


@pytest.mark.parametrize("mask", [m for m in MASKS if "prefix" not in m])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_decode_mask(head_dim: int, mask: str, seqlen_q: int, run_call: Callable) -> None:
    options = {"seqlens_q": (seqlen_q,) * 4, "seqlens_k": (300, 17, 1, 129), **MASKS[mask]}
    run_call(decode_call(head_dim, **options, num_splits=3))
    run_call(decode_call(head_dim, **options, page_size=0, sinks="fp32"))


@pytest.mark.parametrize(
    "mask", ["full", "causal", "causal_window_64", "window_both", "chunk_50_causal", "prefix_window"]
)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("splits", [2, 5])
def test_split_prefill_mask(head_dim: int, mask: str, splits: int, run_call: Callable) -> None:
    call = Call(
        "varlen", LENGTHS_Q, LENGTHS_K, heads_q=2, heads_kv=1, head_dim=head_dim, **MASKS[mask], num_splits=splits
    )
    run_call(call)


@pytest.mark.parametrize("scale", [1.0, 0.0, -0.3, 2.0])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_softmax_scale(head_dim: int, scale: float, run_call: Callable) -> None:
    """1.0 as Gemma 4 has it; large scores: the maximum is subtracted before anything is exponentiated."""
    run_call(Call("varlen", LENGTHS_Q, LENGTHS_K, head_dim=head_dim, softmax_scale=scale, causal=True))
    run_call(Call("varlen", LENGTHS_Q, LENGTHS_K, head_dim=head_dim, softmax_scale=scale, softcap=5.0, num_splits=2))
    run_call(Call("func", (150,) * 2, (220,) * 2, head_dim=head_dim, softmax_scale=scale, sinks="fp32"))
    run_call(decode_call(head_dim, softmax_scale=scale, num_splits=4))


@pytest.mark.parametrize("head_dim", [64, 256, 512])
def test_two_pass_prefix_lm(head_dim: int, cuda: torch.device, run_call: Callable, row_ran: Callable) -> None:
    """The second pass writes the rest of the same out; together they equal prefix_lens in one pass."""
    import broadhead

    prefix, total = (70, 0, 130, 9), (150, 65, 130, 129)
    call = Call("varlen", total, total, head_dim=head_dim, causal=True, prefix=prefix, slack_q=5, slack_k=5, tail=7)
    built, _ = run_call(call)
    once, kw = built.out.clone(), built.kwargs
    twice = torch.full_like(once, float("nan"))
    common = {"k": kw["k"], "v": kw["v"], "max_seqlen_q": 155, "max_seqlen_k": 155, "cu_seqlens_k": kw["cu_seqlens_k"]}
    lengths = torch.tensor(prefix, dtype=torch.int32, device=cuda)
    broadhead.flash_attn_varlen_func(
        kw["q"], cu_seqlens_q=kw["cu_seqlens_q"], seqused_q=lengths, seqused_k=lengths, out=twice, **common
    )
    row_ran(phase="prefill", dtype=call.dtype, head_dim=head_dim)
    starts = kw["cu_seqlens_q"].clone()
    starts[:-1] += lengths
    broadhead.flash_attn_varlen_func(
        kw["q"], cu_seqlens_q=starts, seqused_q=kw["seqused_q"] - lengths, seqused_k=kw["seqused_k"], causal=True,
        out=twice, **common,
    )  # fmt: skip
    row_ran(phase="prefill", dtype=call.dtype, head_dim=head_dim)
    torch.testing.assert_close(twice, once, atol=2e-2, rtol=2e-2, equal_nan=True)
