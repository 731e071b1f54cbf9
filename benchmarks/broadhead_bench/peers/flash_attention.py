"""Adapters for the peers that are packages of their own: FlashAttention-3 and -4, FFPA."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from broadhead_bench.cases import DecodeCase, DenseCase, PagedCase, VarlenCase
from broadhead_bench.cases_landscape import LandscapeCase
from broadhead_bench.cases_masks import ImagesCase
from broadhead_bench.inputs import Fp8Inputs, PagedInputs, VarlenInputs
from broadhead_bench.inputs_decode import AppendInputs, Fp8PagedInputs, LatentInputs
from broadhead_bench.inputs_landscape import LandscapeInputs
from broadhead_bench.inputs_masks import ImagesInputs
from broadhead_bench.model_attention import register_beside_sdpa
from broadhead_bench.peers.base import (
    PackagePeer,
    Skip,
    arguments_of_plan,
    first_output,
    images_blocks,
    plan_of_landscape,
)

#: Queries and keys of a block that FlashAttention-4 skips on Hopper at head_dim 256.
FA4_BLOCK_SIZE = (128, 64)


class FlashAttention3(PackagePeer):
    """FlashAttention-3, any build that has its module by one of these names."""

    name = "fa3"
    areas = (*PackagePeer.areas, "model")
    module_names = ("flash_attn_interface", "fa3_fwd_interface")
    distributions = ("flash_attn_3", "tokenspeed-fa3", "fa3-fwd")

    def __init__(self) -> None:
        self._notes: dict[str, str] = {}  # of the call prepared last, until its versions are read

    def versions(self) -> dict[str, str]:
        notes, self._notes = self._notes, {}
        return {**super().versions(), **notes}

    def attention_of_transformers(self) -> str:
        self._notes = {"note": "window layers alone; head_dim 512 by SDPA, as FlashAttention-3 ends at 256"}
        function = self._module.flash_attn_func

        def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window_size: tuple[int, int]) -> Tensor:
            return first_output(function(q, k, v, softmax_scale=scale, causal=True, window_size=window_size))

        return register_beside_sdpa("fa3", attention)

    def forward(self, case: DenseCase, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        function = self._module.flash_attn_func
        return lambda: first_output(function(q, k, v, causal=case.causal, window_size=case.window_size))

    def fp8(self, case: DenseCase, inputs: Fp8Inputs) -> Callable[[], Tensor]:
        function = self._module.flash_attn_func
        q, k, v, q_descale, k_descale, v_descale = inputs
        scales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
        return lambda: first_output(function(q, k, v, causal=case.causal, **scales))

    def varlen(self, case: VarlenCase, inputs: VarlenInputs) -> Callable[[], Tensor]:
        function = self._module.flash_attn_varlen_func
        q, k, v, cu_seqlens, max_seqlen = inputs
        lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return lambda: first_output(function(q, k, v, *lengths, causal=case.causal, window_size=case.window_size))

    def paged(self, case: PagedCase, inputs: PagedInputs) -> Callable[[], Tensor]:
        return self._over_pages(inputs, causal=case.causal)

    def decode(self, case: DecodeCase, inputs: PagedInputs) -> Callable[[], Tensor]:
        return self._over_pages(inputs, scheduler_metadata=self.plan(case, inputs)())

    def plan(self, case: DecodeCase, inputs: PagedInputs) -> Callable[[], Any]:
        return self._plan(case, inputs.cache_seqlens, inputs.q.dtype)

    def landscape(self, case: LandscapeCase, inputs: LandscapeInputs) -> Callable[[], Tensor]:
        module = self._module
        q, k, v = inputs[:3]
        options: dict[str, Any] = {"causal": case.causal, "window_size": case.window_size, **inputs.descale_options()}
        if case.sinks:
            if "sinks" not in inspect.signature(module.flash_attn_with_kvcache).parameters:
                raise Skip("this build takes no sinks")
            options["sinks"] = inputs.sinks
        if not case.page_size and "num_splits" in inspect.signature(module.flash_attn_func).parameters:
            options["num_splits"] = 0  # as broadhead's
        if case.kind == "varlen":
            lengths = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, max(case.seqlens_q), max(case.seqlens_k))
            return lambda: first_output(module.flash_attn_varlen_func(q, k, v, *lengths, **options))
        if not case.page_size:
            return lambda: first_output(module.flash_attn_func(q, k, v, **options))
        options |= {"cache_seqlens": inputs.cache_seqlens, "page_table": inputs.page_table}
        if case.kind == "decode" and hasattr(module, "get_scheduler_metadata"):
            options["scheduler_metadata"] = module.get_scheduler_metadata(**plan_of_landscape(case, inputs))
        return lambda: first_output(module.flash_attn_with_kvcache(q, k, v, **options))

    def decode_fp8(self, case: DecodeCase, inputs: Fp8PagedInputs) -> Callable[[], Tensor]:
        """Its queries must be e4m3 as well."""
        return self._over_pages(
            inputs.paged._replace(q=inputs.q),
            q_descale=inputs.q_descale,
            k_descale=inputs.k_descale,
            v_descale=inputs.v_descale,
            scheduler_metadata=self._plan(case, inputs.paged.cache_seqlens, inputs.q.dtype)(),
        )

    def decode_mla(self, case: DecodeCase, inputs: LatentInputs) -> Callable[[], Tensor]:
        split = inputs.beside_qv

        def over(paged: PagedInputs, page_size: int | None, **paging: Any) -> Callable[[], Tensor]:
            dims: dict[str, Any] = {"headdim_v": case.head_dim_v, "page_size": page_size}
            plan = self._plan(case.beside_qv, paged.cache_seqlens, paged.q.dtype, **dims)()
            options = {"qv": inputs.q_latent, "softmax_scale": inputs.softmax_scale, "scheduler_metadata": plan}
            return self._over_pages(paged, **options, **paging)

        try:
            call = over(split, case.page_size)
            call()
        except RuntimeError as error:
            if "does not support paged" not in str(error):
                raise
            self._notes = {"note": "the cache gathered into a dense one beforehand: this build does not page it"}
            cache, _ = inputs.paged.gathered(case.context)
            latent, rope = cache.tensor_split([case.head_dim_v], dim=-1)
            return over(split._replace(k_cache=rope, v_cache=latent), None, page_table=None)
        return call

    def append(self, case: DecodeCase, inputs: AppendInputs) -> Callable[[], Tensor]:
        return self._over_pages(
            inputs.paged._replace(cache_seqlens=inputs.cache_seqlens),
            k=inputs.k,
            v=inputs.v,
            rotary_cos=inputs.cos,
            rotary_sin=inputs.sin,
            rotary_interleaved=False,
            scheduler_metadata=self._plan(case, inputs.cache_seqlens, inputs.k.dtype, inputs.k.shape[1])(),
        )

    def _plan(
        self, case: DecodeCase, cache_seqlens: Tensor, dtype: torch.dtype, seqlen_k_new: int = 0, **options: Any
    ) -> Callable[[], Any]:
        function = getattr(self._module, "get_scheduler_metadata", None)
        if function is None:
            raise Skip("this build has no get_scheduler_metadata")
        positional = arguments_of_plan(case, cache_seqlens)
        options = {"page_size": case.page_size, "max_seqlen_k_new": seqlen_k_new, "causal": True} | options
        return lambda: function(*positional, qkv_dtype=dtype, **options)

    def _over_pages(self, inputs: PagedInputs, **options: Any) -> Callable[[], Tensor]:
        function = self._module.flash_attn_with_kvcache
        q, k_cache, v_cache, page_table, cache_seqlens = inputs
        options = {"cache_seqlens": cache_seqlens, "page_table": page_table, "causal": True} | options
        return lambda: first_output(function(q, k_cache, v_cache, **options))


class FlashAttention4(PackagePeer):
    """FlashAttention-4, the CuTe DSL implementation."""

    name = "fa4"
    compiles_calls = True
    areas = (*PackagePeer.areas, "training", "prefix-lm", "masks")
    module_names = ("flash_attn.cute", "vllm.vllm_flash_attn.cute.interface")
    distributions = ("flash-attn-4", "vllm")

    def forward(self, case: DenseCase, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        if case.prefix:
            return self.two_passes(case, q, k, v)
        function = self._module.flash_attn_func
        window = (None, None) if case.window is None else case.window_size
        return lambda: first_output(function(q, k, v, causal=case.causal, window_size=window))

    def varlen(self, case: VarlenCase, inputs: VarlenInputs) -> Callable[[], Tensor]:
        function = self._module.flash_attn_varlen_func
        q, k, v, cu_seqlens, max_seqlen = inputs
        options: dict[str, Any] = {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}
        options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "causal": case.causal}
        if case.window is not None:
            options["window_size"] = case.window_size
        return lambda: first_output(function(q, k, v, **options))

    def paged(self, case: PagedCase, inputs: PagedInputs) -> Callable[[], Tensor]:
        return self._over_pages(inputs, case.causal)

    def decode(self, case: DecodeCase, inputs: PagedInputs) -> Callable[[], Tensor]:
        return self._over_pages(inputs)

    def images(self, case: ImagesCase, inputs: ImagesInputs) -> Callable[[], Tensor]:
        """Its mask_mod, and the blocks that both directions skip, as large as its tiles of head_dim 256."""
        function = self._module.flash_attn_func
        if "mask_mod" not in inspect.signature(function).parameters:
            raise Skip("this build takes no mask_mod")
        mask_mod, blocks_of = self._mask_tools(case.window or case.seqlen)
        blocks = images_blocks(case, inputs, FA4_BLOCK_SIZE)
        common = {"block_size": FA4_BLOCK_SIZE}
        of_queries = blocks_of(
            blocks.kv_num_blocks, blocks.kv_indices, blocks.full_kv_num_blocks, blocks.full_kv_indices, **common
        )
        of_keys = blocks_of(
            blocks.q_num_blocks, blocks.q_indices, blocks.full_q_num_blocks, blocks.full_q_indices, **common
        )
        options: dict[str, Any] = {"mask_mod": mask_mod, "aux_tensors": list(inputs.bounds(case))}
        options |= {"block_sparse_tensors": of_queries, "block_sparse_tensors_bwd": of_keys}
        q, k, v = inputs[:3]
        return lambda: first_output(function(q, k, v, **options))

    def _mask_tools(self, window: int) -> tuple[Any, Any]:
        """The mask of images, and the type that says which blocks it skips."""
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        from broadhead_bench.fa4_mask import images_mask_mod

        return images_mask_mod(window), BlockSparseTensorsTorch

    def _over_pages(self, inputs: PagedInputs, causal: bool = True) -> Callable[[], Tensor]:
        function = self._module.flash_attn_varlen_func
        if "page_table" not in inspect.signature(function).parameters:
            raise Skip("this build takes no page_table")
        q, k_cache, v_cache, page_table, cache_seqlens = inputs
        return lambda: first_output(
            function(q, k_cache, v_cache, seqused_k=cache_seqlens, page_table=page_table, causal=causal)
        )


class Ffpa(PackagePeer):
    """FFPA, for head_dim above 256."""

    name = "ffpa"
    compiles_calls = True
    areas = ("forward", "chunked", "landscape", "varlen", "paged", "window", "backward", "backward-sweep", "training")
    module_names = ("ffpa_attn",)
    distributions = ("ffpa-attn",)

    def __init__(self) -> None:
        self._notes: dict[str, str] = {}

    def versions(self) -> dict[str, str]:
        return {**super().versions(), **self._notes}

    def forward(self, case: DenseCase, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        self._notes = {}
        if case.window is not None:
            raise Skip("takes no window")
        return self._dense(case.head_dim, q, k, v, case.causal)

    def varlen(self, case: VarlenCase, inputs: VarlenInputs) -> Callable[[], Tensor]:
        self._notes = {}
        _above_256(case.head_dim)
        if case.window is not None:
            raise Skip("takes no window")
        function = self._module.ffpa_attn_varlen_func
        q, k, v, cu_seqlens, max_seqlen = inputs
        gqa = case.num_heads_q != case.num_heads_kv
        return lambda: first_output(
            function(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=case.causal, enable_gqa=gqa)
        )

    def paged(self, case: PagedCase, inputs: PagedInputs) -> Callable[[], Tensor]:
        self._notes = {"note": "K and V gathered into dense tensors beforehand: it has no paging"}
        return self._dense(case.head_dim, inputs.q, *inputs.gathered(case.context), True)

    def _dense(self, head_dim: int, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable[[], Tensor]:
        """Its causal mask is aligned to the bottom right, as broadhead's."""
        _above_256(head_dim)
        backend = self._module.CuTeDSLBackend()
        function = self._module.ffpa_attn_func
        query, key, value = (t.transpose(1, 2) for t in (q, k, v))
        gqa = q.shape[2] != k.shape[2]
        return lambda: function(query, key, value, is_causal=causal, enable_gqa=gqa, backend=backend).transpose(1, 2)


def _above_256(head_dim: int) -> None:
    if head_dim <= 256:
        raise Skip("hands head_dim <= 256 to SDPA")
