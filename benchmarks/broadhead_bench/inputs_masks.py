"""Makes the tensors of the cases of masks: those of the same case without its mask, and the mask as values."""

from __future__ import annotations

from typing import NamedTuple

import broadhead
import torch
from torch import Tensor

from broadhead_bench.cases_masks import ChunkCase, ImagesCase, TreeCase
from broadhead_bench.inputs import PagedInputs, dense_inputs
from broadhead_bench.inputs_decode import Fp8PagedInputs, decode_sets, fp8_decode_sets


class ImagesInputs(NamedTuple):
    """q, k, v and dout ``(1, S, H, D)`` in bf16, query_ranges int32 ``(1, S, 2)``."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    ranges: Tensor

    def bounds(self, case: ImagesCase) -> tuple[Tensor, Tensor]:
        """For implementations whose masks are functions: the first key of each query's range, and the one behind it,
        int32 ``(S,)``, both 0 where it has none. The window has cut them where it does."""
        begin, end = self.ranges[0].unbind(-1)
        if case.in_window and case.window is not None:
            positions = torch.arange(case.seqlen, dtype=torch.int32, device=begin.device)
            begin = begin.maximum(positions - (case.window - 1))
        return begin.contiguous(), end.contiguous()


class ChunkInputs(NamedTuple):
    """An e4m3 cache, and query_ranges int32 ``(1, Sq, 2)``."""

    fp8: Fp8PagedInputs
    ranges: Tensor


class TreeInputs(NamedTuple):
    """A paged step, and tree_mask int64 ``(B, Sq)``."""

    paged: PagedInputs
    words: Tensor


def images_inputs(case: ImagesCase, device: torch.device) -> ImagesInputs:
    """bf16 tensors, and the ranges of the images."""
    ranges = broadhead.make_query_ranges([case.spans], case.seqlen, device=device)
    return ImagesInputs(*dense_inputs(case.plain, device), ranges)


def chunk_inputs(case: ChunkCase, device: torch.device) -> ChunkInputs:
    """e4m3 tensors, and the ranges of the images."""
    ranges = broadhead.make_query_ranges([case.spans], case.new, case.context, device=device)
    return ChunkInputs(fp8_decode_sets(case.plain, device)[0], ranges)


def tree_sets(case: TreeCase, device: torch.device) -> list[TreeInputs]:
    """bf16 inputs, as many sets as the case needs, all with the same trees."""
    words = torch.tensor(case.words, dtype=torch.int64, device=device)
    return [TreeInputs(paged, words) for paged in decode_sets(case.plain, device)]
