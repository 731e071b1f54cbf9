"""The adapter of torch's FlexAttention: the mask as a function that it compiles, with the blocks that it skips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from broadhead_bench.cases_masks import ImagesCase
from broadhead_bench.inputs_masks import ImagesInputs
from broadhead_bench.peers.base import Peer, Skip, images_blocks


class Flex(Peer):
    """torch.nn.attention.flex_attention, compiled for each shape."""

    name = "flex"
    areas = ("masks",)
    _compiled: Any = None

    def why_unavailable(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else "needs a CUDA device"

    def images(self, case: ImagesCase, inputs: ImagesInputs) -> Callable[[], Tensor]:
        if case.head_dim > 256:
            raise Skip("is measured up to head_dim 256")
        if self._compiled is None:
            self._compiled = self._compile()
        function, blocks = self._compiled, images_blocks(case, inputs)
        gqa = case.num_heads_q != case.num_heads_kv
        query, key, value = (t.transpose(1, 2) for t in inputs[:3])
        return lambda: function(query, key, value, block_mask=blocks, enable_gqa=gqa).transpose(1, 2)

    def _compile(self) -> Any:
        return torch.compile(flex_attention.flex_attention, dynamic=False)
