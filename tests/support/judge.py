"""What a built call must give: textbook attention of its logical sequences, in any dtype, e4m3 included."""

from __future__ import annotations

import oracle
import torch
from calls import Built
from torch import Tensor

#: Kernels of 8-bit inputs hand P to the tensor cores in e4m3, whose smallest normal number is 2^-6. P, at most 1
#: against the row maximum, is scaled by this much beforehand: weights down to 2^-14 keep their three bits.
E4M3_P_SCALE = 256.0


def judge(built: Built, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """Per sequence ``(sq, Hq, Dv)`` and ``(Hq, sq)`` by textbook attention in ``dtype``, heads batched.

    In fp64 it is the truth: 8-bit inputs are what their numbers times their factors are. In the dtype of the call's q
    it is the naive implementation whose error sets the tolerance, on an 8-bit cache dequantised to 16 bits if q has 16.
    For e4m3, which has no arithmetic, that is an emulation of what any kernel on 8-bit tensor cores does: S in fp32, P
    against the row maximum times E4M3_P_SCALE rounded to e4m3, P V in fp32, the row sum of the P that was not rounded,
    one division at the end, and the output stored in bf16.
    """
    call, outs, lses = built.call, [], []
    emulated, dtype = dtype.itemsize == 1, torch.float32 if dtype.itemsize == 1 else dtype
    left, right = call.normalized_window
    for b in range(len(built.q)):
        q, k, v = (_scaled(built, name, b, dtype) for name in ("q", "k", "v"))
        sq, sk, group = len(q), len(k), call.heads_q // call.heads_kv
        if sq == 0 or sk == 0:
            outs.append(torch.zeros(sq, call.heads_q, call.dim_v, dtype=dtype, device=q.device))
            lses.append(torch.full((call.heads_q, sq), float("-inf"), dtype=dtype, device=q.device))
            continue
        keys, values = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
        scores = q.transpose(0, 1) @ keys.transpose(1, 2)
        if built.qv is not None:
            scores = scores + built.qv[b].to(dtype).transpose(0, 1) @ values.transpose(1, 2)
        scores = scores * call.scale
        if call.softcap > 0:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        prefix = call.prefix[b] if call.prefix else None
        mask = oracle.visible(sq, sk, left, right, call.attention_chunk, prefix, q.device)
        scores = scores.masked_fill(~mask, float("-inf"))
        if built.sinks is not None:
            sink = built.sinks.to(dtype)[:, None, None].expand(-1, sq, 1)
            scores = torch.cat((scores, sink), dim=2)
        empty = ~mask.any(dim=1)
        softmax = _softmax_of_e4m3(scores, sk) if emulated else torch.softmax(scores, dim=2)
        weights = softmax.masked_fill(empty[None, :, None], 0.0)[:, :, :sk]
        out = (weights @ values).transpose(0, 1)
        outs.append(out.to(call.out_dtype).to(dtype) if emulated else out)
        lses.append(torch.logsumexp(scores, dim=2).masked_fill(empty, float("-inf")))
    return outs, lses


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


def _softmax_of_e4m3(scores: Tensor, sk: int) -> Tensor:
    """Softmax weights of scores ``(H, sq, sk)``, or one column more for a sink, as e4m3 holds them."""
    row_max = scores[:, :, :sk].amax(dim=2, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    p = torch.exp(scores - row_max)
    rounded = (p * E4M3_P_SCALE).clamp(max=448.0).to(torch.float8_e4m3fn).to(scores.dtype) / E4M3_P_SCALE
    return rounded / p.sum(dim=2, keepdim=True)


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
