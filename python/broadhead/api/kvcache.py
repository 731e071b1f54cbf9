"""flash_attn_with_kvcache: decode and chunked prefill over a cache, after appending new keys to it if asked."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..call import validation as check
from ..call.cache_length import lengths_tensor
from ..call.masking import split_causal
from ..run import known
from .append import run_appending
from .forward import run_forward
from .results import may_return_lse


@may_return_lse
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool | Tensor = False,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    sinks: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
    block_table: Tensor | None = None,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    q_v: Tensor | None = None,
    return_attn_probs: bool = False,
    deterministic: bool = False,
    query_ranges: Tensor | None = None,
    ranges_in_window: bool = False,
    tree_mask: Tensor | None = None,
    tokens_per_split: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries over a KV cache, which first takes new keys if there are any.

    Args:
        q: queries, ``(B, Sq, Hq, D)``, or ``(T, Hq, D)`` with cu_seqlens_q and max_seqlen_q.
        k_cache: cached keys, ``(B, S, Hkv, D)``, or pages ``(num_pages, page_size, Hkv, D)`` with page_table, of any
            page_size >= 1. The dtype is that of q, or float8_e4m3fn under bf16 or fp16 q. The cache is never copied:
            any strides with a contiguous last dimension are accepted.
        v_cache: cached values, as k_cache with Dv.
        k: new keys, ``(B, S_new, Hkv, D)``, or ``(T_new, Hkv, D)`` with cu_seqlens_k_new. They are written to the cache
            from row ``cache_seqlens`` on, before attention. For a float8_e4m3fn cache wider keys are divided by
            k_descale and rounded.
        v: new values, as k with Dv, divided by v_descale.
        rotary_cos: ``(positions, rotary_dim / 2)``: rotates q and k; only with k and v. Fastest as fp32 or in the dtype
            of q. Under causal, be it a tensor, or a window, query i is at the position of new key i, else all queries
            are at that of the first.
        rotary_sin: like rotary_cos.
        cache_seqlens: int32 ``(B,)``, or an int for all sequences: cached keys before the append; None: the whole
            cache. An int that the cache does not hold, new keys included, is refused on every device.
        cache_batch_idx: int32 ``(B,)``, the row of the cache, or of the page table, of each sequence.
        cache_leftpad: int32 ``(B,)``: the keys of a sequence are cache rows ``[cache_leftpad, cache_seqlens)``.
        page_table: int32 ``(B, max_pages)``, the page ids of each sequence.
        cu_seqlens_q: int32 ``(B + 1,)``, offsets of the sequences in packed q.
        cu_seqlens_k_new: int32 ``(B + 1,)``, offsets in packed k and v; ignored without them.
        max_seqlen_q: tokens of the longest sequence in packed q.
        rotary_seqlens: int32 ``(B,)``, position of the first new token; None: cache_seqlens.
        k_descale: fp32 ``(B, Hkv)``, factor of float8 keys; None: 1.
        v_descale: fp32 ``(B, Hkv)``, factor of float8 values; None: 1.
        rotary_interleaved: whether columns 2 i and 2 i + 1 are rotated together, or the halves of rotary_dim.
        scheduler_metadata: int32, as get_scheduler_metadata returns it.
        return_softmax_lse: also return softmax_lse.
        tokens_per_split: batch-invariant mode; see below. A multiple of 64; 0: off.
        deterministic: gradients that are the same in every run, bit for bit, as for flash_attn_func.
        block_table: synonym of page_table.
        return_attn_probs: synonym of return_softmax_lse.
        query_ranges: int32 ``(B, Sq, 2)``, or ``(T, 2)`` with cu_seqlens_q, as for flash_attn_func: positions count
            from the first key behind cache_leftpad, and appended keys are keys as well.
        tree_mask: int64 ``(B, Sq)``, or ``(T,)`` with cu_seqlens_q, as for flash_attn_func: the last 64 keys are those
            after the append.
        qv, q_descale, softmax_scale, ...: the other arguments are those of flash_attn_func.

    With tokens_per_split the keys of every sequence are cut at multiples of so many tokens. On one kind of device the
    kernels then give a sequence bitwise the same result whatever else is in the batch, in all calls of the same
    max_seqlen_q, heads, head dims, dtypes, page size and tokens_per_split. It costs balance, since splits no longer
    follow from what fills the device: a few sequences, or short ones, may leave it partly idle, and small splits of
    long sequences are much to combine. Calls of more than 32 query rows (max_seqlen_q times the query heads of a KV
    head) are prefill: they are not cut, and not split by what fills the device either. num_splits must be 0, or 1 for
    no cut. The partial results may take 4 GiB, counted for sequences as long as the page table or cache allows. The
    torch fallback ignores the argument.

    Returns:
        out, of the shape of q with Dv and the dtype of q (bf16 for float8); with return_softmax_lse ``(out,
        softmax_lse)``, softmax_lse fp32 ``(B, Hq, Sq)`` or ``(Hq, T)``, natural log.

    Raises:
        InvalidArgumentError: an argument has a wrong value, shape or device; the text names it.
        InvalidTypeError: an argument has a wrong type or dtype; the text names it.
        UnsupportedError: no kernel runs the call and falling back was forbidden; or new keys are appended under
            autograd.
    """
    if block_table is not None:
        page_table = check.pick_synonym(  # type: ignore[assignment]
            "flash_attn_with_kvcache", "page_table", page_table, "block_table", block_table
        )
    if s_aux is not None or learnable_sink is not None:
        sinks = check.pick_sinks("flash_attn_with_kvcache", sinks, s_aux, learnable_sink)
    if q_v is not None:
        qv = check.pick_synonym("flash_attn_with_kvcache", "qv", qv, "q_v", q_v)  # type: ignore[assignment]
    if cache_seqlens is not None and not isinstance(cache_seqlens, Tensor):
        cache_seqlens = lengths_tensor(
            "flash_attn_with_kvcache", q, cu_seqlens_q, cache_seqlens, k_cache, page_table, k, cu_seqlens_k_new
        )
    need_lse = return_softmax_lse or return_attn_probs
    by_sequence = None
    if type(causal) is not bool:
        causal, by_sequence = split_causal(causal)
    call = (
        q, k_cache, v_cache, qv, out, cu_seqlens_q, None, None, cache_seqlens, max_seqlen_q, None, page_table,
        cache_batch_idx, cache_leftpad, q_descale, k_descale, v_descale, softmax_scale, causal, window_size,
        attention_chunk, softcap, scheduler_metadata, num_splits, pack_gqa, sm_margin, sinks, prefix_lens, backend,
        tokens_per_split,
    ) + (query_ranges, ranges_in_window, by_sequence, tree_mask)  # fmt: skip
    if k is None and v is None and rotary_cos is None and rotary_sin is None:
        result = None if is_dynamo_compiling() else known.run_known("flash_attn_with_kvcache", need_lse, call)
        if result is None:
            result = run_forward("flash_attn_with_kvcache", call, need_lse, deterministic)
    else:
        new = (k, v, cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved)
        result = run_appending("flash_attn_with_kvcache", call, new, need_lse)
    return result if need_lse else result[0]
