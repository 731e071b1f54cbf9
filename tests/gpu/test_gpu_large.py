"""Full GPU set: 64-bit offsets, long sequences, and a thousand repeats of one call."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from broadhead import support
from calls import Call, build
from checks import check_call, check_equal
from gpu_calls import PREFILL_ROWS, decode_call, prefill_call, row_call, row_cases, row_id

pytestmark = [pytest.mark.gpu, pytest.mark.full, pytest.mark.usefixtures("first_rows")]

MASKS = {"full": {}, "causal": {"causal": True}}


def need_memory(cuda: torch.device, elements: int) -> None:
    """Skip where that many 16-bit elements do not fit beside what other tests use at the same time."""
    free = torch.cuda.mem_get_info(cuda)[0]
    if free < 1.5 * elements * 2:
        pytest.skip(f"needs {3e-9 * elements:.0f} GB of free device memory, {free / 1e9:.0f} are")


@pytest.mark.parametrize(
    "head_dim, head_dim_v, page_size, prefill",
    [
        (128, 128, 16, False),
        (512, 512, 16, False),
        (128, 128, 16, True),
        (512, 512, 64, True),
        (64, 64, 64, True),
        (256, 256, 128, True),
        (192, 128, 1, True),
    ],
)
def test_pool_of_more_than_2_to_the_31_elements(
    head_dim: int, head_dim_v: int, page_size: int, prefill: bool, cuda: torch.device, row_ran: Callable
) -> None:
    """The few pages that hold the sequences lie at the end of a pool whose offsets need 64 bits."""
    num_pages = 2**31 // (page_size * 2 * min(head_dim, head_dim_v)) + 64 * max(1, 16 // page_size) * 4
    need_memory(cuda, num_pages * page_size * 2 * (head_dim + head_dim_v))
    make = prefill_call if prefill else decode_call
    built = build(make(head_dim, head_dim_v=head_dim_v, page_size=page_size, heads_kv=2, k_layout="plain"), cuda)
    kw = built.kwargs
    names = ("k", "v") if prefill else ("k_cache", "v_cache")
    small = kw[names[0]].shape[0]
    assert small * 2 < num_pages
    for name in names:
        pool = torch.empty(num_pages, *kw[name].shape[1:], dtype=built.call.dtype, device=cuda)
        pool[:small].fill_(float("nan"))  # where truncated offsets would land
        pool[-small:] = kw[name]
        kw[name] = pool
    real = (kw["page_table"] >= 0) & (kw["page_table"] < small)
    kw["page_table"] = torch.where(real, kw["page_table"] + (num_pages - small), kw["page_table"])
    check_call(built)
    phase = "prefill" if prefill else "decode"
    row_ran(phase=phase, dtype=built.call.dtype, head_dim=head_dim, head_dim_v=head_dim_v)


def spread(built, names: tuple[str, ...], strides: Callable[[torch.Tensor], tuple], cuda: torch.device) -> None:
    """Moves arguments of the call into one large buffer, one behind the other at its start, with those strides."""
    tensors = [built.kwargs[name] for name in names]
    ends = [1 + sum((size - 1) * step for size, step in zip(x.shape, strides(x))) for x in tensors]
    offsets = [sum(x[0].numel() for x in tensors[:i]) for i in range(len(tensors))]
    store = torch.empty(max(end + at for end, at in zip(ends, offsets)), dtype=torch.bfloat16, device=cuda)
    for name, x, offset in zip(names, tensors, offsets):
        view = store.as_strided(x.shape, strides(x), offset)
        view.copy_(x)
        built.kwargs[name] = view
    built.out, built.out_store = built.kwargs["out"], None


@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_batch_strides_of_more_than_2_to_the_31_elements(head_dim: int, cuda: torch.device, row_ran: Callable) -> None:
    """Slices of one large buffer: the second sequence of q, k, v and out lies past 2^31 elements."""
    step = 2**31 + 1024
    need_memory(cuda, step + 2**22)
    built = build(Call("func", (130, 130), (200, 200), heads_q=4, head_dim=head_dim, causal=True), cuda)
    spread(built, ("q", "k", "v", "out"), lambda x: (step, *x.stride()[1:]), cuda)
    check_call(built)
    row_ran(phase="prefill", dtype=torch.bfloat16, head_dim=head_dim)


@pytest.mark.parametrize("head_dim", [64, 256, 512])
def test_row_strides_of_more_than_2_to_the_31_elements(head_dim: int, cuda: torch.device, row_ran: Callable) -> None:
    """The rows of one packed sequence are columns of a wide buffer: the last of them lie past 2^31 elements."""
    rows, width = 260, 2**23 + 64
    need_memory(cuda, rows * width)
    built = build(Call("varlen", (rows,), (rows,), heads_q=4, head_dim=head_dim, causal=True), cuda)
    spread(built, ("q", "k", "v", "out"), lambda x: (width, *x.stride()[1:]), cuda)
    check_call(built)
    row_ran(phase="prefill", dtype=torch.bfloat16, head_dim=head_dim)


# --- long sequences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row, mask", row_cases(MASKS))
def test_8192_keys(row: support.KernelRow, mask: str, only_row: Callable, cuda: torch.device) -> None:
    only_row(row)
    built = build(row_call(row, "varlen", (8192,), (8192,), heads_q=2, heads_kv=1, **MASKS[mask]), cuda)
    check_call(built)


# --- repeats ----------------------------------------------------------------------------------------------------------

#: Of kernels whose copies and products run asynchronously; portable ones have fewer orders to get wrong.
REPEATS, PORTABLE_REPEATS = 1000, 250
REPEATED = {
    "full": {},
    "causal": {"causal": True},
    "paged": {"causal": True, "page_size": 16, "window": (300, 0)},
    "splits": {"num_splits": 3},
}


@pytest.mark.parametrize("row, name", row_cases(REPEATED))
def test_repeats_agree_bit_for_bit(
    row: support.KernelRow, name: str, only_row: Callable, cuda: torch.device, rng: random.Random
) -> None:
    """More tiles than multiprocessors, in whatever order they finish: a race shows as another bit, sooner or later."""
    only_row(row)
    m, n = row.tile.tile_m, row.tile.tile_n
    lengths = {"seqlens_q": (2 * m + 9, m, 1, 3 * m + 1), "seqlens_k": (5 * n + 3, m + 2 * n, 70, 3 * m + 1)}
    built = build(row_call(row, "varlen", **lengths, heads_q=24, heads_kv=4, **REPEATED[name]), cuda, rng)
    out, lse = check_call(built)
    first_out, first_lse = out.clone(), lse.clone()
    differ = torch.zeros((), dtype=torch.int64, device=cuda)
    repeats = REPEATS if len(row.capabilities) == 1 else PORTABLE_REPEATS
    for _ in range(repeats):
        out.fill_(float("nan"))
        out, lse = built.run()
        differ += (out != first_out).any() | (lse != first_lse).any()
    assert int(differ) == 0, f"{int(differ)} of {repeats} runs differ: {built.call}"


@pytest.mark.parametrize("row", PREFILL_ROWS, ids=row_id)
def test_neighbours_on_the_device_change_nothing(
    row: support.KernelRow, only_row: Callable, cuda: torch.device, rng: random.Random
) -> None:
    """The same call while another stream keeps part of the device busy: blocks start late and in another order."""
    only_row(row)
    m, n = row.tile.tile_m, row.tile.tile_n
    call = row_call(row, "varlen", (3 * m + 1, m), (5 * n + 3, 3 * n), heads_q=24, heads_kv=4, causal=True)
    built = build(call, cuda, rng)
    expected, _ = (x.clone() for x in check_call(built))
    busy, x = torch.cuda.Stream(), torch.randn(2048, 2048, device=cuda, dtype=torch.bfloat16)
    for _ in range(30):
        with torch.cuda.stream(busy):
            x @ x
        built.out.fill_(float("nan"))
        built.run()
        check_equal(built.out, expected)
    torch.cuda.synchronize()
