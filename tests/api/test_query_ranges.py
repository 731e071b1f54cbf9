"""make_query_ranges: spans of tokens as ranges of queries, against loops over tokens, and what it refuses."""

from __future__ import annotations

import random
from typing import Any

import broadhead
import pytest
import torch
from broadhead import InvalidArgumentError, InvalidTypeError, make_query_ranges

Spans = list[list[tuple[int, int]]]


def by_loops(spans: Spans, seqlens_q: list[int], seqlens_k: list[int]) -> list[list[int]]:
    found = []
    for of_sequence, rows, keys in zip(spans, seqlens_q, seqlens_k, strict=True):
        for token in range(keys - rows, keys):
            found.append(next(([start, end] for start, end in of_sequence if start <= token < end), [0, 0]))
    return found


def drawn_spans(rng: random.Random, keys: int) -> list[tuple[int, int]]:
    """Disjoint spans in any order, some of them empty, the last one perhaps behind the keys."""
    cuts = sorted(rng.randint(0, keys + 5) for _ in range(2 * rng.randint(0, 4)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=True))
    rng.shuffle(spans)
    return spans


@pytest.mark.parametrize("number", range(20))
def test_random_spans(number: int, rng: random.Random) -> None:
    batch = rng.randint(0, 6)
    seqlens_k = [rng.randint(0, 40) for _ in range(batch)]
    seqlens_q = [rng.randint(0, keys) for keys in seqlens_k]
    spans = [drawn_spans(rng, keys) for keys in seqlens_k]
    expected = by_loops(spans, seqlens_q, seqlens_k)
    found = make_query_ranges(spans, seqlens_q, seqlens_k)
    assert found.dtype == torch.int32 and found.shape == (sum(seqlens_q), 2) and found.tolist() == expected
    tensors = [torch.tensor(one, dtype=rng.choice((torch.int32, torch.int64))).view(-1, 2) for one in spans]
    lengths = torch.tensor(seqlens_q, dtype=torch.int32), torch.tensor(seqlens_k)
    assert make_query_ranges(tensors, *lengths).tolist() == expected
    offsets = torch.tensor([2, *seqlens_q]).cumsum(0).to(torch.int32)
    total = int(offsets[-1]) + 3
    packed = make_query_ranges(spans, None, seqlens_k, cu_seqlens_q=offsets, total_q=total)
    assert packed.tolist() == [[0, 0]] * 2 + expected + [[0, 0]] * 3


def test_dense_queries() -> None:
    spans: Spans = [[(1, 3)], [(0, 2), (3, 9)]]
    assert make_query_ranges(spans, 4).tolist() == [[[0, 0], [1, 3], [1, 3], [0, 0]], [[0, 2], [0, 2], [0, 0], [3, 9]]]
    assert make_query_ranges(spans, 2, 5).tolist() == [[[0, 0], [0, 0]], [[3, 9], [3, 9]]]
    assert make_query_ranges(spans, 2, [3, 4]).tolist() == [[[1, 3], [1, 3]], [[0, 0], [3, 9]]]
    assert make_query_ranges([], 4).shape == (0, 4, 2) and make_query_ranges([[]], 0).shape == (1, 0, 2)


def test_a_device() -> None:
    found = make_query_ranges([[(0, 2)]], [3], device="meta")
    assert found.device.type == "meta" and found.shape == (3, 2)


def test_an_image_sees_itself() -> None:
    """Blocks of an image attend to each other, text stays causal; in chunks as in one piece."""
    q, k, v = (torch.randn(1, 12, 2, 16) for _ in range(3))
    spans = [[(2, 6), (8, 11)]]
    seen = torch.ones(12, 12, dtype=torch.bool).tril()
    for start, end in spans[0]:
        seen[start:end, start:end] = True
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 4
    expected = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)
    out = broadhead.flash_attn_func(q, k, v, causal=True, query_ranges=make_query_ranges(spans, 12))
    torch.testing.assert_close(out, expected)
    tail = make_query_ranges(spans, 5, 12)
    torch.testing.assert_close(
        broadhead.flash_attn_func(q[:, 7:], k, v, causal=True, query_ranges=tail), expected[:, 7:]
    )


REFUSED: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((torch.zeros(1, 1, 2), [4]), {}, InvalidTypeError, "spans must be a list"),
    (([[(1, 3), (2, 4)]], [5]), {}, InvalidArgumentError, r"spans\[0\] must hold disjoint spans, got \(2, 4\)"),
    (([[], [(3, 1)]], [5, 5]), {}, InvalidArgumentError, r"spans\[1\] must hold pairs 0 <= start <= end.*got \(3, 1\)"),
    (([[(-1, 1)]], [5]), {}, InvalidArgumentError, r"spans\[0\] must hold pairs.*got \(-1, 1\)"),
    (([[(0, 2**31)]], [5]), {}, InvalidArgumentError, r"32 bits, got \(0, 2147483648\)"),
    (([[(0, 2**70)]], [5]), {}, InvalidTypeError, r"spans\[0\] must be ints"),
    (([[(1.0, 2.0)]], [5]), {}, InvalidTypeError, r"spans\[0\] must be ints.*float32"),
    (([[(1, 2, 3)]], [5]), {}, InvalidArgumentError, r"spans\[0\] must be ints of shape \(n, 2\).*\(1, 3\)"),
    (([None], [5]), {}, InvalidTypeError, r"spans\[0\] must be ints"),
    (([torch.zeros(1, 2, dtype=torch.int32, device="meta")], [5]), {}, InvalidTypeError, r"spans\[0\].*meta.*waits"),
    (([[]],), {}, InvalidArgumentError, "one of seqlens_q and cu_seqlens_q must be given, got neither"),
    (([[]], [5]), {"cu_seqlens_q": [0, 5]}, InvalidArgumentError, "one of seqlens_q and cu_seqlens_q .*, got both"),
    (([[]], [5, 6]), {}, InvalidArgumentError, r"seqlens_q must be ints of shape \(batch,\).*got \(2,\)"),
    (([[]], True), {}, InvalidTypeError, "seqlens_q must be a Python int, got True"),
    (([[]], -1), {}, InvalidArgumentError, "seqlens_q must be an int in .*got -1"),
    (([[]], [-1]), {}, InvalidArgumentError, "seqlens_q must hold lengths >= 0, got -1"),
    (([[]], 3.0), {}, InvalidTypeError, "seqlens_q must be ints"),
    (([[], []], [1, 5], [1, 3]), {}, InvalidArgumentError, "seqlens_k must be .* got 3 keys and 5 .* sequence 1"),
    (([[]], torch.ones(1, dtype=torch.int32, device="meta")), {}, InvalidTypeError, "seqlens_q .* waits"),
    (([[]],), {"cu_seqlens_q": [0, 5, 6]}, InvalidArgumentError, r"cu_seqlens_q must be ints of shape \(batch \+ 1,\)"),
    (([[], []],), {"cu_seqlens_q": [0, 5, 3]}, InvalidArgumentError, "cu_seqlens_q must hold offsets"),
    (([[]], [5]), {"total_q": 4}, InvalidArgumentError, "total_q must be at least 5.*got 4"),
    (([[]], 5), {"total_q": 5}, InvalidArgumentError, "total_q must be None with an int as seqlens_q"),
]


@pytest.mark.parametrize(("args", "named", "error", "text"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_refused(args: Any, named: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^make_query_ranges: .*{text}"):
        make_query_ranges(*args, **named)
