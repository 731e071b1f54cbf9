"""The public attention functions: dense, varlen and the full-argument form. Arguments get canonical names here."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..call import validation as check
from ..call.masking import split_causal
from ..errors import InvalidArgumentError
from ..run import known
from .append import run_appending
from .forward import run_forward
from .results import may_return_lse


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """``x`` with a contiguous last dimension, copied only if it has none; None stays None."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


@may_return_lse
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool | Tensor = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
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
    q_v: Tensor | None = None,
    return_softmax_lse: bool = False,
    query_ranges: Tensor | None = None,
    ranges_in_window: bool = False,
    tree_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention of dense tensors. Differentiable in q, k, v, qv and sinks.

    The kernels take bf16 and fp16, and on Hopper float8_e4m3fn with D and Dv multiples of 16. The torch fallback also
    takes fp32, fp64 and float8_e5m2. k and v alone may be float8_e4m3fn under bf16 or fp16 q; such a call has no
    gradients. Hq is a multiple of Hkv; D and Dv are multiples of 8. A tensor of any strides is accepted; one whose last
    dimension is not contiguous is copied in every call.

    Args:
        q: queries, ``(B, Sq, Hq, D)``.
        k: keys, ``(B, Sk, Hkv, D)``, dtype of q or float8_e4m3fn.
        v: values, ``(B, Sk, Hkv, Dv)``, dtype of k.
        softmax_scale: factor of the scores; None: ``D ** -0.5``, with qv ``(D + Dv) ** -0.5``.
        causal: query i, at position ``i + Sk - Sq``, sees no key behind its position: clamps the right window to 0. A
            bool or int32 tensor ``(B,)`` on the device of q says it of each sequence; one that is not causal has the
            window as given.
        qv: second queries, ``(B, Sq, Hq, Dv)``, dtype of q; they add ``qv . v`` to the scores.
        q_descale: fp32 ``(B, Hkv)``, factor of float8 q; None: 1. It must be None where k and v alone are float8.
        k_descale: fp32 ``(B, Hkv)``, factor of float8 k; None: 1.
        v_descale: fp32 ``(B, Hkv)``, factor of float8 v; None: 1.
        window_size: ``(left, right)`` keys that a query sees before and behind its position, or one int for both; None
            or a negative number: unbounded.
        attention_chunk: positions of a chunk; a query sees keys of its own chunk only. 0 or None: off.
        softcap: bound of the scores, ``softcap * tanh(score / softcap)``; 0 or None: off.
        num_splits: at most so many CTAs divide the keys of a row, up to 256, of which the kernels use up to 128; 0: a
            heuristic decides.
        pack_gqa: whether the query heads of a KV head share a tile; None: the shape decides.
        deterministic: gradients that are the same in every run, bit for bit; see mha_bwd.
        sm_margin: multiprocessors to leave free.
        return_attn_probs: also return softmax_lse.
        sinks: ``(Hq,)``, fp32 or the dtype of out: a logit that joins the softmax denominator of each row of its head.
        prefix_lens: int32 ``(B,)``, keys below it are visible to every query of the sequence; needs causal, or a tensor
            of it.
        out: ``(B, Sq, Hq, Dv)``, written and returned if given; excludes gradients.
        backend: None: a kernel if there is one, else the torch fallback, with a warning on a CUDA device; "cuda": a
            kernel or an error; "torch": the fallback.
        s_aux: synonym of sinks.
        learnable_sink: synonym of sinks.
        q_v: synonym of qv.
        return_softmax_lse: synonym of return_attn_probs.
        query_ranges: int32 ``(B, Sq, 2)``: query i also sees the keys ``[begin, end)`` of its sequence, whatever
            causal, window_size and attention_chunk say. Positions count from the first key of the sequence; end is
            clamped to its keys, and ``begin < 0`` or ``end <= begin`` is no range. See make_query_ranges.
        ranges_in_window: a range keeps only keys no further back than the window's left side.
        tree_mask: int64 ``(B, Sq)``, at most 64 queries: bit j of the word of query i says whether it sees key ``Sk -
            64 + j``, in place of the mask; keys before these are visible as the mask says. It has no gradient, and
            excludes query_ranges, prefix_lens, attention_chunk and a window with a bounded right side but causal.

    A scalar may also be a NumPy scalar or a 0-dim tensor on the CPU, window_size a CPU tensor of two; causal may be an
    int. Such tensors on another device would have to be read back, so they are refused by name.

    Returns:
        out ``(B, Sq, Hq, Dv)`` of the dtype of q, bf16 for float8; with return_attn_probs ``(out, softmax_lse)``,
        softmax_lse fp32 ``(B, Hq, Sq)``, natural log. A row that sees no key has out 0 and softmax_lse -inf.

    Raises:
        InvalidArgumentError: an argument has a wrong value, shape or device; the text names it.
        InvalidTypeError: an argument has a wrong type or dtype; the text names it.
        UnsupportedError: no kernel runs the call, and backend="cuda" or BROADHEAD_STRICT=1 forbids the fallback.
    """
    if s_aux is not None or learnable_sink is not None:
        sinks = check.pick_sinks("flash_attn_func", sinks, s_aux, learnable_sink)
    if q_v is not None:
        qv = check.pick_synonym("flash_attn_func", "qv", qv, "q_v", q_v)  # type: ignore[assignment]
    need_lse = return_attn_probs or return_softmax_lse
    by_sequence = None
    if type(causal) is not bool:
        causal, by_sequence = split_causal(causal)
    call = (
        q, k, v, qv, out, None, None, None, None, None, None, None, None, None, q_descale, k_descale, v_descale,
        softmax_scale, causal, window_size, attention_chunk, softcap, None, num_splits, pack_gqa, sm_margin, sinks,
        prefix_lens, backend, 0,
    ) + (query_ranges, ranges_in_window, by_sequence, tree_mask)  # fmt: skip
    result = None if is_dynamo_compiling() else known.run_known("flash_attn_func", need_lse, call)
    if result is None:
        result = run_forward("flash_attn_func", call, need_lse, deterministic)
    return result if need_lse else result[0]


@may_return_lse
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool | Tensor = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    page_table: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    sinks: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
    block_table: Tensor | None = None,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    q_v: Tensor | None = None,
    return_softmax_lse: bool = False,
    query_ranges: Tensor | None = None,
    ranges_in_window: bool = False,
    tree_mask: Tensor | None = None,
    tokens_per_split: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention of packed sequences, over packed keys or a paged cache. Differentiable as flash_attn_func.

    Args:
        q: queries, ``(T, Hq, D)``, sequence b in rows ``[cu_seqlens_q[b], cu_seqlens_q[b + 1])``; T may exceed
            ``cu_seqlens_q[-1]``.
        k: keys, ``(Tk, Hkv, D)`` with cu_seqlens_k, or pages ``(num_pages, page_size, Hkv, D)`` with page_table. Pages
            are never copied, so their last dimension must be contiguous.
        v: values, as k with Dv.
        cu_seqlens_q: int32 ``(B + 1,)``, offsets of the sequences in q.
        cu_seqlens_k: int32 ``(B + 1,)``, offsets in k; with page_table its differences are the lengths, unless
            seqused_k gives them.
        max_seqlen_q: tokens of the longest sequence in q.
        max_seqlen_k: tokens of the longest sequence in k; ignored with page_table, where it is ``page_table.size(1) *
            page_size``.
        seqused_q: int32 ``(B,)``, live rows of each sequence in q; out keeps what it holds in the other rows.
        seqused_k: int32 ``(B,)``, live rows of each sequence in k.
        page_table: int32 ``(B, max_pages)``, the page ids of each sequence.
        scheduler_metadata: int32, as get_scheduler_metadata returns it.
        out: ``(T, Hq, Dv)``, written and returned if given; excludes gradients.
        block_table: synonym of page_table.
        tokens_per_split: batch-invariant mode, as for flash_attn_with_kvcache. It cuts nothing at num_splits=1, the
            default here.
        query_ranges: int32 ``(T, 2)``, as for flash_attn_func. Rows of q that no sequence owns may have any range.
        tree_mask: int64 ``(T,)``, as for flash_attn_func, with ``max_seqlen_q <= 64``.
        softmax_scale, causal, qv, ...: the other arguments are those of flash_attn_func, with ``(T, Hq, Dv)`` for qv.

    Returns:
        out ``(T, Hq, Dv)``; with return_attn_probs ``(out, softmax_lse)``, softmax_lse fp32 ``(Hq, T)``, natural log.
        Rows that no sequence owns are undefined where out is allocated here.

    Raises:
        InvalidArgumentError: an argument has a wrong value, shape or device; the text names it.
        InvalidTypeError: an argument has a wrong type or dtype; the text names it.
        UnsupportedError: no kernel runs the call, and backend="cuda" or BROADHEAD_STRICT=1 forbids the fallback.
    """
    function = "flash_attn_varlen_func"
    if block_table is not None:
        page_table = check.pick_synonym(  # type: ignore[assignment]
            function, "page_table", page_table, "block_table", block_table
        )
    if s_aux is not None or learnable_sink is not None:
        sinks = check.pick_sinks(function, sinks, s_aux, learnable_sink)
    if q_v is not None:
        qv = check.pick_synonym(function, "qv", qv, "q_v", q_v)  # type: ignore[assignment]
    if cu_seqlens_q is None:
        raise InvalidArgumentError(f"{function}: cu_seqlens_q must be an int32 tensor of shape (batch + 1,), got None")
    if cu_seqlens_k is None and page_table is None and seqused_k is None:
        raise InvalidArgumentError(
            f"{function}: cu_seqlens_k must be given with packed k and v, got None; or pass page_table, or seqused_k"
            " with k and v of shape (batch, seqlen_k, heads_kv, head_dim)"
        )
    need_lse = return_attn_probs or return_softmax_lse
    by_sequence = None
    if type(causal) is not bool:
        causal, by_sequence = split_causal(causal)
    call = (
        q, k, v, qv, out, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, page_table,
        None, None, q_descale, k_descale, v_descale, softmax_scale, causal, window_size, attention_chunk, softcap,
        scheduler_metadata, num_splits, pack_gqa, sm_margin, sinks, prefix_lens, backend, tokens_per_split,
    ) + (query_ranges, ranges_in_window, by_sequence, tree_mask)  # fmt: skip
    result = None if is_dynamo_compiling() else known.run_known(function, need_lse, call)
    if result is None:
        result = run_forward(function, call, need_lse, deterministic)
    return result if need_lse else result[0]


