"""_C.run_known without a GPU: which calls it takes for known, and what it does of a call that it knows."""

from __future__ import annotations

from pathlib import Path

import pytest
from stub_process import KNOWN, pytestmark, run, stub  # noqa: F401


@pytest.mark.parametrize("kind", ["AttributeTensor", "ExchangeTensor"])
def test_a_known_call_is_packed_as_a_new_one(stub: Path, kind: str) -> None:  # noqa: F811
    """Only addresses come from the call itself: all of them, at other places than those of the first call."""
    run(
        stub,
        KNOWN
        + f"""
T = {kind}
def masks(T):
    return dict(query_ranges=T(20 << 12, (2, 3, 2), INT), tree_mask=T(21 << 12, (2, 3), "torch.int64"),
                causal_by_sequence=T(22 << 12, (2,), "torch.bool"), ranges_in_window=True)
def moved(T):
    shift = lambda pointer, *a, **k: T(pointer + (99 << 12), *a, **k)
    return dict(zip(ARGUMENTS, arguments(shift, qv=shift(1 << 12, (2, 3, 4, 32)), k_descale=shift(2 << 12, (2, 2), F32),
                                         v_descale=shift(3 << 12, (2, 2), F32), seqused_q=shift(4 << 12, (2,), INT),
                                         **masks(shift))))
first = dict(qv=T(1 << 12, (2, 3, 4, 32)), k_descale=T(2 << 12, (2, 2), F32), v_descale=T(3 << 12, (2, 2), F32),
             seqused_q=T(4 << 12, (2,), INT), **masks(T))
assert known(T, **first) is None
out, lse = remember(T, **first)
before = last_call(library)
result = known(T, **moved(T))
got = last_call(library)
assert result[0].data_ptr() == (4 + 99) << 12 and result[1].data_ptr() == 5 << 12
_C.forget_calls()
assert known(T, **moved(T)) is None
remember(T, **moved(T))
assert got == last_call(library) and got["q"] != before["q"] and got["v_descale"] != before["v_descale"]
for name, page in (("query_ranges", 20), ("tree_mask", 21), ("causal_by_sequence", 22)):
    assert got[name] == str((page + 99) << 12), name
assert hooks.last == ("cuda", "row", "why") and len(scratch_sizes) == 3
""",
    )


def test_what_a_known_call_allocates(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        KNOWN
        + """
T = ExchangeTensor
remember(T, out=None)
out, lse = known(T, out=None)
assert out.data_ptr() == 4 << 12 and lse.data_ptr() == 5 << 12
out, lse = known(T, need_lse=False, out=None)
assert lse is None and last_call(library)["softmax_lse"] == "0"
assert scratch_sizes == freed == [6 * 4 * 6 * 33] * 3
""",
    )


CHANGES = [
    "q=T(1 << 12, (2, 5, 4, 64))",
    "q=T(1 << 12, (2, 3, 4, 64), strides=(1024, 256, 64, 1))",
    "q=T(1 << 12, (2, 3, 4, 64), 'torch.float16')",
    "q=T(1 << 12, (2, 3, 4, 64), device=1)",
    "q=T((1 << 12) + 8, (2, 3, 4, 64))",
    "k=T((2 << 12) + 2, (5, 16, 2, 64))",
    "k=T(2 << 12, (6, 16, 2, 64))",
    "v=T(3 << 12, (5, 16, 2, 32))",
    "qv=T(1 << 12, (2, 3, 4, 32))",
    "out=None",
    "cu_seqlens_q=T(4096, (3,), INT)",
    "seqused_k=None",
    "seqused_k=T(8 << 12, (3,), INT)",
    "page_table=T(11 << 12, (2, 8), INT, strides=(9, 1))",
    "sinks=T(13 << 12, (4,))",
    "scheduler_metadata=None",
    "k_descale=T(4096, (2, 2), F32)",
    "max_seqlen_q=3",
    "max_seqlen_k=112",
    "softmax_scale=0.125",
    "causal=False",
    "causal=1",
    "window_size=(7, 1)",
    "window_size=(7, 0, 0)",
    "window_size=7",
    "window_size=(7, None)",
    "attention_chunk=8",
    "softcap=30",
    "softcap=29.0",
    "num_splits=5",
    "pack_gqa=True",
    "sm_margin=1",
    "backend='cuda'",
    "tokens_per_split=64",
    "query_ranges=None",
    "query_ranges=T(15 << 12, (2, 3, 2), INT, strides=(20, 4, 1))",
    "ranges_in_window=True",
    "tree_mask=T(4096, (2, 3), 'torch.int64')",
    "causal_by_sequence=None",
    "causal_by_sequence=T(17 << 12, (2,), INT)",
]
#: Masks as values.
MASKS = """
masks = dict(query_ranges=T(15 << 12, (2, 3, 2), INT), ranges_in_window=False,
             causal_by_sequence=T(17 << 12, (2,), "torch.bool"))
"""


