"""The operator broadhead::append_kv: new keys into a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call.plain import plain_fields
from ..run.append import Append, run_append
from .canonical import canonical

_APPEND = (
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k_new, Tensor v_new, Tensor cache_seqlens, Tensor? page_table,"
    " Tensor? cache_batch_idx, Tensor? cu_seqlens_k_new, Tensor? rotary_cos, Tensor? rotary_sin,"
    " Tensor? rotary_seqlens, bool rotary_interleaved, Tensor? q=None, Tensor? cu_seqlens_q=None,"
    " bool causal_or_local=False, Tensor? k_descale=None, Tensor? v_descale=None) -> (Tensor, Tensor)"
)


@torch.library.custom_op("broadhead::append_kv", mutates_args=("k_cache", "v_cache"), schema=_APPEND)
def append(
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_seqlens: Tensor | None,
    rotary_interleaved: bool,
    q: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    causal_or_local: bool = False,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(q rotated, empty without q; lengths after the append)``."""
    call = Append(
        k_cache, v_cache, k_new, v_new, cache_seqlens, None if rotary_cos is None else q, rotary_cos, rotary_sin,
        rotary_seqlens, cu_seqlens_q, cu_seqlens_k_new, page_table, cache_batch_idx, k_descale, v_descale,
        rotary_interleaved, causal_or_local,
    )  # fmt: skip
    call = plain_fields("append_kv", call, written=("k_cache", "v_cache"))
    turned, lengths = run_append(call, function="append_kv")
    return k_new.new_empty(0) if turned is None else canonical(turned), lengths


@append.register_fake
def _(
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_seqlens: Tensor | None,
    rotary_interleaved: bool,
    q: Tensor | None = None,
    *others: Any,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    turned = k_new.new_empty(0) if q is None or rotary_cos is None else q.new_empty(q.shape)
    return turned, cache_seqlens.new_empty(cache_seqlens.shape)
