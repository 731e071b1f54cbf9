"""Adapters for the peers that are packages of their own: FlashAttention-3 and -4, FFPA, FlashInfer."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from broadhead.bench.cases import DecodeCase, DenseCase
from broadhead.bench.peers import DecodeInputs, Peer, Skip

WORKSPACE_BYTES = 256 << 20


class PackagePeer(Peer):
    """A peer that is importable or not."""

    module_name = ""
    distributions: tuple[str, ...] = ()
    _module: Any = None

    def why_unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "needs a CUDA device"
        try:
            self._module = importlib.import_module(self.module_name)
        except Exception as error:  # an installed peer may fail to load in any way
            text = (str(error).splitlines() or [""])[0]
            return f"cannot import {self.module_name}: {type(error).__name__}: {text}"
        return None

    def versions(self) -> dict[str, str]:
        for name in self.distributions:
            try:
                return {self.name: f"{name} {importlib.metadata.version(name)}"}
            except importlib.metadata.PackageNotFoundError:
                continue
        return {self.name: str(getattr(self._module, "__version__", "unknown"))}


def _first(result: Any) -> Tensor:
    """The output of a call that may also return its LSE."""
    return result[0] if isinstance(result, (tuple, list)) else result


class FlashAttention3(PackagePeer):
    """FlashAttention-3, any build with the module `flash_attn_interface`."""

    name = "fa3"
    module_name = "flash_attn_interface"
    distributions = ("flash_attn_3", "tokenspeed-fa3", "fa3-fwd")

    def forward(self, case: DenseCase, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        function = self._module.flash_attn_func
        return lambda: _first(function(q, k, v, causal=case.causal))

    def decode(self, case: DecodeCase, inputs: DecodeInputs) -> Callable[[], Tensor]:
        plan = getattr(self._module, "get_scheduler_metadata", None)
        if plan is None:
            raise Skip("this build has no get_scheduler_metadata")
        metadata = plan(
            case.batch,
            1,
            case.pages_per_sequence * case.page_size,
            case.num_heads_q,
            case.num_heads_kv,
            case.head_dim,
            inputs.cache_seqlens,
            qkv_dtype=inputs.q.dtype,
            page_size=case.page_size,
            causal=True,
        )
        function = self._module.flash_attn_with_kvcache
        q, k_cache, v_cache, page_table, cache_seqlens = inputs
        return lambda: _first(
            function(
                q,
                k_cache,
                v_cache,
                cache_seqlens=cache_seqlens,
                page_table=page_table,
                causal=True,
                scheduler_metadata=metadata,
            )
        )


class FlashAttention4(PackagePeer):
    """FlashAttention-4, the CuTe DSL implementation."""

    name = "fa4"
    module_name = "flash_attn.cute"
    distributions = ("flash-attn-4",)

    def forward(self, case: DenseCase, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        function = self._module.flash_attn_func
        return lambda: _first(function(q, k, v, causal=case.causal))

    def decode(self, case: DecodeCase, inputs: DecodeInputs) -> Callable[[], Tensor]:
        function = self._module.flash_attn_varlen_func
        if "page_table" not in inspect.signature(function).parameters:
            raise Skip("this build takes no page_table")
        q, k_cache, v_cache, page_table, cache_seqlens = inputs
        return lambda: _first(
            function(q, k_cache, v_cache, seqused_k=cache_seqlens, page_table=page_table, causal=True)
        )


class Ffpa(PackagePeer):
    """FFPA, for head_dim above 256."""

    name = "ffpa"
    module_name = "ffpa_attn"
    distributions = ("ffpa-attn",)

    def forward(self, case: DenseCase, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        if case.head_dim <= 256:
            raise Skip("hands head_dim <= 256 to SDPA")
        backend = self._module.CuTeDSLBackend()
        function = self._module.ffpa_attn_func
        query, key, value = (t.transpose(1, 2) for t in (q, k, v))
        gqa = case.num_heads_q != case.num_heads_kv
        return lambda: function(query, key, value, is_causal=case.causal, enable_gqa=gqa, backend=backend).transpose(
            1, 2
        )


class FlashInfer(PackagePeer):
    """FlashInfer: ragged prefill and paged decode, planned beforehand."""

    name = "flashinfer"
    module_name = "flashinfer"
    distributions = ("flashinfer-python",)

    def forward(self, case: DenseCase, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        if q.requires_grad:
            raise Skip("has no backward")
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        wrapper = self._module.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        indptr = torch.arange(case.batch + 1, dtype=torch.int32, device=q.device) * case.seqlen
        wrapper.plan(
            indptr,
            indptr,
            case.num_heads_q,
            case.num_heads_kv,
            case.head_dim,
            causal=case.causal,
            q_data_type=q.dtype,
        )
        query, key, value = (t.flatten(0, 1) for t in (q, k, v))
        return lambda: _first(wrapper.run(query, key, value)).view_as(q)

    def decode(self, case: DecodeCase, inputs: DecodeInputs) -> Callable[[], Tensor]:
        q, k_cache, v_cache, page_table, cache_seqlens = inputs
        device = q.device
        indptr = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.pages_per_sequence
        indices = page_table.flatten().contiguous()
        last_page_len = ((cache_seqlens - 1) % case.page_size + 1).to(torch.int32)
        wrapper = self._module.BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device),
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
        return lambda: _first(wrapper.run(query, (k_cache, v_cache)))[:, None]
