"""Adapter for FlashInfer, whose wrappers plan a call before they run it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from broadhead.bench.cases import DecodeCase, DenseCase, PagedCase, VarlenCase
from broadhead.bench.inputs import PagedInputs, VarlenInputs
from broadhead.bench.peers import Skip
from broadhead.bench.peers_flash import PackagePeer, first_output

WORKSPACE_BYTES = 256 << 20


class FlashInfer(PackagePeer):
    """FlashInfer: ragged and paged prefill, paged decode, planned beforehand."""

    name = "flashinfer"
    module_name = "flashinfer"
    distributions = ("flashinfer-python",)

    def forward(self, case: DenseCase, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        if q.requires_grad:
            raise Skip("has no backward")
        wrapper = self._module.BatchPrefillWithRaggedKVCacheWrapper(_workspace(q.device), "NHD")
        indptr = torch.arange(case.batch + 1, dtype=torch.int32, device=q.device) * case.seqlen
        wrapper.plan(
            indptr,
            indptr,
            case.num_heads_q,
            case.num_heads_kv,
            case.head_dim,
            head_dim_vo=case.head_dim_v,
            causal=case.causal,
            window_left=case.window_size[0],
            q_data_type=q.dtype,
            kv_data_type=k.dtype,
        )
        query, key, value = (t.flatten(0, 1) for t in (q, k, v))
        return lambda: first_output(wrapper.run(query, key, value)).unflatten(0, (case.batch, case.seqlen))

    def varlen(self, case: VarlenCase, inputs: VarlenInputs) -> Callable[[], Tensor]:
        q, k, v, cu_seqlens, _ = inputs
        wrapper = self._module.BatchPrefillWithRaggedKVCacheWrapper(_workspace(q.device), "NHD")
        wrapper.plan(
            cu_seqlens,
            cu_seqlens,
            case.num_heads_q,
            case.num_heads_kv,
            case.head_dim,
            causal=True,
            q_data_type=q.dtype,
            kv_data_type=k.dtype,
        )
        return lambda: first_output(wrapper.run(q, k, v))

    def paged(self, case: PagedCase, inputs: PagedInputs) -> Callable[[], Tensor]:
        q, k_cache, v_cache, page_table, cache_seqlens = inputs
        steps = torch.arange(case.batch + 1, dtype=torch.int32, device=q.device)
        wrapper = self._module.BatchPrefillWithPagedKVCacheWrapper(_workspace(q.device), "NHD")
        wrapper.plan(
            steps * case.seqlen_q,
            steps * case.pages_per_sequence,
            page_table.flatten(),
            _last_page_len(cache_seqlens, case.page_size),
            case.num_heads_q,
            case.num_heads_kv,
            case.head_dim,
            case.page_size,
            causal=True,
            q_data_type=q.dtype,
            kv_data_type=k_cache.dtype,
        )
        query = q.flatten(0, 1)
        return lambda: first_output(wrapper.run(query, (k_cache, v_cache))).view_as(q)

    def decode(self, case: DecodeCase, inputs: PagedInputs) -> Callable[[], Tensor]:
        q, k_cache, v_cache, page_table, cache_seqlens = inputs
        device = q.device
        indptr = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.pages_per_sequence
        indices = page_table.flatten().contiguous()
        last_page_len = _last_page_len(cache_seqlens, case.page_size)
        wrapper = self._module.BatchDecodeWithPagedKVCacheWrapper(
            _workspace(device),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=case.num_heads_q // case.num_heads_kv >= 4,
            paged_kv_indptr_buffer=torch.empty_like(indptr),
            paged_kv_indices_buffer=torch.empty_like(indices),
            paged_kv_last_page_len_buffer=torch.empty_like(last_page_len),
        )
        wrapper.plan(
            indptr,
            indices,
            last_page_len,
            case.num_heads_q,
            case.num_heads_kv,
            case.head_dim,
            case.page_size,
            q_data_type=q.dtype,
            kv_data_type=k_cache.dtype,
        )
        query = q[:, 0]
        return lambda: first_output(wrapper.run(query, (k_cache, v_cache)))[:, None]


def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _last_page_len(seqlens: Tensor, page_size: int) -> Tensor:
    """Tokens in the last page of each sequence."""
    return ((seqlens - 1) % page_size + 1).to(torch.int32)
