"""Small calls for the GPU tests, those that suit a row, the phase each must run in, and CUDA-graph capture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from broadhead import support
from calls import Built, Call

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float8_e4m3fn": torch.float8_e4m3fn}
ROWS = tuple(row for row in support.ROWS if row.direction == "forward")
#: Portable rows too: a device that has rows of its own runs them where they take less time, every other one always.
PREFILL_ROWS = tuple(row for row in ROWS if row.phase == "prefill")
DECODE_ROWS = tuple(row for row in ROWS if row.phase == "decode")
#: The feature that a row must have for each mask of a Call.
MASK_FEATURES = {
    "causal": "causal",
    "window": "window",
    "attention_chunk": "attention_chunk",
    "prefix": "prefix_lens",
    "ranges": "query_ranges",
    "tree": "tree_mask",
    "causal_each": "causal_by_sequence",
}
#: Packed rows (tokens x query heads of one KV head) up to which decode rows must run with qv, up to which they must
#: without (with it see `absorbed_phase`), and from which prefill rows must.
SURELY_DECODE, MOST_DECODE, SURELY_PREFILL = 16, 32, 128
#: Not multiples of the 64, 32 or 16 columns that kernels copy and multiply at a time.
ODD_HEAD_DIMS = (8, 40, 72, 80, 96, 112, 160, 200, 320, 384, 448, 504)
#: Masks of five sequences.
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "causal_window_1": {"causal": True, "window": (0, 0)},
    "causal_window_64": {"causal": True, "window": (64, 0)},
    "causal_window_63": {"causal": True, "window": (63, -1)},
    "causal_window_large": {"causal": True, "window": (10**9, 0)},
    "window_both": {"window": (17, 80)},
    "window_right": {"window": (-1, 64)},
    "window_left": {"window": (64, -1)},
    "window_diagonal": {"window": (0, 0)},
    "chunk_64": {"attention_chunk": 64},
    "chunk_50_causal": {"attention_chunk": 50, "causal": True},
    "chunk_window": {"attention_chunk": 100, "causal": True, "window": (30, 0)},
    "chunk_1": {"attention_chunk": 1},
    "prefix": {"causal": True, "prefix": (40, 1, 3, 64, 500)},
    "prefix_zero": {"causal": True, "prefix": (0, 0, 0, 0, 0)},
    "prefix_window": {"causal": True, "window": (20, 0), "prefix": (64, 3, 0, 129, 63)},
    "prefix_chunk": {"causal": True, "attention_chunk": 64, "prefix": (30, 3, 0, 65, 1)},
}
#: Masks of five sequences that are values; a tree's queries are at most 64.
VALUE_MASKS = {
    "ranges_nothing": {"causal": True, "ranges": "nothing"},
    "ranges_images": {"causal": True, "ranges": "images"},
    "ranges_images_window": {"causal": True, "window": (64, 0), "ranges": "images", "ranges_in_window": True},
    "ranges_tiles": {"causal": True, "window": (40, 0), "ranges": "tiles"},
    "ranges_pages": {"window": (17, 3), "ranges": "pages"},
    "ranges_splits": {"causal": True, "window": (0, 0), "ranges": "splits"},
    "ranges_far": {"causal": True, "window": (20, 0), "ranges": "far"},
    "ranges_far_window": {"causal": True, "window": (20, -1), "ranges": "far", "ranges_in_window": True},
    "ranges_ahead": {"causal": True, "ranges": "ahead"},
    "ranges_beyond": {"causal": True, "window": (5, 0), "ranges": "beyond"},
    "ranges_single": {"causal": True, "window": (0, 0), "ranges": "single"},
    "ranges_prefix": {"causal": True, "window": (9, 0), "ranges": "random", "prefix": (40, 1, 3, 64, 500)},
    "ranges_chunk": {"causal": True, "attention_chunk": 50, "ranges": "random"},
    "ranges_random": {"window": (-1, 5), "ranges": "random", "strided_masks": True},
    "causal_each": {"causal_each": (True, False, True, False, True)},
    "causal_each_none": {"causal_each": (False,) * 5, "window": (33, -1)},
    "causal_each_window": {
        "causal_each": (False, True, False, True, True), "causal_dtype": torch.int32, "window": (30, 7),
    },
    "causal_each_prefix": {"causal_each": (True, False, True, True, False), "prefix": (40, 1, 3, 64, 500)},
    "causal_each_ranges": {"causal_each": (True, True, False, True, False), "window": (12, 4), "ranges": "random"},
    "causal_each_chunk": {"causal_each": (False, True, True, True, False), "attention_chunk": 64},
    "tree_eagle": {"causal": True, "tree": "eagle"},
    "tree_chain": {"tree": "chain", "strided_masks": True},
    "tree_words": {"causal": True, "window": (90, 0), "tree": "words"},
    "tree_causal_each": {"causal_each": (True, False, True, True, False), "window": (70, -1), "tree": "words"},
}  # fmt: skip
#: What may join any mask.
EXTRAS = {
    "": {},
    "softcap": {"softcap": 15.0},
    "sinks": {"sinks": "fp32"},
    "sinks_softcap": {"sinks": "q", "softcap": 3.0},
}


def absorbed_phase(call: Call, rows: int, planned: bool) -> str:
    """The phase of a call with qv of ``rows`` query rows; ``planned``: it brings metadata."""
    capability = torch.cuda.get_device_capability()
    if not any("qv" in row.requires and capability in row.capabilities for row in PREFILL_ROWS):
        return "decode"  # of any number of rows
    even = not call.tokens_per_split and (planned or call.function == "func")  # or the host knows the lengths
    return "prefill" if rows > MOST_DECODE or (rows > SURELY_DECODE and even) else "decode"


def expected_phase(call: Call, planned: bool = False, max_seqlen_q: int | None = None) -> str | None:
    """The phase whose rows must run; None where the choice is a matter of speed. ``planned``: by metadata."""
    if not any(TORCH_DTYPES[row.dtype] == call.dtype for row in DECODE_ROWS):
        return "prefill"  # they have no other rows
    rows = (max_seqlen_q or max(call.seqlens_q, default=0)) * call.heads_q // call.heads_kv
    if call.qv:
        return absorbed_phase(call, rows, planned or call.metadata)
    return "decode" if rows <= MOST_DECODE else "prefill" if rows >= SURELY_PREFILL else None


def supports(row: support.KernelRow, options: dict) -> bool:
    """Whether the row's kernel has the masks among a call's options."""
    return all(MASK_FEATURES[name] in row.features for name in options if name in MASK_FEATURES)


def value_masks_of(row: support.KernelRow) -> tuple[str, ...]:
    """The masks that are values and that the row's kernel has."""
    return tuple(name for name in ("ranges", "causal_each", "tree") if supports(row, {name: True}))


