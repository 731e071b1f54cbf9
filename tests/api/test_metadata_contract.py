"""Scheduler metadata through the public functions: shape, views, the length rule, refusals by name."""

from __future__ import annotations

import broadhead
import pytest
import torch
from calls import Call, build
from checks import check_call, check_equal


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("batch", [1, 3, 4, 5, 8])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (64, 0)}, {"num_splits": 4}, {"num_splits": 1}]
)
def test_metadata_shape(batch: int, options: dict) -> None:
    lengths = torch.full((batch,), 70, dtype=torch.int32)
    metadata = broadhead.get_scheduler_metadata(batch, 1, 128, 8, 2, 64, lengths, page_size=64, **options)
    assert metadata.shape == (1 + 4 * -(-batch // 4) * 4,) and metadata.dtype == torch.int32
    assert metadata.device == lengths.device and metadata[-1] == 0
    by_keyword = broadhead.get_scheduler_metadata(
        batch_size=batch,
        max_seqlen_q=1,
        max_seqlen_k=128,
        num_heads=8,
        num_heads_k=2,
        headdim=64,
        cache_seqlens=lengths,
        page_size=64,
        **options,
    )
    check_equal(by_keyword, metadata)
    buffer = torch.full((metadata.numel() + 9,), 7, dtype=torch.int32)
    result = broadhead.get_scheduler_metadata(
        batch, 1, 128, 8, 2, 64, lengths, page_size=64, out=buffer[: metadata.numel()], **options
    )
    assert result.data_ptr() == buffer.data_ptr(), "out= must be written in place"
    check_equal(buffer[: metadata.numel()], metadata)
    assert (buffer[metadata.numel() :] == 7).all(), "elements past the metadata belong to the caller"


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_metadata_cache_seqlens_dtype(dtype: torch.dtype) -> None:
    """Any integer dtype is cast or refused by name (a client casts)."""
    lengths = torch.tensor([70, 3], dtype=dtype)
    try:
        metadata = broadhead.get_scheduler_metadata(2, 1, 128, 8, 2, 64, lengths, page_size=64)
    except broadhead.BroadheadError as error:
        assert dtype != torch.int32 and "cache_seqlens" in str(error) and "int32" in str(error)
    else:
        check_equal(metadata, broadhead.get_scheduler_metadata(2, 1, 128, 8, 2, 64, lengths.int(), page_size=64))


@pytest.mark.parametrize("view", ["exact", "prefix", "larger"])
def test_forward_takes_exact_prefix_and_larger_metadata(view: str) -> None:
    built = build(
        Call("kvcache", (1, 1, 1), (70, 5, 0), page_size=16, heads_q=4, dtype=torch.float32), torch.device("cpu")
    )
    metadata = built.scheduler_metadata()
    larger = torch.zeros(metadata.numel() + 40, dtype=torch.int32)
    larger[: metadata.numel()] = metadata
    chosen = {"exact": metadata, "prefix": larger[: metadata.numel()], "larger": larger}[view]
    check_call(built, scheduler_metadata=chosen)


@pytest.mark.parametrize(
    "metadata, text",
    [
        (torch.zeros(16, dtype=torch.int32), "scheduler_metadata"),
        (torch.zeros(17, dtype=torch.int64), "int32"),
        (torch.zeros(17, dtype=torch.float32), "int32"),
        (torch.zeros(1, 17, dtype=torch.int32), "scheduler_metadata"),
        (torch.zeros(34, dtype=torch.int32)[::2], "contiguous"),
    ],
)
def test_wrong_metadata_is_refused(metadata: torch.Tensor, text: str) -> None:
    built = build(
        Call("kvcache", (1, 1, 1), (70, 5, 9), page_size=16, heads_q=4, dtype=torch.float32), torch.device("cpu")
    )
    with pytest.raises(broadhead.BroadheadError, match=text):
        built.run(scheduler_metadata=metadata)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 4, "cache_seqlens": int32(70, 5, 9, 1)},
        {"num_heads_q": 8},
        {"num_heads_kv": 1},
        {"headdim": 128},
        {"headdim_v": 128},
        {"qkv_dtype": torch.float16},
        {"causal": False, "window_size": (64, 0)},
    ],
)
def test_metadata_of_another_configuration_is_refused_by_name(changes: dict) -> None:
    built = build(
        Call("kvcache", (2, 2, 2), (70, 5, 9), page_size=16, heads_q=4, dtype=torch.bfloat16, causal=True),
        torch.device("cpu"),
    )
    arguments = {
        "batch_size": 3,
        "max_seqlen_q": 2,
        "max_seqlen_k": built.max_seqlen_k(),
        "num_heads_q": 4,
        "num_heads_kv": 2,
        "headdim": 64,
        "cache_seqlens": built.kwargs["cache_seqlens"],
        "page_size": 16,
        "causal": True,
    }
    right = broadhead.get_scheduler_metadata(**arguments)
    check_call(built, scheduler_metadata=right)
    wrong = broadhead.get_scheduler_metadata(**{**arguments, **changes})
    with pytest.raises(broadhead.InvalidArgumentError, match="scheduler_metadata"):
        built.run(scheduler_metadata=wrong)


def test_length_rule() -> None:
    """seqlen_k of a paged call is page_table.size(1) * page_size: max_seqlen_k of a client does not enter."""
    built = build(Call("varlen", (3, 7), (5, 19), page_size=4, causal=True, dtype=torch.float32), torch.device("cpu"))
    expected = built.run(out=None)[0]
    for max_seqlen_k in (19, 20, 4096):
        check_equal(built.run(out=None, max_seqlen_k=max_seqlen_k)[0], expected)


def test_masks_that_are_values_are_no_part_of_a_plan() -> None:
    """A causal tensor counts as causal=False, in the plan and in the call; ranges and trees change nothing."""
    q, cache = torch.randn(2, 3, 4, 16), torch.randn(2, 40, 2, 16)
    lengths, each = int32(30, 40), torch.tensor([True, False])
    plan = (2, 3, 40, 4, 2, 16, lengths, torch.float32)
    ranges, words = torch.zeros(2, 3, 2, dtype=torch.int32), torch.full((2, 3), -1)
    calls = ({"causal": each}, {"causal": each, "prefix_lens": int32(1, 2)}, {"query_ranges": ranges},
             {"causal": each, "query_ranges": ranges}, {"tree_mask": words}, {})  # fmt: skip
    for causal in (False, each, int32(0, 1)):
        metadata = broadhead.get_scheduler_metadata(*plan, causal=causal)
        for masks in calls:
            broadhead.flash_attn_with_kvcache(
                q, cache, cache, cache_seqlens=lengths, scheduler_metadata=metadata, **masks
            )
    metadata = broadhead.get_scheduler_metadata(*plan, causal=True)
    for masks in ({"query_ranges": ranges}, {"tree_mask": words}):
        broadhead.flash_attn_with_kvcache(
            q, cache, cache, cache_seqlens=lengths, scheduler_metadata=metadata, causal=True, **masks
        )
    with pytest.raises(broadhead.InvalidArgumentError, match=r"made for window_right=0.*a causal tensor counts as"):
        broadhead.flash_attn_with_kvcache(
            q, cache, cache, cache_seqlens=lengths, scheduler_metadata=metadata, causal=each
        )
