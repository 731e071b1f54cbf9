"""_C.run_new_shared and _C.run_known_shared without a GPU: what of shared keys is packed, refused and known."""

from __future__ import annotations

from pathlib import Path

from stub_process import pytestmark, run, stub  # noqa: F401

SHARED = """
OWN = dict(prefix_lens=None, leftpad_k=None, kv_batch_idx=None)
TABLE = 20 << 12

def launch(T, **changes):
    return make_launch(T, **dict(kernel_id="decode_bf16", window_left=-1, attention_chunk=0) | changes)

def table(T, pages=4, **options):
    return T(TABLE, (pages,), INT, **options)

def first(T, length=50, pages=None, launch_changes={}, **changes):
    pages = table(T) if pages is None else pages
    return _C.run_new_shared(launch(T, **launch_changes), "new", True, arguments(T, **OWN | changes), pages, length)

def known(T, length=50, pages=None, **changes):
    pages = table(T) if pages is None else pages
    return _C.run_known_shared("known", True, arguments(T, **OWN | changes), pages, length)
"""


def test_they_are_packed(stub: Path) -> None:  # noqa: F811
    """The address of each call, the length of its kind; other calls have none."""
    run(
        stub,
        SHARED
        + """
for T in (AttributeTensor, ExchangeTensor):
    _C.forget_calls()
    first(T)
    got = last_call(library)
    assert (got["shared_page_table"], got["shared_seqlen_k"], got["index"]) == (str(TABLE), "50", "3"), got
    assert known(T, pages=T(21 << 12, (4,), INT)) is not None
    assert last_call(library) == got | dict(shared_page_table=str(21 << 12))
    call(T, **OWN)
    got = last_call(library)
    assert got["shared_page_table"] == got["shared_seqlen_k"] == "0"
""",
    )


def test_which_calls_are_known(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        SHARED
        + """
T = ExchangeTensor
assert known(T) is None
first(T)
assert known(T) is not None
for changes in (dict(length=49), dict(length=50.0), dict(length=True), dict(pages=table(T, 5)), dict(softcap=29.0),
                dict(pages=T(TABLE, (4,), INT, device=1)), dict(pages=T(TABLE, (4,), F32)), dict(pages=7),
                dict(q=T(1 << 12, (2, 3, 4, 64), strides=(1024, 256, 64, 1)))):
    assert known(T, **changes) is None, changes
assert _C.run_known_shared("known", True, arguments(T, **OWN), None, 50) is None
# Neither takes a call of the other.
assert _C.run_known("known", True, arguments(T, **OWN)) is None
_C.run_new(launch(T), "new", True, arguments(T))
assert known(T, prefix_lens=T(12 << 12, (2,), INT)) is None
""",
    )


def test_what_is_refused(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        SHARED
        + """
T = ExchangeTensor
apart = T(1 << 12, (2, 3, 4, 64), strides=(1024, 256, 64, 1))
used = T(12 << 12, (2,), INT)
for words, changes in (
    ("shared_page_table is for decode kernels", dict(launch_changes=dict(kernel_id="sm80_fwd_d64_bf16"))),
    ("shared_length must be in [1, pages * page_size]", dict(length=65)),
    ("shared_length must be in", dict(length=0)),
    ("shared_length must be in", dict(length=-1)),
    ("shared_page_table must be a tensor", dict(pages=7)),
    ("shared_page_table must be contiguous", dict(pages=table(T, strides=(2,)))),
    ("shared_page_table must be contiguous, on the device of q", dict(pages=table(T, device=1))),
    ("shared_page_table must be int32", dict(pages=T(TABLE, (4,), F32))),
    ("shared_page_table must be", dict(pages=T(TABLE, (2, 2), INT))),
    ("q must be one piece of tokens", dict(q=apart)),
    ("seqused_q must be None", dict(seqused_q=used)),
    ("prefix_lens must be None", dict(prefix_lens=used)),
    ("causal_by_sequence must be None", dict(causal_by_sequence=used)),
    ("query_ranges must be None", dict(query_ranges=T(12 << 12, (2, 3, 2), INT))),
    ("tree_mask must be None", dict(tree_mask=T(12 << 12, (2, 3), "torch.int64"))),
    ("num_splits 1", dict(launch_changes=dict(num_splits=1))),
    ("cell_blocks 4", dict(launch_changes=dict(cell_blocks=4))),
    ("no window and no attention_chunk", dict(launch_changes=dict(window_left=7))),
    ("no window and no attention_chunk", dict(launch_changes=dict(window_right=1))),
    ("no window and no attention_chunk", dict(launch_changes=dict(attention_chunk=9))),
):
    text = error(lambda: first(T, **changes))
    assert words in text, (words, text)
# Tokens of one sequence, or one of each, lie apart by one stride, whatever the other.
first(T, q=T(1 << 12, (2, 1, 4, 64), strides=(1024, 7, 64, 1)), out=T(4 << 12, (2, 1, 4, 32)))
""",
    )
