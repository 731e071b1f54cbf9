"""A call of every public function by plain arguments, and other ways to spell its scalars and lay out its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import broadhead
import numpy as np
import torch

Function = Callable[..., Any]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense() -> dict[str, Any]:
    return {"q": randn(2, 6, 4, 16), "k": randn(2, 9, 2, 16), "v": randn(2, 9, 2, 16)}


def varlen() -> dict[str, Any]:
    return {
        "q": randn(7, 4, 16), "k": randn(11, 2, 16), "v": randn(11, 2, 16), "cu_seqlens_q": int32(0, 3, 7),
        "cu_seqlens_k": int32(0, 5, 11), "max_seqlen_q": 4, "max_seqlen_k": 6,
    }  # fmt: skip


def kvcache() -> dict[str, Any]:
    return {
        "q": randn(2, 2, 4, 16), "k_cache": randn(6, 4, 2, 16), "v_cache": randn(6, 4, 2, 16),
        "cache_seqlens": int32(7, 5), "page_table": int32(5, 1, 0, 2).view(2, 2),
    }  # fmt: skip


def appending() -> dict[str, Any]:
    return {
        "q": randn(2, 2, 4, 16), "k_cache": randn(2, 12, 2, 16), "v_cache": randn(2, 12, 2, 16),
        "k": randn(2, 2, 2, 16), "v": randn(2, 2, 2, 16), "cache_seqlens": int32(7, 5),
        "rotary_cos": randn(12, 4), "rotary_sin": randn(12, 4), "rotary_interleaved": False,
    }  # fmt: skip


def shared() -> dict[str, Any]:
    return {
        "q": randn(2, 2, 4, 16), "k_cache": randn(8, 4, 2, 16), "v_cache": randn(8, 4, 2, 16),
        "prefix_len": 4, "page_table": int32(5, 1, 0, 2).view(2, 2), "cache_seqlens": int32(7, 5),
        "prefix_page_table": int32(7, 6),
    }  # fmt: skip


def metadata() -> dict[str, Any]:
    return {
        "batch_size": 2, "max_seqlen_q": 1, "max_seqlen_k": 64, "num_heads_q": 4, "num_heads_kv": 2, "headdim": 64,
        "cache_seqlens": int32(7, 5),
    }  # fmt: skip


#: Every public function that takes scalars: name -> (its arguments, the scalars that it takes beside the common ones).
CALLS: dict[str, tuple[str, Callable[[], dict[str, Any]], dict[str, Any]]] = {
    "dense": ("flash_attn_func", dense, {"attention_chunk": 4, "num_splits": 3, "sm_margin": 1, "pack_gqa": True}),
    "varlen": ("flash_attn_varlen_func", varlen, {"attention_chunk": 4, "max_seqlen_q": 4, "max_seqlen_k": 6}),
    "kvcache": ("flash_attn_with_kvcache", kvcache, {"attention_chunk": 4, "num_splits": 3, "tokens_per_split": 0}),
    "append": ("flash_attn_with_kvcache", appending, {"attention_chunk": 4, "rotary_interleaved": True}),
    "mha_fwd": (
        "mha_fwd", lambda: {**dense(), "k_new": None},
        {"attention_chunk": 4, "window_size_left": 3, "window_size_right": 1, "num_splits": 3},
    ),
    "mha_bwd": ("mha_bwd", lambda: {"dout": randn(2, 6, 4, 16), **dense()}, {"attention_chunk": 4}),
    "qkvpacked": ("flash_attn_qkvpacked_func", lambda: {"qkv": randn(2, 6, 3, 4, 16)}, {"attention_chunk": 4}),
    "heads packed": (
        "flash_attn_qkvpacked_func", lambda: {"qkv": randn(2, 6, 8, 16), "num_heads_q": 4}, {"num_heads_q": 4},
    ),
    "kvpacked": (
        "flash_attn_kvpacked_func", lambda: {"q": randn(2, 6, 4, 16), "kv": randn(2, 9, 2, 2, 16)},
        {"attention_chunk": 4},
    ),
    "varlen packed": (
        "flash_attn_varlen_qkvpacked_func",
        lambda: {"qkv": randn(7, 3, 4, 16), "cu_seqlens": int32(0, 3, 7), "max_seqlen": 4}, {"max_seqlen": 4},
    ),
    "shared prefix": ("flash_attn_with_shared_prefix", shared, {"prefix_len": 4, "num_splits": 3}),
}  # fmt: skip
COMMON = {"causal": True, "softcap": 3.0, "softmax_scale": 0.3}
#: Ways to spell a scalar.
SPELLINGS: dict[str, Callable[[Any], Any]] = {
    "NumPy": lambda x: np.bool_(x) if isinstance(x, bool) else np.int64(x) if isinstance(x, int) else np.float64(x),
    "narrow NumPy": lambda x: (
        np.bool_(x) if isinstance(x, bool) else np.int32(x) if isinstance(x, int) else np.float32(x)
    ),
    "array": lambda x: np.array(x),
    "tensor": lambda x: torch.tensor(x),
    "int for bool": lambda x: int(x) if isinstance(x, bool) else x,
}


def clone(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def same(got: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    elif expected is not None:
        for a, b in zip(got, expected, strict=True):
            same(a, b)


def function_of(name: str) -> Function:
    return getattr(broadhead, CALLS[name][0])


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with every other element of memory left out."""
    wide = torch.zeros(*x.shape, 2, dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]
