"""Capacities of keys far beyond any sequence: what reaches the kernels fits 32 bits, and workspaces are bounded."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import broadhead
import pytest
import torch
from broadhead import InvalidArgumentError
from broadhead.call.arguments import AttentionArgs
from broadhead.call.check import check_forward
from broadhead.call.masking import UNBOUNDED_WINDOW
from broadhead.call.metadata_request import describe_request
from broadhead.call.validation import INT32_MAX, MAX_SEQLEN_K
from broadhead.plan.dispatch import resolve
from broadhead.run import cuda_backend
from broadhead.run.cuda_backend import make_launch
from described import FULL, h200

BF16 = torch.bfloat16


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are the fields that the compiled module would get: it takes those of CUDA devices alone."""
    module = SimpleNamespace(connect=lambda **hooks: None, Launch=lambda **fields: fields)
    monkeypatch.setattr(cuda_backend, "connected_module", lambda: module)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def paged(keys: int, batch: int = 2, seqlen_q: int = 1, **options: Any) -> AttentionArgs:
    """A call whose page table could hold so many ``keys`` of a sequence, without the memory for them."""
    page_size = max(64, keys >> 10)
    pages = torch.zeros(1, 1, 2, 64, dtype=BF16).expand(1, page_size, 2, 64)
    table = torch.zeros(1, keys // page_size, dtype=torch.int32).expand(batch, -1)
    q = torch.zeros(batch, seqlen_q, 8, 64, dtype=BF16)
    return AttentionArgs(q, pages, pages, page_table=table, seqused_k=int32(*(9,) * batch), **options)


def test_workspaces_of_gigabytes_are_refused() -> None:
    """By the capacity of the page table: the text says what it came from and what would do, and that does."""
    for keys, batch, seqlen_q, tokens in ((2**30, 2, 1, 64), (2**20, 4096, 4, 64), (2**40, 8, 4, 4096)):
        args = paged(keys, batch, seqlen_q, tokens_per_split=tokens)
        capacity = min(keys, 2**30)
        with pytest.raises(InvalidArgumentError) as caught:
            check_forward("flash_attn_with_kvcache", args)
        text = str(caught.value)
        assert text.startswith(f"flash_attn_with_kvcache: tokens_per_split={tokens} cuts sequences of up to {capacity}")
        assert f"{-(-capacity // tokens)} pieces" in text and "page_table.size(1) * page_size" in text
        found = re.search(r"pass tokens_per_split=(\d+) or more, or a narrower page_table", text)
        assert found is not None
        enough = int(found[1])
        rows = batch * seqlen_q * 8 * (64 + 1) * 4
        for asked, fits in ((enough, True), (enough - 64, False)):
            assert (-(-capacity // asked) * rows <= 4 * 2**30) == fits
            if fits:
                check_forward("mha_fwd", args._replace(tokens_per_split=asked))
        with pytest.raises(InvalidArgumentError, match="whose results take"):
            check_forward("mha_fwd", args._replace(qv=args.q))
        check_forward("mha_fwd", args._replace(num_splits=1))  # nothing is cut
        check_forward("mha_fwd", args._replace(tokens_per_split=0))
    check_forward("mha_fwd", paged(2**30, seqlen_q=9, tokens_per_split=64))  # prefill


@pytest.mark.usefixtures("no_extension")
@pytest.mark.parametrize("tokens", [0, 64, 4096])
@pytest.mark.parametrize("seqlen_q, pack_gqa", [(1, None), (4, None), (8, None), (5, False)])
def test_capacities_are_bounded_whatever_the_page_table(seqlen_q: int, pack_gqa: bool | None, tokens: int) -> None:
    """The keys that a launch counts on, and the cells of them: the results of all cells take at most 4 GB."""
    for keys in (64, 4096, 2**20, 2**30, 2**31, 2**32, 2**40):
        args = paged(keys, 3, seqlen_q, pack_gqa=pack_gqa, tokens_per_split=tokens)
        try:
            call = check_forward("mha_fwd", args)
        except InvalidArgumentError:
            assert tokens and keys >= 2**30
            continue
        assert call.problem.seqlen_k == min(keys, 2**30)
        launch: Any = make_launch(args, call, resolve(call.problem, h200(), FULL))
        assert launch["call"].problem.seqlen_k <= 2**30 and launch["plan"].schedule.cell_blocks == tokens // 64
        if tokens:
            cells = -(-call.problem.seqlen_k // tokens)
            assert cells * 3 * seqlen_q * 8 * (64 + 1) <= 2**30


def test_a_position_and_a_window_fit_32_bits() -> None:
    """The largest that kernels add: the last position, a window or chunk to its right, and one."""
    assert (MAX_SEQLEN_K - 1) + (UNBOUNDED_WINDOW - 1) + 1 <= INT32_MAX


@pytest.mark.usefixtures("no_extension")
@pytest.mark.parametrize("keys", [2**30 - 1024, 2**30, 2**31 - 1024, 2**31, 2**32, 2**40])
def test_metadata_and_call_bound_the_page_table_alike(keys: int) -> None:
    """The length rule holds past 2^30 keys: equal capacities, equal plans, numbers that the binding takes."""
    args = paged(keys, scheduler_metadata=torch.zeros(17, dtype=torch.int32))
    call = check_forward("mha_fwd", args)
    plan = resolve(call.problem, h200(), FULL)
    assert call.problem.seqlen_k == min(keys, 2**30)
    fields: Any = make_launch(args, call, plan)
    decided = (*fields["call"].problem, *fields["plan"].schedule, fields["plan"].metadata_tag)
    numbers = [value for value in decided if isinstance(value, int)]
    assert len(numbers) >= 20 and all(-INT32_MAX <= number <= INT32_MAX for number in numbers)
    for new in (0, 5, INT32_MAX):
        request = describe_request(
            2, 1, 7, 8, 2, 64, None, BF16, args.k.shape[1], new, False, None, 0, 0, None, 0, args.page_table
        )
        assert request.problem.seqlen_k == call.problem.seqlen_k
        assert request.seqlen_k_new == min(new, 2**30 - request.problem.seqlen_k)
        planned = resolve(request.problem, h200(), FULL)
        assert (planned.row, planned.schedule, planned.metadata_tag) == (plan.row, plan.schedule, plan.metadata_tag)


def test_declared_lengths_are_bounded() -> None:
    """max_seqlen_k is a promise about the batch: clients pass the largest int for "any"."""
    for declared in (2**30 + 1, INT32_MAX):
        request = describe_request(2, 1, declared, 8, 2, 64, None, BF16, 16, 9, False, None, 0, 0, None, 0, None)
        assert (request.problem.seqlen_k, request.seqlen_k_new) == (2**30, 0)
        q, k = torch.zeros(2, 8, 64, dtype=BF16), torch.zeros(9, 2, 64, dtype=BF16)
        options = {"cu_seqlens_q": int32(0, 1, 2), "cu_seqlens_k": int32(0, 4, 9), "max_seqlen_q": 1}
        args = AttentionArgs(q, k, k, **options, max_seqlen_k=declared)
        assert check_forward("mha_fwd", args).problem.seqlen_k == 2**30


def test_a_cache_of_more_keys_is_refused() -> None:
    """Without pages the keys are there: they can not be cut off silently."""
    q = torch.zeros(1, 1, 8, 64, dtype=BF16)
    for keys, accepted in ((2**30, True), (2**30 + 1, False), (2**31, False)):
        cache = torch.zeros(1, 1, 2, 64, dtype=BF16).expand(1, keys, 2, 64)
        if accepted:
            assert check_forward("mha_fwd", AttentionArgs(q, cache, cache)).problem.seqlen_k == keys
            continue
        words = rf"k_cache must have at most {2**30} keys a sequence, got {keys} \(shape"
        with pytest.raises(InvalidArgumentError, match="^flash_attn_with_kvcache: " + words):
            broadhead.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=int32(5))
