"""FlashAttention-2's functions: module flash_attn and flash_attn.flash_attn_interface."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..api import attention, kvcache, packed
from ..api.attention import maybe_contiguous
from ..api.backward import mha_bwd
from .advice import tell_if_faster_elsewhere
from .declare import declare

#: The release whose signatures these are.
__version__ = "2.8.4"
_SURFACE = "flash_attn"
_MODULE = __name__
_TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,"
    " deterministic=False, return_attn_probs=False"
)


def round_multiple(x: int, m: int) -> int:
    """The least multiple of ``m`` that is not below ``x``."""
    return -(-x // m) * m


def _to_eights(x: Tensor) -> Tensor:
    """``x`` with zeros behind its last dimension up to a multiple of 8, as FlashAttention-2 pads."""
    return F.pad(x, [0, -x.shape[-1] % 8])


def _with_probs(result: Any, q: Tensor, return_attn_probs: bool) -> Any:
    """``out``, or the triple: S_dmask has no elements, as FlashAttention-2's has without dropout."""
    return (*result, q.new_empty(0)) if return_attn_probs else result


def _padded(run: Any, q: Tensor, k: Tensor, v: Tensor, softmax_scale: Any, **others: Any) -> Any:
    """``run`` of head dims that FlashAttention-2 pads; the columns that come of it are cut off."""
    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    if head_dim % 8 == 0 and head_dim_v % 8 == 0:
        return run(q, k, v, softmax_scale=softmax_scale, **others)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    result = run(_to_eights(q), _to_eights(k), _to_eights(v), softmax_scale=scale, **others)
    if isinstance(result, tuple):
        return (result[0][..., :head_dim_v], *result[1:])
    return result[..., :head_dim_v]


def _dense(*, q: Tensor, k: Tensor, v: Tensor, return_attn_probs: bool, **others: Any) -> Any:
    tell_if_faster_elsewhere(_SURFACE, q)
    result = _padded(attention.flash_attn_func, q, k, v, return_attn_probs=return_attn_probs, **others)
    return _with_probs(result, q, return_attn_probs)


def _dense_qkv(*, qkv: Tensor, return_attn_probs: bool, **others: Any) -> Any:
    if qkv.shape[-1] % 8:
        q, k, v = qkv.unbind(2)
        return _dense(q=q, k=k, v=v, return_attn_probs=return_attn_probs, **others)
    tell_if_faster_elsewhere(_SURFACE, qkv)
    result = packed.flash_attn_qkvpacked_func(qkv, return_attn_probs=return_attn_probs, **others)
    return _with_probs(result, qkv, return_attn_probs)


def _dense_kv(*, q: Tensor, kv: Tensor, return_attn_probs: bool, **others: Any) -> Any:
    k, v = kv.unbind(2)
    return _dense(q=q, k=k, v=v, return_attn_probs=return_attn_probs, **others)


def _varlen(*, q: Tensor, k: Tensor, v: Tensor, return_attn_probs: bool, block_table: Any = None, **others: Any) -> Any:
    tell_if_faster_elsewhere(_SURFACE, q)
    others.update(return_attn_probs=return_attn_probs, page_table=block_table)
    # A cache is never copied, so its head dims are not padded.
    if block_table is None:
        result = _padded(attention.flash_attn_varlen_func, q, k, v, **others)
    else:
        result = attention.flash_attn_varlen_func(q, k, v, **others)
    return _with_probs(result, q, return_attn_probs)


def _varlen_qkv(*, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, **others: Any) -> Any:
    q, k, v = qkv.unbind(1)
    return _varlen_of(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, others)


def _varlen_kv(
    *,
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **others: Any,
) -> Any:
    k, v = kv.unbind(1)
    return _varlen_of(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, others)


def _varlen_of(q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, others: Any) -> Any:
    lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
    return _varlen(q=q, k=k, v=v, **lengths, **others)


def _cached(*, q: Tensor, **others: Any) -> Any:
    tell_if_faster_elsewhere(_SURFACE, q)
    return kvcache.flash_attn_with_kvcache(q, **others)


