"""Arguments as FlashAttention-3 takes them: scalars in tensors are read, strided tensors copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import validation as check
from .arguments import FLAGS, SCALARS, AttentionArgs
from .cache_length import lengths_tensor
from .layout import contiguous, is_strided
from .masking import normalize_window
from .names import KVCACHE_FUNCTIONS, shown_name

#: Fields whose tensors are only read: a copy of them is as good. Not scheduler_metadata, whose address is known, and
#: not the factors and tree_mask, which may have any strides.
_COPIED = (
    "q", "qv", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table", "kv_batch_idx", "leftpad_k",
    "sinks", "prefix_lens", "query_ranges", "causal_by_sequence",
)  # fmt: skip
_PLAIN = (bool, int, float, type(None), torch.SymInt, torch.SymFloat, torch.SymBool)


def are_caches(function: str, args: AttentionArgs) -> bool:
    """Whether k and v of a call are a cache, which is never copied."""
    return function in KVCACHE_FUNCTIONS or args.page_table is not None or args.kv_batch_idx is not None


def read_tensors(function: str, args: AttentionArgs) -> AttentionArgs:
    """``args`` with scalars and window out of their tensors, and copies in place of strided tensors.

    The same object where there is nothing to do. Other scalars stay as they are: validation converts them.
    """
    changes: dict[str, Any] = {}
    for name in SCALARS:
        value = getattr(args, name)
        if isinstance(value, Tensor):
            changes[name] = _scalar(function, name, value)
    window = args.window_size
    if isinstance(window, Tensor) or (
        isinstance(window, (tuple, list)) and any(isinstance(side, Tensor) for side in window)
    ):
        changes["window_size"] = normalize_window(window, False, function)
    length = args.seqused_k
    if function == "flash_attn_with_kvcache" and isinstance(length, Tensor) and length.dim() == 0:
        changes["seqused_k"] = lengths_tensor(function, args.q, args.cu_seqlens_q, length, args.k, args.page_table)
    for name in _COPIED if are_caches(function, args) else (*_COPIED, "k", "v"):
        value = getattr(args, name)
        if is_strided(value):
            changes[name] = contiguous(value)
    return changed(args, changes)


def plain_scalars(function: str, args: AttentionArgs) -> AttentionArgs:
    """``args`` with every scalar as Python's own bool, int or float, as an operator's schema wants them."""
    changes: dict[str, Any] = {}
    for name in SCALARS:
        value = getattr(args, name)
        if type(value) not in _PLAIN:
            changes[name] = _scalar(function, name, value)
    for name in FLAGS:
        value = getattr(args, name)
        if value is not None and type(value) is not bool:
            changes[name] = check.check_bool(function, shown_name(function, name), value)
    if args.softcap is None:
        changes["softcap"] = 0.0
    if args.attention_chunk is None:
        changes["attention_chunk"] = 0
    return changed(args, changes)


def changed(args: AttentionArgs, changes: dict[str, Any]) -> AttentionArgs:
    """``args`` with other values; without _replace, which torch.compile of older torch can not trace."""
    if not changes:
        return args
    return AttentionArgs(*[changes.get(name, value) for name, value in zip(AttentionArgs._fields, args)])


def _scalar(function: str, field: str, value: Any) -> Any:
    name = shown_name(function, field)
    if field in FLAGS:
        return check.check_bool(function, name, value)
    if field in ("softmax_scale", "softcap"):
        return check.check_number(function, name, value)
    return check.check_int(function, name, value)
