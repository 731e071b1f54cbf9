"""The class that vLLM selects: what it supports, the classes behind it, and the layout of its cache."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionType, MultipleOf
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from .attention import BroadheadImpl
from .metadata import BroadheadMetadataBuilder
from .policy import CACHE_DTYPES, MAX_HEAD_SIZE, Layer, missing

_OLDEST = (8, 0)


class BroadheadBackend(FlashAttentionBackend):  # type: ignore[misc,unused-ignore]
    """broadhead as CUSTOM. The cache has the layout of FlashAttention's in every version of vLLM."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = list(CACHE_DTYPES)
    #: The cache is written by an op of vLLM before forward.
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        """The member of AttentionBackendEnum that vLLM looks up."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[BroadheadImpl]:
        """The attention of a layer."""
        return BroadheadImpl

    @staticmethod
    def get_builder_cls() -> type[BroadheadMetadataBuilder]:
        """What prepares a step."""
        return BroadheadMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Kernels take any page; vLLM's op that writes the cache, and its other backends, want multiples of 16."""
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """The default where it is a multiple of 16."""
        return default_block_size if default_block_size % 16 == 0 else 16

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Multiples of 8 up to 512."""
        return head_size % 8 == 0 and 0 < head_size <= MAX_HEAD_SIZE

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        """bfloat16 and float16."""
        return dtype in (torch.bfloat16, torch.float16)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        """16 bits, or e4m3."""
        return kv_cache_dtype is None or kv_cache_dtype in CACHE_DTYPES

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders, encoders and cross attention."""
        return attn_type in (
            AttentionType.DECODER,
            AttentionType.ENCODER,
            AttentionType.ENCODER_ONLY,
            AttentionType.ENCODER_DECODER,
        )

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """8.0 and newer."""
        return (capability.major, capability.minor) >= _OLDEST

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: Any,
    ) -> str | None:
        """Why the kernels of this installation do not run the layer on the device; None: they do."""
        layer = Layer(head_size, dtype, kv_cache_dtype, use_mm_prefix)
        return missing(layer, (device_capability.major, device_capability.minor))

    @classmethod
    def supports_sink(cls) -> bool:
        """Learnable sinks, on every device."""
        return True

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Images whose tokens see each other, with every cache."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Windows."""
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Batches that are not causal, and causality by request."""
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """No: a request that decodes runs on another kernel when a prefill joins its batch."""
        return False

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        """A factor for each KV head of an FP8 cache."""
        return True

    @classmethod
    def supports_rswa(cls) -> bool:
        """Reference sliding windows: not taken."""
        return False
