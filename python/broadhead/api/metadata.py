"""get_scheduler_metadata: plans the splits of a decode step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..call import validation as check
from ..call.masking import split_causal
from ..call.metadata_request import FUNCTION
from ..call.plain import refuse_transformed, resolved, runs_as_operator
from ..ops.metadata import call_get_scheduler_metadata
from ..run import known, metadata


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int | None = None,
    num_heads_kv: int | None = None,
    headdim: int | None = None,
    cache_seqlens: Tensor | None = None,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool | Tensor = False,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    *,
    out: Tensor | None = None,
    page_table: Tensor | None = None,
    num_heads: int | None = None,
    num_heads_k: int | None = None,
    has_qv: bool | None = None,
    kv_dtype: torch.dtype | None = None,
    tokens_per_split: int = 0,
) -> Tensor:
    """Plan the splits of a decode step on the device, for the attention calls of all layers of a kind.

    The call neither waits for the device nor reads from it.

    Args:
        batch_size: sequences.
        max_seqlen_q: query tokens of the longest sequence.
        max_seqlen_k: keys of the longest sequence; ignored with page_table, where it is ``page_table.size(1) *
            page_size``, as the forward call derives it.
        num_heads_q: query heads.
        num_heads_kv: KV heads.
        headdim: columns of q and k, a multiple of 8.
        cache_seqlens: int32 ``(batch,)``, the lengths before this call's ``max_seqlen_k_new`` keys are appended.
        qkv_dtype: dtype of q; without kv_dtype that of k and v may be meant, too.
        headdim_v: columns of v, a multiple of 8; None: headdim.
        cu_seqlens_q: int32 ``(batch + 1,)``, offsets of the sequences in packed q.
        cu_seqlens_k_new: accepted; no plan depends on it.
        cache_leftpad: int32 ``(batch,)``, cache rows in front of each sequence that hold no key of it.
        page_size: keys of a page.
        max_seqlen_k_new: keys that the forward call appends to each sequence.
        causal: that of the forward call. A tensor counts as False, here and there: what is planned for the keys that a
            window shows serves sequences that are causal, too. Other masks that a call gives as values (prefix_lens,
            query_ranges, tree_mask) are no part of a plan.
        window_size: that of the forward call.
        attention_chunk: that of the forward call.
        has_softcap: accepted; no plan depends on it, nor on descales.
        num_splits: the bound of every sequence, up to 256, of which the kernels use up to 128; 0: a heuristic decides.
        pack_gqa: that of the forward call.
        sm_margin: multiprocessors to leave free.
        out: int32 buffer of at least ``1 + 4 * round_up(batch, 4)`` elements, written and returned if given.
        page_table: int32 ``(batch, max_pages)``; only its shape is read.
        num_heads: synonym of num_heads_q.
        num_heads_k: synonym of num_heads_kv.
        has_qv: whether the forward call passes qv; None: assumed where headdim <= 64 and headdim_v > 256.
        kv_dtype: dtype of k and v; None: qkv_dtype.
        tokens_per_split: that of the forward call; see flash_attn_with_kvcache.

    Returns:
        int32 ``(1 + 4 * round_up(batch, 4),)``, or ``out``.

    Raises:
        InvalidArgumentError: an argument has a wrong value, shape or device; the text names it.
        InvalidTypeError: an argument has a wrong type or dtype; the text names it.
    """
    heads_q = check.pick_synonym(FUNCTION, "num_heads_q", num_heads_q, "num_heads", num_heads)
    heads_kv = check.pick_synonym(FUNCTION, "num_heads_kv", num_heads_kv, "num_heads_k", num_heads_k)
    causal, _ = split_causal(causal)
    if type(window_size) is list:
        window_size = tuple(window_size)
    numbers = (
        batch_size, max_seqlen_q, max_seqlen_k, heads_q, heads_kv, headdim, headdim_v, qkv_dtype, page_size,
        max_seqlen_k_new, causal, window_size, attention_chunk, num_splits, pack_gqa, sm_margin, has_qv, kv_dtype,
        tokens_per_split,
    )  # fmt: skip
    tensors = (cache_seqlens, cu_seqlens_q, cache_leftpad, out, page_table)
    if is_dynamo_compiling():
        return _run_operator(tensors, numbers)
    result = known.run_known_metadata(*tensors, numbers)
    if result is not None:
        return result
    if runs_as_operator(*tensors):
        return _run_operator(tensors, numbers)
    return metadata.run_new(tensors, numbers)


def _run_operator(tensors: tuple[Any, ...], numbers: tuple[Any, ...]) -> Tensor:
    """get_scheduler_metadata through the operators; traceable."""
    (
        batch_size, max_seqlen_q, max_seqlen_k, heads_q, heads_kv, headdim, headdim_v, qkv_dtype, page_size,
        max_seqlen_k_new, causal, window_size, attention_chunk, num_splits, pack_gqa, sm_margin, has_qv, kv_dtype,
        tokens_per_split,
    ) = numbers  # fmt: skip
    if not is_dynamo_compiling():
        refuse_transformed(FUNCTION, "planning the splits", *tensors)
        tensors = tuple(
            resolved(FUNCTION, name, value, written=name == "out")
            for name, value in zip(metadata.NAMES, tensors, strict=True)
        )
    cache_seqlens, cu_seqlens_q, cache_leftpad, out, page_table = tensors
    return call_get_scheduler_metadata(
        batch_size, max_seqlen_q, max_seqlen_k, heads_q, heads_kv, headdim, cache_seqlens, qkv_dtype, headdim_v,
        cu_seqlens_q, cache_leftpad, page_size, max_seqlen_k_new, causal, window_size, attention_chunk, num_splits,
        pack_gqa, sm_margin, out, page_table, has_qv, kv_dtype, tokens_per_split,
    )  # fmt: skip
