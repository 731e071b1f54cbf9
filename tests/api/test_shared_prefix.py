"""flash_attn_with_shared_prefix against the plain call over whole sequences, and what it refuses."""

from __future__ import annotations

from typing import Any, NamedTuple

import broadhead
import pytest
import torch
from torch import Tensor

PAGE, HEADS, HEADS_KV, DIM = 16, 4, 2, 32


class Step(NamedTuple):
    """A decode step whose sequences share their first tokens; the prefix has pages of its own."""

    q: Tensor
    caches: tuple[Tensor, Tensor]
    prefix_len: int
    prefix_pages: Tensor
    own_table: Tensor
    own_lens: Tensor
    whole_table: Tensor
    whole_lens: Tensor


def make_step(
    prefix_len: int, own_lens: tuple[int, ...], seqlen_q: int = 1, dtype: torch.dtype = torch.float32
) -> Step:
    """Unused slots hold NaN, unused table entries lie far outside."""
    batch, prefix_pages = len(own_lens), -(-prefix_len // PAGE)
    own_pages = max(-(-n // PAGE) for n in own_lens) + 1
    pages = torch.randperm(prefix_pages + batch * own_pages, dtype=torch.int32)
    caches = tuple(torch.randn(len(pages), PAGE, HEADS_KV, DIM).to(dtype) for _ in range(2))
    prefix, own = pages[:prefix_pages], pages[prefix_pages:].view(batch, own_pages).clone()
    for cache in caches:
        if prefix_len % PAGE:
            cache[prefix[-1].item(), prefix_len % PAGE :] = float("nan")
        for b, n in enumerate(own_lens):
            for i in range(own_pages):
                cache[own[b, i].item(), max(0, min(PAGE, n - i * PAGE)) :] = float("nan")
    whole = torch.cat((prefix.expand(batch, -1), own), dim=1)
    for b, n in enumerate(own_lens):
        own[b, -(-n // PAGE) :] = 2**30
        whole[b, prefix_pages + -(-n // PAGE) :] = 2**30
    lens = torch.tensor(own_lens, dtype=torch.int32)
    q = torch.randn(batch, seqlen_q, HEADS, DIM).to(dtype)
    return Step(q, caches, prefix_len, prefix, own, lens, whole, lens + prefix_len)


def plain(step: Step, **options: Any) -> tuple[Tensor, Tensor]:
    return broadhead.flash_attn_with_kvcache(
        step.q, *step.caches, page_table=step.whole_table, cache_seqlens=step.whole_lens, causal=True,
        return_softmax_lse=True, **options,
    )  # fmt: skip


def by_table(step: Step, **options: Any) -> Any:
    return broadhead.flash_attn_with_shared_prefix(
        step.q, *step.caches, prefix_len=step.prefix_len, prefix_page_table=step.prefix_pages,
        page_table=step.own_table, cache_seqlens=step.own_lens, **options,
    )  # fmt: skip


def by_length(step: Step, **options: Any) -> Any:
    return broadhead.flash_attn_with_shared_prefix(
        step.q, *step.caches, prefix_len=step.prefix_len, page_table=step.whole_table, cache_seqlens=step.whole_lens,
        **options,
    )  # fmt: skip


def check_close(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", [by_table, by_length])
@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("prefix_len", [0, PAGE, 5 * PAGE])
def test_as_the_plain_call(call: Any, seqlen_q: int, prefix_len: int) -> None:
    step = make_step(prefix_len, (7, 3, 40), seqlen_q)
    check_close(call(step, return_softmax_lse=True), plain(step))


@pytest.mark.parametrize(
    "options",
    [{"softcap": 5.0}, {"softmax_scale": 1.0}, {"sinks": torch.randn(HEADS)}],
    ids=lambda options: next(iter(options)),
)
def test_options(options: dict[str, Any]) -> None:
    step = make_step(2 * PAGE, (7, 3, 40), 2)
    check_close(by_table(step, return_softmax_lse=True, **options), plain(step, **options))


def test_a_prefix_that_ends_inside_a_page() -> None:
    """Whole sequences can not be paged like that: compare with contiguous ones."""
    step = make_step(2 * PAGE + 5, (7, 20), 2)
    out, lse = by_table(step, return_softmax_lse=True)
    for b, own in enumerate((7, 20)):
        k, v = (
            torch.cat((c[step.prefix_pages.long()].flatten(0, 1)[: step.prefix_len],
                       c[step.own_table[b, : -(-own // PAGE)].long()].flatten(0, 1)[:own]))[None]
            for c in step.caches
        )  # fmt: skip
        expected, expected_lse = broadhead.flash_attn_func(step.q[b : b + 1], k, v, causal=True, return_attn_probs=True)
        check_close((out[b : b + 1], lse[b : b + 1]), (expected, expected_lse))


def test_ragged_queries_and_out() -> None:
    step = make_step(3 * PAGE, (9, 4, 33), 2)
    expected, expected_lse = plain(step)
    out = torch.full((5, HEADS, DIM), float("nan"))
    ragged = step._replace(q=torch.cat((step.q[0], step.q[1, 1:], step.q[2])))
    cu_seqlens_q = torch.tensor([0, 2, 3, 5], dtype=torch.int32)
    result, lse = by_table(ragged, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=2, out=out, return_softmax_lse=True)
    assert result is out
    rows = torch.tensor([0, 1, 3, 4, 5])
    check_close((out, lse), (expected.flatten(0, 1)[rows], expected_lse.transpose(0, 1).flatten(1)[:, rows]))


def test_compiled() -> None:
    step = make_step(2 * PAGE, (7, 3, 40), dtype=torch.bfloat16)
    compiled = torch.compile(lambda s: by_table(s), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(step), by_table(step))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"prefix_len": -1}, "prefix_len must be"),
        ({"prefix_len": 33}, "prefix_len must be at most what prefix_page_table holds, 2 pages of 16 = 32, got 33"),
        ({"prefix_len": 20, "prefix_page_table": None}, "prefix_len must be a multiple of page_size 16"),
        ({"prefix_len": 1600, "prefix_page_table": None}, r"at most page_table.size\(1\) \* page_size"),
        ({"prefix_page_table": torch.zeros(2, dtype=torch.int64)}, "prefix_page_table must"),
        ({"prefix_page_table": torch.zeros(1, 2, dtype=torch.int32)}, "prefix_page_table must"),
        ({"cache_seqlens": torch.zeros(2, dtype=torch.int32)}, "cache_seqlens must"),
        ({"page_table": torch.zeros(3, dtype=torch.int32)}, "page_table must"),
        ({"k_cache": torch.zeros(3, HEADS_KV, DIM)}, "k_cache must"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals(changes: dict[str, Any], words: str) -> None:
    step = make_step(2 * PAGE, (7, 3, 40))
    arguments = {
        "q": step.q, "k_cache": step.caches[0], "v_cache": step.caches[1], "prefix_len": step.prefix_len,
        "prefix_page_table": step.prefix_pages, "page_table": step.own_table, "cache_seqlens": step.own_lens,
    }  # fmt: skip
    with pytest.raises(broadhead.BroadheadError, match=f"flash_attn_with_shared_prefix: .*{words}"):
        broadhead.flash_attn_with_shared_prefix(**{**arguments, **changes})
