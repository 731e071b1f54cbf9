"""The image ranges of a batch of vLLM as the query_ranges of broadhead, made on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import broadhead


def query_ranges(
    images: Mapping[int, Sequence[tuple[int, int]]],
    query_start_loc: Tensor,
    seq_lens: Tensor,
    num_tokens: int,
) -> Tensor | None:
    """The range of keys that each query sees besides the causal ones; None: no query of the batch lies in an image.

    Args:
        images: for each request its images, as vLLM has them: the positions of the first and of the last token. A pair
            whose first is not before its last shows nothing, as in vLLM.
        query_start_loc: int32 ``(requests + 1,)`` on the CPU, offsets of the requests in the query tokens.
        seq_lens: int32 ``(requests,)`` on the CPU, keys of the requests. Those of a request that decodes may be too
            many: its queries then lie still further behind all images.
        num_tokens: query tokens of the batch, with padding.

    Returns:
        int32 ``(num_tokens, 2)`` on the CPU: begin, and one past the end; ``(0, 0)`` where there is no range.
    """
    starts = query_start_loc.tolist()
    ends = seq_lens.tolist()
    spans: list[list[tuple[int, int]]] = [[] for _ in ends]
    found = False
    for request, pairs in images.items():
        if request >= len(ends):
            continue
        first_query = ends[request] - (starts[request + 1] - starts[request])
        for first, last in pairs:
            if first < last and last >= first_query and first < ends[request]:
                spans[request].append((int(first), int(last) + 1))
                found = True
    if not found:
        return None
    # A padding row of a CUDA graph has no query, and may have no key.
    lengths = torch.maximum(seq_lens.long(), query_start_loc.long().diff())
    return broadhead.make_query_ranges(spans, None, lengths, cu_seqlens_q=query_start_loc, total_q=num_tokens)
