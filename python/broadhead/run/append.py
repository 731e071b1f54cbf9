"""Runs a checked append of new keys: in one kernel launch where the kernel takes it, else on torch ops."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call.plain import is_autocast, mark_written
from ..plan import native
from ..plan.device import common_kernel_obstacle, describe
from ..reference import append as append_kv
from .cuda_backend import CURRENT_STREAM, connected_module
from .fallback import ASKED_FOR_TORCH, Dispatch, settle_operation, state

_FLOAT8 = torch.float8_e4m3fn
#: (dtype of the cache, of the new keys) that the kernel stores.
_KERNEL_DTYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (_FLOAT8, torch.bfloat16),
    (_FLOAT8, torch.float16),
    (_FLOAT8, _FLOAT8),
)
_MAX_ELEMENTS = 2**32 - 2**20  # a thread has an index of 31 bits and moves two elements at least

BY_KERNEL: Dispatch = ("cuda", "append_kv", "one launch of the append kernel")


class Append(NamedTuple):
    """One append. Shapes as in append_kv.append and apply_rotary_q; ``q`` None: there are no queries to rotate."""

    k_cache: Tensor
    v_cache: Tensor
    k_new: Tensor
    v_new: Tensor
    cache_seqlens: Tensor
    q: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_seqlens: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k_new: Tensor | None
    page_table: Tensor | None
    cache_batch_idx: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None
    rotary_interleaved: bool
    causal_or_local: bool


def kernel_obstacle(call: Append) -> str | None:
    """Why the kernel can not run a checked append; None: it can."""
    obstacle = common_kernel_obstacle(call.k_cache.device)
    if obstacle is not None:
        return obstacle
    if (call.k_cache.dtype, call.k_new.dtype) not in _KERNEL_DTYPES:
        return f"no kernel stores {call.k_new.dtype} keys in a cache of {call.k_cache.dtype}"
    for name, angles in (("rotary_cos", call.rotary_cos), ("rotary_sin", call.rotary_sin)):
        if angles is None or call.rotary_cos is None:
            continue
        taken = (torch.float32, *((torch.bfloat16, torch.float16) if call.k_new.dtype == _FLOAT8 else ()))
        if angles.dtype not in (*taken, call.k_new.dtype) or angles.dtype != call.rotary_cos.dtype:
            return f"{name} is {angles.dtype}; the kernel takes rotary tables of one dtype, fp32 or that of q"
        if angles.shape[1] > 1 and angles.stride(1) != 1:
            return f"{name} has strides {angles.stride()}; the kernel takes a contiguous last dimension"
    if sum(0 if x is None else x.numel() for x in (call.k_new, call.v_new, call.q)) > _MAX_ELEMENTS:
        return f"q, k and v hold more than {_MAX_ELEMENTS} elements"
    return None


def run_append(call: Append, backend: str | None = None, function: str | None = None) -> tuple[Tensor | None, Tensor]:
    """Write the new keys; ``(q rotated, or None where there is none, lengths after the append)``.

    Args:
        function: by this name a fallback is told, or refused; None: the caller has done that.
    """
    obstacle = ASKED_FOR_TORCH if backend == "torch" else kernel_obstacle(call)
    if obstacle is None:
        return launch_append(call)
    if function is not None:
        settle_operation(function, "append", describe(call.k_cache.device), backend, obstacle)
    state.append = ("torch", None, obstacle)
    return _run_torch(call)


def launch_append(call: Append) -> tuple[Tensor | None, Tensor]:
    """run_append by the kernel, which takes the call: allocates what it writes and launches it."""
    (
        k_cache, v_cache, k_new, v_new, cache_seqlens, q, rotary_cos, rotary_sin, rotary_seqlens, cu_seqlens_q,
        cu_seqlens_k_new, page_table, cache_batch_idx, k_descale, v_descale, rotary_interleaved, causal_or_local,
    ) = call  # fmt: skip
    if k_cache.get_device() != torch.cuda.current_device():
        with torch.cuda.device(k_cache.device):
            return launch_append(call)
    lengths = torch.empty_like(cache_seqlens)
    q_out = None if q is None else torch.empty_like(q)
    module = native.extension()
    assert module is not None
    module.append_kv(
        k_cache, v_cache, k_new, v_new, cache_seqlens, lengths, q, q_out, rotary_cos, rotary_sin, rotary_seqlens,
        None if q is None else cu_seqlens_q, cu_seqlens_k_new, page_table, cache_batch_idx, k_descale, v_descale,
        int(rotary_interleaved), int(causal_or_local), CURRENT_STREAM,
    )  # fmt: skip
    mark_written(k_cache, v_cache)
    state.append = BY_KERNEL
    return q_out, lengths


def remember_append(
    causal_or_local: bool, args: tuple[Any, ...], new: tuple[Any, ...], attention: tuple[Any, ...]
) -> None:
    """Make calls like ``args`` and ``new`` known: both ran on kernels, attention as ``attention``."""
    connected_module().remember_append(BY_KERNEL, causal_or_local, args, new, attention)


def _run_torch(call: Append) -> tuple[Tensor | None, Tensor]:
    if is_autocast(call.k_cache):  # it would change dtypes on the way, and knows no fp16 on a CPU
        with torch.autocast(call.k_cache.device.type, enabled=False):
            return _run_torch(call)
    q = call.q
    if q is not None and call.rotary_cos is not None and call.rotary_sin is not None:
        q = append_kv.apply_rotary_q(
            q,
            call.rotary_cos,
            call.rotary_sin,
            cache_seqlens=call.cache_seqlens,
            rotary_seqlens=call.rotary_seqlens,
            cu_seqlens_q=call.cu_seqlens_q,
            causal_or_local=call.causal_or_local,
            rotary_interleaved=call.rotary_interleaved,
        )
    append_kv.append(
        call.k_cache,
        call.v_cache,
        call.k_new,
        call.v_new,
        cache_seqlens=call.cache_seqlens,
        page_table=call.page_table,
        cache_batch_idx=call.cache_batch_idx,
        cu_seqlens_k_new=call.cu_seqlens_k_new,
        rotary_cos=call.rotary_cos,
        rotary_sin=call.rotary_sin,
        rotary_seqlens=call.rotary_seqlens,
        rotary_interleaved=call.rotary_interleaved,
        k_descale=call.k_descale,
        v_descale=call.v_descale,
    )
    return q, append_kv.appended_lengths(
        call.k_cache, call.cache_seqlens, call.k_new, call.cu_seqlens_k_new, call.page_table
    )
