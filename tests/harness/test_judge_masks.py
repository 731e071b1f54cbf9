"""Masks that are values, in the oracle, the patterns, the layouts and the random calls: against loops over numbers."""

from __future__ import annotations

import random
from collections import Counter

import oracle
import pytest
import torch
from calls import Call, build
from layouts import GARBAGE_PAGES, bytes_of
from masks import RANGES, TREES
from oracle import Rule
from random_calls import VALUE_MASKS, random_call, takes_tree

CPU = torch.device("cpu")
LENGTHS = ((1, 1), (5, 5), (64, 70), (64, 64), (33, 200), (64, 20), (1, 150), (0, 9), (7, 0))


def sees(rule: Rule, sq: int, sk: int, i: int, j: int) -> bool:
    """Whether query i sees key j: the rules of the masks, one after the other, on plain numbers."""
    back = i + sk - sq - j  # how far the key lies behind the query's own
    left, right = rule.window
    seen = not (0 <= left < back or 0 <= right < -back)
    if rule.chunk and seen:
        seen = (i + sk - sq) // rule.chunk == j // rule.chunk
    if rule.prefix is not None and j < rule.prefix:
        seen = True
    if rule.ranges is not None:
        begin, end = rule.ranges[i]
        if begin >= 0 and j in range(begin, min(end, sk)) and not (rule.ranges_in_window and 0 <= left < back):
            seen = True
    if rule.tree is not None and sk - j <= 64:
        seen = f"{rule.tree[i] & 2**64 - 1:064b}"[sk - j - 1] == "1"  # the last key's bit is the highest
    return seen


def by_loops(rule: Rule, sq: int, sk: int) -> torch.Tensor:
    return torch.tensor([sees(rule, sq, sk, i, j) for i in range(sq) for j in range(sk)]).bool().reshape(sq, sk)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_what_is_visible(lengths: tuple[int, int], rng: random.Random) -> None:
    """Every pattern under windows, chunks and prefixes."""
    sq, sk = lengths
    for name, pattern in RANGES.items():
        for in_window in (False, True):
            window = rng.choice(((-1, -1), (-1, 0), (20, 0), (0, 0), (9, 5), (3, -1)))
            rule = Rule(1.0, window, rng.choice((0, 0, 16)), rng.choice((None, 0, 30)), ranges_in_window=in_window)
            rule = Rule(**{**vars(rule), "ranges": tuple(pattern(rng, sq, sk))})
            found = oracle.visible(sq, sk, rule, CPU)
            assert torch.equal(found, by_loops(rule, sq, sk)), f"{name}: {rule}"
    for name, pattern in TREES.items():
        for window in ((-1, -1), (-1, 0), (20, 0), (90, -1)):
            rule = Rule(1.0, window, tree=tuple(pattern(rng, sq, sk)))
            assert torch.equal(oracle.visible(sq, sk, rule, CPU), by_loops(rule, sq, sk)), f"{name}: {rule}"


def test_a_window_bounds_ranges_on_its_left_alone() -> None:
    """One query of ten keys in the middle of its window: keys ahead stay, those too far back go."""
    rule = Rule(1.0, (2, 0), ranges=((0, 10),) * 6, ranges_in_window=True)
    assert oracle.visible(6, 10, rule, CPU)[1].tolist() == [j >= 3 for j in range(10)]
    free = Rule(1.0, (-1, 0), ranges=((0, 10),) * 6, ranges_in_window=True)
    assert oracle.visible(6, 10, free, CPU).all()


# --- patterns ---------------------------------------------------------------------------------------------------------


def shown(name: str, sq: int, sk: int, rng: random.Random) -> torch.Tensor:
    """What a pattern of ranges shows under the narrowest window."""
    return oracle.visible(sq, sk, Rule(1.0, (0, 0), ranges=tuple(RANGES[name](rng, sq, sk))), CPU)


