"""The judge of calls and the layouts they are built in: factors, qv, the e4m3 emulation, poison in padding slots."""

from __future__ import annotations

import math
import random

import broadhead
import oracle
import pytest
import torch
from calls import Built, Call, build
from checks import check_call, check_gradients
from judge import Judgement, judge
from layouts import E4M3_NAN, bytes_of
from random_calls import drawn_call, random_call
from tolerance import max_error
from torch import Tensor

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn


def stacked(built: Built, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = judge(built, dtype)
    return torch.stack(out), torch.stack(lse)


def by_hand(built: Built, b: int, h: int, i: int) -> tuple[list[float], float]:
    """The output and the LSE of one query row in plain numbers: every rule of the contract, spelt once more."""
    call = built.call
    left, right = call.normalized_window
    kv_head = h // (call.heads_q // call.heads_kv)
    factor = {name: float(x[b, kv_head]) for name, x in built.descales.items()}
    q = [x * factor.get("q_descale", 1.0) for x in built.q[b][i, h].tolist()]
    k = built.k[b][:, kv_head].tolist()
    v = [[x * factor.get("v_descale", 1.0) for x in row] for row in built.v[b][:, kv_head].tolist()]
    position = i + len(k) - len(built.q[b])
    right = 0 if call.causal_each and call.causal_each[b] else right
    terms: list[tuple[float, list[float]]] = []
    for j, key in enumerate(k):
        seen = (left < 0 or j >= position - left) and (right < 0 or j <= position + right)
        if call.attention_chunk:
            seen = seen and position // call.attention_chunk == j // call.attention_chunk
        seen = seen or bool(call.prefix and j < call.prefix[b])
        if call.ranges:
            begin, end = call.ranges[b][i]
            hidden = call.ranges_in_window and 0 <= left < position - j
            seen = seen or (0 <= begin <= j < end and not hidden)
        if call.tree and j >= len(k) - 64:
            bits = format(call.tree[b][i] % 2**64, "064b")[::-1]  # bit 0 first
            seen = bits[j - len(k) + 64] == "1"
        if not seen:
            continue
        score = sum(x * y for x, y in zip(q, key, strict=True)) * factor.get("k_descale", 1.0)
        if built.qv is not None:
            score += sum(x * y for x, y in zip(built.qv[b][i, h].tolist(), v[j], strict=True))
        score *= call.scale
        terms.append((call.softcap * math.tanh(score / call.softcap) if call.softcap else score, v[j]))
    if not terms:
        return [0.0] * call.dim_v, -math.inf
    largest = max(score for score, _ in terms)
    total = sum(math.exp(score - largest) for score, _ in terms)
    if built.sinks is not None:
        total += math.exp(float(built.sinks[h]) - largest)
    out = [sum(math.exp(s - largest) * row[c] for s, row in terms) / total for c in range(call.dim_v)]
    return out, largest + math.log(total)


@pytest.mark.parametrize("number", range(24))
def test_the_oracle_equals_arithmetic_by_hand(number: int, rng: random.Random) -> None:
    """Random calls of every mask, factor and option, row by row."""
    dtype = (torch.float64, torch.bfloat16, FP8)[number % 3]
    call = random_call(rng, (dtype,), longest=12, head_dims=(8, 16), qv=0.5)
    if call.batch > 5:
        call = call.with_(seqlens_q=call.seqlens_q[:5], seqlens_k=call.seqlens_k[:5], prefix=call.prefix[:5])
        call = call.with_(leftpad=call.leftpad[:5], num_new=call.num_new[:5], causal_each=call.causal_each[:5])
    built = build(call, CPU, rng)
    outs, lses = judge(built)
    for b, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        for i in range(len(out)):
            for h in range(call.heads_q):
                expected, expected_lse = by_hand(built, b, h, i)
                torch.testing.assert_close(out[i, h].tolist(), expected, rtol=1e-9, atol=1e-9, msg=str(call))
                assert float(lse[h, i]) == pytest.approx(expected_lse, rel=1e-9, abs=1e-9), call


def test_long_sequences_are_judged_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(Call("func", (9,) * 2, (13,) * 2, heads_q=4, causal=True, softcap=4.0, sinks="fp32"), CPU)
    whole = stacked(built, torch.float64)
    monkeypatch.setattr(oracle, "MAX_SCORES", 2 * 4 * 13)
    torch.testing.assert_close(stacked(built, torch.float64), whole, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_judge_are_those_of_finite_differences(rng: random.Random) -> None:
    """Of a loss over out and softmax_lse, in every logical element of one call with all options."""
    options = {"window": (4, 1), "softcap": 2.0, "sinks": "fp32", "qv": True, "dtype": torch.float64}
    built = build(drawn_call(rng, batch=2, longest_q=3, longest_k=5, head_dim=8, **options), CPU, rng)
    built.sinks = built.sinks.double()
    grad_out = [torch.randn_like(x) for x in judge(built)[0]]
    grad_lse = [torch.randn_like(x) for x in judge(built)[1]]

    def loss() -> float:
        outs, lses = judge(built)
        finite = [x.masked_fill(x.isinf(), 0.0) for x in lses]
        pairs = [*zip(outs, grad_out, strict=True), *zip(finite, grad_lse, strict=True)]
        return float(sum((x * g).sum() for x, g in pairs))

    found = Judgement(built, torch.float64).gradients(grad_out, grad_lse)
    assert set(found) == {"q", "k", "v", "qv", "sinks"}
    for name, gradients in found.items():
        for x, gradient in zip(built.logical(name), gradients, strict=True):
            for at in rng.sample(range(x.numel()), min(6, x.numel())):
                kept, step = float(x.view(-1)[at]), 1e-5
                sides = []
                for side in (step, -step):
                    x.view(-1)[at] = kept + side
                    sides.append(loss())
                x.view(-1)[at] = kept
                assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(float(gradient.reshape(-1)[at]), abs=1e-6), (
                    name
                )


@pytest.mark.parametrize("fault", ["q", "k", "v", "sinks", "dead"])
def test_wrong_gradients_are_told(fault: str, rng: random.Random) -> None:
    """A scaled gradient, and one where nothing depends on the argument."""
    found: dict[str, Tensor] = {}
    while not found or any(not gradient.any() for gradient in found.values()):  # drawn calls may have no key in sight
        built = build(drawn_call(rng, ragged_q=True, page_size=16, window=(5, 2), sinks="fp32"), CPU, rng)
        leaves = built.requires_grad()
        out, _ = broadhead.reference.attention(**built.normalised())
        grad_out = torch.randn_like(out).masked_fill(~built.live_mask()[:, None, None], 0.0)
        found = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad_out), strict=True))
    check_gradients(built, found, grad_out)
    if fault == "dead":
        found["k"] = found["k"] + torch.where(found["k"] == 0, 1e-9, 0.0)
    else:
        found[fault] = found[fault] * 1.01
    with pytest.raises(AssertionError, match=r"is off by|is not 0 where nothing depends"):
        check_gradients(built, found, grad_out)


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
        call = call.with_(causal_each=(), tree="")
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
