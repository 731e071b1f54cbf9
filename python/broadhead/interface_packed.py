"""The packed forms: q, k and v in one tensor, read through views without a copy."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import validation as check
from .errors import InvalidArgumentError
from .interface import flash_attn_func, flash_attn_varlen_func


def _split(function: str, name: str, packed: Any, rank: int, num_heads_q: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k, v in ``(..., 3, H, D)``, or in ``(..., Hq + 2 Hkv, D)`` with num_heads_q."""
    tensor = check.check_tensor(function, name, packed, "a tensor that holds q, k and v")
    lead = "batch, seqlen" if rank == 2 else "total"
    if num_heads_q is None:
        if tensor.dim() != rank + 3 or tensor.shape[rank] != 3:
            raise InvalidArgumentError(
                f"{function}: {name} must be ({lead}, 3, heads, head_dim), got {tuple(tensor.shape)}; with num_heads_q"
                f" it is ({lead}, heads_q + 2 * heads_kv, head_dim)"
            )
        q, k, v = tensor.unbind(rank)
        return q, k, v
    heads_q = check.check_int(function, "num_heads_q", num_heads_q, 1, check.MAX_NUM_HEADS)
    if tensor.dim() != rank + 2 or tensor.shape[rank] <= heads_q or (tensor.shape[rank] - heads_q) % 2:
        raise InvalidArgumentError(
            f"{function}: {name} must be ({lead}, heads_q + 2 * heads_kv, head_dim) with num_heads_q {heads_q}, got"
            f" {tuple(tensor.shape)}"
        )
    heads_kv = (tensor.shape[rank] - heads_q) // 2
    q, k, v = tensor.split([heads_q, heads_kv, heads_kv], dim=rank)
    return q, k, v


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    return_softmax_lse: bool = False,
) -> Any:
    """flash_attn_func of ``qkv``: ``(B, S, 3, H, D)``, or ``(B, S, Hq + 2 Hkv, D)`` with num_heads_q. No copy is made.

    Returns and raises as flash_attn_func.
    """
    q, k, v = _split("flash_attn_qkvpacked_func", "qkv", qkv, 2, num_heads_q)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        None,
        q_descale,
        k_descale,
        v_descale,
        window_size,
        attention_chunk,
        softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
        sinks=sinks,
        prefix_lens=prefix_lens,
        out=out,
        backend=backend,
        s_aux=s_aux,
        learnable_sink=learnable_sink,
        return_softmax_lse=return_softmax_lse,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    return_softmax_lse: bool = False,
) -> Any:
    """flash_attn_func of q ``(B, Sq, Hq, D)`` and ``kv`` ``(B, Sk, 2, Hkv, D)``. No copy is made.

    Returns and raises as flash_attn_func.
    """
    function = "flash_attn_kvpacked_func"
    tensor = check.check_tensor(function, "kv", kv, "a tensor that holds k and v")
    if tensor.dim() != 5 or tensor.shape[2] != 2:
        raise InvalidArgumentError(
            f"{function}: kv must be (batch, seqlen, 2, heads_kv, head_dim), got {tuple(tensor.shape)}"
        )
    k, v = tensor.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
        sinks=sinks,
        prefix_lens=prefix_lens,
        out=out,
        backend=backend,
        s_aux=s_aux,
        learnable_sink=learnable_sink,
        return_softmax_lse=return_softmax_lse,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    return_softmax_lse: bool = False,
) -> Any:
    """flash_attn_varlen_func of ``qkv``: ``(T, 3, H, D)``, or ``(T, Hq + 2 Hkv, D)`` with num_heads_q. No copy is made.

    cu_seqlens: int32 ``(B + 1,)``, of queries and keys alike. Returns and raises as flash_attn_varlen_func.
    """
    q, k, v = _split("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 1, num_heads_q)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
        sinks=sinks,
        prefix_lens=prefix_lens,
        out=out,
        backend=backend,
        s_aux=s_aux,
        learnable_sink=learnable_sink,
        return_softmax_lse=return_softmax_lse,
    )