def test_patterns_are_what_they_are_called(rng: random.Random) -> None:
    diagonal = oracle.visible(90, 400, Rule(1.0, (0, 0)), CPU)
    assert torch.equal(shown("nothing", 90, 400, rng), diagonal)
    for name in RANGES:
        assert all(len(RANGES[name](rng, sq, sk)) == sq for sq, sk in LENGTHS), name
        found = [shown(name, 90, 400, rng) for _ in range(8)]
        assert name == "nothing" or not all(torch.equal(x, diagonal) for x in found), f"{name} shows nothing"
    position = torch.arange(90)[:, None] + 310
    key = torch.arange(400)
    assert not (shown("far", 90, 400, rng) & ~diagonal)[:, 150:].any()
    ahead = [shown("ahead", 90, 400, rng) for _ in range(8)]
    assert not any((x & (key < position)).any() for x in ahead) and any(x[0, 311] for x in ahead)
    assert (shown("single", 90, 400, rng).sum(dim=1) <= 2).all()
    blocks = oracle.visible(400, 400, Rule(1.0, (0, 0), ranges=tuple(RANGES["images"](rng, 400, 400))), CPU)
    assert torch.equal(blocks, blocks.T), "tokens of an image see each other"
    ends = [end for _ in range(20) for _, end in RANGES["images"](rng, 50, 400)]
    assert max(ends) > 400, "an image goes on behind the chunk"
    begins = [begin for _ in range(20) for begin, _ in RANGES["tiles"](rng, 400, 2000)]
    assert {begin % 16 for begin in begins} == {0, 1, 15}, "ranges begin at edges of tiles and beside them"
    assert max(end for _, end in RANGES["beyond"](rng, 90, 400)) > 400


def test_drafts_see_their_ancestors(rng: random.Random) -> None:
    for sq, sk in ((1, 9), (7, 7), (7, 100), (64, 64), (64, 300)):
        drafts = oracle.visible(sq, sk, Rule(1.0, (-1, 0), tree=tuple(TREES["eagle"](rng, sq, sk))), CPU)
        context, among = drafts[:, : sk - sq], drafts[:, sk - sq :]
        assert context.all() and among.diagonal().all() and not among.triu(1).any()
        for i in range(sq):  # whom an ancestor sees, its descendants see
            for parent in among[i].nonzero().flatten().tolist():
                assert not (among[parent] & ~among[i]).any()
        chain = oracle.visible(sq, sk, Rule(1.0, tree=tuple(TREES["chain"](rng, sq, sk))), CPU)
        assert torch.equal(chain, oracle.visible(sq, sk, Rule(1.0, (-1, 0)), CPU))


def test_patterns_fit_their_dtypes(rng: random.Random) -> None:
    for sq, sk in LENGTHS:
        for patterns, dtype in ((RANGES, torch.int32), (TREES, torch.int64)):
            for pattern in patterns.values():
                for _ in range(20):
                    torch.tensor(pattern(rng, sq, sk), dtype=dtype)


# --- layouts ----------------------------------------------------------------------------------------------------------

FORMS = {
    "dense": Call("func", (40,) * 3, (150,) * 3),
    "varlen": Call("varlen", (40, 0, 3), (150, 9, 70), slack_q=3, slack_k=2, tail=4),
    "paged": Call("kvcache", (40,) * 3, (150, 41, 70), page_size=4, leftpad=(3, 0, 9), batch_idx=True),
    "ragged": Call("kvcache", (40, 0, 3), (150, 9, 70), ragged_q=True, page_size=16, tail=3, max_seqlen_slack=5),
    "mixed": Call("mha_fwd", (40, 5, 0), (150, 9, 70), slack_k=3),
}
VALUES = {
    "ranges": {"ranges": "far", "window": (9, 0)},
    "ranges_in_window": {"ranges": "pages", "ranges_in_window": True, "window": (70, 0)},
    "tree": {"tree": "words", "window": (20, -1)},
    "causal_each": {"causal_each": (True, False, True), "window": (12, 4)},
    "all": {"ranges": "single", "causal_each": (False, True, True), "causal_dtype": torch.int32, "window": (3, -1)},
}


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("form", FORMS)
def test_layouts(form: str, values: str, strided: bool, rng: random.Random) -> None:
    """Values where their rows are; NaN in each key that no query sees, be it between those that one sees."""
    call = FORMS[form].with_(heads_q=1, heads_kv=1, head_dim=8, dtype=torch.float32, strided_masks=strided)
    call = call.with_(**VALUES[values], freed_entries=call.page_size > 0)
    built = build(call, CPU, rng)
    kwargs, call, rows = built.kwargs, built.call, built.kwargs["q"].shape[:-2]
    if call.ranges:
        x = kwargs["query_ranges"]
        assert x.dtype == torch.int32 and x.shape == (*rows, 2) and x.stride(-1) == 1
        flat = x.reshape(-1, 2)
        assert [tuple(map(tuple, flat[place].tolist())) for place in built.rows] == list(call.ranges)
        assert x.is_contiguous() != strided
    if call.tree:
        x = kwargs["tree_mask"]
        assert x.dtype == torch.int64 and x.shape == rows and x.is_contiguous() != strided
        assert [tuple(x.reshape(-1)[place].tolist()) for place in built.rows] == list(call.tree)
    if call.causal_each:
        assert kwargs["causal"].dtype == call.causal_dtype
        assert tuple(kwargs["causal"].bool().tolist()) == call.causal_each
    k = kwargs["k_cache" if call.function == "kvcache" else "k"]
    hidden = 0
    for b, (sq, sk) in enumerate(zip(call.seqlens_q, call.seqlens_k, strict=True)):
        rule = call.rule(b)
        assert rule.window[1] == (0 if call.causal_each and call.causal_each[b] else call.normalized_window[1])
        expected = [any(sees(rule, sq, sk, i, j) for i in range(sq)) for j in range(sk)]
        assert (~k.flatten(0, -3)[built.slots[b], 0, 0].isnan()).tolist() == expected
        inner = "".join("x" if seen else "." for seen in expected).strip(".")
        hidden += inner.count(".")
        if call.freed_entries:
            check_freed(built, b, expected)
    assert hidden or values not in ("ranges", "all"), "no key lies between those that are seen"


