"""Ragged sequences for calls spelt as other packages spell them, and the judge of what comes back, gradients included.

The device is a GPU where there is one: tests that are marked ``attends`` then run kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import broadhead
import oracle
import tolerance
import torch
from on_device import DEVICE
from torch import Tensor

LSE_ATOL = {"cpu": 1e-5, "cuda": 2e-4}


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def offsets(lengths: tuple[int, ...]) -> Tensor:
    """cu_seqlens of sequences of these lengths."""
    return int32(0, *torch.tensor(lengths).cumsum(0).tolist())


class Sequences:
    """Packed q, k and v that require gradients, and a packed gradient of the output; dense views of equal lengths."""

    def __init__(
        self,
        seqlens_q: tuple[int, ...],
        seqlens_k: tuple[int, ...],
        *,
        heads: tuple[int, int] = (4, 2),
        head_dims: tuple[int, int] = (64, 64),
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.seqlens_q, self.seqlens_k, self.dtype = seqlens_q, seqlens_k, dtype
        head_dim, head_dim_v = head_dims
        self.q = self._draw(sum(seqlens_q), heads[0], head_dim)
        self.k = self._draw(sum(seqlens_k), heads[1], head_dim)
        self.v = self._draw(sum(seqlens_k), heads[1], head_dim_v)
        self.grad_out = self._draw(sum(seqlens_q), heads[0], head_dim_v).detach()
        self.cu_q, self.cu_k = offsets(seqlens_q), offsets(seqlens_k)
        self.max_q, self.max_k = max(seqlens_q), max(seqlens_k)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(self.dtype).requires_grad_()

    @property
    def batch(self) -> int:
        return len(self.seqlens_q)

    def dense(self, x: Tensor) -> Tensor:
        """A packed tensor as ``(B, S, ...)``; the lengths are equal."""
        return x.unflatten(0, (self.batch, -1))

    def truth(self, rule: oracle.Rule | list[oracle.Rule], dtype: torch.dtype, sinks: Tensor | None = None) -> Any:
        """``(out, lse, dq, dk, dv[, dsinks])`` packed, by the oracle in ``dtype``."""
        rules = rule if isinstance(rule, list) else [rule] * self.batch
        leaves = [x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v)]
        if sinks is not None:
            leaves.append(sinks.detach().to(dtype).requires_grad_())
        parts = zip(*(x.split(lengths) for x, lengths in zip(leaves[:3], (self.seqlens_q, *[self.seqlens_k] * 2))))
        results = [
            oracle.attention(q, k, v, each, sinks=None if sinks is None else leaves[3])
            for (q, k, v), each in zip(parts, rules, strict=True)
        ]
        out, lse = torch.cat([x for x, _ in results]), torch.cat([x for _, x in results], dim=1)
        gradients = torch.autograd.grad(out, leaves, self.grad_out.to(dtype))
        return out.detach(), lse.detach(), *gradients

    def check(
        self,
        rule: oracle.Rule | list[oracle.Rule],
        out: Tensor,
        lse: Tensor | None = None,
        gradients: tuple[Tensor, ...] = (),
        sinks: Tensor | None = None,
    ) -> None:
        """Packed results against the oracle in fp64, by the tolerance rule. ``lse`` is ``(Hq, T)``."""
        truth, naive = self.truth(rule, torch.float64, sinks), self.truth(rule, self.dtype, sinks)
        out, lse = out.detach(), None if lse is None else lse.detach()
        assert out.shape == truth[0].shape and out.dtype == self.dtype
        tolerance.assert_close("out", out, truth[0], naive[0], self.dtype, tolerance.OUT_FACTOR, "out")
        if lse is not None:
            assert lse.dtype == torch.float32 and lse.shape == truth[1].shape
            tolerance.assert_lse(lse, truth[1], LSE_ATOL[DEVICE.type], "lse")
        for name, found, exact, plain in zip(("dq", "dk", "dv", "dsinks"), gradients, truth[2:], naive[2:]):
            assert found.shape == exact.shape, name
            tolerance.assert_close(name, found, exact, plain, self.dtype, tolerance.GRADIENT_FACTOR, name)

    def gradients(self, out: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """Of the packed or dense ``out`` by autograd, packed."""
        given = self.grad_out.view_as(out)
        return torch.autograd.grad(out, (self.q, self.k, self.v, *more), given)


def paged(x: Tensor, lengths: tuple[int, ...], page_size: int) -> tuple[Tensor, Tensor]:
    """``(pages, page_table)`` of a packed tensor, in a shuffled order; slots that nobody owns hold NaN."""
    width = max(1, -(-max(lengths) // page_size))
    pages = torch.full((len(lengths) * width + 1, page_size, *x.shape[1:]), torch.nan, dtype=x.dtype, device=x.device)
    table = torch.randperm(len(pages), device=x.device)[: len(lengths) * width].view(len(lengths), width).int()
    for b, rows in enumerate(x.detach().split(lengths)):
        for row, value in enumerate(rows):
            pages[table[b, row // page_size], row % page_size] = value
    return pages, table


def raises_by_name(call: Callable[[], object], *words: str) -> None:
    """The call is refused with a text that has all the words."""
    try:
        call()
    except broadhead.BroadheadError as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"{missing} are not in {error}"
    else:
        raise AssertionError("the call was not refused")
