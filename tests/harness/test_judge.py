"""The judge of calls and the layouts they are built in: factors, qv, the e4m3 emulation, poison in padding slots."""

from __future__ import annotations

import random

import oracle
import pytest
import torch
from calls import Built, Call, build
from checks import check_call
from compare import max_error
from judge import judge
from layouts import E4M3_NAN, bytes_of
from random_calls import random_call

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn


def stacked(built: Built, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = judge(built, dtype)
    return torch.stack(out), torch.stack(lse)


@pytest.mark.parametrize("options", [{"qv": True}, {"dtype": FP8, "descale": "each"}, {"dtype": FP8, "descale": "kv"}])
def test_judge_equals_the_oracle(options: dict) -> None:
    call = Call("func", (5,) * 3, (9,) * 3, heads_q=6, heads_kv=2, head_dim=16, head_dim_v=32, causal=True, **options)
    built = build(call, CPU)
    kw = built.kwargs
    given = {name: kw.get(name) for name in ("q", "k", "v", "qv", "q_descale", "k_descale", "v_descale")}
    expected = oracle.attention(**given, softmax_scale=call.scale, window_left=-1, window_right=0)
    for actual, want in zip(stacked(built, torch.float64), expected, strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-12, atol=1e-12)
    assert call.scale == (48 if call.qv else 16) ** -0.5


def test_factors_belong_to_their_sequence_and_head() -> None:
    """Each factor alone changes its sequence and the query heads of its KV head, and nothing else."""
    call = Call("func", (3,) * 2, (7,) * 2, heads_q=4, heads_kv=2, dtype=FP8, descale="each")
    built = build(call, CPU)
    before = stacked(built, torch.float64)[0]
    for name in ("q_descale", "k_descale", "v_descale"):
        kept = built.descales[name]
        built.descales[name] = kept.clone()
        built.descales[name][1, 0] *= 2
        changed = (stacked(built, torch.float64)[0] != before).any(dim=-1)
        built.descales[name] = kept
        assert changed[1, :, :2].all() and not changed[0].any() and not changed[1, :, 2:].any(), name


def test_emulation_of_e4m3() -> None:
    """It errs as three bits of mantissa do in P, and nowhere else."""
    built = build(Call("func", (64,), (700,), dtype=FP8, descale="each", sinks="q", softcap=20.0), CPU)
    truth, truth_lse = stacked(built, torch.float64)
    naive, naive_lse = stacked(built, FP8)
    relative = float((naive - truth).norm() / truth.norm())
    assert 5e-3 < relative < 4e-2, relative
    torch.testing.assert_close(naive_lse.double(), truth_lse, rtol=1e-5, atol=1e-5)
    one = build(Call("func", (5,), (1,), dtype=FP8, descale="each"), CPU)
    assert max_error(stacked(one, FP8)[0], stacked(one, torch.float64)[0].bfloat16()) == 0, "P is 1: nothing to round"
    check_call(built)


def test_wrong_factors_are_told() -> None:
    """The tolerance is one that mistakes of a kernel exceed."""
    call = Call("func", (70,) * 2, (200,) * 2, heads_q=4, dtype=FP8, descale="each", head_dim=128)
    for name in ("q_descale", "k_descale", "v_descale"):
        swapped = torch.ones(1)
        while not (swapped > 1.25).any():  # factors are random: those of the two sequences must not be nearly the same
            built = build(call, CPU)
            swapped = built.kwargs[name] / built.kwargs[name].flip(0)
        built.kwargs[name] = built.kwargs[name].flip(0)
        with pytest.raises(AssertionError, match="off by"):
            check_call(built)


@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16])
def test_every_padding_slot_holds_nan(dtype: torch.dtype, seed: int) -> None:
    """As many numbers as there are live elements: all other slots of q, k, v and qv are NaN, whatever the layout."""
    for i in range(40):
        rng = random.Random(seed + i)
        call = random_call(rng, (dtype,), 60, (16, 48, 64), qv=0.3)
        call = call.with_(num_new=(), window=(-1, -1), attention_chunk=0, causal=False, prefix=(), freed_entries=False)
        if call.k_layout == "overlapping":
            continue
        built = build(call, CPU, rng)
        keys = ("k_cache", "v_cache") if call.function == "kvcache" else ("k", "v")
        live = {"q": built.q, keys[0]: built.k, keys[1]: built.v, **({"qv": built.qv} if call.qv else {})}
        for name, logical in live.items():
            x = built.kwargs[name]
            numbers = int((~x.float().isnan()).sum())
            seen = [n for n, sq in zip(logical, call.seqlens_q, strict=True) if name in ("q", "qv") or sq]
            assert numbers == sum(n.numel() for n in seen), f"{name} of {call}"
            if dtype == FP8:
                assert set(bytes_of(x)[x.float().isnan()].tolist()) <= {E4M3_NAN}