def without_lacking(row: support.KernelRow, call: Call) -> Call:
    """The call without the masks that the row lacks."""
    fields = Call.__dataclass_fields__
    lacking = {name: fields[name].default for name in MASK_FEATURES if not supports(row, {name: True})}
    if "causal_each" in lacking and call.causal_each and "causal" not in lacking:
        lacking["causal"] = True
    return call.with_(**lacking)


def within(row: support.KernelRow, call: Call) -> Call:
    """The call with the masks that the row is for: at least a window wider than any sequence."""
    if "window" in row.requires and call.normalized_window[0] < 0 and call.normalized_window[1] <= 0:
        return call.with_(window=(1 << 20, -1))
    return call


def cache_dtype(row: support.KernelRow) -> str:
    """The dtype of k and v that the row is for: that of q unless the table says otherwise."""
    return row.kv_dtype or row.dtype


def row_call(row: support.KernelRow, function: str, seqlens_q: tuple, seqlens_k: tuple, **options) -> Call:
    """A call of the row's dtype and largest head dims, without the masks that its kernel lacks, with what it is for:
    qv, or another factor for each sequence and KV head of 8-bit inputs."""
    options = {name: x for name, x in options.items() if supports(row, {name: x})}
    defaults = {"head_dim": row.head_dim, "head_dim_v": row.head_dim_v, "dtype": TORCH_DTYPES[row.dtype]}
    keys = TORCH_DTYPES[cache_dtype(row)]
    defaults |= {"kv_dtype": keys if keys != TORCH_DTYPES[row.dtype] else None}
    defaults |= {"qv": "qv" in row.requires, "descale": "each" if keys.itemsize == 1 else ""}
    call = Call(function, tuple(seqlens_q), tuple(seqlens_k), **{**defaults, **options})
    if call.k_layout == "overlapping" and call.dim_v != call.head_dim:
        call = call.with_(k_layout="plain")
    return within(row, call)


def row_cases(masks: dict[str, dict], rows: tuple = PREFILL_ROWS) -> list:
    """pytest parameters (row, name) of every row with every mask of the table that it has."""
    pairs = [(row, name) for row in rows for name, options in masks.items() if supports(row, options)]
    return [pytest.param(row, name, id=f"{row.id}-{name}") for row, name in pairs]


def column_step(row: support.KernelRow) -> int:
    """Columns of 16 bytes: what the row's head dims must be multiples of."""
    return 16 // support.ELEMENT_BYTES[cache_dtype(row)]


def dims_within(row: support.KernelRow) -> list[tuple[int, int]]:
    """Pairs of head dims that the row takes: odd ones, and one or both sides at their edges."""
    step = column_step(row)
    sizes = [-(-d // step) * step for d in ODD_HEAD_DIMS]
    pairs = [(min(d, row.head_dim), min(d, row.head_dim_v)) for d in sizes]
    pairs += [(step, row.head_dim_v), (row.head_dim, step), (row.head_dim - step, row.head_dim_v)]
    pairs += [(row.head_dim, row.head_dim_v - step)]
    return list(dict.fromkeys(pairs))


def row_id(row: support.KernelRow) -> str:
    return row.id


def decode_call(head_dim: int, **options) -> Call:
    """A small paged decode step: ragged lengths, one empty, garbage past the pages."""
    defaults = {
        "seqlens_q": (1, 1, 1, 1),
        "seqlens_k": (300, 17, 0, 129),
        "heads_q": 4,
        "heads_kv": 1,
        "page_size": 16,
        "slack_k": 33,
    }
    return Call("kvcache", head_dim=head_dim, **{**defaults, **options})


def prefill_call(head_dim: int, **options) -> Call:
    """A small packed prefill: a tile and a bit, one row, nothing, and a long prefix."""
    defaults = {
        "seqlens_q": (133, 1, 0, 65),
        "seqlens_k": (133, 40, 7, 209),
        "heads_q": 4,
        "heads_kv": 2,
        "causal": True,
    }
    return Call("varlen", head_dim=head_dim, **{**defaults, **options})


def shortened(built: Built, lengths: list[int]) -> Built:
    """The same pages with other cache_seqlens (at most the built ones)."""
    return dataclasses.replace(
        built,
        call=built.call.with_(seqlens_k=tuple(lengths)),
        k=[k[:n] for k, n in zip(built.k, lengths, strict=False)],
        v=[v[:n] for v, n in zip(built.v, lengths, strict=False)],
    )


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Warm up on a side stream, then record ``work``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph
