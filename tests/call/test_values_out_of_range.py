"""Lengths, offsets, page ids and batch indices out of range: refused by name on a CPU, clamped in compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import broadhead
import pytest
import torch
from broadhead import reference
from torch import Tensor


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def table(*rows: tuple[int, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def kvcache(**kwargs: Any) -> Any:
    q, k, v = torch.randn(2, 8, 4, 64), torch.randn(2, 32, 2, 64), torch.randn(2, 32, 2, 64)
    return broadhead.flash_attn_with_kvcache(q, kwargs.pop("k_cache", k), kwargs.pop("v_cache", v), **kwargs)


def paged(**kwargs: Any) -> Any:
    q, pool = torch.randn(2, 8, 4, 64), torch.randn(6, 16, 2, 64)
    return broadhead.flash_attn_with_kvcache(q, pool, pool, **kwargs)


def varlen(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **kwargs: Any) -> Any:
    q, k = torch.randn(2, 4, 64), torch.randn(52, 2, 64)
    return broadhead.flash_attn_varlen_func(q, k, k, cu_q, cu_k, max_q, max_k, **kwargs)


def shared_prefix(**kwargs: Any) -> Any:
    q, pool = torch.randn(2, 1, 4, 64), torch.randn(6, 16, 2, 64)
    return broadhead.flash_attn_with_shared_prefix(q, pool, pool, **kwargs)


NEW = {"k": torch.randn(2, 4, 2, 64), "v": torch.randn(2, 4, 2, 64)}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "length past the cache": (
        lambda: kvcache(cache_seqlens=int32(32, 40), causal=True),
        r"flash_attn_with_kvcache: cache_seqlens must be in \[0, 32\], the length of the cache, got 40 for sequence 1",
    ),
    "int past the cache": (lambda: kvcache(cache_seqlens=40), r"flash_attn_with_kvcache: cache_seqlens .*32.*got 40"),
    "length past the table": (
        lambda: paged(page_table=table((0, 1), (2, 3)), cache_seqlens=int32(33, 5)),
        r"cache_seqlens must be in \[0, 32\], the page_table.size\(1\) \* page_size, got 33 for sequence 0",
    ),
    "used past the sequence": (
        lambda: varlen(int32(0, 1, 2), int32(0, 20, 52), 1, 32, seqused_k=int32(28, 32)),
        r"flash_attn_varlen_func: seqused_k must be in \[0, 20\], the rows that cu_seqlens_k gives .*got 28",
    ),
    "max_seqlen_k": (
        lambda: varlen(int32(0, 1, 2), int32(0, 20, 52), 1, 20),
        r"flash_attn_varlen_func: max_seqlen_k must be at least 32, the length of sequence 1, got 20",
    ),
    "max_seqlen_q": (
        lambda: varlen(int32(0, 2, 2), int32(0, 20, 52), 1, 32),
        r"max_seqlen_q must be at least 2, the length of sequence 0, got 1",
    ),
    "offsets past q": (lambda: varlen(int32(0, 1, 3), int32(0, 20, 52), 2, 32), r"cu_seqlens_q .*at most at 2"),
    "used past q": (
        lambda: varlen(int32(0, 1, 2), int32(0, 20, 52), 1, 32, seqused_q=int32(1, 2)),
        r"seqused_q must be in \[0, 1\], .* got 2 for sequence 1",
    ),
    "batch index": (
        lambda: kvcache(cache_batch_idx=int32(0, 2), cache_seqlens=int32(5, 5)),
        r"cache_batch_idx must be in \[0, 1\], a row of k_cache, got 2 for sequence 1",
    ),
    "batch index of a table": (
        lambda: paged(page_table=table((0, 1)), cache_batch_idx=int32(0, 1), cache_seqlens=int32(5, 5)),
        r"cache_batch_idx must be in \[0, 0\], a row of page_table, got 1",
    ),
    "page -1": (
        lambda: paged(page_table=table((0, -1), (2, 3)), cache_seqlens=int32(20, 20)),
        r"page_table must hold ids in \[0, 5\], .* got -1 at \[0, 1\]",
    ),
    "page past the pool": (
        lambda: paged(page_table=table((0, 1), (6, 3)), cache_seqlens=int32(20, 1)),
        r"page_table must hold ids in \[0, 5\], .* got 6 at \[1, 0\]",
    ),
    "append past the cache": (
        lambda: kvcache(cache_seqlens=int32(28, 29), **NEW),
        r"flash_attn_with_kvcache: cache_seqlens plus the keys that k appends must be at most 32, .*29 \+ 4 for .* 1",
    ),
    "int append past the cache": (lambda: kvcache(cache_seqlens=29, **NEW), r"cache_seqlens .*32.* 29"),
    "append to a page": (
        lambda: paged(page_table=table((0, 9), (2, 3)), cache_seqlens=int32(14, 3), **NEW),
        r"page_table must hold ids in \[0, 5\], .* got 9 at \[0, 1\]",
    ),
    "append to an index": (
        lambda: kvcache(cache_batch_idx=int32(0, -1), cache_seqlens=int32(5, 5), **NEW),
        r"cache_batch_idx must be in \[0, 1\]|cache_batch_idx must hold",
    ),
    "short rotary table": (
        lambda: kvcache(
            cache_seqlens=int32(20, 20), rotary_cos=torch.ones(8, 8), rotary_sin=torch.ones(8, 8), **NEW
        ),
        r"rotary_cos and rotary_sin must have a row for each position of the cache, 32 .*got 8",
    ),
    "rotary positions past the table": (
        lambda: kvcache(
            cache_seqlens=int32(20, 20), rotary_cos=torch.ones(32, 8), rotary_sin=torch.ones(32, 8),
            rotary_seqlens=int32(20, 30), **NEW,
        ),
        r"rotary_seqlens .*sequence 1 are at positions 30 to 33, and rotary_cos and rotary_sin have 32 rows",
    ),
    "shared prefix": (
        lambda: shared_prefix(
            prefix_len=20, page_table=table((2,), (3,)), cache_seqlens=int32(5, 5), prefix_page_table=int32(0, 9)
        ),
        r"flash_attn_with_shared_prefix: prefix_page_table must hold ids in \[0, 5\], .* got 9 at \[0, 1\]",
    ),
    "behind a shared prefix": (
        lambda: shared_prefix(prefix_len=16, page_table=table((0, 2), (0, -1)), cache_seqlens=int32(20, 20)),
        r"flash_attn_with_shared_prefix: page_table must hold ids in \[0, 5\], .* got -1",
    ),
    "backward": (
        lambda: broadhead.mha_bwd(
            *[torch.randn(2, 2, 64), torch.randn(2, 2, 64)], torch.randn(52, 2, 64), torch.randn(52, 2, 64), None, None,
            int32(0, 1, 2), int32(0, 20, 52), None, None, 1, 20,
        ),
        r"mha_bwd: max_seqlen_k must be at least 32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(broadhead.InvalidArgumentError, match=words):
        call()


@pytest.mark.parametrize("case", [name for name in REFUSED if "append" in name or "rotary" in name])
def test_a_refused_append_has_written_nothing(case: str) -> None:
    """Neither into a cache that the call fits in part nor where the attention behind it is what is wrong."""
    cache = torch.randn(6, 16, 2, 64) if "page" in case else torch.randn(2, 32, 2, 64)
    before, real = cache.clone(), broadhead.flash_attn_with_kvcache

    def on_this_cache(q: Tensor, _k: Tensor, _v: Tensor, **kwargs: Any) -> Any:
        return real(q, cache, cache, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(broadhead.InvalidArgumentError):
        patch.setattr(broadhead, "flash_attn_with_kvcache", on_this_cache)
        REFUSED[case][0]()
    assert torch.equal(cache, before)


def test_a_refused_shared_prefix_has_written_nothing() -> None:
    out = torch.full((2, 1, 4, 64), 7.0)
    real = broadhead.flash_attn_with_shared_prefix
    for name in ("shared prefix", "behind a shared prefix"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(broadhead.InvalidArgumentError):
            patch.setattr(broadhead, "flash_attn_with_shared_prefix", lambda *a, **k: real(*a, **k, out=out))
            REFUSED[name][0]()
    assert (out == 7.0).all()


def test_pages_that_nobody_sees_may_have_any_id() -> None:
    """Behind the lengths, before a window, and of a sequence without queries."""
    pool, q = torch.randn(6, 16, 2, 64), torch.randn(2, 1, 4, 64)
    pages = table((99, -1, 2, 3, -7), (99, 2**31 - 1, 4, 5, 77))
    out = broadhead.flash_attn_with_kvcache(
        q, pool, pool, page_table=pages, cache_seqlens=int32(60, 50), causal=True, window_size=(10, 0)
    )
    whole = table((0, 0, 2, 3), (0, 0, 4, 5))
    want = broadhead.flash_attn_with_kvcache(
        q, pool, pool, page_table=whole, cache_seqlens=int32(60, 50), causal=True, window_size=(10, 0)
    )
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    broadhead.flash_attn_varlen_func(
        q[:1, 0], pool, pool, int32(0, 1, 1), None, 1, 32, page_table=table((0, 1), (9, 9)), seqused_k=int32(20, 20)
    )


def one_hot_values(rows: int) -> Tensor:
    """Key j has a 1 in column j."""
    return torch.eye(rows).view(1, rows, 1, rows)


@pytest.mark.parametrize("read_lengths", [True, False], ids=["read", "unread"])
def test_clamped_lengths_move_the_diagonal(read_lengths: bool) -> None:
    """cache_seqlens 40 over a cache of 32: query i of 8 sees keys to 24 + i."""
    out, lse = reference.attention(
        torch.zeros(1, 8, 1, 64), torch.zeros(1, 32, 1, 64), one_hot_values(32), softmax_scale=1.0, window_left=-1,
        window_right=0, max_seqlen_q=8, max_seqlen_k=32, seqused_k=int32(40), read_lengths=read_lengths,
    )  # fmt: skip
    for i in range(8):
        assert out[0, i, 0].nonzero().flatten().tolist() == list(range(25 + i))
    torch.testing.assert_close(lse[0, 0], torch.arange(25.0, 33.0).log())


@pytest.mark.parametrize("read_lengths", [True, False], ids=["read", "unread"])
def test_packed_keys_out_of_range(read_lengths: bool) -> None:
    """seqused_k past a sequence reads no key of the next one; max_seqlen_k cuts no key."""
    k, v = torch.zeros(300, 1, 64), torch.eye(300).view(300, 1, 300)
    for max_seqlen_k in (1, 32, 500):
        out, lse = reference.attention(
            torch.zeros(3, 1, 64), k, v, softmax_scale=1.0, window_left=-1, window_right=-1,
            cu_seqlens_q=int32(0, 1, 2, 3), cu_seqlens_k=int32(0, 20, 290, 310), max_seqlen_q=1,
            max_seqlen_k=max_seqlen_k, seqused_k=int32(28, 300, 30), read_lengths=read_lengths,
        )  # fmt: skip
        seen = [row.nonzero().flatten().tolist() for row in out[:, 0]]
        assert seen == [list(range(20)), list(range(20, 290)), list(range(290, 300))], max_seqlen_k
        torch.testing.assert_close(lse[0], torch.tensor([20.0, 270.0, 10.0]).log())


def test_compiled_code_clamps() -> None:
    """What a CPU in eager mode refuses, compiled code computes as a device does."""
    torch._dynamo.reset()
    q, k, v = torch.zeros(2, 8, 1, 64), torch.zeros(2, 32, 1, 64), one_hot_values(32).expand(2, -1, -1, -1)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(lengths: Tensor, index: Tensor) -> Tensor:
        return broadhead.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, cache_batch_idx=index, causal=True, return_softmax_lse=True
        )[1]

    lse = call(int32(40, -3), int32(1, 0))
    torch.testing.assert_close(lse[0, 0], torch.arange(25.0, 33.0).log())
    assert (lse[1] == float("-inf")).all()
    assert (call(int32(40, 9), int32(2, -1)) == float("-inf")).all()


def test_gradients_of_clamped_values(seed: int) -> None:
    """Keys that do not exist have none; the others those of the call in range."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, dout = (
        torch.randn(s, generator=generator) for s in ((2, 3, 2, 8), (4, 8, 1, 8), (4, 8, 1, 8), (2, 3, 2, 8))
    )
    found = []
    for pages, lengths in ((table((0, 1), (3, 7)), int32(99, 12)), (table((0, 1), (3, 3)), int32(16, 8))):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _ = reference.attention(
            *leaves, softmax_scale=0.3, window_left=-1, window_right=-1, max_seqlen_q=3, max_seqlen_k=16,
            page_table=pages, seqused_k=lengths,
        )  # fmt: skip
        found.append((out.detach(), *torch.autograd.grad(out, leaves, dout)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
