"""Random values out of range: one call of random form, and other values for the same tensors."""

from __future__ import annotations

import random
from collections.abc import Collection

from edge_cases import INT_MAX, INT_MIN, MASKS
from edges import Edge, answer
from random_calls import VALUE_MASKS

PAGE_SIZES = (1, 2, 3, 8, 16, 24, 64, 100, 128)


def wild(rng: random.Random, top: int) -> int:
    """A number that should be within [0, top]: mostly it is, else about an end of that or of int32."""
    if rng.random() < 0.55:
        return rng.randint(0, top)
    return rng.choice(
        (0, top, top + 1, top - 1, -1, -rng.randint(1, 300), top + rng.randint(1, 300), 2 * top, INT_MAX, INT_MIN)
    )


def _wilds(rng: random.Random, count: int, top: int) -> tuple[int, ...]:
    return tuple(wild(rng, top) for _ in range(count))


def _offsets(rng: random.Random, batch: int, total: int) -> tuple[int, ...]:
    """Offsets of packed sequences: often in order, with some of them anywhere."""
    offsets = sorted(rng.randint(0, total) for _ in range(batch + 1))
    if rng.random() < 0.6:
        for _ in range(rng.randint(1, 2)):
            offsets[rng.randrange(batch + 1)] = wild(rng, total)
    return tuple(offsets)


