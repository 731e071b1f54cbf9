"""Assertions on a built call: live rows and gradients against the judge by the tolerance rule, dead rows untouched."""

from __future__ import annotations

import math
from typing import Any

import tolerance
import torch
from calls import Built
from judge import Judgement, judge, largest_score, weights
from layouts import bytes_of
from torch import Tensor

#: Absolute tolerance of the LSE. Kernels exponentiate in base 2 with the hardware's approximation.
LSE_ATOL = {"cpu": 1e-5, "cuda": 2e-4}
#: With softcap the kernels approximate tanh too: their error is a part of the score, whatever softcap is.
SOFTCAP_LSE_RTOL = 2e-5
#: Tensor cores add products of 8-bit inputs with 13 bits beside the largest, cutting off the rest of each: the error of
#: a score, by its bound, and what the output may err beyond the tolerance rule, whose emulation adds in fp32.
E4M3_SCORE_RTOL = 2.0**-12
E4M3_OUT_FACTOR = 3.0
#: Roundings of the sum D in the backward pass that may all point one way.
D_ROUNDINGS = 8
#: Standard deviations of the gradient of a sink, a sum over rows whose D was rounded.
SUM_DEVIATIONS = 8.0


def check_equal(a: Tensor, b: Tensor) -> None:
    """Bitwise equality (NaN equals NaN)."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def check_call(built: Built, **overrides: Any) -> tuple[Tensor, Tensor]:
    """Run the call into its poisoned ``out`` and check everything there is to check; returns ``(out, softmax_lse)``."""
    poison_allocator(built)
    keep = {name: built.kwargs[name] for name in ("k_cache", "v_cache") if name in built.kwargs}
    before = {name: cache.clone() for name, cache in keep.items()} if built.call.num_new else {}
    out, lse = built.run(**overrides)
    assert out.data_ptr() == built.out.data_ptr() and out.shape == built.out.shape, "out= must be returned"
    check_against(built, out, lse)
    check_dead_rows(built, out)
    if before:
        check_appended(built, before)
    return out, lse


def check_against(built: Built, out: Tensor, lse: Tensor | None = None) -> None:
    """Live rows of ``out`` and ``lse`` against the judge."""
    call = built.call
    rows = built.kwargs["q"].shape[:-2]
    assert out.shape == (*rows, call.heads_q, call.dim_v), f"{call}: out has shape {tuple(out.shape)}"
    if lse is not None:
        expected = (call.heads_q, *rows) if len(rows) == 1 else (rows[0], call.heads_q, rows[1])
        assert lse.shape == expected and lse.dtype == torch.float32, f"{call}: LSE is {lse.dtype} {tuple(lse.shape)}"
    check_split(built, out, lse)


def check_split(built: Built, out: Tensor, lse: Tensor | None = None) -> None:
    """As check_against, for tensors whose rows are merely in the order of the call's: (R, Hq, Dv) and (Hq, R)."""
    call = built.call
    truth, truth_lse = judge(built)
    if not truth:
        return
    actual, expected = torch.cat(built.split(out)), torch.cat(truth)
    assert not actual.isnan().any(), f"{call}: {int(actual.isnan().any(dim=(1, 2)).sum())} live rows hold NaN"
    if call.dtype == torch.float64:  # the judge's own dtype: only the order of the sums differs
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    else:
        # The fallback has no tensor cores of 8 bits: it must be as good as bf16.
        emulated = call.dtype == torch.float8_e4m3fn and out.device.type == "cuda"
        naive = torch.cat(judge(built, call.dtype if emulated else call.out_dtype)[0])
        factor = E4M3_OUT_FACTOR if emulated else tolerance.OUT_FACTOR
        tolerance.assert_close("out", actual, expected, naive, call.out_dtype, factor, str(call))
    empty = (torch.cat(truth_lse, dim=1) == float("-inf")).all(dim=0)
    assert (actual[empty] == 0).all(), f"{call}: a row that sees no key must be 0"
    if lse is not None:
        atol = LSE_ATOL[out.device.type]
        if out.device.type == "cuda" and call.softcap:
            atol += SOFTCAP_LSE_RTOL * min(call.softcap, largest_score(built))
        if out.device.type == "cuda" and call.dtype.itemsize == 1:
            atol += E4M3_SCORE_RTOL * largest_score(built)
        tolerance.assert_lse(torch.cat(built.split_lse(lse), dim=1), torch.cat(truth_lse, dim=1), atol, str(call))


