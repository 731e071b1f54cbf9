"""Rotary embedding and the append of new keys against a loop over tokens."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import broadhead
import pytest
import torch
from broadhead.reference import append as append_kv
from layouts import GARBAGE_PAGES
from torch import Tensor

CACHES = ("contiguous", "contiguous_batch_idx", "paged", "paged_batch_idx", "interleaved", "overlapping")
ROTARY = ("none", "interleaved", "halves", "partial", "partial_interleaved", "own_positions")
HEADS, HEAD_DIM, POSITIONS = 2, 32, 200


@dataclasses.dataclass
class Append:
    """One call's tensors. ``places[b][r]`` indexes row r of sequence b in the caches; None: there is no such place."""

    k_cache: Tensor
    v_cache: Tensor
    k_new: Tensor
    v_new: Tensor
    options: dict[str, Any]
    seqlens: list[int]
    num_new: list[int]
    first_new: list[int]  # where the new rows of a sequence begin in k_new.flatten(0, -3)
    places: list[list[tuple[int, int] | None]]
    block_step: int  # 2 where K's pages are every other one of the pool that V shares


def build(
    seed: int, cache: str, rotary: str, ragged: bool, dtype: torch.dtype = torch.float32, overflow: bool = False
) -> Append:
    """A random append. overflow: some rows land past the cache or on pages that were never allocated."""
    rng = random.Random(seed)
    step = 2 if cache == "overlapping" else 1
    batch, page_size = 4, rng.choice([1, 3, 16])
    paged = not cache.startswith("contiguous")
    same = rng.randint(1, 7)
    num_new = [rng.choice([0, 1, rng.randint(1, 9)]) for _ in range(batch)] if ragged else [same] * batch
    seqlens = [rng.randint(0, 30) for _ in range(batch)]
    capacity = max(n + new for n, new in zip(seqlens, num_new))
    capacity -= rng.randint(1, 5) if overflow and not paged else -2
    capacity = max(capacity, 1)
    options: dict[str, Any] = {"cache_seqlens": torch.tensor(seqlens, dtype=torch.int32)}

    num_owners = batch + 2 if cache.endswith("batch_idx") else batch
    owners = rng.sample(range(num_owners), batch)
    if cache.endswith("batch_idx"):
        options["cache_batch_idx"] = torch.tensor(owners, dtype=torch.int32)
    else:
        owners = list(range(batch))

    places: list[list[tuple[int, int] | None]] = []
    if paged:
        max_pages = -(-capacity // page_size) + 1
        num_pages = num_owners * max_pages
        free = [page * step for page in rng.sample(range(num_pages), num_pages)]
        table = [[rng.choice(GARBAGE_PAGES) for _ in range(max_pages)] for _ in range(num_owners)]
        for b, owner in enumerate(owners):
            needed = -(-(seqlens[b] + num_new[b]) // page_size)
            allocated = max(0, needed - rng.randint(0, 2)) if overflow else needed
            table[owner][:allocated] = [free.pop() for _ in range(allocated)]
            rows = range(max_pages * page_size)
            places.append(
                [(table[owner][r // page_size], r % page_size) if r // page_size < allocated else None for r in rows]
            )
        options["page_table"] = torch.tensor(table, dtype=torch.int32)
        shape = (num_pages * step, page_size, HEADS, HEAD_DIM)
    else:
        places = [[(owner, r) for r in range(capacity)] for owner in owners]
        shape = (num_owners, capacity, HEADS, HEAD_DIM)
    if cache == "interleaved":
        pool = torch.randn(shape[0], HEADS, shape[1], 2 * HEAD_DIM).to(dtype).transpose(1, 2)
        k_cache, v_cache = pool[..., :HEAD_DIM], pool[..., HEAD_DIM:]
    elif cache == "overlapping":
        pool = torch.randn(shape[0] + 1, *shape[1:]).to(dtype)
        k_cache, v_cache = pool[:-1], pool[1:]
    else:
        k_cache, v_cache = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)

    first_new = [sum(num_new[:b]) for b in range(batch)]
    if ragged:
        lead: tuple[int, ...] = (sum(num_new) + rng.randint(0, 3),)  # rows past the last sequence
        options["cu_seqlens_k_new"] = torch.tensor([*first_new, sum(num_new)], dtype=torch.int32)
    else:
        lead = (batch, same)
    k_new, v_new = torch.randn(*lead, HEADS, HEAD_DIM), torch.randn(*lead, HEADS, HEAD_DIM)
    if ragged:
        k_new[sum(num_new) :], v_new[sum(num_new) :] = float("nan"), float("nan")
    if rotary != "none":
        columns = HEAD_DIM // 4 if rotary.startswith("partial") else HEAD_DIM // 2
        angle = torch.rand(POSITIONS, columns) * 6.28
        options |= {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()}
        options["rotary_interleaved"] = "interleaved" in rotary
        if rotary == "own_positions":
            options["rotary_seqlens"] = torch.tensor([rng.randint(0, 99) for _ in range(batch)], dtype=torch.int32)
    return Append(k_cache, v_cache, k_new, v_new, options, seqlens, num_new, first_new, places, step)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """One token ``(H, D)`` by the angles of its position, pair by pair."""
    x = x.double().clone()
    source, half = x.clone(), len(cos)
    for pair in range(half):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        c, s = cos[pair].double(), sin[pair].double()
        x[:, a] = source[:, a] * c - source[:, b] * s
        x[:, b] = source[:, b] * c + source[:, a] * s
    return x


def expected_caches(call: Append) -> tuple[Tensor, Tensor, Tensor]:
    """K and V after the append in fp64, and which ``(block, slot)`` were written."""
    k, v = call.k_cache.double(), call.v_cache.double()
    written = torch.zeros(k.shape[:2], dtype=torch.bool)
    options = call.options
    for b, length in enumerate(call.seqlens):
        for i in range(call.num_new[b]):
            row = length + i
            place = call.places[b][row] if row < len(call.places[b]) else None
            if place is None:
                continue
            k_token = call.k_new.flatten(0, -3)[call.first_new[b] + i]
            if "rotary_cos" in options:
                position = (int(options["rotary_seqlens"][b]) if "rotary_seqlens" in options else length) + i
                cos, sin = options["rotary_cos"][position], options["rotary_sin"][position]
                k_token = rotate(k_token, cos, sin, options["rotary_interleaved"])
            k[place], v[place] = k_token.double(), call.v_new.flatten(0, -3)[call.first_new[b] + i].double()
            written[place] = True
    return k, v, written


def check(call: Append, append: Any = append_kv.append) -> None:
    before_k, before_v = call.k_cache.clone(), call.v_cache.clone()
    expected_k, expected_v, written = expected_caches(call)
    append(call.k_cache, call.v_cache, call.k_new, call.v_new, **call.options)
    tolerance = 4 * torch.finfo(torch.float16 if call.k_cache.dtype.itemsize == 2 else torch.float32).eps
    if call.k_cache.dtype == torch.bfloat16:
        tolerance = 2 * torch.finfo(torch.bfloat16).eps
    mine = slice(None, None, call.block_step)
    for cache, before, expected in ((call.k_cache, before_k, expected_k), (call.v_cache, before_v, expected_v)):
        is_new, stale = written[mine], ~written[mine]
        torch.testing.assert_close(cache[mine][is_new].double(), expected[mine][is_new], rtol=tolerance, atol=tolerance)
        assert torch.equal(cache[mine][stale], before[mine][stale]), "a slot that no new key belongs to was written"


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("cache", CACHES)
def test_append(cache: str, rotary: str, ragged: bool, seed: int) -> None:
    check(build(seed, cache, rotary, ragged))


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("cache", CACHES)
def test_rows_without_a_place_are_dropped(cache: str, ragged: bool, seed: int) -> None:
    for number in range(5):
        check(build(seed + number, cache, "halves", ragged, overflow=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_caches(dtype: torch.dtype, seed: int) -> None:
    for cache in CACHES:
        check(build(seed, cache, "partial_interleaved", True, dtype))


def quantised(new: Tensor, descale: Tensor | None, sequence: Tensor) -> Tensor:
    """Tokens ``(T, H, D)`` as an e4m3 cache holds them: divided, saturated, rounded once."""
    factor = torch.ones(4, HEADS) if descale is None else descale
    exact = new.double() / factor[sequence][:, :, None].double()
    return exact.clamp(-448, 448).float().to(torch.float8_e4m3fn)


@pytest.mark.parametrize("factors", ["none", "each", "one"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cache", CACHES)
def test_fp8_cache_of_16_bit_keys(cache: str, dtype: torch.dtype, factors: str, seed: int) -> None:
    """Divided by the factors of the sequence and head, saturated, NaN kept; every other slot keeps its bytes."""
    call = build(seed, cache, "none", True, torch.float8_e4m3fn)
    call.k_new, call.v_new = (100 * call.k_new).to(dtype), (300 * call.v_new).to(dtype)
    call.v_new[:1, 0, :4] = torch.tensor([float("inf"), -float("inf"), float("nan"), 6e4])
    descales: dict[str, Tensor | None] = {"k_descale": None, "v_descale": None}
    if factors != "none":
        # Powers of two: the division is exact, and so is what the cache must hold.
        descales = {name: 2.0 ** torch.randint(-3, 3, (4, HEADS)) for name in descales}
        if factors == "one":
            descales = {name: x[:1, :1].expand(4, HEADS) for name, x in descales.items()}
    before = call.k_cache.view(torch.uint8).clone(), call.v_cache.view(torch.uint8).clone()
    append_kv.append(call.k_cache, call.v_cache, call.k_new, call.v_new, **call.options, **descales)
    live = sum(call.num_new)
    sequence = torch.arange(4).repeat_interleave(torch.tensor(call.num_new))
    mine = slice(None, None, call.block_step)
    for x, old, new, name in (
        (call.k_cache, before[0], call.k_new, "k_descale"), (call.v_cache, before[1], call.v_new, "v_descale")
    ):  # fmt: skip
        expected = quantised(new[:live], descales[name], sequence)
        for b, length in enumerate(call.seqlens):
            for i in range(call.num_new[b]):
                place = call.places[b][length + i]
                old[place] = expected[call.first_new[b] + i].view(torch.uint8)
        assert torch.equal(x.view(torch.uint8)[mine], old[mine])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_public_functions_append_to_an_fp8_cache(dtype: torch.dtype, compiled: bool, seed: int) -> None:
    """flash_attn_with_kvcache and mha_fwd append what append_kv.append does, then attend over it."""
    torch._dynamo.reset()
    e4m3, lengths = torch.float8_e4m3fn, torch.tensor([5, 0], dtype=torch.int32)
    q, k, v = (torch.randn(2, 3, h, 32, dtype=dtype) for h in (4, 2, 2))
    factors = {"k_descale": torch.rand(2, 2) * 0.01 + 0.01, "v_descale": torch.rand(1, 1).expand(2, 2) * 0.01 + 0.01}
    caches = [(torch.randn(2, 12, 2, 32) * 100).to(e4m3) for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    append_kv.append(*expected, k, v, cache_seqlens=lengths, **factors)
    attended = broadhead.flash_attn_with_kvcache(q, *expected, cache_seqlens=lengths + 3, causal=True, **factors)

    def kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, n: Tensor, **factors: Tensor
    ) -> Tensor:
        return broadhead.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=n, causal=True, **factors)

    def full(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, n: Tensor, **factors: Tensor) -> Tensor:
        return broadhead.mha_fwd(q, k_cache, v_cache, k, v, seqused_k=n, causal=True, **factors)[0]

    for function in (kvcache, full):
        if compiled:
            function = torch.compile(function, fullgraph=True, backend="aot_eager")
        given = [cache.clone() for cache in caches]
        out = function(q, *given, k, v, lengths, **factors)
        assert out.dtype == dtype
        torch.testing.assert_close(out, attended, rtol=0, atol=0)
        for cache, wanted in zip(given, expected):
            assert torch.equal(cache.view(torch.uint8), wanted.view(torch.uint8))


def test_appends_to_an_fp8_cache_are_checked_first() -> None:
    e4m3, lengths = torch.float8_e4m3fn, torch.tensor([5, 0], dtype=torch.int32)
    q, new, cache = torch.randn(2, 1, 4, 32).bfloat16(), torch.randn(2, 1, 2, 32).bfloat16(), torch.zeros(2, 9, 2, 32)
    cache = cache.to(e4m3)
    good = {"q": q, "k": cache, "v": cache, "k_new": new, "v_new": new, "seqused_k": lengths}
    for changes, words in (
        ({"k_new": new.to(e4m3), "v_new": new.to(e4m3)}, "k_new must have the dtype of q, .*bfloat16"),
        ({"v": cache.bfloat16()}, "v must have the dtype of k, torch.float8_e4m3fn, got torch.bfloat16"),
        ({"q": q.float(), "k_new": new.float(), "v_new": new.float()}, "k must have the dtype of q, .*float32, or"),
        ({"k_new": new.half(), "v_new": new.half()}, "k_new must have the dtype of q, .*bfloat16, got .*float16"),
        ({"v_new": new.to(e4m3)}, "v_new must have the dtype of q, .*bfloat16, got .*e4m3"),
        ({"v_new": None}, "v_new must be given"),
        ({"k_descale": torch.ones(2)}, "k_descale must have shape"),
        ({"v_descale": torch.ones(2, 2).half()}, "v_descale must be fp32"),
    ):
        with pytest.raises(broadhead.BroadheadError, match=f"mha_fwd: {words}"):
            broadhead.mha_fwd(**{**good, **changes})  # type: ignore[arg-type]
    with pytest.raises(broadhead.InvalidArgumentError, match="flash_attn_with_kvcache: q_descale must be None"):
        broadhead.flash_attn_with_kvcache(q, cache, cache, new, new, cache_seqlens=lengths, q_descale=torch.ones(2, 2))
    assert (cache.view(torch.uint8) == 0).all(), "a refused call wrote into the cache"


def e4m3(x: Tensor) -> Tensor:
    """Rounded to float8_e4m3fn by arithmetic alone: three bits of mantissa, steps of 2^-9 at least, 448 at most."""
    x = x.double().clamp(-448, 448)
    exponent = torch.frexp(x).exponent.clamp(min=-5)
    step = torch.ldexp(torch.ones_like(x), exponent - 4)
    return torch.round(x / step) * step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rotary", ["none", "partial", "interleaved"])
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
def test_wider_keys_in_an_fp8_cache(ragged: bool, rotary: str, dtype: torch.dtype, seed: int) -> None:
    """k and v are divided by their sequence's and head's factor, saturate, and are rounded once, rotary or not."""
    call = build(seed, "paged", rotary, ragged, torch.float8_e4m3fn)
    call.k_new, call.v_new = (call.k_new * 30).to(dtype), (call.v_new * 30).to(dtype)
    factors = {"k_descale": torch.rand(4, HEADS) + 0.05, "v_descale": torch.rand(1, 1).expand(4, HEADS) + 0.05}
    append_kv.append(call.k_cache, call.v_cache, call.k_new, call.v_new, **call.options, **factors)
    for b, length in enumerate(call.seqlens):
        for i in range(call.num_new[b]):
            place = call.places[b][length + i]
            k, v = (x.flatten(0, -3)[call.first_new[b] + i].float() for x in (call.k_new, call.v_new))
            if rotary != "none":
                cos, sin = (call.options[name][length + i] for name in ("rotary_cos", "rotary_sin"))
                k = rotate_fp32(k, cos, sin, call.options["rotary_interleaved"])
            assert torch.equal(call.k_cache[place].double(), e4m3(k / factors["k_descale"][b, :, None]))
            assert torch.equal(call.v_cache[place].double(), e4m3(v / factors["v_descale"][b, :, None]))


def rotate_fp32(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """rotate, each operation rounded to fp32."""
    source, half = x.clone(), len(cos)
    for pair in range(half):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        x[:, a] = source[:, a] * cos[pair] - source[:, b] * sin[pair]
        x[:, b] = source[:, b] * cos[pair] + source[:, a] * sin[pair]
    return x


def test_fp8_keys_are_copied_whatever_the_factors(seed: int) -> None:
    call = build(seed, "contiguous", "none", False, torch.float8_e4m3fn)
    k_new, v_new = call.k_new.to(torch.float8_e4m3fn), call.v_new.to(torch.float8_e4m3fn)
    factors = torch.full((4, HEADS), 0.25)
    append_kv.append(call.k_cache, call.v_cache, k_new, v_new, **call.options, k_descale=factors, v_descale=factors)
    for b, length in enumerate(call.seqlens):
        stored = call.k_cache[b, length : length + call.num_new[b]]
        assert torch.equal(stored.view(torch.uint8), k_new[b].view(torch.uint8))


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("rotary", ["halves", "interleaved", "partial", "partial_interleaved", "own_positions"])
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
def test_fp8_keys_are_rotated_in_fp32(ragged: bool, rotary: str, seed: int) -> None:
    """8-bit keys are rotated in fp32 and rounded once, and saturate; other columns and values are copied bit by bit."""
    call = build(seed, "paged", rotary, ragged, FP8)
    k_new, v_new = ((x * 400).clamp(-448, 448).to(FP8) for x in (call.k_new, call.v_new))
    factors = torch.full((4, HEADS), 0.25)  # say what the numbers mean, before and after the rotation alike
    call.options |= {"k_descale": factors, "v_descale": factors}
    append_kv.append(call.k_cache, call.v_cache, k_new, v_new, **call.options)
    columns = 2 * call.options["rotary_cos"].shape[1]
    for b, length in enumerate(call.seqlens):
        first = int(call.options["rotary_seqlens"][b]) if rotary == "own_positions" else length
        for i in range(call.num_new[b]):
            place = call.places[b][length + i]
            k, v = (x.flatten(0, -3)[call.first_new[b] + i] for x in (k_new, v_new))
            cos, sin = (call.options[name][first + i] for name in ("rotary_cos", "rotary_sin"))
            turned = rotate_fp32(k.float(), cos, sin, call.options["rotary_interleaved"])
            assert torch.equal(call.k_cache[place].double()[:, :columns], e4m3(turned)[:, :columns])
            rest = (call.k_cache[place][:, columns:], k[:, columns:])
            for stored, given in (rest, (call.v_cache[place], v)):
                assert torch.equal(stored.view(torch.uint8), given.view(torch.uint8))


@pytest.mark.parametrize("interleaved", [False, True])
def test_fp8_queries_are_rotated_in_fp32(interleaved: bool, seed: int) -> None:
    q = (torch.randn(2, 3, HEADS, HEAD_DIM) * 150).clamp(-448, 448).to(FP8)
    q[0, 0] = 448.0
    angle = torch.rand(POSITIONS, 12) * 6.28
    angle[5] = 0.785  # the sum of sine and cosine is largest
    starts = torch.tensor([5, 90], dtype=torch.int32)
    result = append_kv.apply_rotary_q(
        q, angle.cos(), angle.sin(), cache_seqlens=starts, causal_or_local=True, rotary_interleaved=interleaved
    )
    assert result.dtype == FP8
    assert (result[0, 0].double() == 448).any(), "a number past the range of float8 saturates"
    for b in range(2):
        for i in range(3):
            position = int(starts[b]) + i
            turned = rotate_fp32(q[b, i].float(), angle[position].cos(), angle[position].sin(), interleaved)
            assert torch.equal(result[b, i].double()[:, :24], e4m3(turned)[:, :24])
            assert torch.equal(result[b, i, :, 24:].view(torch.uint8), q[b, i, :, 24:].view(torch.uint8))


@pytest.mark.parametrize("compiled", [False, True])
def test_public_function_rotates_fp8(compiled: bool, seed: int) -> None:
    """What FlashAttention-3 takes: q, k, v and the caches of 8 bits, rotary tables of 16."""
    q, new = torch.randn(2, 1, 4, 32).to(FP8), torch.randn(2, 1, 2, 32).to(FP8)
    cache = torch.randn(2, 8, 2, 32).to(FP8)
    angle = torch.rand(8, 16) * 6.28
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    lengths = torch.tensor([3, 7], dtype=torch.int32)
    k_cache, v_cache = cache.clone(), cache.clone()
    function = broadhead.flash_attn_with_kvcache
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out = function(
            q, k_cache, v_cache, new, new, rotary_cos=cos, rotary_sin=sin, cache_seqlens=lengths, causal=True,
            rotary_interleaved=False,
        )  # fmt: skip
        turned_q = torch.stack(
            [rotate_fp32(q[b, 0].float(), cos[n].float(), sin[n].float(), False) for b, n in ((0, 3), (1, 7))]
        )
        expected = broadhead.flash_attn_with_kvcache(
            turned_q[:, None].to(FP8), k_cache, v_cache, cache_seqlens=lengths + 1, causal=True
        )
    for b, row in ((0, 3), (1, 7)):
        turned = rotate_fp32(new[b, 0].float(), cos[row].float(), sin[row].float(), False)
        assert torch.equal(k_cache[b, row].double(), e4m3(turned))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


# --- values out of range, which a device does not refuse ---


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
def test_batch_indices_that_do_not_exist(paged: bool, seed: int) -> None:
    """Their sequences are written nowhere; the others are."""
    k_cache, v_cache = torch.zeros(3, 4, 1, 8), torch.zeros(3, 4, 1, 8)
    new = torch.randn(5, 1, 1, 8)
    options: dict[str, Any] = {"page_table": torch.arange(3, dtype=torch.int32)[:, None]} if paged else {}
    index = int32(1, 3, -1, 2**31 - 1, 0)
    append_kv.append(k_cache, v_cache, new, new, cache_seqlens=int32(2, 0, 0, 1, 3), cache_batch_idx=index, **options)
    expected = torch.zeros(3, 4, 1, 8)
    expected[1, 2], expected[0, 3] = new[0, 0], new[4, 0]
    assert torch.equal(k_cache, expected) and torch.equal(v_cache, expected)


@pytest.mark.parametrize("pages", [0, 3])
def test_lengths_behind_an_append_are_those_of_the_cache(pages: int) -> None:
    cache, new = torch.zeros(4, 4, 1, 8), torch.zeros(4, 3, 1, 8)
    table = torch.zeros(4, pages, dtype=torch.int32) if pages else None
    capacity = 4 * max(pages, 1)
    before = int32(0, capacity - 1, capacity + 9, 2**31 - 1)
    lengths = append_kv.appended_lengths(cache, before, new, None, table)
    assert lengths.dtype == torch.int32 and lengths.tolist() == [3, capacity, capacity, capacity]
    offsets = int32(-2, 2, 1, 99, 12)
    packed = append_kv.appended_lengths(cache, before, new.flatten(0, 1), offsets, table)
    assert packed.tolist() == [2, capacity - 1, capacity, capacity]


def test_offsets_out_of_order_write_only_what_they_own() -> None:
    k_cache, v_cache = torch.zeros(3, 8, 1, 8), torch.zeros(3, 8, 1, 8)
    new = torch.arange(1.0, 9).view(8, 1, 1).expand(8, 1, 8)
    append_kv.append(k_cache, v_cache, new, new, cache_seqlens=int32(0, 0, 0), cu_seqlens_k_new=int32(0, 2, 1, 8))
    assert torch.equal(k_cache, v_cache) and not k_cache[1].any()
    assert torch.equal(k_cache[2, 1:7, 0, 0], torch.arange(3.0, 9)), "rows 2 to 7 are the third sequence's alone"


@pytest.mark.parametrize("name", ["flash_attn_with_kvcache", "mha_fwd"])
@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
def test_rotary_tables_shorter_than_the_cache_are_refused(paged: bool, name: str) -> None:
    q, cache, new = torch.randn(2, 1, 2, 16), torch.zeros(4, 8, 2, 16), torch.randn(2, 1, 2, 16)
    table = int32(0, 1, 2, 3).view(2, 2) if paged else None
    capacity = 16 if paged else 8
    cache = cache if paged else cache[:2].clone()
    angle = torch.rand(capacity, 4)
    lengths = int32(0, capacity - 1)
    for rows, words in (
        (capacity, ""),
        (capacity - 1, f"rotary_cos and rotary_sin must have a row .* {capacity}.* got {capacity - 1}"),
    ):
        tables = {"rotary_cos": angle[:rows], "rotary_sin": angle[:rows]}
        k_cache, v_cache = cache.clone(), cache.clone()
        if name == "mha_fwd":
            call = dict(q=q, k=k_cache, v=v_cache, k_new=new, v_new=new, seqused_k=lengths, page_table=table, **tables)
        else:
            call = dict(
                q=q, k_cache=k_cache, v_cache=v_cache, k=new, v=new, cache_seqlens=lengths, page_table=table, **tables
            )
        if not words:
            getattr(broadhead, name)(**call)
            assert k_cache.any()
            continue
        with pytest.raises(broadhead.InvalidArgumentError, match=f"{name}: {words}"):
            getattr(broadhead, name)(**call)
        assert not k_cache.any(), "a refused call wrote into the cache"


@pytest.mark.parametrize("cache", ["contiguous", "paged"])
def test_nothing_to_append(cache: str, seed: int) -> None:
    """Every sequence appends nothing, but the packed tensors have padding rows; and no rows at all."""
    call = build(seed, cache, "none", True)
    call.num_new = [0] * 4
    call.options["cu_seqlens_k_new"].zero_()
    check(call)
    call.k_new, call.v_new = call.k_new[:0], call.v_new[:0]
    check(call)


def test_dead_rows_never_undo_a_write(seed: int) -> None:
    """Many padding rows and one live row whose slot they could hit: the live one wins, whatever the order."""
    cache_k, cache_v = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8)
    new = torch.full((64, 1, 8), float("nan"))
    for live_slot in (0, 1):
        new[0] = live_slot + 1
        append_kv.append(
            cache_k,
            cache_v,
            new,
            new,
            cache_seqlens=torch.tensor([live_slot], dtype=torch.int32),
            cu_seqlens_k_new=torch.tensor([0, 1], dtype=torch.int32),
        )
    expected = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, 1, 8)
    assert torch.equal(cache_k, expected) and torch.equal(cache_v, expected)


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("causal_or_local", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("own_positions", [False, True])
def test_rotary_of_queries(
    ragged: bool, causal_or_local: bool, interleaved: bool, own_positions: bool, seed: int
) -> None:
    rng = random.Random(seed)
    batch, heads = 3, 2
    lengths = [rng.randint(0, 6) for _ in range(batch)] if ragged else [5] * batch
    starts = [rng.randint(0, 90) for _ in range(batch)]
    angle = torch.rand(POSITIONS, rng.choice([4, 16])) * 6.28
    cos, sin = angle.cos(), angle.sin()
    options: dict[str, Any] = {"cache_seqlens": torch.tensor(starts, dtype=torch.int32)}
    if own_positions:
        options = {"cache_seqlens": torch.tensor([0] * batch, dtype=torch.int32)}
        options["rotary_seqlens"] = torch.tensor(starts, dtype=torch.int32)
    begins = [sum(lengths[:b]) for b in range(batch + 1)]
    q = torch.randn(begins[-1] + (2 if ragged else 0), heads, HEAD_DIM)
    if ragged:
        options["cu_seqlens_q"] = torch.tensor(begins, dtype=torch.int32)
    result = append_kv.apply_rotary_q(
        q if ragged else q.unflatten(0, (batch, 5)),
        cos,
        sin,
        causal_or_local=causal_or_local,
        rotary_interleaved=interleaved,
        **options,
    )
    assert result.shape == (q.shape if ragged else (batch, 5, heads, HEAD_DIM))
    flat = result.flatten(0, -3)
    for b in range(batch):
        for i in range(lengths[b]):
            position = starts[b] + (i if causal_or_local else 0)
            expected = rotate(q[begins[b] + i], cos[position], sin[position], interleaved)
            torch.testing.assert_close(flat[begins[b] + i].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", ["contiguous_batch_idx", "paged"])
def test_compiles_in_one_graph(cache: str, seed: int) -> None:
    torch._dynamo.reset()
    for ragged in (False, True):
        compiled = torch.compile(append_kv.append, fullgraph=True, backend="aot_eager", dynamic=False)
        check(build(seed, cache, "partial", ragged), compiled)
