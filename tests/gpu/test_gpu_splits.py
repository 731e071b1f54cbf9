"""Full GPU set: split-KV with and without scheduler metadata, the combine and merge kernels, repeatability."""

from __future__ import annotations

import random
from collections.abc import Callable

import broadhead
import pytest
import torch
from broadhead import support
from calls import build
from checks import check_call, check_equal, check_split
from gpu_calls import PREFILL_ROWS, decode_call, prefill_call, row_call, row_id
from judge import judge

pytestmark = [pytest.mark.gpu, pytest.mark.full, pytest.mark.usefixtures("first_rows")]


@pytest.mark.parametrize("num_splits", range(1, 33))
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_splits(num_splits: int, head_dim: int, run_call: Callable) -> None:
    """More splits than keys have tiles: the surplus is empty and adds nothing."""
    run_call(decode_call(head_dim, num_splits=num_splits, seqlens_k=(2100, 64, 0, 500)))
    run_call(decode_call(head_dim, num_splits=num_splits, metadata=True, seqlens_k=(2100, 64, 0, 500), causal=True))


@pytest.mark.parametrize("num_splits", range(2, 9))
@pytest.mark.parametrize("row", PREFILL_ROWS, ids=row_id)
def test_prefill_splits(row: support.KernelRow, num_splits: int, run_row: Callable) -> None:
    """Prefill kernels split too: sequences of fewer steps than splits, of none, rows that see no key of a share."""
    m, n = row.tile.tile_m, row.tile.tile_n
    lengths = {"seqlens_q": (m + 9, 3, 70, 0, 2 * m), "seqlens_k": (9 * n + 5, n, 0, 3 * n, 4 * n + 1)}
    masks = ({}, {"causal": True}, {"causal": True, "window": (2 * n, 0)}, {"window": (n, 5)})[num_splits % 4]
    options = {"num_splits": num_splits, "heads_q": 6, "heads_kv": 2, "sinks": "q" if num_splits % 3 else ""}
    run_row(row, row_call(row, "varlen", **lengths, **masks, **options, pack_gqa=num_splits % 2 == 0))
    run_row(row, row_call(row, "kvcache", **lengths, **masks, **options, page_size=64, ragged_q=True, metadata=True))


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "window": (100, 0)}, {"softcap": 9.0}], ids=str
)
@pytest.mark.parametrize("batch", [1, 3, 4, 5, 33])
@pytest.mark.parametrize("num_splits", [0, 1, 6, 32])
def test_metadata(num_splits: int, batch: int, options: dict, run_call: Callable, rng: random.Random) -> None:
    lengths = tuple(rng.choice((0, 1, 70, 1000, 3000)) for _ in range(batch))
    call = decode_call(128, seqlens_q=(1,) * batch, seqlens_k=lengths, metadata=True, num_splits=num_splits, **options)
    built, _ = run_call(call)
    metadata = built.scheduler_metadata()
    padded = -(-batch // 4) * 4
    assert metadata.shape == (1 + 4 * padded,) and metadata.dtype == torch.int32
    splits = metadata[:batch]
    assert (splits >= 1).all() and (num_splits == 0 or bool((splits <= num_splits).all()))
    assert (metadata[batch:padded] >= 0).all() and (metadata[2 * padded :] == 0).all(), "reserved words are zero"


def test_metadata_gives_long_sequences_more_splits(cuda: torch.device) -> None:
    """Of a prefill kernel; decode kernels plan for themselves, their metadata is one split each."""
    lengths = torch.tensor([65536, 64, 64, 64], dtype=torch.int32, device=cuda)
    hopper = torch.cuda.get_device_capability(cuda) == (9, 0)
    latent = {"headdim_v": 512, "has_qv": True}
    for seqlen_q, head_dim, options, is_prefill in (
        (64, 128, {}, True), (4, 64, latent, hopper), (4, 512, {}, False), (4, 128, {}, False), (1, 64, latent, False)
    ):  # fmt: skip
        metadata = broadhead.get_scheduler_metadata(
            4, seqlen_q, 65536, 8, 1, head_dim, lengths, page_size=64, **options
        )
        splits = metadata[:4].tolist()
        assert (splits[0] > 4) == is_prefill and splits[1:] == [1, 1, 1], (seqlen_q, head_dim, splits)


@pytest.mark.parametrize("tampering", ["tag", "splits", "random", "zeros", "tail"])
def test_foreign_metadata_is_never_wrong(tampering: str, cuda: torch.device, rng: random.Random) -> None:
    """A buffer of unknown content changes how the work is divided at most, never the result."""
    call = decode_call(128, seqlens_k=(2100, 64, 0, 500), num_splits=8)
    built = build(call, cuda, rng)
    metadata = built.scheduler_metadata()
    foreign = torch.zeros_like(metadata)
    foreign.copy_(metadata)
    if tampering == "tag":
        foreign[4:8] += 1
    elif tampering == "splits":
        foreign[:4] = torch.tensor([10**6, -5, 0, 7], dtype=torch.int32, device=cuda)
    elif tampering == "random":
        foreign.random_(-(2**31), 2**31 - 1)
    elif tampering == "zeros":
        foreign.zero_()
    else:
        foreign = torch.cat((foreign, torch.full((40,), -7, dtype=torch.int32, device=cuda)))
    check_call(built, scheduler_metadata=foreign)


def test_metadata_of_another_configuration_is_refused(cuda: torch.device, rng: random.Random) -> None:
    built = build(decode_call(128), cuda, rng)
    for wrong in ({"headdim_v": 64}, {"window_size": (3, 0)}):
        with pytest.raises(broadhead.InvalidArgumentError, match="scheduler_metadata"):
            built.run(scheduler_metadata=built.scheduler_metadata(**wrong))


@pytest.mark.parametrize("head_dim", [64, 256, 512])
@pytest.mark.parametrize("num_splits", [1, 5, 0])
def test_repeated_runs_agree_bit_for_bit(
    head_dim: int, num_splits: int, cuda: torch.device, rng: random.Random
) -> None:
    for call in (
        decode_call(head_dim, num_splits=num_splits, seqlens_k=(2100, 64, 0, 500)),
        prefill_call(head_dim, num_splits=num_splits),
    ):
        built = build(call, cuda, rng, poison=False)
        first_out, first_lse = (x.clone() for x in built.run())
        for _ in range(4):
            out, lse = built.run()
            check_equal(torch.cat(built.split(out)), torch.cat(built.split(first_out)))
            check_equal(torch.cat(built.split_lse(lse), dim=1), torch.cat(built.split_lse(first_lse), dim=1))


# --- combine and merge ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 5, 3, 64), (1, 130, 4, 128), (3, 1, 16, 512), (2, 7, 2, 72)])
@pytest.mark.parametrize("splits", [1, 2, 7, 32, 100, 128, 129, 256])
def test_combine(splits: int, shape: tuple[int, ...], dtype: torch.dtype, cuda: torch.device) -> None:
    batch, seqlen, heads, _head_dim_v = shape
    partial = torch.randn(splits, *shape, device=cuda)
    lse = torch.randn(splits, batch, seqlen, heads, device=cuda) * 4
    empty = torch.rand_like(lse) < 0.2
    lse[empty] = float("-inf")
    lse[:, 0, 0, 0] = float("-inf")  # a row that no split has keys for
    partial[lse == float("-inf")] = float("nan")  # what an empty split left behind must not matter
    out, combined = broadhead.flash_attn_combine(partial, lse, out_dtype=dtype)[:2]
    weights = torch.softmax(lse.double(), dim=0).nan_to_num(0.0)
    expected = (weights[..., None] * partial.double().nan_to_num(0.0)).sum(0)
    assert out.dtype == dtype and out.shape == shape
    torch.testing.assert_close(out.double(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-2)
    expected_lse = torch.logsumexp(lse.double(), dim=0)
    combined = combined if combined.shape == expected_lse.shape else combined.transpose(-1, -2)
    torch.testing.assert_close(combined.double(), expected_lse, atol=1e-5, rtol=1e-5)
    given = torch.full(shape, float("nan"), dtype=dtype, device=cuda)
    again = broadhead.flash_attn_combine(partial, lse, out=given)
    again = again[0] if isinstance(again, tuple) else again
    assert again.data_ptr() == given.data_ptr()
    check_equal(given, out)


@pytest.mark.parametrize("head_dim", [64, 512])
def test_merge_of_key_halves_equals_whole(
    head_dim: int, cuda: torch.device, rng: random.Random, row_ran: Callable
) -> None:
    built = build(decode_call(head_dim, page_size=0, seqlens_k=(200,) * 4, slack_k=0), cuda, rng)
    kw = built.kwargs
    common = {"q": kw["q"], "return_attn_probs": True}
    halves = []
    for begin, end in ((0, 77), (77, 200)):
        out, lse = broadhead.flash_attn_func(k=kw["k_cache"][:, begin:end], v=kw["v_cache"][:, begin:end], **common)
        row_ran(phase="decode", dtype=torch.bfloat16, head_dim=head_dim)
        halves += [out.flatten(0, 1), lse.transpose(0, 1).flatten(1).contiguous()]
    out, lse = broadhead.merge_attn_states(*halves)[:2]
    check_split_loosely(built, out, lse)


def check_split_loosely(built, out: torch.Tensor, lse: torch.Tensor) -> None:
    """The halves were rounded to 16 bits before the merge: three roundings instead of one."""
    truth, truth_lse = judge(built)
    torch.testing.assert_close(torch.cat(built.split(out)).double(), torch.cat(truth), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(
        torch.cat(built.split_lse(lse), 1).double(), torch.cat(truth_lse, 1), atol=1e-3, rtol=1e-3
    )


def test_lse_of_every_path(cuda: torch.device, rng: random.Random) -> None:
    """Dense, packed, split and sink paths return the same natural-log LSE as the judge, -inf for empty rows."""
    for call in (
        prefill_call(64, seqlens_q=(133, 1, 0, 65), seqlens_k=(20, 0, 7, 209), sinks="fp32"),
        decode_call(64, num_splits=1, sinks="fp32"),
        decode_call(64, num_splits=7, sinks="fp32"),
        decode_call(512, num_splits=7),
    ):
        built = build(call, cuda, rng)
        out, lse = built.run()
        check_split(built, out, lse)
