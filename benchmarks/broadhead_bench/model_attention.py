"""Attention of models of transformers: the fp32 reference, and peers that know no head_dim of 512, beside SDPA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from broadhead_bench.accuracy_backward import Mask, gradients_of_group, probabilities
from broadhead_bench.cases_prefill import window_size

#: transformers knows the attention that computes the reference by this name.
REFERENCE = "broadhead_bench_fp32"
#: The widest head of FlashAttention-2 and -3.
WIDEST = 256
_ALL_BACKENDS = [
    SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]  # fmt: skip

#: Causal attention of q, k and v ``(B, S, H, D)``, aligned to the last key, with a scale and a window as the flash-attn
#: functions take it.
Attention = Callable[[Tensor, Tensor, Tensor, "float | None", "tuple[int, int]"], Tensor]


class _Exact(torch.autograd.Function):
    """Causal attention of ``(B, H, S, D)`` in fp32 whose scores are held a block of queries at a time, both ways."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.mask, ctx.scale = mask, scale
        out = torch.empty_like(q)
        for batch, head, group in _groups(q, k):
            query, key = q[batch, group].transpose(0, 1), k[batch, head]
            for rows, keys, p in probabilities(query, key, mask, scale):
                out[batch, group, rows] = torch.einsum("rgs,sd->grd", p, v[batch, head, keys])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dout,) = gradients
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for batch, head, group in _groups(q, k):
            query, upstream = (t[batch, group].transpose(0, 1) for t in (q, dout))
            found = gradients_of_group(query, k[batch, head], v[batch, head], upstream, ctx.mask, ctx.scale)
            dq[batch, group], dk[batch, head], dv[batch, head] = found[0].transpose(0, 1), found[1], found[2]
        return dq, dk, dv, None, None


def _groups(q: Tensor, k: Tensor) -> list[tuple[int, int, slice]]:
    """Each KV head of each sequence, with its query heads."""
    size = q.shape[1] // k.shape[1]
    return [(b, h, slice(h * size, (h + 1) * size)) for b in range(k.shape[0]) for h in range(k.shape[1])]


def register_reference() -> None:
    """Make REFERENCE known to transformers: self-attention without a cache."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float,
        sliding_window: int | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        out = _Exact.apply(query, key, value, Mask(True, sliding_window), scaling)
        return out.transpose(1, 2).contiguous(), None

    _register(REFERENCE, attention)


def register_beside_sdpa(name: str, attention: Attention) -> str:
    """Make an attention known to transformers that takes heads of up to 256 columns; wider ones run on SDPA.

    transformers' own flash implementations refuse a model with wider heads as a whole. This is the best that its user
    could put together of the two.

    Returns:
        The name by which models find it.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
        sliding_window: int | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        if query.shape[-1] > WIDEST:
            # One query sees all keys, several are a prompt: neither needs a mask.
            with sdpa_kernel(_ALL_BACKENDS):
                out, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling)
            return out, None
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return attention(q, k, v, scaling, window_size(sliding_window)), None

    known = f"broadhead_bench_{name}"
    _register(known, forward)
    return known


def _register(name: str, attention: Callable[..., Any]) -> None:
    """With no mask: batches have no padding."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, lambda *_, **__: None)
