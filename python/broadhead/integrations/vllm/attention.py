"""Runs the attention of a layer of vLLM on broadhead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import flash_attn as vllm_flash_attn

import broadhead
from broadhead.errors import InvalidArgumentError, UnsupportedError

from .metadata import BroadheadMetadata, window_of
from .policy import HOPPER, is_fp8

_WITHOUT_CACHE = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)
#: The widest head size for which e4m3 queries have a prefill kernel, on Hopper.
_MAX_FP8_PREFILL = 256


class BroadheadImpl(vllm_flash_attn.FlashAttentionImpl):  # type: ignore[misc,name-defined,unused-ignore]
    """The attention of a layer. The cache, and how it is written, are those of vLLM's FlashAttention."""

    can_return_lse_for_decode: bool = True
    supports_dcp: bool = True

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        # The parent's __init__ asks for a version of FlashAttention, which need not be there.
        if alibi_slopes is not None:
            raise UnsupportedError(
                "broadhead's vLLM backend: alibi_slopes must be None, got the slopes of a model with ALiBi; serve it"
                " with --attention-backend TRITON_ATTN"
            )
        if sinks is not None and sinks.shape[0] != num_heads:
            raise InvalidArgumentError(
                f"broadhead's vLLM backend: sinks must have shape ({num_heads},), one for each head, got"
                f" {tuple(sinks.shape)}"
            )
        config = get_current_vllm_config_or_none()
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.num_queries_per_kv = self.num_heads // self.num_kv_heads
        self.alibi_slopes = None
        self.kv_cache_dtype = kv_cache_dtype
        self.fp8_cache = is_fp8(kv_cache_dtype)
        self.logits_soft_cap = logits_soft_cap or 0.0
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        left = -1 if sliding_window is None else sliding_window - 1
        # vLLM's window counts the query; an encoder's has two sides.
        self.sliding_window = (left, left if attn_type == AttentionType.ENCODER_ONLY or left < 0 else 0)
        self.supports_quant_query_input = self.fp8_cache and self._takes_fp8_queries(config)
        by_all_to_all = config is not None and config.parallel_config.dcp_comm_backend == "a2a"
        self.dcp_combine = vllm_flash_attn.dcp_a2a_lse_reduce if by_all_to_all else vllm_flash_attn.cp_lse_ag_out_rs

    def _takes_fp8_queries(self, config: Any) -> bool:
        """Whether vLLM is to quantise the queries: where they have a prefill kernel. 16-bit queries are more exact."""
        if config is None or config.model_config is None or config.model_config.dtype != torch.bfloat16:
            return False  # out of float8 queries is bf16
        if self.attn_type in _WITHOUT_CACHE or self.dcp_world_size > 1 or self.head_size > _MAX_FP8_PREFILL:
            return False
        return torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: BroadheadMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of the tokens of a step, whose keys are in the cache already.

        Args:
            layer: has the factors of an FP8 cache, and ``mm_prefix_clamp_sliding_window``.
            query: ``(T, Hq, D)``, bf16 or fp16, or e4m3 where ``supports_quant_query_input``.
            key: ``(T, Hkv, D)``; read by encoders and with decode context parallelism.
            value: likewise.
            kv_cache: the pages of the layer, in the layout of vLLM's FlashAttention.
            attn_metadata: the step; None while vLLM measures its memory: output is then 0.
            output: ``(T, Hq, D)`` of the model's dtype, written.
            output_scale: must be None.
            output_block_scale: must be None.

        Returns:
            output.

        Raises:
            UnsupportedError: the step asks for what has no kernel, or for a quantised output.
        """
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError(
                "broadhead's vLLM backend: output_scale and output_block_scale must be None, got the scale of a"
                " quantised output; switch off vLLM's fusion of attention with quantisation (fuse_attn_quant)"
            )
        if attn_metadata is None:
            return output.fill_(0)
        tokens = attn_metadata.num_actual_tokens
        q, out = query[:tokens], output[:tokens]
        if self.attn_type in _WITHOUT_CACHE:
            assert key is not None and value is not None
            self._encode(q, key[:tokens], value[:tokens], out, attn_metadata)
            return output
        k_cache, v_cache = self._pages(kv_cache)
        factors = self._factors(layer, attn_metadata)
        if attn_metadata.dcp_context_kv_lens is not None:
            assert key is not None and value is not None
            self._attend_across_ranks(q, key[:tokens], value[:tokens], k_cache, v_cache, out, attn_metadata, factors)
        elif attn_metadata.common_prefix_len:
            self._attend_cascade(q, k_cache, v_cache, out, attn_metadata, factors)
        else:
            self._attend(layer, q, k_cache, v_cache, out, attn_metadata, factors)
        return output

    def _attend(
        self,
        layer: Any,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        out: Tensor,
        step: BroadheadMetadata,
        factors: dict[str, Any],
    ) -> None:
        """Prefill, chunked prefill, decode and mixtures of them, of one rank. ``step.decodes`` requests run apart."""
        ranges = step.mm_prefix_query_range_tensor
        images: dict[str, Any] = {}
        if ranges is not None:
            clamped = bool(getattr(layer, "mm_prefix_clamp_sliding_window", False))
            images = {"query_ranges": ranges[step.decodes :] if step.decodes else ranges, "ranges_in_window": clamped}

        def attend(
            q: Tensor,
            out: Tensor,
            start_loc: Tensor,
            max_query_len: int,
            seq_lens: Tensor,
            pages: Tensor,
            **options: Any,
        ) -> None:
            broadhead.flash_attn_varlen_func(
                q,
                k_cache,
                v_cache,
                start_loc,
                max_seqlen_q=max_query_len,
                seqused_k=seq_lens,
                softmax_scale=self.scale,
                causal=step.causal,
                window_size=window_of(self.sliding_window, step.causal),
                softcap=self.logits_soft_cap,
                num_splits=0,
                page_table=pages,
                sinks=self.sinks,
                out=out,
                **options,
            )

        seq_lens, pages = step.seq_lens, step.block_table
        n = step.decodes
        if n == 0:
            attend(q, out, step.query_start_loc, step.max_query_len, seq_lens, pages, **factors, **images)
            return
        assert step.prefill_start_loc is not None
        first = {name: factor[:n] for name, factor in factors.items()}
        others = {name: factor[n:] for name, factor in factors.items()}
        attend(q[:n], out[:n], step.query_start_loc[: n + 1], 1, seq_lens[:n], pages[:n], **first)
        attend(q[n:], out[n:], step.prefill_start_loc, step.max_query_len, seq_lens[n:], pages[n:], **others, **images)

    def _attend_cascade(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        out: Tensor,
        step: BroadheadMetadata,
        factors: dict[str, Any],
    ) -> None:
        """All requests begin with the same tokens, which are read once."""
        if self.sliding_window != (-1, -1):
            raise UnsupportedError(
                f"broadhead's vLLM backend: a window must be none in cascade attention, got {self.sliding_window}; pass"
                " --disable-cascade-attn"
            )
        broadhead.flash_attn_with_shared_prefix(
            q,
            k_cache,
            v_cache,
            prefix_len=step.common_prefix_len,
            page_table=step.block_table,
            cache_seqlens=step.seq_lens,
            cu_seqlens_q=step.query_start_loc,
            max_seqlen_q=step.max_query_len,
            softmax_scale=self.scale,
            causal=True,
            softcap=self.logits_soft_cap,
            sinks=self.sinks,
            num_splits=0,
            out=out,
            **factors,
        )

    def _attend_across_ranks(
        self,
        q: Tensor,
        key: Tensor,
        value: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        out: Tensor,
        step: BroadheadMetadata,
        factors: dict[str, Any],
    ) -> None:
        """Decode context parallelism: all heads over the keys of this rank, merged over ranks, then the new keys."""
        if self.sliding_window != (-1, -1) or self.sinks is not None:
            raise UnsupportedError(
                "broadhead's vLLM backend: decode context parallelism takes no window and no sinks, got window"
                f" {self.sliding_window} and sinks {'none' if self.sinks is None else 'of a model'}; pass"
                " --decode-context-parallel-size 1"
            )
        group = vllm_flash_attn.get_dcp_group()
        heads_of_all = group.all_gather(q.contiguous(), dim=1)
        context, context_lse = broadhead.flash_attn_varlen_func(
            heads_of_all,
            k_cache,
            v_cache,
            step.query_start_loc,
            max_seqlen_q=step.max_query_len,
            seqused_k=step.dcp_context_kv_lens,
            softmax_scale=self.scale,
            softcap=self.logits_soft_cap,
            num_splits=0,
            page_table=step.block_table,
            return_softmax_lse=True,
            **factors,
        )
        # vLLM merges (T, H).
        context, context_lse = self.dcp_combine(context, context_lse.transpose(0, 1), group, return_lse=True)
        own, own_lse = self._attend_packed(q, key, value, step, causal=step.causal, return_softmax_lse=True)
        broadhead.merge_attn_states(context, context_lse.transpose(0, 1).contiguous(), own, own_lse, out)

    def _encode(self, q: Tensor, key: Tensor, value: Tensor, out: Tensor, step: BroadheadMetadata) -> None:
        """An encoder: every token sees all tokens of its sequence, in both directions, and nothing is cached."""
        self._attend_packed(q, key, value, step, window_size=self.sliding_window, sinks=self.sinks, out=out)

    def _attend_packed(self, q: Tensor, key: Tensor, value: Tensor, step: BroadheadMetadata, **options: Any) -> Any:
        """Among the tokens of this step alone, whose keys are not read from pages."""
        return broadhead.flash_attn_varlen_func(
            q,
            key,
            value,
            step.query_start_loc,
            step.query_start_loc,
            step.max_query_len,
            step.max_query_len,
            softmax_scale=self.scale,
            softcap=self.logits_soft_cap,
            num_splits=0,
            **options,
        )

    def _pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """K and V ``(blocks, block_size, Hkv, D)`` of a layer's cache, by the layouts of vLLM 0.24 to 0.33."""
        shape, heads, columns = kv_cache.shape, self.num_kv_heads, self.head_size
        if kv_cache.dim() == 5 and shape[1] == 2 and shape[3:] == (heads, columns):  # (blocks, 2, block_size, Hkv, D)
            k_cache, v_cache = kv_cache.unbind(1)
        elif kv_cache.dim() == 4 and shape[1] == heads and shape[3] == 2 * columns:  # (blocks, Hkv, block_size, 2 D)
            k_cache, v_cache = kv_cache.transpose(1, 2).split(columns, dim=-1)
        else:
            raise UnsupportedError(
                f"broadhead's vLLM backend: kv_cache must have shape (blocks, 2, block_size, {heads}, {columns}) or"
                f" (blocks, {heads}, block_size, {2 * columns}), as vLLM 0.24 to 0.33 have it, got {tuple(shape)}"
            )
        if self.fp8_cache and k_cache.dtype != torch.float8_e4m3fn:  # vLLM holds bytes
            k_cache, v_cache = k_cache.view(torch.float8_e4m3fn), v_cache.view(torch.float8_e4m3fn)
        return k_cache, v_cache

    def _factors(self, layer: Any, step: BroadheadMetadata) -> dict[str, Any]:
        """The factors of an FP8 cache, and of queries where they are FP8: each ``(requests, Hkv)``, not copied."""
        if not self.fp8_cache:
            return {}
        shape = (step.seq_lens.shape[0], self.num_kv_heads)
        factors = {"k_descale": layer._k_scale.expand(shape), "v_descale": layer._v_scale.expand(shape)}
        if self.supports_quant_query_input:
            factors["q_descale"] = layer._q_scale.expand(shape)
        return factors
