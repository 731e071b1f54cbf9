"""Makes the tensors of the landscape: dense, packed or in scattered pages, in bf16, fp16 or e4m3."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from broadhead_bench.cases_landscape import LandscapeCase
from broadhead_bench.inputs import E4M3_MAX

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn}
#: What e4m3 numbers are multiplied by: normal data reaches 5 in a large tensor, and 448 / 64 is 7.
DESCALE = 1 / 64


class LandscapeInputs(NamedTuple):
    """q ``(B, Sq, Hq, D)`` or, packed, ``(Tq, Hq, D)``; k and v the same with Hkv heads, or caches ``(pages, page_size,
    Hkv, D)``. Packed: cu_seqlens_q and cu_seqlens_k int32 ``(B + 1,)``. Pages: page_table int32 ``(B, pages of the
    longest)``, cache_seqlens int32 ``(B,)``. e4m3: the descales of q, k and v, fp32 ``(B, Hkv)``. sinks ``(Hq,)`` in
    the dtype of out."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    page_table: Tensor | None = None
    cache_seqlens: Tensor | None = None
    descales: tuple[Tensor, Tensor, Tensor] | None = None
    sinks: Tensor | None = None

    def descale_options(self) -> dict[str, Tensor]:
        """The descales as the flash-attn functions take them."""
        return dict(zip(("q_descale", "k_descale", "v_descale"), self.descales)) if self.descales else {}

    def of_sequence(self, case: LandscapeCase, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """q ``(Sq, Hq, D)``, k and v ``(Sk, Hkv, D)`` of a sequence, in fp32, descales applied."""
        if case.kind == "varlen":
            at_q, at_k = sum(case.seqlens_q[:index]), sum(case.seqlens_k[:index])
            keys = slice(at_k, at_k + case.seqlens_k[index])
            parts = self.q[at_q : at_q + case.seqlens_q[index]], self.k[keys], self.v[keys]
        elif self.page_table is not None:
            length = case.seqlens_k[index]
            pages = self.page_table[index, : -(-length // case.page_size)].long()
            # e4m3 is gathered as the bytes it is made of.
            k, v = (
                cache.view(torch.uint8)[pages].view(cache.dtype) if case.dtype == "e4m3" else cache[pages]
                for cache in (self.k, self.v)
            )
            parts = self.q[index], k.flatten(0, 1)[:length], v.flatten(0, 1)[:length]
        else:
            parts = self.q[index], self.k[index], self.v[index]
        factor = DESCALE if case.dtype == "e4m3" else 1.0
        q, k, v = (part.float() * factor for part in parts)
        return q, k, v

    def out_of_sequence(self, case: LandscapeCase, index: int, out: Tensor) -> Tensor:
        """What ``out`` holds of a sequence, ``(Sq, Hq, Dv)``."""
        if case.kind != "varlen":
            return out[index]
        start = sum(case.seqlens_q[:index])
        return out[start : start + case.seqlens_q[index]]


def landscape_inputs(case: LandscapeCase, device: torch.device) -> LandscapeInputs:
    """Random normal data."""
    batch, dims, dims_v = case.batch, case.head_dim, case.head_dim_v
    page_table = cache_seqlens = cu_q = cu_k = None
    if case.kind == "varlen":
        shapes: list[tuple[int, ...]] = [(sum(case.seqlens_q),), (sum(case.seqlens_k),)]
        cu_q, cu_k = (_offsets(lengths, device) for lengths in (case.seqlens_q, case.seqlens_k))
    elif case.page_size:
        counts = [-(-length // case.page_size) for length in case.seqlens_k]
        shapes = [(batch, case.seqlens_q[0]), (sum(counts), case.page_size)]
        cache_seqlens = torch.tensor(case.seqlens_k, dtype=torch.int32, device=device)
        used = torch.arange(max(counts), device=device) < torch.tensor(counts, device=device)[:, None]
        page_table = torch.zeros_like(used, dtype=torch.int32)
        page_table[used] = torch.randperm(sum(counts), device=device).to(torch.int32)
    else:
        shapes = [(batch, case.seqlens_q[0]), (batch, case.seqlens_k[0])]
    q = _values(case, (*shapes[0], case.num_heads_q, dims), device)
    k = _values(case, (*shapes[1], case.num_heads_kv, dims), device)
    v = _values(case, (*shapes[1], case.num_heads_kv, dims_v), device)
    descales = None
    if case.dtype == "e4m3":
        descale = torch.full((batch, case.num_heads_kv), DESCALE, dtype=torch.float32, device=device)
        descales = (descale, descale.clone(), descale.clone())
    sinks = None
    if case.sinks:
        dtype = torch.float16 if case.dtype == "fp16" else torch.bfloat16
        sinks = torch.randn(case.num_heads_q, device=device).to(dtype)
    return LandscapeInputs(q, k, v, cu_q, cu_k, page_table, cache_seqlens, descales, sinks)


def _values(case: LandscapeCase, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if case.dtype != "e4m3":
        return torch.randn(shape, dtype=TORCH_DTYPES[case.dtype], device=device)
    values = torch.randn(shape, dtype=torch.bfloat16, device=device)
    return values.div_(DESCALE).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
