"""The table of edge inputs: each value that the host does not see, at and beyond its bounds, under every mask."""

from __future__ import annotations

from edges import Edge

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (9, 0)},
    "window_both": {"window": (11, 4)},
    "chunk": {"causal": True, "attention_chunk": 7},
}
#: Masks that are values, and the windows that they come with: with_values has the values.
VALUE_MASKS = {
    "ranges": {"causal": True, "window": (9, 0)},
    "ranges_in_window": {"window": (30, 2), "ranges_in_window": True},
    "tree": {"causal": True, "window": (80, 0)},
    "causal_each": {"window": (40, 5)},
    "causal_each_tree": {},
}
PAGE_SIZES = (1, 16, 64, 128)


def _cache(name: str, lengths: tuple[int, ...], refused: str = "", **options) -> Edge:
    """Four queries of each sequence over a cache of 75 keys a sequence."""
    defaults = {"blocks": len(lengths), "block_rows": 75, "seqlen_q": 4, "group": "lengths", "refused": refused}
    return Edge(name, function="kvcache", lengths=lengths, **{**defaults, **options})


RAGGED = {"seqlen_q": 0, "cu_seqlens_q": (0, 5, 6, 13), "total_q": 15, "max_seqlen_q": 7}
CACHES = (
    _cache("cache_seqlens_past_the_cache", (76, 70, 1000), "cache_seqlens"),
    _cache("cache_seqlens_int_max", (INT_MAX, 3, INT_MAX - 5), "cache_seqlens"),
    _cache("cache_seqlens_negative", (-1, 70, INT_MIN), "cache_seqlens"),
    _cache("cache_seqlens_zero", (0, 75, 0)),
    _cache("shorter_than_the_queries", (3, 1, 75)),
    _cache("leftpad_beyond_the_length", (20, 75, 5), leftpad=(25, 9, 5)),
    _cache("leftpad_beyond_the_cache", (20, 75, 5), leftpad=(76, 3, INT_MAX)),
    _cache("leftpad_negative", (20, 75, 5), "cache_leftpad", leftpad=(-1, 9, INT_MIN)),
    _cache("leftpad_and_length_too_large", (90, 75, INT_MAX), "cache_seqlens", leftpad=(70, 9, 80)),
    _cache("batch_idx_outside", (20, 75, 5), "cache_batch_idx", blocks=5, batch_idx=(-1, 3, 5)),
    _cache("batch_idx_extreme", (20, 75, 5), "cache_batch_idx", blocks=5, batch_idx=(INT_MAX, 0, INT_MIN)),
    _cache("ragged_past_the_cache", (90, 60, 75), "cache_seqlens", **RAGGED),
)

PACKED_SHAPE = {
    "cu_seqlens_q": (0, 9, 10, 30),
    "total_q": 33,
    "max_seqlen_q": 20,
    "cu_seqlens_k": (0, 30, 38, 82),
    "max_seqlen_k": 44,
    "blocks": 1,
    "block_rows": 85,
    "group": "offsets",
}


def _packed(name: str, refused: str = "", **options) -> Edge:
    """Three packed sequences of 9, 1 and 20 queries, and of 30, 8 and 44 keys; some rows behind each."""
    return Edge(name, function="varlen", **{**PACKED_SHAPE, "refused": refused, **options})


def _offsets_q(name: str, offsets: tuple[int, ...], total_q: int = 33, longest: int = 64) -> Edge:
    return _packed(f"cu_seqlens_q_{name}", "cu_seqlens_q", cu_seqlens_q=offsets, total_q=total_q, max_seqlen_q=longest)


def _offsets_k(name: str, offsets: tuple[int, ...], total_k: int = 85) -> Edge:
    return _packed(f"cu_seqlens_k_{name}", "cu_seqlens_k", cu_seqlens_k=offsets, block_rows=total_k)