def random_edge(
    rng: random.Random,
    longest: int = 150,
    packed_k: bool = True,
    appends: bool = True,
    values: Collection[str] = VALUE_MASKS,
) -> Edge:
    """A call of one of the forms of Edge, of at most ``longest`` keys a sequence.

    packed_k: False: k and v are a cache or pages; appends: False: the call only reads them; values: those of
    VALUE_MASKS that it may have.
    """
    batch = rng.choice((1, 2, 3, 5))
    paged = rng.random() < 0.5
    cached = not packed_k or rng.random() < 0.6
    if paged:
        block_rows = rng.choice(PAGE_SIZES)
        columns = max(1, min(rng.randint(1, longest) // block_rows, 40))
        blocks = batch * columns + rng.randint(0, 2)
        rows = rng.choice((batch, batch, batch + 2))
        table = tuple(_wilds(rng, columns, blocks - 1) for _ in range(rows))
        capacity = columns * block_rows
    else:
        rows, table = rng.choice((batch, batch + 2)), ()
        blocks, block_rows = (rows, rng.randint(1, longest)) if cached else (1, rng.randint(1, longest))
        capacity = block_rows
    function = "kvcache" if cached else "varlen"
    edge = Edge("random", "random", function, blocks, block_rows, page_table=table, **rng.choice(list(MASKS.values())))
    form: dict = {"max_seqlen_k": rng.choice((0, 1, capacity, capacity // 3, 4000)) if not cached else 0}
    if cached and rng.random() < 0.5:
        form["seqlen_q"] = rng.choice((1, 1, 2, 4, 9, 70))
    else:
        form["total_q"] = rng.choice((1, 5, 30, 150))
        form["cu_seqlens_q"] = (0,) * (batch + 1)
        form["max_seqlen_q"] = rng.choice((1, 3, 20, 64, form["total_q"], 300))
        if function == "varlen" and rng.random() < 0.4:
            form["seqused_q"] = (0,) * batch
    if not cached and not paged:
        form["cu_seqlens_k"] = (0,) * (batch + 1)
    if cached or paged or rng.random() < 0.4:
        form["lengths"] = (0,) * batch
    if cached and (rows > batch or rng.random() < 0.3):
        form["batch_idx"] = (0,) * batch
    elif rows > batch and paged:
        form |= {"page_table": table[:batch]}
    elif rows > batch and cached:
        form |= {"blocks": batch}
    if cached and rng.random() < 0.3:
        form["leftpad"] = (0,) * batch
    if cached and appends and rng.random() < 0.3:
        form["seqlen_new"] = rng.randint(1, 5)
    edge = edge.with_(**form)
    return other_values(edge.with_(**_value_masks(edge, rng, values)), rng)


def _value_masks(edge: Edge, rng: random.Random, names: Collection[str]) -> dict:
    """Masks that are values, whose values are drawn with the others."""
    form: dict = {}
    if "causal_each" in names and rng.random() < 0.2:
        form |= {"causal": False, "causal_each": (0,) * edge.batch}
    free = edge.attention_chunk == 0 and (edge.causal or edge.window[1] <= 0)
    if "tree" in names and free and max(edge.seqlen_q, edge.max_seqlen_q) <= 64 and rng.random() < 0.25:
        form |= {"tree": (0,) * edge.rows_q}
    elif "ranges" in names and rng.random() < 0.25:
        form |= {"ranges": ((0, 0),) * edge.rows_q, "ranges_in_window": rng.random() < 0.4}
    return form


def other_values(edge: Edge, rng: random.Random) -> Edge:
    """The same tensors with other lengths, offsets, page ids and indices. Rows of out have one owner at most, and so
    have the places of new keys: nobody says whose value stays."""
    for _ in range(100):
        drawn = _drawn(edge, rng)
        try:
            if not answer(drawn).contested:
                return drawn
        except AssertionError:  # two new keys have one place
            continue
    return _in_order(edge, drawn, rng)


def _drawn(edge: Edge, rng: random.Random) -> Edge:
    batch, changes = edge.batch, {}
    columns = len(edge.page_table[0]) if edge.page_table else 1
    capacity = columns * edge.block_rows
    if edge.page_table:
        changes["page_table"] = tuple(_wilds(rng, columns, edge.blocks - 1) for _ in edge.page_table)
    if edge.lengths:
        least = 0 if edge.appends else INT_MIN  # where a new key behind a negative length goes nobody says
        changes["lengths"] = tuple(max(least, n) for n in _wilds(rng, batch, capacity))
    if edge.cu_seqlens_q:
        changes["cu_seqlens_q"] = _offsets(rng, batch, edge.total_q)
    if edge.seqused_q:
        changes["seqused_q"] = _wilds(rng, batch, max(1, edge.total_q // batch))
    if edge.cu_seqlens_k:
        changes["cu_seqlens_k"] = _offsets(rng, batch, edge.block_rows)
    if edge.batch_idx:
        changes["batch_idx"] = _wilds(rng, batch, (len(edge.page_table) or edge.blocks) - 1)
    if edge.leftpad:
        changes["leftpad"] = tuple(rng.choice((0, n)) for n in _wilds(rng, batch, capacity // 2))
    if edge.ranges:
        begins, ends = (_wilds(rng, edge.rows_q, capacity) for _ in range(2))
        changes["ranges"] = tuple(zip(begins, ends, strict=True))
    if edge.tree:
        changes["tree"] = tuple(rng.choice((0, -1, rng.getrandbits(64) - 2**63)) for _ in edge.tree)
    if edge.causal_each:
        changes["causal_each"] = tuple(rng.choice((0, 0, 1, 256, -1)) for _ in edge.causal_each)
    return edge.with_(**changes)


def _in_order(edge: Edge, drawn: Edge, rng: random.Random) -> Edge:
    """Offsets in order, and every new key on a page or in a cache of its own."""
    changes: dict = {}
    if edge.cu_seqlens_q:
        changes["cu_seqlens_q"] = tuple(sorted(rng.randint(0, edge.total_q) for _ in range(edge.batch + 1)))
    if edge.page_table:
        columns, ids = len(edge.page_table[0]), list(range(edge.blocks))
        rng.shuffle(ids)
        ids += [-1] * (columns * len(edge.page_table))
        changes["page_table"] = tuple(
            tuple(ids[columns * row : columns * (row + 1)]) for row in range(len(edge.page_table))
        )
    if edge.batch_idx:
        owners = len(edge.page_table) or edge.blocks
        changes["batch_idx"] = tuple(rng.sample(range(-1, max(owners, edge.batch)), edge.batch))
    return drawn.with_(**changes)
