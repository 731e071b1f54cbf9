"""aten's flash attention operators, computed by broadhead: their arguments, layouts and results, and nothing else.

They run below autograd, which keeps what the backward operators are given. Layouts are those of aten: the operators
named after SDPA take ``(B, H, S, D)``, the others ``(B, S, H, D)``, or ``(T, H, D)`` with cumulative lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...api.attention import mha_fwd
from ...api.backward import mha_bwd
from ...errors import UnsupportedError

#: What ends every refusal.
_REMEDY = "or give torch its own kernels back with torch.nn.attention.restore_flash_attention_impl()"
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_Gradients = tuple[Tensor, Tensor, Tensor]


def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> _Outputs:
    """``aten::_flash_attention_forward``.

    Args:
        query: ``(B, Sq, Hq, D)``, or ``(T, Hq, D)`` with cum_seq_q.
        key: ``(B, Sk, Hkv, D)``, or ``(Tk, Hkv, D)`` with cum_seq_k, or pages ``(num_pages, page_size, Hkv, D)`` with
            block_table.
        value: as key.
        cum_seq_q: int32 ``(B + 1,)``, offsets of the sequences in query.
        cum_seq_k: likewise in key.
        max_q: tokens of the longest sequence of query, with cum_seq_q.
        max_k: likewise of key.
        dropout_p: must be 0.
        return_debug_mask: must be False.
        window_size_left, window_size_right: keys before and behind its own that a query sees; None, negative: all.
        seqused_k: int32 ``(B,)``, live keys of each sequence.
        alibi_slopes: must be None.
        block_table: int32 ``(B, max_pages)``, the page ids of each sequence.
        num_splits: as for flash_attn_func; None: a heuristic, or 1 where torch asks for deterministic algorithms.

    Returns:
        ``(out, softmax_lse, rng_state, unused, debug_mask)``: out as query; softmax_lse fp32 ``(B, Hq, Sq)`` or ``(Hq,
        T)``, natural log; the other three, which are of dropout, zero or empty.

    Raises:
        UnsupportedError: dropout, a debug mask, ALiBi slopes or float8 tensors are asked for.
    """
    _refuse("_flash_attention_forward", query, dropout_p, return_debug_mask, alibi_slopes)
    lengths = (cum_seq_q, cum_seq_k, max_q, max_k)
    window = (window_size_left, window_size_right)
    out, lse = _attend(
        query,
        key,
        value,
        lengths,
        is_causal,
        scale,
        window,
        seqused_k,
        block_table,
        num_splits,
        _made_like(query, value),
    )
    return out, lse, *_no_dropout(query)


def flash_attention_forward_inplace(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """``aten::_flash_attention_forward_no_dropout_inplace``: writes out, and returns softmax_lse alone."""
    _refuse("_flash_attention_forward_no_dropout_inplace", query, dropout_p, return_debug_mask, alibi_slopes)
    lengths = (cum_seq_q, cum_seq_k, max_q, max_k)
    window = (window_size_left, window_size_right)
    return _attend(query, key, value, lengths, is_causal, scale, window, seqused_k, block_table, num_splits, out)[1]


def flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> _Gradients:
    """``aten::_flash_attention_backward``: gradients of query, key and value, from out and logsumexp as given.

    Raises:
        UnsupportedError: dropout was asked for.
    """
    _refuse("_flash_attention_backward", query, dropout_p)
    packed = cum_seq_q is not None
    with torch.no_grad():
        dq, dk, dv, _ = mha_bwd(
            grad_out,
            query,
            key,
            value,
            out,
            logsumexp,
            cum_seq_q,
            cum_seq_k,
            max_seqlen_q=max_q if packed else None,
            max_seqlen_k=max_k if packed else None,
            softmax_scale=scale,
            causal=is_causal,
            window_size=_window(window_size_left, window_size_right),
            sm_margin=_sm_margin(),
        )
    return _laid_out(dq, query), _laid_out(dk, key), _laid_out(dv, value)


def sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, None, None, int, int, Tensor, Tensor, Tensor]:
    """``aten::_scaled_dot_product_flash_attention``.

    Args:
        query: ``(B, Hq, Sq, D)``.
        key: ``(B, Hkv, Sk, D)``.
        value: ``(B, Hkv, Sk, Dv)``.
        dropout_p: must be 0.
        is_causal: query i, at position ``i + Sk - Sq``, sees no key behind its position.
        return_debug_mask: must be False.

    Returns:
        ``(out, logsumexp, None, None, Sq, Sk, rng_state, unused, debug_mask)``: out of the strides of query; logsumexp
        fp32 ``(B, Hq, Sq)``, natural log; the last three, which are of dropout, zero or empty.

    Raises:
        UnsupportedError: dropout, a debug mask or float8 tensors are asked for.
    """
    _refuse("_scaled_dot_product_flash_attention", query, dropout_p, return_debug_mask)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = _made_like(query, value)
    written = None if out is None else out.transpose(1, 2)
    found, lse = _attend(q, k, v, (None, None, 0, 0), is_causal, scale, (None, None), None, None, None, written)
    out = found.transpose(1, 2) if out is None else out
    return out, lse, None, None, query.shape[2], key.shape[2], *_no_dropout(query)


def sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> _Gradients:
    """``aten::_scaled_dot_product_flash_attention_backward``: gradients of the strides of query, key and value.

    Raises:
        UnsupportedError: dropout was asked for.
    """
    _refuse("_scaled_dot_product_flash_attention_backward", query, dropout_p)
    dout, q, k, v, o = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    with torch.no_grad():
        dq, dk, dv, _ = mha_bwd(
            dout,
            q,
            k,
            v,
            o,
            logsumexp,
            softmax_scale=scale,
            causal=is_causal,
            sm_margin=_sm_margin(),
        )
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    return _laid_out(dq, query), _laid_out(dk, key), _laid_out(dv, value)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[Tensor | None, Tensor | None, int, int],
    is_causal: bool,
    scale: float | None,
    window: tuple[int | None, int | None],
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    num_splits: int | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``(out, softmax_lse)`` with the heads behind the tokens; lengths: both offsets, both bounds."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = lengths
    if num_splits is None:
        num_splits = 1 if torch.are_deterministic_algorithms_enabled() else 0
    with torch.no_grad():  # autograd is above this, and out= has no gradient
        out, lse = mha_fwd(
            q,
            k,
            v,
            out=out,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            seqused_k=seqused_k,
            max_seqlen_q=None if cu_seqlens_q is None else max_seqlen_q,
            max_seqlen_k=None if cu_seqlens_k is None else max_seqlen_k,
            page_table=block_table,
            softmax_scale=scale,
            causal=is_causal,
            window_size=_window(*window),
            num_splits=num_splits,
            sm_margin=_sm_margin(),
        )
    # What merges or cuts the LSE by heads and rows expects them in this order in memory, too.
    return out, lse.contiguous()


def _refuse(
    operator: str, query: Tensor, dropout_p: float, return_debug_mask: bool = False, alibi_slopes: Tensor | None = None
) -> None:
    """Raise for what no kernel of broadhead computes."""
    where = f"aten::{operator} on broadhead"
    if dropout_p != 0.0:
        raise UnsupportedError(f"{where}: dropout_p must be 0, got {dropout_p}; pass 0, {_REMEDY}")
    if return_debug_mask:
        raise UnsupportedError(
            f"{where}: return_debug_mask must be False, got True, as there is no dropout whose mask it would be; pass "
            f"False, {_REMEDY}"
        )
    if alibi_slopes is not None:
        raise UnsupportedError(f"{where}: alibi_slopes must be None, got a tensor; leave it away, {_REMEDY}")
    if query.dtype.itemsize == 1:
        raise UnsupportedError(
            f"{where}: query must be bf16 or fp16, got {query.dtype}; call broadhead.flash_attn_func, which takes"
            f" float8 with its factors, {_REMEDY}"
        )


def _window(left: int | None, right: int | None) -> tuple[int, int]:
    return -1 if left is None else left, -1 if right is None else right


def _sm_margin() -> int:
    """Multiprocessors that torch wants left free; torch 2.11 and older may not know the setting."""
    carveout: Any = getattr(torch._C, "_get_sm_carveout_experimental", None)
    return 0 if carveout is None else carveout() or 0


def _made_like(query: Tensor, value: Tensor) -> Tensor | None:
    """Memory for out of the strides of query, as aten promises to compiled code; None: the kernel makes its own.

    It makes its own where out has another width than query, or where query's columns do not lie together.
    """
    if query.shape[-1] != value.shape[-1]:
        return None
    out = torch.empty_like(query)
    return out if out.stride(-1) == 1 else None


def _laid_out(grad: Tensor, like: Tensor) -> Tensor:
    """A gradient of the strides that aten promises to compiled code: those of torch.empty_like."""
    if torch.empty_like(like, device="meta").stride() == grad.stride():
        return grad
    return torch.empty_like(like).copy_(grad)


def _no_dropout(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(rng_state, unused, debug_mask)`` of a call without dropout."""
    return (
        torch.zeros(2, dtype=torch.uint64, device=query.device),
        torch.zeros((), dtype=torch.uint64, device=query.device),
        query.new_empty(0),
    )