LONG = {"cu_seqlens_k": (0, 300, 308, 500), "block_rows": 501}
TOO_LONG = {"seqused_q": (4, 3, 99), "lengths": (50, 5, 99), "total_q": 25, "block_rows": 70}
PACKED = (
    _packed("in_range"),
    _packed("seqused_k_beyond_the_rows", "seqused_k", lengths=(38, 8, 44)),
    _packed("seqused_k_extreme", "seqused_k", lengths=(INT_MAX, INT_MIN, 60)),
    _packed("seqused_q_beyond_the_rows", "seqused_q", seqused_q=(10, 5, 20)),
    _packed("seqused_q_extreme", "seqused_q", seqused_q=(INT_MAX, INT_MIN, 7)),
    _packed("everything_too_long", "seqused_|cu_seqlens_", **TOO_LONG),
    _offsets_q("one_beyond", (0, 9, 10, 30), total_q=29),
    _offsets_q("256_beyond", (0, 9, 10, 266), total_q=10, longest=256),
    _offsets_q("int_max", (0, 9, 10, INT_MAX)),
    _offsets_q("wholly_beyond", (0, 9, 40, 60)),
    _offsets_q("backwards", (20, 5, 0, 20)),
    _offsets_q("negative", (-5, 9, 10, 30)),
    _offsets_q("extreme", (INT_MIN, 9, INT_MAX, 30)),
    _offsets_k("beyond", (0, 30, 38, 82), total_k=70),
    _offsets_k("int_max", (0, 30, 38, INT_MAX)),
    _offsets_k("backwards", (60, 20, 0, 60)),
    _offsets_k("negative", (-7, 30, 38, 82)),
    _offsets_k("extreme", (INT_MIN, 30, INT_MAX, 82)),
    _packed("max_seqlen_q_below", "max_seqlen_q", max_seqlen_q=6),
    _packed("max_seqlen_q_one", "max_seqlen_q", max_seqlen_q=1),
    _packed("max_seqlen_q_below_seqused_q", "max_seqlen_q", max_seqlen_q=6, seqused_q=(9, 1, 4)),
    _packed("max_seqlen_k_below", "max_seqlen_k", max_seqlen_k=20),
    _packed("max_seqlen_k_one", "max_seqlen_k", max_seqlen_k=1),
    _packed("max_seqlen_k_below_long", "max_seqlen_k", max_seqlen_k=33, **LONG),
    _packed("no_queries", cu_seqlens_q=(0, 0, 0, 0), max_seqlen_q=0),
    _packed("no_keys", cu_seqlens_k=(0, 0, 38, 38), max_seqlen_k=38),
)


def _table(bad: dict[tuple[int, int], int], columns: int, sequences: int) -> tuple[tuple[int, ...], ...]:
    """Page ids, each once, in another order than the pages lie; ``bad``: (sequence, column) -> another id."""
    pages = sequences * columns
    step = 7 if pages % 7 else 5
    order = [(step * i + 3) % pages for i in range(pages)]
    assert len(set(order)) == pages
    return tuple(tuple(bad.get((b, c), order[b * columns + c]) for c in range(columns)) for b in range(sequences))


def _paged(name: str, size: int, columns: int, lengths: tuple[int, ...], refused: str = "", **options) -> Edge:
    """Three queries of each sequence over pages; the pool has a page to spare."""
    defaults = {
        "blocks": len(lengths) * columns + 1,
        "block_rows": size,
        "seqlen_q": 3,
        "group": "pages",
        "page_table": _table(options.pop("bad", {}), columns, len(lengths)),
        "refused": refused,
    }
    return Edge(f"{name}_{size}", function="kvcache", lengths=lengths, **{**defaults, **options})


