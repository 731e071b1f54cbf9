"""The public attention functions: dense, varlen and the full-argument form. Arguments get canonical names here."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..call import validation as check
from ..errors import InvalidArgumentError
from .append import run_appending
from .forward import run_forward


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """``x`` with a contiguous last dimension, copied only if it has none; None stays None."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
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
) -> Any:
    """Exact attention of dense tensors. Differentiable in q, k, v, qv and sinks.

    Args:
        q: ``(B, Sq, Hq, D)``; k: ``(B, Sk, Hkv, D)``; v: ``(B, Sk, Hkv, Dv)``. Hq is a multiple of Hkv; D and Dv are
            multiples of 8. bf16 or fp16 on the kernels, float8_e4m3fn (D and Dv multiples of 16) on those of Hopper;
            also fp32, fp64 and float8 on the torch fallback. k and v alone may be float8_e4m3fn under bf16 or fp16 q:
            without gradients. Any strides; a tensor whose last dimension is not contiguous is copied in every call.
        softmax_scale: ``D ** -0.5`` by default, ``(D + Dv) ** -0.5`` with qv.
        causal, window_size: query i sits at position ``i + Sk - Sq`` and sees keys from ``left`` before to ``right``
            after it; None, an int, or (left, right), negative or None = unbounded; causal clamps right to 0.
        qv: ``(B, Sq, Hq, Dv)``, adds ``qv . v`` to the scores. q_descale, k_descale, v_descale: fp32 ``(B, Hkv)``,
            factors of float8 q, k and v; None: 1. q_descale must be None where k and v alone are float8.
        attention_chunk: queries see keys of their own chunk of this many positions; 0 or None: off.
        softcap: ``softcap * tanh(score / softcap)``; 0 or None: off.
        num_splits: at most so many blocks share the keys of a row, 0 for the heuristic. Up to 256 may be asked for; the
            kernels use up to 128.
        pack_gqa: let query heads share a tile; None decides by shape. sm_margin: multiprocessors to leave free.
            deterministic: accepted.
        sinks: ``(Hq,)`` fp32 or the dtype of out, a logit in the softmax denominator; also s_aux, learnable_sink.
        prefix_lens: int32 ``(B,)``: keys below it are visible to every query; needs causal.
        out: written if given, ``(B, Sq, Hq, Dv)``; excludes gradients.
        backend: None (a kernel if there is one, else the torch fallback, with a warning on a CUDA device), "cuda" or
            "torch".

    A scalar may also be a NumPy scalar or a 0-dim tensor on the CPU, window_size a CPU tensor of two; causal may be an
    int. On another device they would have to be read back: such tensors are refused by name.

    Returns:
        out ``(B, Sq, Hq, Dv)`` of the dtype of q, bf16 for float8; with return_attn_probs ``(out, softmax_lse)``,
        softmax_lse fp32 ``(B, Hq, Sq)``, natural log. A row that sees no key has out 0 and softmax_lse -inf.

    Raises:
        InvalidArgumentError, InvalidTypeError: an argument is wrong; the text names it.
        UnsupportedError: no kernel runs the call, and backend="cuda" or BROADHEAD_STRICT=1 forbids the fallback.
    """
    if s_aux is not None or learnable_sink is not None:
        sinks = check.pick_sinks("flash_attn_func", sinks, s_aux, learnable_sink)
    if q_v is not None:
        qv = check.pick_synonym("flash_attn_func", "qv", qv, "q_v", q_v)  # type: ignore[assignment]
    need_lse = return_attn_probs or return_softmax_lse
    call = (
        q, k, v, qv, out, None, None, None, None, None, None, None, None, None, q_descale, k_descale, v_descale,
        softmax_scale, causal, window_size, attention_chunk, softcap, None, num_splits, pack_gqa, sm_margin, sinks,
        prefix_lens, backend, 0,
    )  # fmt: skip
    result = run_forward("flash_attn_func", call, need_lse, deterministic)
    return result if need_lse else result[0]


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
    causal: bool = False,
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
    tokens_per_split: int = 0,
) -> Any:
    """Exact attention of packed sequences, over packed keys or a paged cache. Differentiable as flash_attn_func.

    Args:
        q: ``(T, Hq, D)``, sequence b in rows ``[cu_seqlens_q[b], cu_seqlens_q[b + 1])``; T may exceed
            ``cu_seqlens_q[-1]``.
        k, v: ``(Tk, Hkv, D | Dv)`` with cu_seqlens_k, or ``(num_pages, page_size, Hkv, D | Dv)`` with page_table (int32
            ``(B, max_pages)``, also block_table) and seqused_k (or cu_seqlens_k, for its lengths). Pages are never
            copied: their last dimension must be contiguous.
        cu_seqlens_q, cu_seqlens_k: int32 ``(B + 1,)``. max_seqlen_q, max_seqlen_k: ints; with a page table the
            length is ``page_table.size(1) * page_size`` and max_seqlen_k is ignored.
        seqused_q, seqused_k: int32 ``(B,)``, live rows of each sequence; out keeps what it holds in the other rows.
        scheduler_metadata: as get_scheduler_metadata returns it. out: ``(T, Hq, Dv)``.
        tokens_per_split: batch-invariant mode, as for flash_attn_with_kvcache. It cuts nothing at num_splits=1, the
            default here.
        The other arguments: as for flash_attn_func.

    Returns:
        out ``(T, Hq, Dv)``; with return_attn_probs ``(out, softmax_lse)``, softmax_lse fp32 ``(Hq, T)``, natural log.
        Rows that no sequence owns are undefined where out is allocated here.

    Raises:
        InvalidArgumentError, InvalidTypeError, UnsupportedError: as flash_attn_func.
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
    call = (
        q, k, v, qv, out, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, page_table,
        None, None, q_descale, k_descale, v_descale, softmax_scale, causal, window_size, attention_chunk, softcap,
        scheduler_metadata, num_splits, pack_gqa, sm_margin, sinks, prefix_lens, backend, tokens_per_split,
    )  # fmt: skip
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
    causal: bool = False,
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
    tokens_per_split: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention with every argument there is, in the order of FlashAttention-3's operator: ``(out, softmax_lse)``.

    Args:
        q: ``(B, Sq, Hq, D)``, or ``(T, Hq, D)`` with cu_seqlens_q and max_seqlen_q.
        k, v: ``(B, Sk, Hkv, D | Dv)``, ``(Tk, Hkv, D | Dv)`` with cu_seqlens_k and max_seqlen_k, or
            ``(num_pages, page_size, Hkv, D | Dv)`` with page_table, int32 ``(B, max_pages)``.
        k_new, v_new, cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved: keys to append to
            the cache k, v at row ``seqused_k``, as k, v of flash_attn_with_kvcache.
        kv_batch_idx: int32 ``(B,)``, row of the cache or page table; leftpad_k: int32 ``(B,)``.
        window_size_left, window_size_right, or window_size as in flash_attn_func. num_splits: 0 is the heuristic.
        tokens_per_split: batch-invariant mode, as for flash_attn_with_kvcache.
        The other arguments: as for flash_attn_func and flash_attn_varlen_func.

    Returns:
        out ``(B, Sq, Hq, Dv)`` or ``(T, Hq, Dv)``, and softmax_lse fp32 ``(B, Hq, Sq)`` or ``(Hq, T)``, natural log.

    Raises:
        InvalidArgumentError, InvalidTypeError, UnsupportedError: as flash_attn_func.
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
    call = (
        q, k, v, qv, out, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, page_table,
        kv_batch_idx, leftpad_k, q_descale, k_descale, v_descale, softmax_scale, causal, window_size, attention_chunk,
        softcap, scheduler_metadata, num_splits, pack_gqa, sm_margin, sinks, prefix_lens, backend, tokens_per_split,
    )  # fmt: skip
    if k_new is None and v_new is None and rotary_cos is None and rotary_sin is None:
        return run_forward(function, call)
    new = (k_new, v_new, cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved)
    return run_appending(function, call, new)
