"""The tolerance rule: an error may be twice (gradients: three times) that of naive attention in the same dtype.

``max|actual - truth| <= factor * max|naive - truth| + atol`` where truth is the oracle in fp64, naive the oracle in the
dtype of the inputs, and atol the noise of storing the truth itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

OUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


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
    """How far the truth moves when it is stored, and shifted, in dtype, and a few roundings of the fp32 arithmetic.

    A single number may be stored half a step away where the naive one happens to lie nearer.
    """
    if truth.numel() == 0:
        return 0.0
    stored = truth.to(dtype)
    shifted = max_error(stored + 0.3 - 0.3, stored)
    return max(2.0 * shifted, max_error(stored, truth)) + 32 * arithmetic_eps(dtype) * float(truth.abs().max())


def arithmetic_eps(dtype: torch.dtype) -> float:
    """The rounding of sums over inputs of that dtype."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