def _forward(*, q: Tensor, **others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, softmax_lse = attention.mha_fwd(q, **others)
    return out, softmax_lse, q.new_empty(0), q.new_empty(2, dtype=torch.int64)


def _backward(*, q: Tensor, **others: Any) -> Tensor:
    mha_bwd(q=q, **others)
    # FlashAttention's softmax_d is an intermediate of its kernels, padded to their tiles: it has no elements here.
    return q.new_empty(0, dtype=torch.float32)


def _get_block_size_n(device: Any, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Keys of a tile. FlashAttention-2's tests lay out its dropout mask by it; there is none here."""
    return 64


flash_attn_func = declare(
    _MODULE, "flash_attn_func", f"q, k, v, {_TAIL}", _dense, doc="FlashAttention-2's dense attention."
)
flash_attn_qkvpacked_func = declare(
    _MODULE, "flash_attn_qkvpacked_func", f"qkv, {_TAIL}", _dense_qkv, doc="flash_attn_func of ``(B, S, 3, H, D)``."
)
flash_attn_kvpacked_func = declare(
    _MODULE, "flash_attn_kvpacked_func", f"q, kv, {_TAIL}", _dense_kv, doc="flash_attn_func of ``(B, S, 2, Hkv, D)``."
)
flash_attn_varlen_func = declare(
    _MODULE,
    "flash_attn_varlen_func",
    f"q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {_TAIL}, block_table=None",
    _varlen,
    doc="FlashAttention-2's attention of packed sequences.",
)
flash_attn_varlen_qkvpacked_func = declare(
    _MODULE,
    "flash_attn_varlen_qkvpacked_func",
    f"qkv, cu_seqlens, max_seqlen, {_TAIL}",
    _varlen_qkv,
    doc="flash_attn_varlen_func of ``(T, 3, H, D)``.",
    counterparts=("cu_seqlens",),
)
flash_attn_varlen_kvpacked_func = declare(
    _MODULE,
    "flash_attn_varlen_kvpacked_func",
    f"q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {_TAIL}",
    _varlen_kv,
    doc="flash_attn_varlen_func of ``(T, 2, Hkv, D)``.",
)
flash_attn_with_kvcache = declare(
    _MODULE,
    "flash_attn_with_kvcache",
    "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,"
    " cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,"
    " rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False",
    _cached,
    doc="FlashAttention-2's attention over a cache.",
)
_flash_attn_forward = declare(
    _MODULE,
    "_flash_attn_forward",
    "q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,"
    " return_softmax",
    _forward,
    doc="``(out, softmax_lse, S_dmask, rng_state)``; the last two hold nothing.",
)
_flash_attn_varlen_forward = declare(
    _MODULE,
    "_flash_attn_varlen_forward",
    "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,"
    " window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,"
    " block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False, num_splits=0",
    _forward,
    doc="``(out, softmax_lse, S_dmask, rng_state)`` of packed sequences; the last two hold nothing.",
)
_GRADIENTS = "dout, q, k, v, out, softmax_lse, dq, dk, dv"
_flash_attn_backward = declare(
    _MODULE,
    "_flash_attn_backward",
    f"{_GRADIENTS}, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,"
    " deterministic, rng_state=None",
    _backward,
    doc="Writes dq, dk and dv; returns a tensor without elements in place of softmax_d.",
)
_flash_attn_varlen_backward = declare(
    _MODULE,
    "_flash_attn_varlen_backward",
    f"{_GRADIENTS}, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,"
    " window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None, zero_tensors=False",
    _backward,
    doc="Writes dq, dk and dv of packed sequences; returns a tensor without elements in place of softmax_d.",
)
# FlashAttention-2 names its operators so; these functions are operators where torch watches them.
_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward

#: What the package itself exports.
PACKAGE_NAMES = (
    "flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_with_kvcache",
)  # fmt: skip
#: What its module flash_attn_interface holds.
INTERFACE_NAMES = PACKAGE_NAMES + (
    "_flash_attn_backward", "_flash_attn_forward", "_flash_attn_varlen_backward", "_flash_attn_varlen_forward",
    "_get_block_size_n", "_wrapped_flash_attn_backward", "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward", "_wrapped_flash_attn_varlen_forward", "maybe_contiguous", "round_multiple",
)  # fmt: skip
__all__ = ["maybe_contiguous"]
