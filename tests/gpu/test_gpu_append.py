"""The append kernel against the torch implementation, bit for bit: layouts, rotary, dtypes, graphs, torch.compile."""

from __future__ import annotations

import random
from typing import Any

import broadhead
import pytest
import torch
from broadhead.api import append as append_call
from broadhead.run import cuda_backend
from broadhead.run import fallback as fallback_notice
from broadhead.run.append import BY_KERNEL, Append, kernel_obstacle, run_append
from gpu_calls import capture
from torch import Tensor

pytestmark = pytest.mark.gpu

FP8 = torch.float8_e4m3fn
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16-e4m3": (torch.bfloat16, FP8),
    "fp16-e4m3": (torch.float16, FP8),
    "e4m3": (FP8, FP8),
}
#: rotary columns of 128, interleaved, own positions
ROTARY: dict[str, Any] = {
    "none": None,
    "halves": (128, False, False),
    "interleaved": (128, True, False),
    "partial": (64, False, False),
    "partial_interleaved": (72, True, True),
    "own_positions": (128, False, True),
    "odd": (6, False, False),
    "odd_interleaved": (6, True, False),
}
LAYOUTS = ("plain", "vllm", "heads_first", "overlapping", "odd")
GARBAGE = (-1, 2**31 - 1, -(2**31), 1 << 20)


