"""The functions of SGLang's module sgl_kernel.flash_attn."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..api import attention, metadata
from ..api.attention import maybe_contiguous
from ..errors import InvalidArgumentError
from .advice import tell_if_faster_elsewhere
from .declare import declare
from .flash_attn_3 import run_cached, with_parts
from .leniency import scale_of
from .obstacle import device_obstacle

_SURFACE = "sgl_kernel.flash_attn"
_MODULE = __name__
_DESCALES = "q_descale=None, k_descale=None, v_descale=None"


def is_fa3_supported(device: Any = None) -> bool:
    """Whether kernels of this installation run on the device."""
    return device_obstacle(device) is None


def _check_keys(function: str, q: Any, k: Any) -> None:
    for name, value in (("q", q), ("k", k)):
        if value is None:
            raise InvalidArgumentError(
                f"{function}: {name} must be a tensor, got None: only_qv=True, which leaves it out, is not available;"
                " pass qv as q and v as k"
            )


def _cached(*, q: Any, k_cache: Any, **others: Any) -> Any:
    _check_keys("flash_attn_with_kvcache", q, k_cache)
    return run_cached(q=q, k_cache=k_cache, **others)


def _varlen(*, q: Any, k: Any, v: Tensor, return_softmax_lse: bool, **others: Any) -> Any:
    _check_keys("flash_attn_varlen_func", q, k)
    tell_if_faster_elsewhere(_SURFACE, q)
    for name, tensor in (("q_descale", q), ("k_descale", k), ("v_descale", v)):
        others[name] = scale_of(others[name], tensor)
    if others["cu_seqlens_q"] is None:
        # The module takes padded batches as well.
        out, lse = attention.mha_fwd(q, k, v, **others)
        return with_parts(out, lse) if return_softmax_lse else out
    result = attention.flash_attn_varlen_func(q, k, v, return_softmax_lse=return_softmax_lse, **others)
    return with_parts(*result) if return_softmax_lse else result


def _metadata(*, cu_seqlens_k: Any, seqused_q: Any, **others: Any) -> Tensor:
    # No plan depends on where the keys lie in packed tensors, nor on rows of q that are not used.
    return metadata.get_scheduler_metadata(**others)


flash_attn_with_kvcache = declare(
    _MODULE,
    "flash_attn_with_kvcache",
    "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,"
    " cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,"
    f" max_seqlen_q=None, rotary_seqlens=None, {_DESCALES}, softmax_scale=None, causal=False, window_size=(-1, -1),"
    " attention_chunk=None, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None,"
    " only_qv=False, sm_margin=0, return_softmax_lse=False, sinks=None, score_mod=None, aux_tensors=None, ver=3,"
    " out=None",
    _cached,
    doc="SGLang's attention over a cache; with return_softmax_lse four results, the last two empty.",
)
flash_attn_varlen_func = declare(
    _MODULE,
    "flash_attn_varlen_func",
    "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None, seqused_k=None,"
    f" page_table=None, softmax_scale=None, causal=False, qv=None, {_DESCALES}, window_size=(-1, -1),"
    " attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, only_qv=False, sm_margin=0,"
    " return_softmax_lse=False, sinks=None, score_mod=None, aux_tensors=None, ver=3, out=None",
    _varlen,
    doc="SGLang's attention of packed sequences; with return_softmax_lse four results, the last two empty.",
)
get_scheduler_metadata = declare(
    _MODULE,
    "get_scheduler_metadata",
    "batch_size, max_seqlen_q, max_seqlen_k, num_heads, num_heads_k, headdim, cache_seqlens, qkv_dtype=torch.bfloat16,"
    " headdim_v=None, cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, leftpad_k=None,"
    " page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False,"
    " num_splits=0, pack_gqa=None, sm_margin=0",
    _metadata,
    doc="The plan of a decode step, int32 ``(1 + 4 * round_up(batch, 4),)`` whatever the arguments.",
    renamed={"leftpad_k": "cache_leftpad"},
)

#: What the module exports.
NAMES = (
    "flash_attn_varlen_func", "flash_attn_with_kvcache", "get_scheduler_metadata", "is_fa3_supported",
    "maybe_contiguous",
)  # fmt: skip
__all__ = ["maybe_contiguous"]