def mha_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    qv: Tensor | None = None,
    out: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool | Tensor = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    *,
    window_size: Any = None,
    sinks: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    backend: str | None = None,
    q_v: Tensor | None = None,
    block_table: Tensor | None = None,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    deterministic: bool = False,
    query_ranges: Tensor | None = None,
    ranges_in_window: bool = False,
    tree_mask: Tensor | None = None,
    tokens_per_split: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention with every argument there is, in the order of FlashAttention-3's operator.

    Args:
        q: queries, ``(B, Sq, Hq, D)``, or ``(T, Hq, D)`` with cu_seqlens_q and max_seqlen_q.
        k: keys, ``(B, Sk, Hkv, D)``, or ``(Tk, Hkv, D)`` with cu_seqlens_k and max_seqlen_k, or pages ``(num_pages,
            page_size, Hkv, D)`` with page_table.
        v: values, as k with Dv.
        k_new: keys to append to the cache k at row ``seqused_k``, as k of flash_attn_with_kvcache.
        v_new: values to append to the cache v, likewise.
        cu_seqlens_k_new: int32 ``(B + 1,)``, offsets in packed k_new and v_new.
        kv_batch_idx: int32 ``(B,)``, the row of the cache, or of the page table, of each sequence.
        leftpad_k: int32 ``(B,)``, cache rows in front of each sequence that hold no key of it.
        rotary_cos: ``(positions, rotary_dim / 2)``, rotates q and k_new, as for flash_attn_with_kvcache.
        rotary_sin: like rotary_cos.
        rotary_interleaved: whether columns 2 i and 2 i + 1 are rotated together, or the halves of rotary_dim.
        rotary_seqlens: int32 ``(B,)``, position of the first new token; None: seqused_k.
        window_size_left: keys that a query sees before its position; negative: unbounded.
        window_size_right: keys that a query sees behind its position; negative: unbounded.
        window_size: both, as in flash_attn_func; replaces them.
        num_splits: as for flash_attn_func; 0, the default, is the heuristic.
        tokens_per_split: batch-invariant mode, as for flash_attn_with_kvcache.
        query_ranges: int32 ``(B, Sq, 2)`` or ``(T, 2)``, as q has its tokens; see flash_attn_func.
        tree_mask: int64 ``(B, Sq)`` or ``(T,)``, likewise.
        qv, out, cu_seqlens_q, ...: the other arguments are those of flash_attn_func and flash_attn_varlen_func.

    Returns:
        ``(out, softmax_lse)``: out ``(B, Sq, Hq, Dv)`` or ``(T, Hq, Dv)``; softmax_lse fp32 ``(B, Hq, Sq)`` or ``(Hq,
        T)``, natural log.

    Raises:
        InvalidArgumentError: an argument has a wrong value, shape or device; the text names it.
        InvalidTypeError: an argument has a wrong type or dtype; the text names it.
        UnsupportedError: no kernel runs the call, and backend="cuda" or BROADHEAD_STRICT=1 forbids the fallback.
    """
    function = "mha_fwd"
    if block_table is not None:
        page_table = check.pick_synonym(  # type: ignore[assignment]
            function, "page_table", page_table, "block_table", block_table
        )
    if s_aux is not None or learnable_sink is not None:
        sinks = check.pick_sinks(function, sinks, s_aux, learnable_sink)
    if q_v is not None:
        qv = check.pick_synonym(function, "qv", qv, "q_v", q_v)  # type: ignore[assignment]
    if window_size is None:
        window_size = (window_size_left, window_size_right)
    by_sequence = None
    if type(causal) is not bool:
        causal, by_sequence = split_causal(causal)
    call = (
        q, k, v, qv, out, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, page_table,
        kv_batch_idx, leftpad_k, q_descale, k_descale, v_descale, softmax_scale, causal, window_size, attention_chunk,
        softcap, scheduler_metadata, num_splits, pack_gqa, sm_margin, sinks, prefix_lens, backend, tokens_per_split,
    ) + (query_ranges, ranges_in_window, by_sequence, tree_mask)  # fmt: skip
    if k_new is None and v_new is None and rotary_cos is None and rotary_sin is None:
        result = None if is_dynamo_compiling() else known.run_known(function, True, call)
        return run_forward(function, call, deterministic=deterministic) if result is None else result
    new = (k_new, v_new, cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved)
    return run_appending(function, call, new)