def check_freed(built, b: int, expected: list[bool]) -> None:
    """Entries of pages of which no query sees a key hold no page."""
    call = built.call
    owner = int(built.kwargs["cache_batch_idx"][b]) if call.batch_idx else b
    pad = call.leftpad[b] if call.leftpad else 0
    seen = [False] * pad + expected
    for column, page in enumerate(built.kwargs["page_table"][owner].tolist()):
        used = any(seen[column * call.page_size : (column + 1) * call.page_size])
        assert (page not in GARBAGE_PAGES) == used


def test_rows_that_no_sequence_owns_hold_anything(rng: random.Random) -> None:
    found: Counter[int] = Counter()
    for _ in range(20):
        call = Call("varlen", (3, 0, 2), (5, 4, 9), slack_q=2, tail=5, ranges="single", heads_q=1, heads_kv=1)
        built = build(call, CPU, rng)
        found.update(built.kwargs["query_ranges"][~built.live_mask()].flatten().tolist())
    assert {2**31 - 1, -(2**31), 0} <= set(found)


def test_8_bit_keys_between_ranges_are_nan(rng: random.Random) -> None:
    call = Call("func", (30,), (300,), dtype=torch.float8_e4m3fn, ranges="far", window=(0, 0), heads_q=1, heads_kv=1)
    built = build(call, CPU, rng)
    seen = by_loops(built.call.rule(0), 30, 300).any(dim=0)
    assert torch.equal(bytes_of(built.kwargs["k"])[0, :, 0].ne(0x7F).any(dim=1), seen) and not seen.all()


# --- random calls -----------------------------------------------------------------------------------------------------


def test_random_calls_draw_every_mask_alone_and_together() -> None:
    """And none of what the functions refuse."""
    found: Counter[tuple[str, ...]] = Counter()
    patterns: set[str] = set()
    for number in range(1500):
        call = random_call(random.Random(number), (torch.bfloat16, torch.float8_e4m3fn), 60, (16, 64), qv=0.2)
        names = tuple(name for name in VALUE_MASKS if getattr(call, name))
        found[names] += 1
        patterns |= {call.ranges, call.tree}
        others = {"prefix": bool(call.prefix), "page_size": call.page_size > 0, "sinks": call.sinks != ""}
        others |= {
            "softcap": call.softcap > 0,
            "append": bool(call.num_new),
            "qv": call.qv,
            "chunk": call.attention_chunk,
        }
        others |= {"splits": (call.num_splits or 0) > 1, "metadata": call.metadata, "in_window": call.ranges_in_window}
        for other in (other for other, used in others.items() if used):
            found.update((name, other) for name in names)
        assert not (call.causal and call.causal_each), call
        assert not call.prefix or call.causal or call.causal_each, call
        if call.tree:
            assert takes_tree(call), call
            assert max(call.seqlens_q, default=0) <= 64 and not (call.ranges or call.prefix or call.attention_chunk)
    assert set(RANGES) | set(TREES) <= patterns
    assert all(found[(name,)] > 20 for name in VALUE_MASKS) and found[()] > 300, found
    assert found["ranges", "causal_each"] and found["causal_each", "tree"], found
    for other in ("prefix", "page_size", "sinks", "softcap", "append", "qv", "chunk", "splits", "metadata"):
        for name in VALUE_MASKS:
            refused = name == "tree" and other in ("prefix", "chunk")
            assert (found[name, other] > 0) != refused, (name, other)


def test_random_calls_without_some_masks() -> None:
    for number in range(300):
        call = random_call(random.Random(number), (torch.bfloat16,), 60, (16,), values=("ranges",))
        assert not call.tree and not call.causal_each
