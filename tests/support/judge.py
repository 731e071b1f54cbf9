"""What a built call must give: the oracle on its logical sequences, in any dtype, e4m3 included, and its gradients."""

from __future__ import annotations

import dataclasses

import oracle
import torch
from calls import Built
from torch import Tensor


def judge(built: Built, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """Per sequence ``(sq, Hq, Dv)`` and ``(Hq, sq)`` by the oracle in ``dtype``.

    In fp64 it is the truth: 8-bit inputs are what their numbers times their factors are. In the dtype of the call's q
    it is the naive implementation whose error sets the tolerance, on an 8-bit cache dequantised to 16 bits if q has 16.
    For e4m3, which has no arithmetic, that is an emulation of what any kernel on 8-bit tensor cores does: the oracle's,
    in fp32, with the output stored in bf16.
    """
    call, outs, lses = built.call, [], []
    emulated, dtype = dtype.itemsize == 1, torch.float32 if dtype.itemsize == 1 else dtype
    for b in range(len(built.q)):
        q, k, v = (_scaled(built, name, b, dtype) for name in ("q", "k", "v"))
        qv = None if built.qv is None else built.qv[b].to(dtype)
        out, lse = oracle.attention(q, k, v, call.rule(b), qv=qv, sinks=built.sinks, e4m3=emulated)
        outs.append(out.to(call.out_dtype).to(dtype) if emulated else out)
        lses.append(lse)
    return outs, lses


def weights(built: Built, b: int) -> Tensor:
    """``(sq, Hq, sk)``: P of sequence ``b`` in fp64, which is out where V is one."""
    q, k = built.q[b].detach().double(), built.k[b].detach().double()
    if built.qv is not None:  # its scores are those of longer queries and keys
        q = torch.cat((q, built.qv[b].detach().double()), dim=-1)
        k = torch.cat((k, built.v[b].detach().double()), dim=-1)
    one = torch.eye(len(k), dtype=torch.double, device=k.device)[:, None].expand(-1, k.shape[1], -1)
    sinks = None if built.sinks is None else built.sinks.detach()
    return oracle.attention(q, k, one, built.call.rule(b), sinks=sinks)[0]


class Judgement:
    """`judge` in ``dtype``, and the gradients of what it gives: one evaluation, whatever is asked of it.

    Attributes:
        outs, lses: as `judge` returns them.
    """

    def __init__(self, built: Built, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._leaves = {
            name: [x.detach().to(dtype).requires_grad_() for x in built.logical(name)] for name in built.differentiable
        }
        given = dataclasses.replace(built, **{name: x for name, x in self._leaves.items() if name != "sinks"})
        if "sinks" in self._leaves:
            (given.sinks,) = self._leaves["sinks"]
        self._results = judge(given, dtype)
        self.outs, self.lses = ([x.detach() for x in found] for found in self._results)

    def gradients(self, grad_out: list[Tensor], grad_lse: list[Tensor] | None) -> dict[str, list[Tensor]]:
        """By name: of each sequence's q, k, v and qv, and of the sinks as a list of one.

        grad_out, grad_lse: per sequence, as the results. An LSE of -inf has no gradient.
        """
        outs, lses = self._results
        loss = torch.zeros((), dtype=self._dtype)
        for out, part in zip(outs, grad_out, strict=True):
            loss = loss + (out * part.to(self._dtype)).sum()
        for lse, part in zip(lses, grad_lse or (), strict=grad_lse is not None):
            loss = loss + (lse.masked_fill(lse == float("-inf"), 0.0) * part.to(self._dtype)).sum()
        flat = [x for found in self._leaves.values() for x in found]
        # Where no query sees a key, nothing depends on the inputs.
        found = [None] * len(flat)
        if loss.requires_grad:
            found = list(torch.autograd.grad(loss, flat, allow_unused=True, retain_graph=True))
        gradients = iter([torch.zeros_like(x) if g is None else g for x, g in zip(flat, found, strict=True)])
        return {name: [next(gradients) for _ in tensors] for name, tensors in self._leaves.items()}


def _scaled(built: Built, name: str, b: int, dtype: torch.dtype) -> Tensor:
    """Sequence b of q, k or v in ``dtype``, times its factors."""
    x = getattr(built, name)[b].to(dtype)
    descale = built.descales.get(f"{name}_descale")
    if descale is None:
        return x
    # Rounded once: the naive implementation in 16 bits reads what a cache of 16 bits would hold.
    wide = torch.promote_types(dtype, torch.float32)
    factor = descale[b].to(wide).repeat_interleave(x.shape[1] // built.call.heads_kv)
    return (x.to(wide) * factor[None, :, None]).to(dtype)


def largest_score(built: Built) -> float:
    """A bound of the scores before any softcap: the longest query times the longest key, factors and scale included."""
    largest = 0.0
    for b in range(len(built.q)):
        q, k, v = (_scaled(built, name, b, torch.float32) for name in ("q", "k", "v"))
        if not (len(q) and len(k)):
            continue
        bound = float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
        if built.qv is not None:
            bound += float(built.qv[b].float().norm(dim=-1).max() * v.norm(dim=-1).max())
        largest = max(largest, bound * built.call.scale)
    return largest
