"""Calls in the layouts of torch's attention functions, judged by the oracle: heads before tokens, and packed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import oracle
import torch
from tolerance import GRADIENT_FACTOR, OUT_FACTOR, assert_close, assert_lse
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]
#: ``(out, softmax_lse)`` of leaves by the oracle.
Judge = Callable[[Triple], tuple[Tensor, Tensor]]


def make(
    shape_q: tuple[int, ...], shape_k: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Triple:
    """q, k and v that require gradients."""
    q, k, v = (torch.randn(s, device=device).to(dtype).requires_grad_() for s in (shape_q, shape_k, shape_k))
    return q, k, v


def offsets(lengths: Sequence[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def check(
    inputs: Triple,
    out: Tensor,
    rule: oracle.Rule,
    *,
    lse: Tensor | None = None,
    grads: Sequence[Tensor] | None = None,
    dout: Tensor | None = None,
) -> None:
    """Results of a call on ``(B, H, S, D)`` tensors are those of the oracle, by the tolerance of their dtype.

    grads: gradients of the inputs where out had ``dout``; None: ``out`` is differentiated here.
    """

    def judge(leaves: Triple) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in leaves)
        right, right_lse = oracle.dense(q, k, v, rule)
        return right.transpose(1, 2), right_lse

    _compare(inputs, judge, out, lse, grads, dout)


def check_packed(
    inputs: Triple, cu_q: Tensor, cu_k: Tensor, out: Tensor, rule: oracle.Rule, lse: Tensor | None = None
) -> None:
    """Likewise of packed tensors ``(T, H, D)``; lse is ``(H, T)``."""
    queries, keys = (list(itertools.pairwise(cu.tolist())) for cu in (cu_q, cu_k))

    def judge(leaves: Triple) -> tuple[Tensor, Tensor]:
        q, k, v = leaves
        found = [oracle.attention(q[a:b], k[c:d], v[c:d], rule) for (a, b), (c, d) in zip(queries, keys, strict=True)]
        return torch.cat([x for x, _ in found]), torch.cat([x for _, x in found], dim=1)

    _compare(inputs, judge, out, lse, None, None)


def _compare(
    inputs: Triple,
    judge: Judge,
    out: Tensor,
    lse: Tensor | None,
    grads: Sequence[Tensor] | None,
    dout: Tensor | None,
) -> None:
    dtype = inputs[0].dtype
    assert out.dtype == dtype
    dout = torch.randn_like(out) if dout is None else dout
    grads = torch.autograd.grad(out, inputs, dout) if grads is None else grads
    truth, naive = (_results(inputs, judge, dout, of) for of in (torch.float64, dtype))
    assert_close("out", out.detach(), truth[0], naive[0], dtype, OUT_FACTOR, "attention")
    if lse is not None:
        assert lse.dtype == torch.float32
        assert_lse(lse.detach(), truth[1], 1e-5 if dtype == torch.float32 else 1e-2, "attention")
    for name, got, right, near, given in zip(("dq", "dk", "dv"), grads, truth[2:], naive[2:], inputs, strict=True):
        assert got.shape == given.shape and got.dtype == dtype
        assert_close(name, got, right, near, dtype, GRADIENT_FACTOR, "attention")


def _results(inputs: Triple, judge: Judge, dout: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """out, softmax_lse, dq, dk and dv by the oracle in ``dtype``."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs)
    out, lse = judge((q, k, v))
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(dtype))]