def int32(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def poison(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.empty(shape, dtype=dtype, device=device)
    (x.view(torch.uint8) if dtype.itemsize == 1 else x).fill_(0x7F if dtype.itemsize == 1 else float("nan"))
    return x


def caches(
    lead: tuple[int, int], heads: int, dims: tuple[int, int], dtype: torch.dtype, layout: str, device: torch.device
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """K, V and what they are views of."""
    blocks, size = lead
    if layout == "vllm":  # K and V interleaved in one row, head by head
        pool = poison((blocks, heads, size, sum(dims)), dtype, device)
        both = pool.transpose(1, 2)
        return both[..., : dims[0]], both[..., dims[0] :], [pool]
    if layout == "overlapping":  # V begins one block after K: ids step by two
        pool = poison((blocks + 1, size, heads, dims[0]), dtype, device)
        return pool[:-1], pool[1:], [pool]
    pools = []
    for dim in dims:
        if layout == "heads_first":
            pools.append(poison((blocks, heads, size, dim), dtype, device))
        else:
            pools.append(poison((blocks, size, heads, dim + (3 if layout == "odd" else 0)), dtype, device))
    views = [pool.transpose(1, 2) if layout == "heads_first" else pool for pool in pools]
    return views[0][..., : dims[0]], views[1][..., : dims[1]], pools


def build(
    seed: int,
    device: torch.device,
    dtypes: str = "bf16",
    page_size: int = 16,
    layout: str = "plain",
    rotary: str = "none",
    ragged: bool = False,
    batch_idx: bool = False,
    angles: str = "fp32",
    dims: tuple[int, int] = (128, 128),
    most_new: int = 5,
    overflow: bool = False,
) -> tuple[Append, list[Tensor]]:
    """A random append and the storage of its caches, NaN all over; the same for the same seed."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype, cache_dtype = DTYPES[dtypes]
    batch, heads_kv, heads_q = 7, 2, 6
    step = 2 if layout == "overlapping" else 1
    num_new = [rng.choice([0, 1, rng.randint(1, most_new)]) for _ in range(batch)] if ragged else [most_new] * batch
    num_q = [rng.choice([0, 1, rng.randint(1, 9)]) for _ in range(batch)] if ragged else [rng.randint(1, 9)] * batch
    seqlens = [rng.randint(0, 70) for _ in range(batch)]
    capacity = max(1, max(n + new for n, new in zip(seqlens, num_new)) + (-9 if overflow else 2))
    rows = batch + 3 if batch_idx else batch
    owners = rng.sample(range(rows), batch) if batch_idx else list(range(batch))
    table = None
    if page_size:
        columns = -(-capacity // page_size)
        ids = iter(rng.sample(range(rows * columns), rows * columns))
        entries = [[rng.choice(GARBAGE) for _ in range(columns + 2)] for _ in range(rows)]
        for owner, length, new in zip(owners, seqlens, num_new):
            for column in range(min(columns, -(-(length + new) // page_size) - (2 if overflow else 0))):
                entries[owner][column] = next(ids) * step
        # A slice of a wider table; its last columns are garbage, and beyond the slice there is more.
        table = torch.tensor(entries, dtype=torch.int32, device=device)[:, : columns + 1]
        lead = (rows * columns * step, page_size)
    else:
        lead = (rows, capacity)
        assert step == 1
    k_cache, v_cache, pools = caches(lead, heads_kv, dims, cache_dtype, layout, device)

    def tokens(counts: list[int], heads: int, dim: int) -> Tensor:
        lead = (sum(counts) + 2,) if ragged else (batch, counts[0])
        wide = torch.randn(*lead, heads + 1, dim + (5 if layout == "odd" else 0), device=device) * 20
        if ragged:
            wide[sum(counts) :] = float("nan")  # rows that no sequence owns
        return wide.to(dtype)[..., :heads, :dim]

    def offsets(counts: list[int]) -> Tensor | None:
        return int32([sum(counts[:i]) for i in range(batch + 1)], device) if ragged else None

    cos = sin = own = None
    interleaved = False
    if ROTARY[rotary] is not None:
        columns, interleaved, own_positions = ROTARY[rotary]
        narrow = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(angles, dtype)
        narrow = torch.bfloat16 if narrow == FP8 else narrow  # 8-bit keys have tables of either
        both = torch.randn(90, columns, device=device).to(torch.float32 if angles == "fp32" else narrow)
        cos, sin = both.chunk(2, dim=1)  # as vLLM's cos_sin_cache
        own = int32([rng.randint(-2, 99) for _ in range(batch)], device) if own_positions else None
    call = Append(
        k_cache, v_cache, tokens(num_new, heads_kv, dims[0]), tokens(num_new, heads_kv, dims[1]),
        int32(seqlens, device), tokens(num_q, heads_q, dims[0]) if cos is not None else None, cos, sin, own,
        offsets(num_q) if cos is not None else None, offsets(num_new), table,
        int32(owners, device) if batch_idx else None,
        torch.rand(batch, heads_kv, device=device) + 0.05,
        (torch.rand(1, 1, device=device) + 0.05).expand(batch, heads_kv), interleaved, rng.random() < 0.5,
    )  # fmt: skip
    return call, pools


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8 if x.dtype.itemsize == 1 else torch.int16)


def check(seed: int, device: torch.device, **options: Any) -> None:
    """Caches, rotated q and lengths of the kernel are those of the torch implementation, down to the last NaN."""
    call, pools = build(seed, device, **options)
    reference, expected_pools = build(seed, device, **options)
    assert kernel_obstacle(call) is None
    q, lengths = run_append(call)
    assert fallback_notice.state.append == BY_KERNEL
    expected_q, expected_lengths = run_append(reference, "torch")
    assert fallback_notice.state.append[0] == "torch"
    assert torch.equal(lengths, expected_lengths) and lengths.dtype == torch.int32
    for pool, expected in zip(pools, expected_pools, strict=True):
        different = (bits(pool) != bits(expected)).sum().item()
        assert different == 0, f"{different} of {pool.numel()} numbers of a cache differ"
    if q is not None:
        live = slice(None) if call.cu_seqlens_q is None else slice(0, int(call.cu_seqlens_q[-1]))
        assert torch.equal(bits(q[live]), bits(expected_q[live])) and q.is_contiguous()


@pytest.mark.curated
@pytest.mark.parametrize("page_size", [0, 1, 16])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_append(dtypes: str, page_size: int, cuda: torch.device, seed: int) -> None:
    check(seed, cuda, dtypes=dtypes, page_size=page_size, rotary="partial", ragged=page_size == 16)


@pytest.mark.full
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("page_size", [0, 1, 16, 64])
@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_rotary_and_pages(
    dtypes: str, rotary: str, page_size: int, ragged: bool, cuda: torch.device, seed: int
) -> None:
    for number, angles in enumerate(("fp32", "bf16", "fp16") if dtypes == "e4m3" else ("fp32", "q")):
        options = {"page_size": page_size, "ragged": ragged, "batch_idx": bool(number), "angles": angles}
        check(seed + number, cuda, dtypes=dtypes, rotary=rotary, **options)


@pytest.mark.full
@pytest.mark.parametrize("dims", [(128, 128), (8, 8), (72, 40), (64, 512), (256, 96)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_layouts_and_head_dims(dtypes: str, layout: str, dims: tuple[int, int], cuda: torch.device, seed: int) -> None:
    if layout == "overlapping" and dims[0] != dims[1]:
        return
    rotary = "none" if dims[0] < 128 else "halves"
    for page_size in (16, 48) if layout == "overlapping" else (0, 16, 48):
        check(seed, cuda, dtypes=dtypes, layout=layout, dims=dims, page_size=page_size, rotary=rotary, ragged=True)


@pytest.mark.full
@pytest.mark.parametrize("batch_idx", [False, True])
@pytest.mark.parametrize("page_size", [0, 1, 16, 64])
def test_rows_without_a_place_are_dropped(page_size: int, batch_idx: bool, cuda: torch.device, seed: int) -> None:
    """Past the cache, past the page table, and on pages that were never allocated."""
    for number in range(6):
        options = {"page_size": page_size, "batch_idx": batch_idx, "ragged": number % 2 == 0, "most_new": 20}
        check(seed + number, cuda, rotary="interleaved", overflow=True, **options)


WILD = (-1, 2**31 - 1, -(2**31), 1 << 20, 89)


@pytest.mark.full
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("page_size", [0, 1, 16])
@pytest.mark.parametrize("dtypes", ["bf16", "e4m3"])
def test_values_out_of_range(dtypes: str, page_size: int, ragged: bool, cuda: torch.device, seed: int) -> None:
    """Lengths, batch indices, rotary positions and offsets that are nowhere: the kernel writes what torch ops write."""
    for number in range(8):
        rng = random.Random(seed + number)
        results = []
        for backend in (None, "torch"):
            rng.seed(seed + number)
            options = {"page_size": page_size, "rotary": "own_positions", "ragged": ragged, "batch_idx": True}
            call, pools = build(seed + number, cuda, dtypes=dtypes, **options)
            for name in ("cache_seqlens", "cache_batch_idx", "rotary_seqlens"):
                values = getattr(call, name)
                for b in rng.sample(range(7), 3):
                    values[b] = rng.choice(WILD)
            if ragged and number % 2:
                call.cu_seqlens_k_new[7] = rng.choice(WILD)  # in between, two sequences would claim a row
            results.append((*run_append(call, backend), *pools))
        assert fallback_notice.state.append[0] == "torch"
        q_live = slice(None) if call.cu_seqlens_q is None else slice(0, int(call.cu_seqlens_q[-1]))
        (q, lengths, *pools), (expected_q, expected_lengths, *expected_pools) = results
        assert torch.equal(lengths, expected_lengths)
        assert torch.equal(bits(q[q_live]), bits(expected_q[q_live]))
        for pool, expected in zip(pools, expected_pools, strict=True):
            assert torch.equal(bits(pool), bits(expected))


@pytest.mark.full
@pytest.mark.parametrize("dtypes", DTYPES)
def test_prefill_sized_appends(dtypes: str, cuda: torch.device, seed: int) -> None:
    for ragged in (False, True):
        check(seed, cuda, dtypes=dtypes, ragged=ragged, most_new=3000, rotary="halves", page_size=64)


@pytest.mark.full
def test_offsets_beyond_31_bits(cuda: torch.device) -> None:
    """Pages at the end of a pool of more than 2^31 elements."""
    pages, page_size, heads, dim = 1 << 18, 16, 8, 72
    assert pages * page_size * heads * dim > 2**31
    k_cache = torch.zeros(pages, page_size, heads, dim, dtype=FP8, device=cuda)
    v_cache = torch.zeros(pages, page_size, heads, 16, dtype=FP8, device=cuda)
    k_new = torch.randn(2, 1, heads, dim, device=cuda, dtype=torch.bfloat16)
    table = int32([pages - 1, 0], cuda).view(2, 1)
    call = Append(
        k_cache, v_cache, k_new, k_new[..., :16], int32([15, 3], cuda), None, None, None, None, None, None, table, None,
        None, None, True, False,
    )  # fmt: skip
    assert run_append(call)[1].tolist() == [16, 4] and fallback_notice.state.append == BY_KERNEL
    assert torch.equal(bits(k_cache[-1, 15]), bits(k_new[0, 0].float().to(FP8)))
    assert torch.equal(bits(v_cache[0, 3]), bits(k_new[1, 0, :, :16].float().to(FP8)))
    assert int(k_cache[-8:].view(torch.uint8).any(-1).sum()) == heads, "a slot that no new key belongs to was written"


@pytest.mark.curated
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
def test_graph_replays_with_other_lengths(ragged: bool, cuda: torch.device, seed: int) -> None:
    """Nothing is read on the host: lengths, offsets, page table and positions are those at replay."""
    options = {"ragged": ragged, "rotary": "halves", "page_size": 16, "most_new": 4}
    call, pools = build(seed, cuda, **options)
    results: list[tuple[Tensor | None, Tensor]] = []

    def step() -> None:
        results.append(run_append(call))

    torch.cuda.set_sync_debug_mode("error")
    try:
        run_append(call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = capture(step)
    for number in range(4):
        other, _ = build(seed + number, cuda, **options)
        reference, expected_pools = build(seed, cuda, **options)
        torch.minimum(other.cache_seqlens, call.cache_seqlens, out=reference.cache_seqlens)
        call.cache_seqlens.copy_(reference.cache_seqlens)
        if call.cu_seqlens_k_new is not None and reference.cu_seqlens_k_new is not None:
            if number == 2:  # all new keys are those of the first sequence
                reference.cu_seqlens_k_new[1:] = reference.cu_seqlens_k_new[-1].clone()
            call.cu_seqlens_k_new.copy_(reference.cu_seqlens_k_new)
        for pool in pools:
            pool.fill_(float("nan"))
        graph.replay()
        q, after = run_append(reference, "torch")
        assert torch.equal(results[-1][1], after)
        for pool, expected in zip(pools, expected_pools, strict=True):
            assert torch.equal(bits(pool), bits(expected)), number
        live = slice(None) if call.cu_seqlens_q is None else slice(0, int(call.cu_seqlens_q[-1]))
        assert q is not None and torch.equal(bits(results[-1][0][live]), bits(q[live]))


# --- through the public function -------------------------------------------------------------------------------------


def decode_step(device: torch.device) -> dict[str, Any]:
    lengths = [33, 0, 100]
    return {
        "q": torch.randn(3, 1, 8, 128, device=device, dtype=torch.bfloat16),
        "k_cache": torch.randn(30, 16, 2, 128, device=device, dtype=torch.bfloat16),
        "v_cache": torch.randn(30, 16, 2, 128, device=device, dtype=torch.bfloat16),
        "k": torch.randn(3, 1, 2, 128, device=device, dtype=torch.bfloat16),
        "v": torch.randn(3, 1, 2, 128, device=device, dtype=torch.bfloat16),
        "rotary_cos": torch.randn(200, 64, device=device),
        "rotary_sin": torch.randn(200, 64, device=device),
        "cache_seqlens": int32(lengths, device),
        "page_table": torch.randperm(30, device=device).to(torch.int32).view(3, 10),
        "causal": True,
    }


def test_public_function_uses_the_kernel(cuda: torch.device, row_ran: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same output and caches as with torch's append; the second call of its kind is not validated again."""
    step = decode_step(cuda)
    expected = {name: x.clone() if isinstance(x, Tensor) else x for name, x in step.items()}
    with monkeypatch.context() as patch:
        patch.setattr(append_call, "run_append", lambda call, backend: run_append(call, "torch"))
        cuda_backend.forget_calls()
        expected_out = broadhead.flash_attn_with_kvcache(**expected)
    assert fallback_notice.state.append[0] == "torch"
    cuda_backend.forget_calls()
    out = broadhead.flash_attn_with_kvcache(**step)
    row_ran(phase="decode", dtype=torch.bfloat16, head_dim=128)
    assert fallback_notice.state.append == BY_KERNEL
    for got, wanted in (
        (out, expected_out),
        (step["k_cache"], expected["k_cache"]),
        (step["v_cache"], expected["v_cache"]),
    ):
        assert torch.equal(bits(got), bits(wanted))

    def refuse(*arguments: Any) -> None:
        raise AssertionError("a known call was validated again")

    monkeypatch.setattr(append_call, "_validate", refuse)
    step["cache_seqlens"] += 1
    broadhead.flash_attn_with_kvcache(**step)
    fallback_notice.state.append = ("none", None, "")
    torch.cuda.set_sync_debug_mode("error")
    try:
        broadhead.flash_attn_with_kvcache(**step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert fallback_notice.state.append == BY_KERNEL


def test_strict_refuses_an_append_on_torch_ops(cuda: torch.device) -> None:
    step = decode_step(cuda)
    before = step["k_cache"].clone()
    step["rotary_cos"], step["rotary_sin"] = step["rotary_cos"].double(), step["rotary_sin"].double()
    with pytest.raises(broadhead.UnsupportedError, match=r"append kernel.*rotary_cos is torch\.float64"):
        broadhead.flash_attn_with_kvcache(**step)
    assert torch.equal(step["k_cache"], before)


@pytest.mark.full
def test_compiled_call_uses_the_kernel(cuda: torch.device) -> None:
    step = decode_step(cuda)
    eager = {name: x.clone() if isinstance(x, Tensor) else x for name, x in step.items()}
    expected = broadhead.flash_attn_with_kvcache(**eager)
    fallback_notice.state.append = ("none", None, "")
    torch.compiler.reset()
    out = torch.compile(broadhead.flash_attn_with_kvcache, fullgraph=True)(**step)
    assert fallback_notice.state.append == BY_KERNEL
    assert torch.equal(out, expected) and torch.equal(step["k_cache"], eager["k_cache"])