def _of_pages(size: int) -> tuple[Edge, ...]:
    columns = 40 if size == 1 else 3
    whole, middle, last, beyond = size * columns, columns // 2, columns - 1, 3 * columns + 1
    lengths = (whole, whole - size // 2, whole)
    spread = {(0, 0): -1, (1, middle): INT_MAX, (2, last): beyond}
    turned = {(0, last): INT_MIN, (1, 0): beyond, (2, middle): -1}
    behind = {(0, c): -1 for c in range(1, columns)} | {(1, 0): INT_MAX}
    first = {(0, 0): -1, (1, 0): INT_MAX}
    pads = (size, size // 2, 2 * whole)
    ragged = {"seqlen_q": 0, "cu_seqlens_q": (0, 5, 6, 40), "total_q": 20, "max_seqlen_q": 9}
    packed = {"cu_seqlens_q": (0, 9, 10, 30), "total_q": 28, "max_seqlen_q": 12, "max_seqlen_k": 5}
    make = lambda name, *rest, **options: _paged(name, size, columns, *rest, **options)  # noqa: E731
    return (
        make("bad_first_middle_last", lengths, "page_table", bad=spread),
        make("bad_last_first_middle", lengths, "page_table", bad=turned),
        make("all_bad", lengths, "page_table", bad={(0, c): -1 - c for c in range(columns)}),
        make("bad_behind_the_keys", (size, 0, whole), bad=behind),
        make("past_the_table", (whole + 1, whole - 1, INT_MAX), "cache_seqlens"),
        make("negative_length", (-3, whole, INT_MIN), "cache_seqlens"),
        make("past_the_table_and_bad", (whole + 9, whole, INT_MAX), "cache_seqlens|page_table", bad=spread),
        make("index_outside", lengths, "cache_batch_idx", batch_idx=(3, 1, -1)),
        make("leftpad_over_a_bad_page", lengths, bad=first, leftpad=pads),
        make("ragged", lengths, "page_table|cu_seqlens_q|max_seqlen_q", bad=spread, **ragged),
        make(
            "varlen", (whole + 7, whole, -4), "seqused_k|page_table|cu_seqlens_q|max_seqlen_q", bad=spread, **packed
        ).with_(function="varlen", seqlen_q=0),
    )


PAGES = tuple(edge for size in PAGE_SIZES for edge in _of_pages(size))


def _append(name: str, lengths: tuple[int, ...], refused: str = "", **options) -> Edge:
    """As _cache, with four new keys of each sequence."""
    return _cache(name, lengths, refused, **{"group": "append", "seqlen_new": 4, **options})


def _append_offsets(name: str, offsets: tuple[int, ...], total_new: int) -> Edge:
    options = {"seqlen_new": 0, "cu_seqlens_k_new": offsets, "total_new": total_new}
    return _append(f"append_offsets_{name}", (20, 40, 5), "cu_seqlens_k_new", **options)


def _appends_to_pages(size: int) -> tuple[Edge, ...]:
    columns = 12 if size == 1 else 2
    whole = size * columns
    options = {"seqlen_new": 4, "seqlen_q": 4, "group": "append"}
    inside = (whole - 4, 0, whole // 2)
    bad = {(0, columns - 1): -1, (1, 0): 3 * columns + 1}
    outside = (whole - 2, whole - 4, whole + 3)
    return (
        _paged("append_past_the_table", size, columns, outside, "cache_seqlens", **options),
        _paged("append_to_a_bad_page", size, columns, inside, "page_table", bad=bad, **options),
        _paged("append_index_outside", size, columns, inside, "cache_batch_idx", batch_idx=(-1, 1, 3), **options),
    )


APPENDS = (
    _append("append_in_part", (73, 10, 71), "cache_seqlens"),
    _append("append_past_the_cache", (75, 0, 80), "cache_seqlens"),
    _append("append_from_int_max", (INT_MAX, 40, INT_MAX - 2), "cache_seqlens"),
    _append("append_index_outside", (20, 40, 5), "cache_batch_idx", blocks=5, batch_idx=(-1, 3, 5)),
    _append("append_under_leftpad", (20, 71, 5), leftpad=(30, 3, 9)),
    _append_offsets("beyond", (0, 4, 5, 16), total_new=11),
    _append_offsets("backwards", (6, 2, 0, 6), total_new=8),
    _append_offsets("negative", (-3, 4, 5, 9), total_new=11),
    *(edge for size in PAGE_SIZES for edge in _appends_to_pages(size)),
)

BASE = (*CACHES, *PACKED, *PAGES, *APPENDS)
#: Every edge under every mask.
EDGES = tuple(edge.with_(name=f"{edge.name}-{mask}", **options) for edge in BASE for mask, options in MASKS.items())
GROUPS = tuple(dict.fromkeys(edge.group for edge in EDGES))


def with_values(edge: Edge, name: str) -> Edge:
    """The call under a mask of VALUE_MASKS: ranges and words of each row of q, which differ from row to row."""
    options: dict = {"name": f"{edge.name}-{name}", **VALUE_MASKS[name]}
    rows = range(edge.rows_q)
    if "ranges" in name:
        begins = [(-1, 0, 3, 17, 70, INT_MAX, INT_MIN)[7 * row % 11 % 7] + row % 3 * (row % 5 > 0) for row in rows]
        begins = [min(max(begin, INT_MIN), INT_MAX) for begin in begins]
        options["ranges"] = tuple(
            (begin, (5, INT_MAX, 40, 0, 76, INT_MIN, 300)[(row + begin) % 7])
            for row, begin in zip(rows, begins, strict=True)
        )
    if "tree" in name:
        options["tree"] = tuple((row + 1) * 0x9E3779B97F4A7C15 % 2**64 - 2**63 for row in rows)
    if "causal_each" in name:
        options["causal_each"] = tuple((0, 256, -1, 1, 0)[(edge.rows_q + b) % 5] for b in range(edge.batch))
    return edge.with_(**options)


def takes_values(edge: Edge, name: str) -> bool:
    """A tree has at most 64 drafts."""
    return "tree" not in name or max(edge.seqlen_q, edge.max_seqlen_q) <= 64


#: Every edge under half of the masks that are values.
VALUE_EDGES = tuple(
    with_values(edge, name)
    for i, edge in enumerate(BASE)
    for j, name in enumerate(VALUE_MASKS)
    if (i + j) % 2 == 0 and takes_values(edge, name)
)


def edges_of(group: str) -> tuple[Edge, ...]:
    return tuple(edge for edge in EDGES if edge.group == group)
