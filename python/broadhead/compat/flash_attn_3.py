"""FlashAttention-3's functions: module flash_attn_interface and flash_attn_3.flash_attn_interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..api import attention, combine, kvcache, metadata, packed
from ..api.attention import maybe_contiguous
from ..api.backward import mha_bwd
from .advice import tell_if_faster_elsewhere
from .declare import declare
from .flash_attn_2 import round_multiple
from .leniency import scale_of, with_metadata

#: The release whose signatures these are.
__version__ = "3.0.0"
_SURFACE = "flash_attn_interface"
_MODULE = __name__
_DESCALES = "q_descale=None, k_descale=None, v_descale=None"
_HEAD_DIMS = (64, 96, 128, 192, 256, 512)


def round_up_headdim(head_size: int) -> int:
    """The head dim that kernels are built for, 64 to 512."""
    return next((size for size in _HEAD_DIMS if head_size <= size), _HEAD_DIMS[-1])


def _drop_scales(q: Any, k: Any, v: Any, others: dict[str, Any]) -> None:
    """Leave out the descales that FlashAttention-3 does not read."""
    for name, tensor in (("q_descale", q), ("k_descale", k), ("v_descale", v)):
        others[name] = scale_of(others[name], tensor)


def _dense(*, q: Tensor, k: Tensor, v: Tensor, **others: Any) -> Any:
    tell_if_faster_elsewhere(_SURFACE, q)
    _drop_scales(q, k, v, others)
    return attention.flash_attn_func(q, k, v, **others)


def _qkv(*, qkv: Tensor, **others: Any) -> Any:
    tell_if_faster_elsewhere(_SURFACE, qkv)
    _drop_scales(qkv, qkv, qkv, others)
    return packed.flash_attn_qkvpacked_func(qkv, **others)


def _varlen(*, q: Tensor, k: Tensor, v: Tensor, **others: Any) -> Any:
    tell_if_faster_elsewhere(_SURFACE, q)
    _drop_scales(q, k, v, others)
    return attention.flash_attn_varlen_func(q, k, v, **others)


def with_parts(out: Tensor, softmax_lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four results: those of single splits, which FlashAttention-3 returns too, have no elements here."""
    return out, softmax_lse, softmax_lse.new_empty(0), softmax_lse.new_empty(0)


def run_cached(
    *, q: Tensor, k_cache: Tensor, v_cache: Tensor, scheduler_metadata: Any, return_softmax_lse: bool, **others: Any
) -> Any:
    """FlashAttention-3's attention over a cache."""
    tell_if_faster_elsewhere(_SURFACE, q)
    _drop_scales(q, k_cache, v_cache, others)
    others.update(q=q, k_cache=k_cache, v_cache=v_cache, return_softmax_lse=return_softmax_lse)
    result = with_metadata(kvcache.flash_attn_with_kvcache, scheduler_metadata, others)
    return with_parts(*result) if return_softmax_lse else result


def run_forward(*, q: Tensor, k: Tensor, v: Tensor, scheduler_metadata: Any, **others: Any) -> Any:
    """The four results of a call with every argument."""
    tell_if_faster_elsewhere(_SURFACE, q)
    _drop_scales(q, k, v, others)
    others.update(q=q, k=k, v=v)
    return with_parts(*with_metadata(attention.mha_fwd, scheduler_metadata, others))


def run_backward(*, q: Tensor, **others: Any) -> Tensor:
    """Writes dq, dk and dv."""
    mha_bwd(q=q, **others)
    # softmax_d is an intermediate of FlashAttention's kernels, padded to their tiles: it has no elements here.
    return q.new_empty(0, dtype=torch.float32)


flash_attn_func = declare(
    _MODULE,
    "flash_attn_func",
    f"q, k, v, softmax_scale=None, causal=False, qv=None, {_DESCALES}, window_size=(-1, -1), attention_chunk=0,"
    " softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False",
    _dense,
    doc="FlashAttention-3's dense attention.",
)
flash_attn_qkvpacked_func = declare(
    _MODULE,
    "flash_attn_qkvpacked_func",
    f"qkv, softmax_scale=None, causal=False, {_DESCALES}, window_size=(-1, -1), attention_chunk=0, softcap=0.0,"
    " deterministic=False, num_heads_q=None, sm_margin=0, return_attn_probs=False",
    _qkv,
    doc="flash_attn_func of q, k and v in one tensor.",
)
flash_attn_varlen_func = declare(
    _MODULE,
    "flash_attn_varlen_func",
    "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,"
    f" softmax_scale=None, causal=False, qv=None, {_DESCALES}, window_size=(-1, -1), attention_chunk=0, softcap=0.0,"
    " num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False",
    _varlen,
    doc="FlashAttention-3's attention of packed sequences.",
)
flash_attn_with_kvcache = declare(
    _MODULE,
    "flash_attn_with_kvcache",
    "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,"
    " cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,"
    f" max_seqlen_q=None, rotary_seqlens=None, {_DESCALES}, softmax_scale=None, causal=False, window_size=(-1, -1),"
    " attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None,"
    " sm_margin=0, return_softmax_lse=False",
    run_cached,
    doc="FlashAttention-3's attention over a cache; with return_softmax_lse four results, the last two empty.",
)
flash_attn_combine = declare(
    _MODULE,
    "flash_attn_combine",
    "out_partial, lse_partial, out=None, out_dtype=None",
    combine.flash_attn_combine,
    doc="``(out, softmax_lse)`` of splits of the keys.",
)
get_scheduler_metadata = declare(
    _MODULE,
    "get_scheduler_metadata",
    "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens,"
    " qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None,"
    " page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False,"
    " num_splits=0, pack_gqa=None, sm_margin=0",
    metadata.get_scheduler_metadata,
    doc="The plan of a decode step, int32 ``(1 + 4 * round_up(batch, 4),)`` whatever the arguments.",
)
_flash_attn_forward = declare(
    _MODULE,
    "_flash_attn_forward",
    "q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None,"
    " seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None,"
    f" leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, {_DESCALES}, softmax_scale=None,"
    " causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0, rotary_interleaved=True,"
    " scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0",
    run_forward,
    doc="``(out, softmax_lse, out_accum, softmax_lse_accum)``; the last two have no elements.",
    renamed={"out_": "out", "seqlens_rotary": "rotary_seqlens"},
)
_flash_attn_backward = declare(
    _MODULE,
    "_flash_attn_backward",
    "dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,"
    " max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,"
    " window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0",
    run_backward,
    doc="Writes dq, dk and dv; returns a tensor without elements in place of softmax_d.",
    renamed={"sequed_q": "seqused_q", "sequed_k": "seqused_k", "is_causal": "causal"},
)

#: What the module exports.
NAMES = (
    "_flash_attn_backward", "_flash_attn_forward", "flash_attn_combine", "flash_attn_func", "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func", "flash_attn_with_kvcache", "get_scheduler_metadata", "maybe_contiguous", "round_multiple",
    "round_up_headdim",
)  # fmt: skip
__all__ = ["maybe_contiguous", "round_multiple"]
