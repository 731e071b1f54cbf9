"""The packed forms: q, k and v in one tensor, read through views without a copy."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..call import validation as check
from ..call.masking import split_causal
from ..errors import InvalidArgumentError
from ..run import known
from .forward import run_forward
from .results import may_return_lse


def _split(function: str, packed: Any, rank: int, num_heads_q: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k, v in ``(..., 3, H, D)``, or in ``(..., Hq + 2 Hkv, D)`` with num_heads_q."""
    tensor = check.check_tensor(function, "qkv", packed, "a tensor that holds q, k and v")
    lead = "batch, seqlen" if rank == 2 else "total"
    if num_heads_q is None:
        if tensor.dim() != rank + 3 or tensor.shape[rank] != 3:
            raise InvalidArgumentError(
                f"{function}: qkv must be ({lead}, 3, heads, head_dim), got {tuple(tensor.shape)}; with num_heads_q"
                f" it is ({lead}, heads_q + 2 * heads_kv, head_dim)"
            )
        q, k, v = tensor.unbind(rank)
        return q, k, v
    heads_q = check.check_int(function, "num_heads_q", num_heads_q, 1, check.MAX_NUM_HEADS)
    if tensor.dim() != rank + 2 or tensor.shape[rank] <= heads_q or (tensor.shape[rank] - heads_q) % 2:
        raise InvalidArgumentError(
            f"{function}: qkv must be ({lead}, heads_q + 2 * heads_kv, head_dim) with num_heads_q {heads_q}, got"
            f" {tuple(tensor.shape)}"
        )
    heads_kv = (tensor.shape[rank] - heads_q) // 2
    if heads_q % heads_kv:
        raise InvalidArgumentError(
            f"{function}: num_heads_q must be a multiple of the key heads that it leaves in qkv, got {heads_q} and"
            f" {heads_kv} (qkv {tuple(tensor.shape)})"
        )
    q, k, v = tensor.split([heads_q, heads_kv, heads_kv], dim=rank)
    return q, k, v


@may_return_lse
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool | Tensor = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    return_softmax_lse: bool = False,
    query_ranges: Tensor | None = None,
    ranges_in_window: bool = False,
    tree_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_attn_func of q, k and v in one tensor. No copy is made.

    Args:
        qkv: ``(B, S, 3, H, D)``; with num_heads_q ``(B, S, Hq + 2 Hkv, D)``.
        num_heads_q: Hq, where there are fewer KV heads than query heads.
        softmax_scale, causal, ...: the other arguments are those of flash_attn_func, whose results and errors these
            are.
    """
    function = "flash_attn_qkvpacked_func"
    if s_aux is not None or learnable_sink is not None:
        sinks = check.pick_sinks(function, sinks, s_aux, learnable_sink)
    q, k, v = _split(function, qkv, 2, num_heads_q)
    need_lse = return_attn_probs or return_softmax_lse
    by_sequence = None
    if type(causal) is not bool:
        causal, by_sequence = split_causal(causal)
    call = (
        q, k, v, None, out, None, None, None, None, None, None, None, None, None, q_descale, k_descale, v_descale,
        softmax_scale, causal, window_size, attention_chunk, softcap, None, 1, None, sm_margin, sinks, prefix_lens,
        backend, 0,
    ) + (query_ranges, ranges_in_window, by_sequence, tree_mask)  # fmt: skip
    result = None if is_dynamo_compiling() else known.run_known(function, need_lse, call)
    if result is None:
        result = run_forward(function, call, need_lse, deterministic)
    return result if need_lse else result[0]


@may_return_lse
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    softmax_scale: float | None = None,
    causal: bool | Tensor = False,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
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
    return_softmax_lse: bool = False,
    query_ranges: Tensor | None = None,
    ranges_in_window: bool = False,
    tree_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_attn_func of k and v in one tensor. No copy is made.

    Args:
        q: ``(B, Sq, Hq, D)``.
        kv: ``(B, Sk, 2, Hkv, D)``.
        softmax_scale, causal, ...: the other arguments are those of flash_attn_func, whose results and errors these
            are.
    """
    function = "flash_attn_kvpacked_func"
    tensor = check.check_tensor(function, "kv", kv, "a tensor that holds k and v")
    if tensor.dim() != 5 or tensor.shape[2] != 2:
        raise InvalidArgumentError(
            f"{function}: kv must be (batch, seqlen, 2, heads_kv, head_dim), got {tuple(tensor.shape)}"
        )
    if s_aux is not None or learnable_sink is not None:
        sinks = check.pick_sinks(function, sinks, s_aux, learnable_sink)
    k, v = tensor.unbind(2)
    need_lse = return_attn_probs or return_softmax_lse
    by_sequence = None
    if type(causal) is not bool:
        causal, by_sequence = split_causal(causal)
    call = (
        q, k, v, None, out, None, None, None, None, None, None, None, None, None, None, None, None, softmax_scale,
        causal, window_size, attention_chunk, softcap, None, 1, None, sm_margin, sinks, prefix_lens, backend, 0,
    ) + (query_ranges, ranges_in_window, by_sequence, tree_mask)  # fmt: skip
    result = None if is_dynamo_compiling() else known.run_known(function, need_lse, call)
    if result is None:
        result = run_forward(function, call, need_lse, deterministic)
    return result if need_lse else result[0]


@may_return_lse
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float | None = None,
    causal: bool | Tensor = False,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    return_softmax_lse: bool = False,
    query_ranges: Tensor | None = None,
    ranges_in_window: bool = False,
    tree_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_attn_varlen_func of q, k and v in one tensor. No copy is made.

    Args:
        qkv: ``(T, 3, H, D)``; with num_heads_q ``(T, Hq + 2 Hkv, D)``.
        cu_seqlens: int32 ``(B + 1,)``, offsets of queries and keys alike.
        max_seqlen: tokens of the longest sequence.
        num_heads_q: Hq, where there are fewer KV heads than query heads.
        softmax_scale, causal, ...: the other arguments are those of flash_attn_func, the masks of a token those of
            flash_attn_varlen_func, whose results and errors these are.
    """
    function = "flash_attn_varlen_qkvpacked_func"
    if s_aux is not None or learnable_sink is not None:
        sinks = check.pick_sinks(function, sinks, s_aux, learnable_sink)
    if cu_seqlens is None:
        raise InvalidArgumentError(f"{function}: cu_seqlens must be an int32 tensor of shape (batch + 1,), got None")
    q, k, v = _split(function, qkv, 1, num_heads_q)
    need_lse = return_attn_probs or return_softmax_lse
    by_sequence = None
    if type(causal) is not bool:
        causal, by_sequence = split_causal(causal)
    call = (
        q, k, v, None, out, cu_seqlens, cu_seqlens, None, None, max_seqlen, max_seqlen, None, None, None, None, None,
        None, softmax_scale, causal, window_size, attention_chunk, softcap, None, 1, None, sm_margin, sinks,
        prefix_lens, backend, 0,
    ) + (query_ranges, ranges_in_window, by_sequence, tree_mask)  # fmt: skip
    result = None if is_dynamo_compiling() else known.run_known(function, need_lse, call)
    if result is None:
        result = run_forward(function, call, need_lse, deterministic)
    return result if need_lse else result[0]