def test_calls_that_differ_are_not_known(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        KNOWN
        + f"""
T = ExchangeTensor
{MASKS}
remember(T, **masks)
for change in {CHANGES!r}:
    assert known(T, **masks | eval("dict(" + change + ")", globals())) is None, change
assert known(T) is None, "a call without masks"
assert known(T, **masks) is not None and known(T, **masks | dict(query_ranges=T(4096, (2, 3, 2), INT))) is not None
remember(T)
assert known(T) is not None
# Not in the key: addresses that are aligned alike, lists for tuples.
assert known(T, q=T(1 << 13, (2, 3, 4, 64)), seqused_k=T((8 << 12) + 4, (2,), INT)) is not None
assert known(T, window_size=[7, 0]) is not None
""",
    )


def test_values_that_are_no_key(stub: Path) -> None:  # noqa: F811
    """Such a call runs, and is validated each time; a tensor among the values is not read."""
    run(
        stub,
        KNOWN
        + """
class Index:
    def __init__(self, value): self.value = value
    def __index__(self): return self.value
class Real:
    def __init__(self, value): self.value = value
    def __float__(self): return self.value
class Unread(ExchangeTensor):
    def __index__(self): raise AssertionError("read")
T = ExchangeTensor
for value in (1 << 70, Unread(4096, ()), object(), {7}, "\\ud800", (1,) * 999):
    remember(T, window_size=value)
    assert known(T, window_size=value) is None, value
# Numbers of other types have a key of their own.
for value, same, other in ((7, Index(7), Index(8)), (7.0, Real(7.0), Real(7.5))):
    remember(T, softcap=value)
    assert known(T, softcap=same) is None
    remember(T, softcap=same)
    assert known(T, softcap=same) is not None and known(T, softcap=other) is None
assert known(T, q=7) is None and known(T, q=None) is None and known(T, q=T(4096, (1,) * 7)) is None
assert known(T, q=T(1 << 12, (2, 3, 4, 64), is_cuda=False)) is None
""",
    )


def test_gradients_are_not_for_kernels(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        KNOWN
        + """
T = ExchangeTensor
qv = T(1 << 12, (2, 3, 4, 32))
remember(T, qv=qv)
for name, needed in (("q", True), ("k", True), ("v", True), ("qv", True), ("sinks", True), ("out", True),
                     ("seqused_k", False)):
    given = dict(zip(ARGUMENTS, arguments(T, qv=T(1 << 12, (2, 3, 4, 32)))))
    given[name].requires_grad = True
    hooks.grad = True
    assert (known(T, **given) is None) == needed, name
    hooks.grad = False
    assert known(T, **given) is not None, name
""",
    )


def test_metadata_is_compared_once_for_a_record(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        KNOWN
        + """
T = ExchangeTensor
address = 14 << 12
remember(T)
assert known(T) and hooks.identities == [], "nobody knows what the buffer was made for"
hooks.records[address] = "first"
assert known(T) and known(T)
((function, metadata, *identity),) = hooks.identities
assert (function, metadata.data_ptr(), identity) == ("known", address, ["made for", 3])
hooks.records[address] = "second"
assert known(T) and known(T) and len(hooks.identities) == 2
def refuse(*arguments):
    raise ValueError("made for another call")
connect(check_identity=refuse)
hooks.records[address] = "third"
for _ in range(2):
    try:
        known(T)
    except ValueError as exception:
        assert "another call" in str(exception)
    else:
        raise AssertionError("it was refused once, and runs now")
""",
    )


def test_the_device_is_current_while_a_call_runs(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        KNOWN
        + """
T = lambda *a, **k: ExchangeTensor(*a, device=3, **k)
remember(T, launch=dict(device=3))
assert hooks.devices == [0, 3, 0] and last_call(library)["stream"] == str(CURRENT_STREAM + 3)
known(T)
assert hooks.devices == [0, 3, 0, 3, 0]
hooks.devices[:] = [3]
known(T)
assert hooks.devices == [3, 3], "it was the current one: nothing to restore"
hooks.devices[:] = [0]
error(lambda: remember(T, launch=dict(device=3, softcap=-1.0), sm_margin=1))
assert hooks.devices == [0, 3, 0]
assert known(T, sm_margin=1) is None, "a call that failed is validated again"
""",
    )
