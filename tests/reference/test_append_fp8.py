"""Appends to a cache of float8_e4m3fn, of 8-bit keys and of wider ones: factors, one rounding, saturation, rotary."""

from __future__ import annotations

import broadhead
import pytest
import torch
from appends import CACHES, HEAD_DIM, HEADS, POSITIONS, build, e4m3, rotate_fp32
from broadhead.reference import append as append_kv
from torch import Tensor

FP8 = torch.float8_e4m3fn


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


def test_fp8_keys_are_copied_whatever_the_factors(seed: int) -> None:
    call = build(seed, "contiguous", "none", False, torch.float8_e4m3fn)
    k_new, v_new = call.k_new.to(torch.float8_e4m3fn), call.v_new.to(torch.float8_e4m3fn)
    factors = torch.full((4, HEADS), 0.25)
    append_kv.append(call.k_cache, call.v_cache, k_new, v_new, **call.options, k_descale=factors, v_descale=factors)
    for b, length in enumerate(call.seqlens):
        stored = call.k_cache[b, length : length + call.num_new[b]]
        assert torch.equal(stored.view(torch.uint8), k_new[b].view(torch.uint8))


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
