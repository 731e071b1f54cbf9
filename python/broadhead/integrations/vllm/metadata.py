"""What a step of vLLM hands to the attention of its layers, and the builder that makes it for a group of layers."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.attention.backends.utils import get_dcp_local_seq_lens

from .ranges import query_ranges


@dataclasses.dataclass
class BroadheadMetadata:
    """A step. Names are those of vLLM's FlashAttentionMetadata, which models and connectors of vLLM read."""

    num_actual_tokens: int  # rows of q, with padding
    max_query_len: int
    query_start_loc: Tensor  # int32 (requests + 1,)
    max_seq_len: int
    seq_lens: Tensor  # int32 (requests,)
    block_table: Tensor  # int32 (requests, max_blocks)
    slot_mapping: Tensor
    causal: bool | Tensor = True  # a tensor is int32 (requests,)
    common_prefix_len: int = 0  # tokens that all requests share, read once; 0: none
    dcp_context_kv_lens: Tensor | None = None  # int32 (requests,): this rank's keys before the queries
    decodes: int = 0  # requests at the front, of one query each, that run apart from the others; 0: all run together
    prefill_start_loc: Tensor | None = None  # with decodes: query_start_loc of the others, from 0 on
    #: int32 (num_actual_tokens, 2): begin, and one past the end, as query_ranges has them. vLLM's own buffer holds
    #: inclusive ends. Models of vLLM set it to None for layers that do not see images whole.
    mm_prefix_query_range_tensor: Tensor | None = None

    @property
    def mm_prefix_range_tensor(self) -> Tensor | None:
        """The name by which models of vLLM 0.24 clear the ranges."""
        return self.mm_prefix_query_range_tensor

    @mm_prefix_range_tensor.setter
    def mm_prefix_range_tensor(self, value: Tensor | None) -> None:
        self.mm_prefix_query_range_tensor = value

    @property
    def use_cascade(self) -> bool:
        """Whether the first tokens of all requests are read once."""
        return self.common_prefix_len > 0


#: Requests of one query that a step with prompts must have for a call of their own: each call is a launch of its own.
FEWEST_DECODES = 8


class BroadheadMetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc,unused-ignore]
    """Makes the metadata of a group of layers. What kernels read from it keeps its address from step to step."""

    supports_update_block_table: bool = True
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Every batch can be captured, but one that may hold images: a graph without ranges would run for it."""
        model = vllm_config.model_config
        if model is not None and model.is_mm_prefix_lm:
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # vLLM puts requests of few queries in front of the others: of one, or of one and its drafts, as other backends
        # of the model want it. It takes the least that any backend asks for, and some need the drafts in front.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True, supports_dcp_with_varlen=True)
        scheduler = vllm_config.scheduler_config
        compilation = vllm_config.compilation_config
        max_requests = max(scheduler.max_num_seqs, compilation.max_cudagraph_capture_size or 0)
        self.dcp_world_size, self.dcp_rank = _dcp(kv_cache_spec)
        self.interleave: int = vllm_config.parallel_config.cp_kv_cache_interleave_size
        self._compilation = compilation
        self._context_lens: Tensor | None = None
        if self.dcp_world_size > 1:
            self._context_lens = torch.zeros(max_requests, dtype=torch.int32, device=device)
        self._ranges: Tensor | None = None
        if vllm_config.model_config.is_mm_prefix_lm:
            self._ranges = torch.zeros(scheduler.max_num_batched_tokens, 2, dtype=torch.int32, device=device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> BroadheadMetadata:
        """The metadata of a step.

        Scheduler metadata is not made, with ``fast_build`` or without: decode kernels divide the keys by the lengths on
        the device and would not read it. A step of decode launches nothing here.
        """
        common = common_attn_metadata
        causal = common.causal
        if isinstance(causal, Tensor) and causal.dtype != torch.int32:
            causal = causal.to(torch.int32)
        metadata = BroadheadMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=causal,
            common_prefix_len=common_prefix_len,
        )
        if self.dcp_world_size > 1:
            metadata.dcp_context_kv_lens = self._context_of_this_rank(common)
        ranges = None
        if common.mm_req_doc_ranges and causal is not False:
            ranges = self._image_ranges(common)
            metadata.mm_prefix_query_range_tensor = None if ranges is None else self._copied(ranges)
        if common_prefix_len == 0 and self.dcp_world_size == 1 and causal is True:
            metadata.decodes = self._decodes(common, ranges)
        if metadata.decodes:
            metadata.prefill_start_loc = common.query_start_loc[metadata.decodes :] - metadata.decodes
        return metadata

    def update_block_table(self, metadata: BroadheadMetadata, blk_table: Tensor, slot_mapping: Tensor) -> Any:
        """The same step over the pages of another group."""
        updated = copy.copy(metadata)
        updated.block_table = blk_table
        updated.slot_mapping = slot_mapping
        return updated

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the tokens that all requests share are read once: by the rule of vLLM versions that ask it."""
        from vllm.v1.attention.backends import flash_attn

        rule = getattr(flash_attn, "use_cascade_attention", None)
        return rule is not None and bool(rule(*args, **kwargs))

    def _decodes(self, common: Any, ranges: Tensor | None) -> int:
        """Requests at the front that run in a call of their own, on decode kernels: those of one query, in a step that
        also has prompts. A tile of a prefill kernel is nearly empty with them. None of them may be inside an image.
        """
        if common.max_query_len == 1 or self._captures_mixed_steps():
            return 0
        queries: list[int] = common.query_start_loc_cpu.diff().tolist()
        decodes = next((i for i, count in enumerate(queries) if count != 1), len(queries))
        if not FEWEST_DECODES <= decodes < len(queries):
            return 0
        inside = ranges is not None and bool((ranges[:decodes, 1] > ranges[:decodes, 0]).any())
        return 0 if inside else decodes

    def _captures_mixed_steps(self) -> bool:
        """Whether steps with prompts run in CUDA graphs, which other steps replay."""
        mode = getattr(self._compilation, "cudagraph_mode", None)
        return mode is not None and mode.mixed_mode().name == "FULL"

    def _image_ranges(self, common: Any) -> Tensor | None:
        """Ranges of the queries inside images, on the CPU; None: there are none."""
        seq_lens = common.seq_lens_cpu_upper_bound
        if seq_lens is None:
            seq_lens = common.seq_lens.cpu()
        return query_ranges(common.mm_req_doc_ranges, common.query_start_loc_cpu, seq_lens, common.num_actual_tokens)

    def _copied(self, ranges: Tensor) -> Tensor:
        """The ranges in the buffer of this builder, whose address stays."""
        if self._ranges is None or len(self._ranges) < len(ranges):
            self._ranges = torch.zeros(len(ranges), 2, dtype=torch.int32, device=self.device)
        if self.device.type == "cuda":
            ranges = ranges.pin_memory()
        return self._ranges[: len(ranges)].copy_(ranges, non_blocking=True)

    def _context_of_this_rank(self, common: Any) -> Tensor:
        """Keys before the queries of each request that this rank of decode context parallelism holds."""
        assert self._context_lens is not None
        requests = common.num_reqs
        context = common.seq_lens - common.query_start_loc.diff()
        mine = get_dcp_local_seq_lens(context, self.dcp_world_size, self.dcp_rank, self.interleave)
        self._context_lens[:requests] = mine
        self._context_lens[requests:] = 0
        return self._context_lens[:requests]


def window_of(window: tuple[int, int], causal: bool | Tensor) -> tuple[int, int]:
    """The window of a layer in a step: of queries that are not causal it has two sides, as in vLLM."""
    left, right = window
    if left >= 0 and right == 0 and (isinstance(causal, Tensor) or not causal):
        return left, left
    return window


def _dcp(kv_cache_spec: Any) -> tuple[int, int]:
    """``(ranks, rank)`` of decode context parallelism over the cache; ``(1, 0)`` where there is none."""
    from vllm.distributed import parallel_state

    if not getattr(kv_cache_spec, "dcp_sharded", True):
        return 1, 0
    try:
        group = parallel_state.get_dcp_group()
    except AssertionError:  # not initialised
        return 1, 0
    return group.world_size, group.rank_in_group