def check_dead_rows(built: Built, out: Tensor) -> None:
    """Rows that no sequence owns still hold the poison, and so does what lies between the rows and heads of out."""
    dead = ~built.live_mask()
    if bool(dead.any()):
        assert out.flatten(0, -3)[dead].isnan().all(), f"{built.call}: rows that no sequence owns were written"
    store = built.out_store
    if store is not None and store.numel() > out.numel():
        inside = torch.zeros_like(store, dtype=torch.bool)
        inside.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
        assert store[~inside].isnan().all(), f"{built.call}: memory around out was written"


def check_new_rows(built: Built, out: Tensor, lse: Tensor) -> None:
    """Rows that no sequence owns, of results that the call allocated, are 0 and -inf."""
    dead = ~built.live_mask()
    assert (out.flatten(0, -3)[dead] == 0).all(), f"{built.call}: rows that no sequence owns must be 0"
    by_row = lse.T if lse.dim() == 2 else lse.transpose(1, 2).flatten(0, 1)
    assert (by_row[dead] == float("-inf")).all(), f"{built.call}: the LSE of rows that no sequence owns must be -inf"


def random_gradients(
    built: Built, leaves: dict[str, Tensor], out: Tensor, lse: Tensor, through_lse: bool = True
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """``(gradients by name, grad_out, grad_lse)`` of a random loss over what a call of ``leaves`` returned.

    NaN comes in at the rows of out that no sequence owns. Without through_lse grad_lse is 0.
    """
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    if not through_lse:
        grad_lse.zero_()
    poisoned = grad_out.clone()
    poisoned.flatten(0, -3)[~built.live_mask()] = float("nan")
    found = torch.autograd.grad((out, lse), [*leaves.values()], (poisoned, grad_lse))
    return dict(zip(leaves, found, strict=True)), grad_out, grad_lse


def check_gradients(
    built: Built, gradients: dict[str, Tensor], grad_out: Tensor, grad_lse: Tensor | None = None
) -> None:
    """Gradients by name, shaped as the arguments, against the judge's; where nothing depends on one it must be 0."""
    call = built.call
    rows, columns = built.split(grad_out), None if grad_lse is None else built.split_lse(grad_lse)
    exact = Judgement(built, torch.float64)
    truth = exact.gradients(rows, columns)
    naive = Judgement(built, call.dtype).gradients(rows, columns)
    # D = rowsum(dout * out) - dlse moves by what the stored out lacks, and by the rounding of its sum. Where a row sees
    # one key, that is all the error there is, and the naive sum may by luck have none.
    moved_lse, of_sinks = [], []
    for b, out in enumerate(exact.outs):
        products = out * rows[b].double()
        rounded_off = ((out.to(call.dtype).double() - out) * rows[b].double()).sum(dim=-1).T
        arithmetic = D_ROUNDINGS * tolerance.arithmetic_eps(call.dtype) * products.abs().sum(dim=-1).T
        error = rounded_off + arithmetic.copysign(rounded_off)
        moved_lse.append((0.0 if columns is None else columns[b].double()) - error)
        if "sinks" in gradients:
            lse = exact.lses[b]
            p = torch.exp(built.kwargs["sinks"].detach().double()[:, None] - lse)
            p[lse == float("-inf")] = 0  # a row without keys is 0, sink or not
            # Kernels multiply V by P in 16 bits.
            of_weights = (torch.finfo(call.dtype).eps / 2) ** 2 * _squares_of_weights(built, b, rows[b].double())
            of_sinks.append((p * rounded_off).square().sum(dim=-1) + (p.square() * of_weights).sum(dim=-1))
    moved = exact.gradients(rows, moved_lse)
    for name, actual in gradients.items():
        expected, of_naive, of_moved = (_scattered(built, name, x[name], actual) for x in (truth, naive, moved))
        # A gradient may be 0 by luck, too: where it is that of one key, it is that of the LSE. It then moves with D.
        nothing = (expected == 0) & (of_moved == 0)
        most = float(actual[nothing].abs().max()) if bool(nothing.any()) else 0.0
        assert most == 0, f"{call}: d{name} is not 0 where nothing depends on {name}, but up to {most}"
        noise = tolerance.max_error(of_moved, expected)
        if name == "sinks" and of_sinks:  # a sum over all rows, in which the naive errors may happen to cancel
            of_sum = SUM_DEVIATIONS * float(torch.stack(of_sinks).sum(dim=0).max().sqrt())
            assert math.isfinite(of_sum), f"{call}: the deviation of a sum is {of_sum}"
            noise = max(noise, of_sum)
        tolerance.assert_close(
            f"d{name}", actual, expected, of_naive, actual.dtype, tolerance.GRADIENT_FACTOR, str(call), noise
        )


def _squares_of_weights(built: Built, b: int, grad_out: Tensor) -> Tensor:
    """``(Hq, sq)``: the sum over the keys of the square of P dP, where dP = dout . v, of sequence ``b``.

    Each P is rounded by itself, and D = sum P dP moves by that.
    """
    v = built.v[b].detach().double()
    values = v.repeat_interleave(grad_out.shape[1] // v.shape[1], dim=1)
    return (weights(built, b) * torch.einsum("qhd,khd->qhk", grad_out, values)).square().sum(dim=-1).T


def _scattered(built: Built, name: str, sequences: list[Tensor], like: Tensor) -> Tensor:
    """The sequences of an argument where they lie in it, 0 elsewhere."""
    if name == "sinks":
        return sequences[0]
    placed = torch.zeros(like.flatten(0, -3).shape, dtype=sequences[0].dtype if sequences else like.dtype)
    placed = placed.to(like.device)
    for x, place in zip(sequences, built.places(name), strict=True):
        placed[place] = x
    return placed.view(like.shape)


def check_appended(built: Built, before: dict[str, Tensor]) -> None:
    """The new keys are in the cache, bit for bit, and no other slot changed."""
    call, kwargs = built.call, built.kwargs
    for name, logical in (("k_cache", built.k), ("v_cache", built.v)):
        cache, old = bytes_of(kwargs[name]), bytes_of(before[name])
        expected = old.clone()
        for b, new in enumerate(call.num_new):
            begin = int(kwargs["cache_seqlens"][b])
            owner = int(kwargs["cache_batch_idx"][b]) if call.batch_idx else b
            for i in range(new):
                row, value = begin + i, bytes_of(logical[b][len(logical[b]) - new + i])
                if call.page_size:
                    page = int(kwargs["page_table"][owner, row // call.page_size])
                    expected[page, row % call.page_size] = value
                else:
                    expected[owner, row] = value
        if call.k_layout != "overlapping":  # there a slot of K is a slot of V too
            check_equal(cache, expected)


def poison_allocator(built: Built) -> None:
    """Leave NaN in the device memory that the call is about to be given, so that what it forgets to write shows."""
    if built.out.device.type != "cuda":
        return
    sizes = (built.out.numel() // max(built.call.dim_v, 1), built.out.numel(), 1 << 18)
    blocks = [torch.full((max(n, 1),), float("nan"), device=built.out.device) for n in sizes for _ in range(3)]
    del blocks
