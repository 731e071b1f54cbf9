"""Adapter for FlashInfer, whose wrappers plan a call before they run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from broadhead_bench.cases import CascadeCase, DecodeCase, DenseCase, PagedCase, VarlenCase
from broadhead_bench.cases_prefill import BACKWARD_AREAS
from broadhead_bench.inputs import PagedInputs, VarlenInputs
from broadhead_bench.inputs_decode import CascadeInputs, Fp8PagedInputs, LatentInputs
from broadhead_bench.peers.base import PackagePeer, first_output

WORKSPACE_BYTES = 256 << 20


class FlashInfer(PackagePeer):
    """FlashInfer: ragged and paged prefill, paged decode, planned beforehand. One workspace serves all wrappers, whose
    calls run one after the other."""

    name = "flashinfer"
    compiles_calls = True
    areas = tuple(area for area in PackagePeer.areas if area not in BACKWARD_AREAS)  # it has no backward
    module_names = ("flashinfer",)
    distributions = ("flashinfer-python",)

    def __init__(self) -> None:
        self._workspaces: dict[torch.device, Tensor] = {}

    def forward(self, case: DenseCase, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        wrapper = self._module.BatchPrefillWithRaggedKVCacheWrapper(self._workspace(q.device), "NHD")
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
        wrapper = self._module.BatchPrefillWithRaggedKVCacheWrapper(self._workspace(q.device), "NHD")
        wrapper.plan(
            cu_seqlens,
            cu_seqlens,
            case.num_heads_q,
            case.num_heads_kv,
            case.head_dim,
            causal=case.causal,
            q_data_type=q.dtype,
            kv_data_type=k.dtype,
        )
        return lambda: first_output(wrapper.run(q, k, v))

    def paged(self, case: PagedCase, inputs: PagedInputs) -> Callable[[], Tensor]:
        q, k_cache, v_cache, page_table, cache_seqlens = inputs
        steps = torch.arange(case.batch + 1, dtype=torch.int32, device=q.device)
        wrapper = self._module.BatchPrefillWithPagedKVCacheWrapper(self._workspace(q.device), "NHD")
        wrapper.plan(
            steps * case.seqlen_q,
            steps * case.pages_per_sequence,
            page_table.flatten(),
            _last_page_len(cache_seqlens, case.page_size),
            case.num_heads_q,
            case.num_heads_kv,
            case.head_dim,
            case.page_size,
            causal=case.causal,
            q_data_type=q.dtype,
            kv_data_type=k_cache.dtype,
        )
        query = q.flatten(0, 1)
        return lambda: first_output(wrapper.run(query, (k_cache, v_cache))).view_as(q)

    def decode(self, case: DecodeCase, inputs: PagedInputs) -> Callable[[], Tensor]:
        return self._decode(case, inputs)

    def decode_fp8(self, case: DecodeCase, inputs: Fp8PagedInputs) -> Callable[[], Tensor]:
        scales = {"k_scale": inputs.k_descale.max().item(), "v_scale": inputs.v_descale.max().item()}
        return self._decode(case, inputs.paged, **scales)

    def decode_mla(self, case: DecodeCase, inputs: LatentInputs) -> Callable[[], Tensor]:
        counts, indices = inputs.paged.used_pages()
        steps = torch.arange(case.batch + 1, dtype=torch.int32, device=counts.device) * case.seqlen_q
        metadata = {
            "qo_indptr": steps,
            "kv_indptr": _indptr(counts),
            "kv_indices": indices,
            "kv_len_arr": inputs.paged.cache_seqlens,
        }
        buffers = {name: torch.empty_like(tensor) for name, tensor in metadata.items()}
        wrapper = self._module.mla.BatchMLAPagedAttentionWrapper(
            self._workspace(counts.device), use_cuda_graph=True, **buffers
        )
        wrapper.plan(
            metadata=self._module.mla.MLAPlanMetadata.csr(**metadata),
            num_heads=case.num_heads_q,
            head_dim_ckv=case.head_dim_v,
            head_dim_kpe=case.head_dim - case.head_dim_v,
            page_size=case.page_size,
            causal=True,
            sm_scale=inputs.softmax_scale,
            q_data_type=inputs.q_latent.dtype,
            kv_data_type=inputs.latent.dtype,
            query_layout="split",
            kv_cache_layout="split",
        )
        query = (inputs.q_latent.flatten(0, 1), inputs.q_rope.flatten(0, 1))
        caches = (inputs.latent.squeeze(2), inputs.rope.squeeze(2))
        out_shape = inputs.q_latent.shape
        return lambda: first_output(wrapper.run(query=query, kv_cache=caches)).view(out_shape)

    def plan(self, case: DecodeCase, inputs: PagedInputs) -> Callable[[], Any]:
        return self._planned(case, inputs)[1]

    def cascade(self, case: CascadeCase, inputs: CascadeInputs) -> Callable[[], Tensor]:
        """What its MultiLevelCascadeAttentionWrapper does, on the backend whose prefill splits long sequences."""
        q, k_cache, v_cache = inputs.plain.q.flatten(0, 1), inputs.plain.k_cache, inputs.plain.v_cache
        device = q.device
        steps = torch.arange(case.batch + 1, dtype=torch.int32, device=device)
        prefix_pages = inputs.prefix_page_table.numel()
        levels = (
            (
                steps[:: case.batch],
                steps[:2] * prefix_pages,
                inputs.prefix_page_table,
                steps.new_full((1,), case.prefix),
            ),
            (steps, steps * inputs.page_table.shape[1], inputs.page_table.flatten(), inputs.cache_seqlens),
        )
        wrappers = []
        for queries, indptr, indices, seqlens in levels:
            wrapper = self._module.BatchPrefillWithPagedKVCacheWrapper(self._workspace(device), "NHD", backend="fa2")
            wrapper.plan(
                queries.contiguous(),
                indptr,
                indices,
                _last_page_len(seqlens, case.page_size),
                case.num_heads_q,
                case.num_heads_kv,
                case.head_dim,
                case.page_size,
                causal=False,
                q_data_type=q.dtype,
                kv_data_type=k_cache.dtype,
            )
            wrappers.append(wrapper)
        prefix, suffix = wrappers
        merge = self._module.merge_state_in_place

        def step() -> Tensor:
            out, lse = suffix.run(q, (k_cache, v_cache), return_lse=True)
            merge(out, lse, *prefix.run(q, (k_cache, v_cache), return_lse=True))
            return out.view_as(inputs.plain.q)

        return step

    def _decode(self, case: DecodeCase, inputs: PagedInputs, **scales: float) -> Callable[[], Tensor]:
        wrapper, plan = self._planned(case, inputs)
        plan()
        query, caches = inputs.q.flatten(0, 1), (inputs.k_cache, inputs.v_cache)
        return lambda: first_output(wrapper.run(query, caches, **scales)).view_as(inputs.q)

    def _planned(self, case: DecodeCase, inputs: PagedInputs) -> tuple[Any, Callable[[], Any]]:
        """A wrapper, and the call that plans it."""
        counts, indices = inputs.used_pages()
        indptr = _indptr(counts)
        last_page_len = _last_page_len(inputs.cache_seqlens, case.page_size)
        several = {"q_len_per_req": case.seqlen_q} if case.seqlen_q > 1 else {}
        wrapper = self._module.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace(indptr.device),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=bool(several) or case.num_heads_q // case.num_heads_kv >= 4,
            paged_kv_indptr_buffer=torch.empty_like(indptr),
            paged_kv_indices_buffer=torch.empty_like(indices),
            paged_kv_last_page_len_buffer=torch.empty_like(last_page_len),
        )
        return wrapper, lambda: wrapper.plan(
            indptr,
            indices,
            last_page_len,
            case.num_heads_q,
            case.num_heads_kv,
            case.head_dim,
            case.page_size,
            q_data_type=inputs.q.dtype,
            kv_data_type=inputs.k_cache.dtype,
            **several,
        )

    def _workspace(self, device: torch.device) -> Tensor:
        if device not in self._workspaces:
            self._workspaces[device] = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        return self._workspaces[device]


def _indptr(counts: Tensor) -> Tensor:
    """Where each sequence's pages begin among all, and the end."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def _last_page_len(seqlens: Tensor, page_size: int) -> Tensor:
    """Tokens in the last page of each sequence."""
    return ((seqlens - 1) % page_size + 1).to(torch.int32)
