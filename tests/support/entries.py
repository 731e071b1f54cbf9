"""A call of every public function with every tensor argument that it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import broadhead
import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
PAGES = ((3, 0, 1), (2, 5, 4))
F32 = torch.float32
LSE = {"return_softmax_lse": True}


@dataclass
class Entry:
    """One call: ``function(**tensors, **values)``; ``written`` names the tensors that it writes."""

    function: Callable[..., Any]
    tensors: dict[str, Tensor]
    values: dict[str, Any] = field(default_factory=dict)
    written: tuple[str, ...] = ()

    def clone(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.tensors.items()}

    def run(self, tensors: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
        """What it returns, and the tensors that it wrote."""
        result = self.function(**tensors, **self.values)
        found = [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]
        return found, {name: tensors[name] for name in self.written}


@dataclass(frozen=True)
class Draw:
    """Draws the tensors of entries: two sequences, 4 heads over 2 KV heads, head_dim 64, pages of 16 tokens."""

    device: torch.device | str
    dtype: torch.dtype

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype or self.dtype)

    def int32(self, *values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def caches(self) -> dict[str, Tensor]:
        return {"k_cache": self.randn(6, 16, 2, 64), "v_cache": self.randn(6, 16, 2, 64)}

    def decode(self) -> dict[str, Tensor]:
        return {"q": self.randn(2, 1, 4, 64), **self.caches()}

    def pages(self) -> dict[str, Tensor]:
        return {"cache_seqlens": self.int32(20, 33), "page_table": self.int32(*PAGES)}


def entries(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Entry]:
    """Entries of every public function but mha_bwd; names of calls by what they take."""
    draw = Draw(device, dtype)
    return {**_of_keys(draw), **_of_caches(draw), **_of_plans_and_parts(draw)}


def _of_keys(draw: Draw) -> dict[str, Entry]:
    """Calls that bring their keys: dense, varlen and packed."""
    randn, int32 = draw.randn, draw.int32
    dense = {"q": randn(2, 5, 4, 64), "k": randn(2, 7, 2, 64), "v": randn(2, 7, 2, 64)}
    packed = {"q": randn(9, 4, 64), "k": randn(11, 2, 64), "v": randn(11, 2, 64)}
    cu = {"cu_seqlens_q": int32(0, 3, 9), "cu_seqlens_k": int32(0, 6, 11)}
    used = {"seqused_q": int32(2, 5), "seqused_k": int32(5, 4)}
    return {
        "dense": Entry(
            broadhead.flash_attn_func,
            {**dense, "qv": randn(2, 5, 4, 64), "sinks": randn(4, dtype=F32), "prefix_lens": int32(2, 4)},
            {"causal": True, **LSE},
        ),
        "dense_out": Entry(
            broadhead.flash_attn_func, {**dense, "out": randn(2, 5, 4, 64)}, {"softcap": 9.0, **LSE}, ("out",)
        ),
        "masks": Entry(
            broadhead.flash_attn_func,
            {**dense, "query_ranges": int32(*[2, 6] * 5, *[0, 3] * 5).view(2, 5, 2), "causal": int32(1, 0)},
            {"window_size": (3, -1), "ranges_in_window": True, **LSE},
        ),
        "varlen": Entry(
            broadhead.flash_attn_varlen_func,
            {**packed, **cu, **used, "sinks": randn(4, dtype=F32), "out": randn(9, 4, 64)},
            {"max_seqlen_q": 6, "max_seqlen_k": 6, "causal": True, **LSE},
            ("out",),
        ),
        "qkvpacked": Entry(broadhead.flash_attn_qkvpacked_func, {"qkv": randn(2, 5, 3, 4, 64)}, dict(LSE)),
        "kvpacked": Entry(
            broadhead.flash_attn_kvpacked_func, {"q": randn(2, 5, 4, 64), "kv": randn(2, 7, 2, 2, 64)}, dict(LSE)
        ),
        "varlen_qkvpacked": Entry(
            broadhead.flash_attn_varlen_qkvpacked_func,
            {"qkv": randn(9, 3, 4, 64), "cu_seqlens": int32(0, 3, 9)},
            {"max_seqlen": 6, **LSE},
        ),
    }  # fmt: skip


def _of_caches(draw: Draw) -> dict[str, Entry]:
    """Calls over a cache, and those that append to it."""
    randn, int32 = draw.randn, draw.int32
    decode, paged = draw.decode(), draw.pages()
    angles = {"rotary_cos": randn(64, 16, dtype=F32), "rotary_sin": randn(64, 16, dtype=F32)}
    found = {
        "decode": Entry(
            broadhead.flash_attn_with_kvcache,
            {**decode, **paged, "cache_leftpad": int32(1, 2), "out": randn(2, 1, 4, 64)},
            {"causal": True, **LSE},
            ("out",),
        ),
        "tree": Entry(
            broadhead.flash_attn_with_kvcache,
            {
                **decode, **paged, "q": randn(2, 3, 4, 64), "causal": torch.tensor([True, False], device=draw.device),
                "tree_mask": torch.tensor([[-1, 1 << 62, 0], [5, 1 << 61, -(1 << 63)]], device=draw.device),
            },
            dict(LSE),
        ),
        "batch_index": Entry(
            broadhead.flash_attn_with_kvcache,
            {
                "q": randn(9, 4, 64), "k_cache": randn(3, 20, 2, 64), "v_cache": randn(3, 20, 2, 64),
                "cache_seqlens": int32(12, 7), "cache_batch_idx": int32(2, 0), "cu_seqlens_q": int32(0, 3, 9),
            },
            {"max_seqlen_q": 6, **LSE},
        ),
        "append": Entry(
            broadhead.flash_attn_with_kvcache,
            {
                **decode, "k": randn(2, 1, 2, 64), "v": randn(2, 1, 2, 64), **paged, **angles,
                "rotary_seqlens": int32(3, 7),
            },
            {"causal": True, **LSE},
            ("k_cache", "v_cache"),
        ),
        "append_packed": Entry(
            broadhead.flash_attn_with_kvcache,
            {
                "q": randn(3, 4, 64), **draw.caches(), "k": randn(3, 2, 64), "v": randn(3, 2, 64), **paged,
                "cu_seqlens_q": int32(0, 2, 3), "cu_seqlens_k_new": int32(0, 2, 3),
            },
            {"max_seqlen_q": 2, "causal": True, **LSE},
            ("k_cache", "v_cache"),
        ),
        "mha_fwd": Entry(
            broadhead.mha_fwd,
            {
                "q": decode["q"], "k": draw.caches()["k_cache"], "v": draw.caches()["v_cache"],
                "k_new": randn(2, 1, 2, 64), "v_new": randn(2, 1, 2, 64), "seqused_k": int32(20, 33),
                "page_table": int32(*PAGES), "kv_batch_idx": int32(1, 0),
            },
            {"causal": True},
            ("k", "v"),
        ),
        "shared_prefix": Entry(
            broadhead.flash_attn_with_shared_prefix,
            {**decode, **paged, "prefix_page_table": int32(1, 4), "out": randn(2, 1, 4, 64)},
            {"prefix_len": 20, **LSE},
            ("out",),
        ),
    }  # fmt: skip
    if draw.dtype != torch.float32:
        found["fp8_cache"] = Entry(
            broadhead.flash_attn_with_kvcache,
            {
                "q": decode["q"], "k_cache": draw.caches()["k_cache"].to(FP8),
                "v_cache": draw.caches()["v_cache"].to(FP8),
                **paged, "k_descale": torch.rand(2, 2, device=draw.device),
                "v_descale": torch.rand(2, 2, device=draw.device),
            },
            dict(LSE),
        )  # fmt: skip
    return found


def _of_plans_and_parts(draw: Draw) -> dict[str, Entry]:
    """Scheduler metadata, and merges of partial results."""
    randn, int32 = draw.randn, draw.int32
    plan = {"batch_size": 2, "max_seqlen_q": 1, "max_seqlen_k": 48, "num_heads_q": 4, "num_heads_kv": 2, "headdim": 64}
    return {
        "metadata": Entry(
            broadhead.get_scheduler_metadata,
            {
                "cache_seqlens": int32(20, 33), "cu_seqlens_q": int32(0, 1, 2), "cache_leftpad": int32(1, 2),
                "page_table": int32(*PAGES), "out": torch.full((17,), 9, dtype=torch.int32, device=draw.device),
            },
            {**plan, "page_size": 16, "qkv_dtype": draw.dtype},
            ("out",),
        ),
        "merge": Entry(
            broadhead.merge_attn_states,
            {
                "out_a": randn(5, 4, 32), "lse_a": randn(4, 5, dtype=F32), "out_b": randn(5, 4, 32),
                "lse_b": randn(4, 5, dtype=F32), "out": randn(5, 4, 32),
            },
            {},
            ("out",),
        ),
        "combine": Entry(
            broadhead.flash_attn_combine,
            {
                "out_partial": randn(3, 5, 4, 32, dtype=F32), "lse_partial": randn(3, 5, 4, dtype=F32),
                "out": randn(5, 4, 32),
            },
            {},
            ("out",),
        ),
    }  # fmt: skip


def backward_entries(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Entry]:
    """mha_bwd, dense and varlen."""
    found = {}
    for name, source in (("dense", "dense_out"), ("varlen", "varlen")):
        forward = entries(device, dtype)[source]
        tensors = {key: x for key, x in forward.tensors.items() if key not in ("out", "seqused_q", "seqused_k")}
        values: dict[str, Any] = {"causal": True}
        if name == "varlen":
            values |= {"max_seqlen_q": 6, "max_seqlen_k": 6}
        out, lse = broadhead.mha_fwd(**tensors, **values)
        tensors |= {"dout": torch.randn_like(out), "out": out, "softmax_lse": lse}
        tensors |= {f"d{x}": torch.zeros_like(tensors[x]) for x in ("q", "k", "v")}
        found[f"mha_bwd_{name}"] = Entry(broadhead.mha_bwd, tensors, values, ("dq", "dk", "dv"))
    return found


def tensor_arguments() -> Iterator[tuple[str, str]]:
    """Every (entry, tensor argument) there is."""
    for name, entry in (entries() | backward_entries()).items():
        for argument in entry.tensors:
            yield name, argument
