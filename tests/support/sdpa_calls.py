"""Calls in the layouts of torch's attention functions, judged by the oracle: heads before tokens, packed, in pages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import oracle
import torch
from tolerance import GRADIENT_FACTOR, OUT_FACTOR, assert_close, assert_lse
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]


def make(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Triple:
    """q, k and v that require gradients, of the shapes; one shape stands for k and v."""
    q, k, v = shapes if len(shapes) == 3 else (shapes[0], shapes[1], shapes[1])
    a, b, c = (torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in (q, k, v))
    return a, b, c


def truths(q: Tensor, k: Tensor, v: Tensor, rule: oracle.Rule, dtype: torch.dtype) -> tuple[Triple, Tensor, Tensor]:
    """Leaves ``(B, H, S, D)`` in ``dtype``, and the oracle's out and LSE of them, ``(B, H, S, Dv)`` and ``(B, H, S)``."""
    a, b, c = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    out, lse = oracle.dense(*(x.transpose(1, 2) for x in (a, b, c)), rule)
    return (a, b, c), out.transpose(1, 2), lse


def check(
    inputs: Triple, out: Tensor, rule: oracle.Rule, *, lse: Tensor | None = None, grads: Sequence[Tensor] | None = None,
    dout: Tensor | None = None,
) -> None:  # fmt: skip
    """Results of a call on ``(B, H, S, D)`` tensors are those of the oracle, by the tolerance of their dtype.

    grads: gradients of the inputs where out had ``dout``; None: ``out`` is differentiated here.
    """
    dtype = inputs[0].dtype
    leaves, truth, right_lse = truths(*inputs, rule, torch.float64)
    naive_leaves, naive, _ = truths(*inputs, rule, dtype)
    assert out.dtype == dtype
    assert_close("out", out.detach(), truth.detach(), naive.detach(), dtype, OUT_FACTOR, "attention")
    if lse is not None:
        assert lse.dtype == torch.float32
        assert_lse(lse.detach(), right_lse.detach(), 1e-5 if dtype == torch.float32 else 1e-2, "attention")
    if dout is None:
        dout = torch.randn_like(out)
    if grads is None:
        grads = torch.autograd.grad(out, inputs, dout)
    right = torch.autograd.grad(truth, leaves, dout.double())
    near = torch.autograd.grad(naive, naive_leaves, dout)
    for name, got, true, other, given in zip(("dq", "dk", "dv"), grads, right, near, inputs):
        assert got.shape == given.shape and got.dtype == dtype
        assert_close(name, got, true, other, dtype, GRADIENT_FACTOR, "attention")


def offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def as_dense(x: Tensor, cu_seqlens: Tensor, b: int) -> Tensor:
    """Sequence ``b`` of a packed ``(T, H, D)`` as ``(1, H, S, D)``."""
    begin, end = int(cu_seqlens[b]), int(cu_seqlens[b + 1])
    return x[begin:end].transpose(0, 1)[None]


def check_packed(
    inputs: Triple, cu_q: Tensor, cu_k: Tensor, out: Tensor, rule: oracle.Rule, lse: Tensor | None = None,
) -> None:  # fmt: skip
    """Likewise of packed tensors ``(T, H, D)``, sequence by sequence; lse ``(H, T)``."""
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, dout)
    for b in range(len(cu_q) - 1):
        q = as_dense(inputs[0], cu_q, b)
        k, v = (as_dense(x, cu_k, b) for x in inputs[1:])
        begin, end = int(cu_q[b]), int(cu_q[b + 1])
        check(
            (q, k, v),
            as_dense(out, cu_q, b),
            rule,
            lse=None if lse is None else lse[None, :, begin:end],
            grads=[as_dense(grads[0], cu_q, b), *(as_dense(x, cu_k, b) for x in grads[1:])],
            dout=as_dense(dout, cu_q, b),
        )
