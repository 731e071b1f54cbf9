"""Full GPU set: page sizes and strides, caches by index and left padding, appending with rotary."""

from __future__ import annotations

import random
from collections.abc import Callable

import broadhead
import pytest
import torch
from calls import build
from checks import check_against
from gpu_calls import decode_call, prefill_call

pytestmark = [pytest.mark.gpu, pytest.mark.full, pytest.mark.usefixtures("first_rows")]

PAGE_SIZES = (1, 3, 16, 32, 48, 64, 128, 256)
STRIDES = ("plain", "rows", "interleaved", "heads_first", "overlapping")


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_pages(head_dim: int, page_size: int, strides: str, run_call: Callable) -> None:
    options = {"page_size": page_size, "k_layout": strides, "heads_q": 4, "heads_kv": 2}
    run_call(decode_call(head_dim, **options))
    run_call(decode_call(head_dim, **options, seqlens_q=(2,) * 4, causal=True, num_splits=3, window=(150, 0)))
    run_call(prefill_call(head_dim, **options, slack_k=page_size + 1))


@pytest.mark.parametrize("page_size", [0, 1, 16, 64])
@pytest.mark.parametrize("head_dim", [64, 256, 512])
def test_leftpad_and_batch_index(head_dim: int, page_size: int, run_call: Callable) -> None:
    for options in ({"leftpad": (70, 0, 3, 16)}, {"batch_idx": True}, {"leftpad": (1, 64, 2, 200), "batch_idx": True}):
        run_call(decode_call(head_dim, page_size=page_size, **options))
        run_call(decode_call(head_dim, page_size=page_size, causal=True, window=(40, 0), num_splits=2, **options))
        lengths = (70,) * 4
        run_call(decode_call(head_dim, page_size=page_size, seqlens_q=lengths, causal=True, **options))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("page_size", [0, 1, 16, 48, 256])
@pytest.mark.parametrize("head_dim", [64, 128, 512])
def test_append(head_dim: int, page_size: int, ragged: bool, run_call: Callable) -> None:
    """The new keys are in the cache before attention reads it; no other slot changes."""
    base = {"page_size": page_size, "causal": True, "seqlens_k": (300, 17, 3, 129)}
    if ragged:
        lengths = (3, 0, 1, 2)
        run_call(decode_call(head_dim, **base, seqlens_q=lengths, num_new=lengths, ragged_q=True))
        lengths = (100, 0, 1, 129)
        run_call(decode_call(head_dim, **base, seqlens_q=lengths, num_new=lengths, ragged_q=True))
    else:
        run_call(decode_call(head_dim, **base, num_new=(1,) * 4))
        run_call(
            decode_call(head_dim, **base, seqlens_q=(3,) * 4, num_new=(3,) * 4, batch_idx=True, leftpad=(2, 0, 1, 9))
        )


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("page_size", [0, 16])
def test_append_with_rotary(
    interleaved: bool, causal: bool, page_size: int, cuda: torch.device, row_ran: Callable
) -> None:
    """The kernels' result on the device equals the fallback's in fp64 on the CPU, cache and all."""
    lengths, new, head_dim, rotary = torch.tensor([37, 0, 100], dtype=torch.int32), 2, 64, 32
    angle = torch.rand(200, rotary // 2) * 6
    shape = (24, page_size, 2, head_dim) if page_size else (3, 128, 2, head_dim)
    tensors = {
        "q": torch.randn(3, new, 4, head_dim),
        "k_cache": torch.randn(shape),
        "v_cache": torch.randn(shape),
        "k": torch.randn(3, new, 2, head_dim),
        "v": torch.randn(3, new, 2, head_dim),
        "rotary_cos": angle.cos(),
        "rotary_sin": angle.sin(),
    }
    tensors = {name: x.bfloat16() for name, x in tensors.items()}
    table = torch.randperm(24)[: 3 * 8].view(3, 8).to(torch.int32) if page_size else None
    options = {"causal": causal, "rotary_interleaved": interleaved}
    exact = {name: x.double() for name, x in tensors.items()}
    expected = broadhead.flash_attn_with_kvcache(**exact, cache_seqlens=lengths, page_table=table, **options)
    given = {name: x.to(cuda) for name, x in tensors.items()}
    out = broadhead.flash_attn_with_kvcache(
        **given, cache_seqlens=lengths.to(cuda), page_table=None if table is None else table.to(cuda), **options
    )
    row_ran(phase="decode", dtype=torch.bfloat16, head_dim=head_dim)
    torch.testing.assert_close(out.cpu().double(), expected, atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(given["k_cache"].cpu().double(), exact["k_cache"], atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(given["v_cache"].cpu().double(), exact["v_cache"], atol=0, rtol=0)


def test_page_table_view_and_expanded_lengths(cuda: torch.device, rng: random.Random, row_ran: Callable) -> None:
    """A page table that is a slice of a wider one, as engines keep for their largest batch."""
    built = build(decode_call(128, heads_kv=2), cuda, rng)
    table = built.kwargs["page_table"]
    wide = torch.full((9, table.shape[1] + 7), 2**31 - 1, dtype=torch.int32, device=cuda)
    wide[: table.shape[0], : table.shape[1]] = table
    out = broadhead.flash_attn_with_kvcache(**{**built.kwargs, "page_table": wide[: table.shape[0], : table.shape[1]]})
    row_ran(phase="decode", dtype=torch.bfloat16, head_dim=128)
    check_against(built, out)
