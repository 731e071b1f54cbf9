"""Which calls of SDPA go to the flash operators that torch's own selection would not send there.

torch selects a kernel in C++: on CUDA it sends nothing beyond head_dim 256 to the flash operators, and below, on some
GPUs, goes to cuDNN first; on a CPU it has others. What is not taken here goes on to that selection.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey

from ...api.explain import is_supported

_CUDA_DTYPES = (torch.bfloat16, torch.float16)
_CPU_DTYPES = (*_CUDA_DTYPES, torch.float32, torch.float64)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``aten::scaled_dot_product_attention``: the flash operator where `takes` says so, else what torch selects.

    Args:
        query: ``(B, Hq, Sq, D)``.
        key: ``(B, Hkv, Sk, D)``.
        value: ``(B, Hkv, Sk, Dv)``.
    """
    if attn_mask is None and dropout_p == 0.0 and takes(query, key, value, is_causal, enable_gqa):
        flash = torch.ops.aten._scaled_dot_product_flash_attention.default
        # The product may be symbolic where code is traced, and aten wants a float.
        factor = float(query.shape[-1]) ** -0.5 if scale is None else scale
        out: Tensor = flash(query, key, value, 0.0, is_causal, False, scale=factor)[0]
        return out
    composite: Any = torch.ops.aten.scaled_dot_product_attention.default
    selected: Tensor = composite._op_dk(
        DispatchKey.CompositeImplicitAutograd,
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return selected


def takes(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool) -> bool:
    """Whether a call without a mask and without dropout goes to the flash operator here.

    So it does where the flash backend is enabled (``torch.nn.attention.sdpa_kernel``), and broadhead gives what SDPA
    promises; on CUDA where a kernel of broadhead runs it. Who activates broadhead asks for it, and would not get it
    from torch's own order: torch 2.11 prefers cuDNN on an H200.
    """
    tensors = (query, key, value)
    if not torch.backends.cuda.flash_sdp_enabled() or any(x.dim() != 4 or x.is_nested for x in tensors):
        return False
    batch, heads, seqlen_q, head_dim = query.shape
    on_cuda = query.device.type == "cuda"
    if any(x.dtype != query.dtype or x.device != query.device or x.shape[0] != batch for x in tensors):
        return False
    if query.dtype not in (_CUDA_DTYPES if on_cuda else _CPU_DTYPES):
        return False
    if key.shape[-1] != head_dim or value.shape[-1] != head_dim or head_dim % 8 != 0:
        return False
    heads_kv, seqlen_k = key.shape[1], key.shape[2]
    if value.shape[1] != heads_kv or value.shape[2] != seqlen_k or 0 in (batch, heads, heads_kv, seqlen_q, seqlen_k):
        return False
    if heads != heads_kv and not (enable_gqa and heads % heads_kv == 0):
        return False
    # SDPA aligns a causal mask at the first key, the flash operators at the last one.
    if is_causal and seqlen_q != seqlen_k:
        return False
    if not on_cuda:
        return True
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return _has_kernel(int(head_dim), query.dtype, needs_grad, query.device.index or 0)


@functools.cache
def _has_kernel(head_dim: int, dtype: torch.dtype, needs_grad: bool, device: int) -> bool:
    """Whether kernels run such a call, so that it does not leave a kernel of torch for the torch reference."""
    asked: dict[str, Any] = {"head_dim": head_dim, "dtype": dtype, "device": torch.device("cuda", device)}
    return all(
        is_supported(**asked, seqlen_q=256, seqlen_k=256, direction=direction)[0]
        for direction in (("forward", "backward") if needs_grad else ("forward",))
    )
