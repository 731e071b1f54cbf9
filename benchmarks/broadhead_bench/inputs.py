"""Makes the tensors of the cases: random normal data, scattered pages, packed sequences, e4m3 with its scales."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from broadhead_bench.cases import DenseCase, PagedCase, VarlenCase

#: The largest number of e4m3.
E4M3_MAX = 448.0


class DenseInputs(NamedTuple):
    """q, k, v and dout ``(B, S, H, D)`` in bf16."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


class PagedInputs(NamedTuple):
    """Tensors of a paged case: q ``(B, Sq, H, D)``, caches ``(pages, page_size, Hkv, D)``, page_table int32 ``(B, pages
    of the longest sequence)`` with scattered pages, cache_seqlens int32 ``(B,)``."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor
    cache_seqlens: Tensor

    def gathered(self, context: int) -> tuple[Tensor, Tensor]:
        """K and V of the sequences as dense copies ``(B, context, Hkv, D)``."""
        pages = self.page_table.long()
        return (
            self.k_cache[pages].flatten(1, 2)[:, :context].contiguous(),
            self.v_cache[pages].flatten(1, 2)[:, :context].contiguous(),
        )

    def used_pages(self) -> tuple[Tensor, Tensor]:
        """Pages of each sequence ``(B,)``, and their indices one after the other, both int32."""
        page_size = self.k_cache.shape[1]
        counts = (self.cache_seqlens + page_size - 1) // page_size
        columns = torch.arange(self.page_table.shape[1], device=counts.device)
        return counts, self.page_table[columns < counts[:, None]]


class VarlenInputs(NamedTuple):
    """Packed q, k, v ``(T, H, D)``, cu_seqlens int32 ``(N + 1,)`` of queries and keys alike."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


class Fp8Inputs(NamedTuple):
    """q, k, v in e4m3 ``(B, S, H, D)`` and what their numbers are multiplied by, fp32 ``(B, Hkv)``."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_descale: Tensor
    k_descale: Tensor
    v_descale: Tensor

    def widened(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same numbers in bf16, scales applied."""

        def widen(values: Tensor, descale: Tensor) -> Tensor:
            group = values.shape[2] // descale.shape[1]
            return (values.float() * descale.repeat_interleave(group, dim=1)[:, None, :, None]).bfloat16()

        return widen(self.q, self.q_descale), widen(self.k, self.k_descale), widen(self.v, self.v_descale)


def normal(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def dense_inputs(case: DenseCase, device: torch.device) -> DenseInputs:
    """q, k, v and dout in bf16."""
    tokens = (case.batch, case.seqlen)
    return DenseInputs(
        normal(*tokens, case.num_heads_q, case.head_dim, device=device),
        normal(*tokens, case.num_heads_kv, case.head_dim, device=device),
        normal(*tokens, case.num_heads_kv, case.head_dim_v, device=device),
        normal(*tokens, case.num_heads_q, case.head_dim_v, device=device),
    )


def paged_inputs(case: PagedCase, device: torch.device) -> PagedInputs:
    """bf16 caches whose pages are scattered."""
    pages = case.batch * case.pages_per_sequence
    shape = (pages, case.page_size, case.num_heads_kv, case.head_dim)
    return PagedInputs(
        q=normal(case.batch, case.seqlen_q, case.num_heads_q, case.head_dim, device=device),
        k_cache=normal(*shape, device=device),
        v_cache=normal(*shape, device=device),
        page_table=torch.randperm(pages, device=device).view(case.batch, -1).to(torch.int32),
        cache_seqlens=torch.full((case.batch,), case.context, dtype=torch.int32, device=device),
    )


def varlen_inputs(case: VarlenCase, device: torch.device) -> VarlenInputs:
    """bf16 sequences, one after the other."""
    total = sum(case.seqlens)
    offsets = list(itertools.accumulate(case.seqlens, initial=0))
    return VarlenInputs(
        q=normal(total, case.num_heads_q, case.head_dim, device=device),
        k=normal(total, case.num_heads_kv, case.head_dim, device=device),
        v=normal(total, case.num_heads_kv, case.head_dim, device=device),
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32, device=device),
        max_seqlen=max(case.seqlens),
    )


def fp8_inputs(case: DenseCase, device: torch.device) -> Fp8Inputs:
    """Normal data, each sequence's KV head (with the query heads that share it) scaled to the range of e4m3."""
    tensors, descales = [], []
    for values in dense_inputs(case, device)[:3]:
        grouped = values.float().unflatten(2, (case.num_heads_kv, -1))  # (B, S, Hkv, G, D)
        descale = grouped.abs().amax(dim=(1, 3, 4)) / E4M3_MAX
        scaled = grouped / descale[:, None, :, None, None]
        tensors.append(scaled.flatten(2, 3).to(torch.float8_e4m3fn))
        descales.append(descale)
    q, k, v = tensors
    return Fp8Inputs(q, k, v, *descales)
