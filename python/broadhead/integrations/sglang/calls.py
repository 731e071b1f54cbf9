"""The attention functions under the names and arguments that SGLang calls, on broadhead."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...api.attention import flash_attn_varlen_func as varlen
from ...api.kvcache import flash_attn_with_kvcache as kvcache
from ...api.merge import merge_attn_states
from ...errors import InvalidArgumentError, UnsupportedError

#: Arguments of FlashAttention 4 that no model with a mask of ours needs.
_FOREIGN = ("score_mod", "mask_mod", "aux_tensors", "rel_bias", "sfq", "sfk", "sfv")


def _refuse(function: str, **foreign: Any) -> None:
    for name, value in foreign.items():
        if value is not None:
            raise UnsupportedError(
                f"sglang {function}: {name} is an argument of FlashAttention 4 that broadhead does not take: start the"
                " server with --attention-backend fa4 for this model"
            )


def _descale(descale: Tensor | None, batch: int) -> Tensor | None:
    """One scale of a layer, expanded for the requests of the step, for the sequences of this very call."""
    if descale is None or descale.shape[0] == batch or descale.stride(0) != 0:
        return descale
    return descale[:1].expand(batch, *descale.shape[1:])


def _only_qv(function: str, qv: Tensor | None) -> Tensor:
    """The queries of a call whose scores are those of qv with v alone: its keys are its values."""
    if qv is None:
        raise InvalidArgumentError(f"sglang {function}: only_qv=True needs qv, got None: pass the queries as qv")
    return qv


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor | None,
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
    causal: bool = False,
    window_size: Any = (-1, -1),
    attention_chunk: int | None = None,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    only_qv: bool = False,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    score_mod: Any = None,
    aux_tensors: Any = None,
    sfq: Tensor | None = None,
    sfk: Tensor | None = None,
    sfv: Tensor | None = None,
    rel_bias: Tensor | None = None,
    rel_bias_prep_cache: Any = None,
    ver: int = 3,
    out: Tensor | None = None,
    max_seqlen_k: int | None = None,
    mask_mod: Any = None,
    *,
    query_ranges: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``broadhead.flash_attn_with_kvcache`` with the arguments of SGLang's function of this name.

    Args:
        q: ``(T, Hq, D)`` with cu_seqlens_q, or ``(B, Sq, Hq, D)``.
        k_cache: pages ``(num_pages, page_size, Hkv, D)``; with only_qv it may be None.
        only_qv: the scores are those of qv with v_cache alone; q and k_cache are not read.
        attention_chunk: None or 0: none.
        k_descale: fp32 ``(B, Hkv)``. One scale of a layer, expanded, may have the batch of another call of the step.
        ver: accepted, and of no effect: what runs is broadhead. max_seqlen_k, which page_table bounds, likewise.
        query_ranges: int32 ``(T, 2)``, the images that tokens see, within the window.
        cache_seqlens, causal, ...: those of ``broadhead.flash_attn_with_kvcache``.

    Returns:
        out, or ``(out, softmax_lse)`` with return_softmax_lse; softmax_lse is fp32 ``(Hq, T)``.

    Raises:
        UnsupportedError: an argument of FlashAttention 4 is given that broadhead does not take.
        InvalidArgumentError, InvalidTypeError: as for ``broadhead.flash_attn_with_kvcache``.
    """
    _refuse(
        "flash_attn_with_kvcache", score_mod=score_mod, mask_mod=mask_mod, aux_tensors=aux_tensors, rel_bias=rel_bias,
        sfq=sfq, sfk=sfk, sfv=sfv,
    )  # fmt: skip
    if only_qv:
        q, k_cache, qv, k_descale = _only_qv("flash_attn_with_kvcache", qv), v_cache, None, v_descale
    if k_descale is not None or v_descale is not None or q_descale is not None:
        batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        q_descale, k_descale, v_descale = (_descale(each, batch) for each in (q_descale, k_descale, v_descale))
    if k_cache is None:
        raise InvalidArgumentError("sglang flash_attn_with_kvcache: k_cache must be a tensor without only_qv, got None")
    return kvcache(
        q, k_cache, v_cache, k, v, qv, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
        page_table, cu_seqlens_q, cu_seqlens_k_new, max_seqlen_q, rotary_seqlens, q_descale, k_descale, v_descale,
        softmax_scale, causal, window_size, attention_chunk or 0, softcap or 0.0, rotary_interleaved,
        scheduler_metadata, num_splits, pack_gqa, sm_margin, return_softmax_lse, sinks=sinks, out=out,
        query_ranges=query_ranges, ranges_in_window=query_ranges is not None,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Any = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    only_qv: bool = False,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    score_mod: Any = None,
    aux_tensors: Any = None,
    sfq: Tensor | None = None,
    sfk: Tensor | None = None,
    sfv: Tensor | None = None,
    rel_bias: Tensor | None = None,
    rel_bias_prep_cache: Any = None,
    ver: int = 3,
    out: Tensor | None = None,
    mask_mod: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``broadhead.flash_attn_varlen_func`` with the arguments of SGLang's function of this name.

    Args:
        q: ``(T, Hq, D)``; k ``(T_k, Hkv, D)``, v ``(T_k, Hkv, Dv)``.
        ver: accepted, and of no effect.
        cu_seqlens_q, causal, ...: those of ``broadhead.flash_attn_varlen_func``.

    Returns:
        out, or ``(out, softmax_lse)`` with return_softmax_lse; softmax_lse is fp32 ``(Hq, T)``.

    Raises:
        UnsupportedError: an argument of FlashAttention 4 is given that broadhead does not take.
    """
    _refuse(
        "flash_attn_varlen_func", score_mod=score_mod, mask_mod=mask_mod, aux_tensors=aux_tensors, rel_bias=rel_bias,
        sfq=sfq, sfk=sfk, sfv=sfv,
    )  # fmt: skip
    if only_qv:
        q, k, qv, k_descale = _only_qv("flash_attn_varlen_func", qv), v, None, v_descale
    return varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=seqused_q, seqused_k=seqused_k,
        page_table=page_table, softmax_scale=softmax_scale, causal=causal, qv=qv, q_descale=q_descale,
        k_descale=k_descale, v_descale=v_descale, window_size=window_size, attention_chunk=attention_chunk or 0,
        softcap=softcap or 0.0, num_splits=num_splits, pack_gqa=pack_gqa, sm_margin=sm_margin,
        return_attn_probs=return_softmax_lse, sinks=sinks, out=out,
    )  # fmt: skip


def merge_state_v2(
    v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor, v_merged: Tensor | None = None, s_merged: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merge two results of the same queries over disjoint keys, as ``sgl_kernel.merge_state_v2`` does.

    Args:
        v_a: ``(T, H, Dv)``; v_b likewise.
        s_a: fp32 ``(T, H)``, natural log; s_b likewise.
        v_merged: of the shape of v_a, written and returned if given; s_merged likewise for s_a.

    Returns:
        The merged output and its ``(T, H)`` LSE.
    """
    out, lse = merge_attn_states(v_a, s_a.T.contiguous(), v_b, s_b.T.contiguous(), v_merged)
    return out, lse.T.contiguous() if s_merged is None else s_merged.copy_(lse.T)
