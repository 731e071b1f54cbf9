"""The tolerance rule: an error may be twice (gradients: three times) that of naive attention in the same dtype.

``max|actual - truth| <= factor * max|naive - truth| + atol`` where truth is the fp64 oracle, naive the oracle in the
dtype of the inputs, and atol the noise of storing the truth itself. Rows that see no key must be exactly 0 and -inf.
"""

from __future__ import annotations

from typing import NamedTuple

import oracle
import torch
from cases import Case
from torch import Tensor

OUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


class Expected(NamedTuple):
    """What the oracle says of a case, in fp64 (truth) or in the dtype of the inputs (naive)."""

    out: Tensor
    lse: Tensor
    gradients: dict[str, Tensor]  # of case.differentiable by name; empty if none were asked for


def expected(
    case: Case, dtype: torch.dtype, grad_out: Tensor | None = None, grad_lse: Tensor | None = None
) -> Expected:
    """Runs the oracle in ``dtype``; with grad_out also its gradients (grad_lse: that of the LSE, finite rows only)."""
    arguments = {name: x.detach() if isinstance(x, Tensor) else x for name, x in case.arguments().items()}
    leaves = {}
    if grad_out is not None:
        for name in case.differentiable:
            leaves[name] = arguments[name].to(dtype).requires_grad_()
            arguments[name] = leaves[name]
    out, lse = oracle.attention(**arguments, dtype=dtype)
    if grad_out is None:
        return Expected(out, lse, {})
    loss = (out * grad_out.to(dtype)).sum()
    if grad_lse is not None:
        loss = loss + (lse.masked_fill(lse == float("-inf"), 0.0) * grad_lse.to(dtype)).sum()
    # Where no query sees a key, nothing depends on the inputs.
    leaf_list = list(leaves.values())
    found = torch.autograd.grad(loss, leaf_list, allow_unused=True) if loss.requires_grad else (None,) * len(leaf_list)
    zeros = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    return Expected(
        out.detach(),
        lse.detach(),
        {name: zeros[name] if g is None else g for name, g in zip(leaves, found, strict=True)},
    )


def assert_attention(
    case: Case,
    out: Tensor,
    lse: Tensor | None,
    *,
    factor: float = OUT_FACTOR,
    lse_atol: float = 1e-5,
) -> None:
    """Compares a forward result with the oracle; rows that no sequence owns are left to assert_dead_rows."""
    truth = expected(case, torch.float64)
    naive = expected(case, case.compute_dtype)
    live = case.live_rows()
    assert out.shape == truth.out.shape, f"{case}: out is {tuple(out.shape)}, expected {tuple(truth.out.shape)}"
    assert_close("out", out[live], truth.out[live], naive.out[live], out.dtype, factor, str(case))
    by_row = (lambda x: x.transpose(-1, -2)[live]) if case.q.dim() == 4 else (lambda x: x.T[live])
    empty = by_row(truth.lse) == float("-inf")
    assert torch.all(out[live][empty] == 0), f"{case}: a row that sees no key must be 0"
    if lse is None:
        return
    assert lse.dtype == torch.float32, f"{case}: softmax_lse must be fp32, got {lse.dtype}"
    assert lse.shape == truth.lse.shape, f"{case}: LSE is {tuple(lse.shape)}, expected {tuple(truth.lse.shape)}"
    assert_lse(by_row(lse), by_row(truth.lse), lse_atol, str(case))


def assert_dead_rows(case: Case, out: Tensor, before: Tensor | None, lse: Tensor | None = None) -> None:
    """Rows that no sequence owns hold what ``before`` held, bit for bit, or 0 and -inf if the call allocated."""
    dead = ~case.live_rows()
    if before is None:
        assert torch.all(out[dead] == 0), f"{case}: rows that no sequence owns must be 0"
    else:
        same = out[dead].view(torch.uint8) == before[dead].view(torch.uint8)
        assert torch.all(same), f"{case}: rows that no sequence owns were written"
    if lse is not None:
        by_row = lse.transpose(-1, -2)[dead] if case.q.dim() == 4 else lse.T[dead]
        assert torch.all(by_row == float("-inf")), f"{case}: the LSE of rows that no sequence owns must be -inf"


def assert_gradients(
    case: Case,
    gradients: dict[str, Tensor],
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    *,
    factor: float = GRADIENT_FACTOR,
) -> None:
    """Compares gradients by name with those of the oracle; where nobody looks (poisoned slots) they must be 0."""
    truth = expected(case, torch.float64, grad_out, grad_lse).gradients
    naive = expected(case, case.compute_dtype, grad_out, grad_lse).gradients
    # The backward pass reads out as it was stored: D = rowsum(dout * out) - dlse moves by what was rounded off.
    out = expected(case, torch.float64).out
    rounded_off = ((out.to(case.q.dtype).double() - out) * grad_out.double()).sum(dim=-1).transpose(-1, -2)
    moved_lse = (0.0 if grad_lse is None else grad_lse.double()) - rounded_off
    moved = expected(case, torch.float64, grad_out, moved_lse).gradients
    for name, actual in gradients.items():
        unused = truth[name] == 0
        assert torch.all(actual[unused] == 0), f"{case}: d{name} is not 0 where nothing depends on {name}"
        noise = max_error(moved[name], truth[name])
        assert_close(f"d{name}", actual, truth[name], naive[name], actual.dtype, factor, str(case), noise)


def assert_lse(actual: Tensor, truth: Tensor, atol: float, what: str) -> None:
    """-inf exactly where the truth is; elsewhere within atol and the rounding of fp32 at that size."""
    empty = truth == float("-inf")
    assert torch.equal(actual == float("-inf"), empty), f"{what}: -inf in the LSE at the wrong rows"
    difference = (actual[~empty].double() - truth[~empty]).abs()
    bound = atol + 32 * torch.finfo(torch.float32).eps * truth[~empty].abs()
    worst = (difference - bound).argmax() if difference.numel() else None
    assert worst is None or bool((difference <= bound).all()), (
        f"{what}: LSE is off by {difference[worst]:.3g}, allowed {bound[worst]:.3g}"
    )


def assert_close(
    name: str,
    actual: Tensor,
    truth: Tensor,
    naive: Tensor,
    dtype: torch.dtype,
    factor: float,
    what: str,
    noise: float = 0.0,
) -> None:
    """The rule in this file's first lines; ``dtype`` is what the result is stored in, ``noise`` comes on top."""
    assert not torch.isnan(actual).any(), f"{what}: NaN in {name}"
    error = max_error(actual, truth)
    bound = factor * max_error(naive, truth) + storage_noise(truth, dtype) + noise
    assert error <= bound, f"{what}: {name} is off by {error:.3g}, allowed {bound:.3g}"


def max_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def storage_noise(truth: Tensor, dtype: torch.dtype) -> float:
    """How far the truth moves when it is stored and shifted in dtype, and a few roundings of the fp32 arithmetic."""
    if truth.numel() == 0:
        return 0.0
    stored = truth.to(dtype)
    shifted = max_error(stored + 0.3 - 0.3, stored)
    arithmetic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return 2.0 * shifted + 32 * arithmetic * float(truth.abs().max())
