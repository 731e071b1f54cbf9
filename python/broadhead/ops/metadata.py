"""The operators broadhead::get_scheduler_metadata and get_scheduler_metadata_out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call import validation as check
from ..call.masking import normalize_window
from ..call.metadata_request import FUNCTION
from ..run import metadata
from ..run.metadata_records import metadata_size
from . import sharding

_METADATA = (
    "Tensor cache_seqlens, SymInt batch_size, SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt num_heads_q,"
    " SymInt num_heads_kv, SymInt headdim, SymInt headdim_v, ScalarType qkv_dtype, Tensor? cu_seqlens_q,"
    " Tensor? cache_leftpad, SymInt? page_size, SymInt max_seqlen_k_new, bool causal, SymInt window_left,"
    " SymInt window_right, SymInt attention_chunk, SymInt num_splits, bool? pack_gqa, SymInt sm_margin,"
    " Tensor? page_table, bool? has_qv, ScalarType? kv_dtype, SymInt tokens_per_split"
)


@check.clamped()
def _metadata(out: Tensor | None, inputs: tuple[Any, ...]) -> Tensor:
    (
        cache_seqlens, batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, headdim_v, qkv_dtype,
        cu_seqlens_q, cache_leftpad, page_size, max_seqlen_k_new, causal, window_left, window_right, attention_chunk,
        num_splits, pack_gqa, sm_margin, page_table, has_qv, kv_dtype, tokens_per_split,
    ) = inputs  # fmt: skip
    numbers = (
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, headdim_v, qkv_dtype, page_size,
        max_seqlen_k_new, causal, (window_left, window_right), attention_chunk, num_splits, pack_gqa, sm_margin, has_qv,
        kv_dtype, tokens_per_split,
    )  # fmt: skip
    return metadata.run((cache_seqlens, cu_seqlens_q, cache_leftpad, out, page_table), numbers)


@torch.library.custom_op("broadhead::get_scheduler_metadata", mutates_args=(), schema=f"({_METADATA}) -> Tensor")
def get_scheduler_metadata(*inputs: Any) -> Tensor:
    return _metadata(None, inputs)


@get_scheduler_metadata.register_fake
def _(cache_seqlens: Tensor, batch_size: int, *rest: Any) -> Tensor:
    return cache_seqlens.new_empty(metadata_size(batch_size))


@torch.library.custom_op(
    "broadhead::get_scheduler_metadata_out", mutates_args=("out",), schema=f"({_METADATA}, Tensor(a!) out) -> ()"
)
def get_scheduler_metadata_out(*inputs_and_out: Any) -> None:
    _metadata(inputs_and_out[-1], inputs_and_out[:-1])


@get_scheduler_metadata_out.register_fake
def _(*inputs_and_out: Any) -> None:
    return None


def call_get_scheduler_metadata(
    batch_size: Any, max_seqlen_q: Any, max_seqlen_k: Any, num_heads_q: Any, num_heads_kv: Any, headdim: Any,
    cache_seqlens: Any, qkv_dtype: Any, headdim_v: Any, cu_seqlens_q: Any, cache_leftpad: Any, page_size: Any,
    max_seqlen_k_new: Any, causal: Any, window_size: Any, attention_chunk: Any, num_splits: Any, pack_gqa: Any,
    sm_margin: Any, out: Any, page_table: Any, has_qv: Any, kv_dtype: Any, tokens_per_split: Any,
) -> Tensor:  # fmt: skip
    """get_scheduler_metadata through the operators; traceable."""
    sharding.prepare(cache_seqlens, cu_seqlens_q, cache_leftpad, page_table, out)
    causal = check.check_bool(FUNCTION, "causal", causal)
    window_left, window_right = normalize_window(window_size, causal, FUNCTION)
    attention_chunk = 0 if attention_chunk is None else attention_chunk
    inputs = (
        cache_seqlens, batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim,
        headdim if headdim_v is None else headdim_v, qkv_dtype, cu_seqlens_q, cache_leftpad, page_size,
        max_seqlen_k_new, causal, window_left, window_right, attention_chunk, num_splits, pack_gqa, sm_margin,
        page_table, has_qv, kv_dtype, tokens_per_split,
    )  # fmt: skip
    if out is None:
        return torch.ops.broadhead.get_scheduler_metadata(*inputs)
    torch.ops.broadhead.get_scheduler_metadata_out(*inputs, out)
    return out
