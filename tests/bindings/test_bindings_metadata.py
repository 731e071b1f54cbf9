"""Scheduler metadata without a GPU: what is packed, by the stub kernel library, refused, and known the next time."""

from __future__ import annotations

from pathlib import Path

import pytest
from broadhead.run.metadata import ScheduleNumbers
from stub_process import pytestmark, run, stub  # noqa: F401

REQUEST = f"""
T = ExchangeTensor
FIELDS = {ScheduleNumbers._fields!r}
SCHEDULE = (5, 1, 64, 2, 3, 0, 4, 8, 6, 16, 128, 7, 132, 99)
BF16, FP16 = Dtype(), Dtype()
NUMBERS = (5, 1, 64, 8, 2, 64, None, BF16, 16, 2, True, (3, 0), 4, 7, None, 0, None, None, 0)

def request(shift=0, **changes):
    at = lambda place, shape: T((place + shift) << 12, shape, INT)
    a = dict(cache_seqlens=at(1, (5,)), cu_seqlens_q=at(2, (6,)), cache_leftpad=at(3, (5,)), out=at(4, (33,)),
             page_table=at(5, (5, 4)))
    assert not set(changes) - set(a), changes
    return tuple((a | changes).values())

def allocate(cache_seqlens):
    hooks.made.append(T(77 << 12, (33,), INT))
    return hooks.made[-1]

def plan(tensors, numbers=NUMBERS, schedule=SCHEDULE, device=0):
    return _C.run_new_metadata(device, allocate, "made for", schedule, *tensors, numbers)

def known(tensors, numbers=NUMBERS):
    return _C.run_known_metadata(*tensors, numbers)
"""


def test_what_is_packed(stub: Path) -> None:  # noqa: F811
    """Of a new request and of one like it, each with its own addresses."""
    run(
        stub,
        REQUEST
        + """
def check(shift, leftpad=True):
    wanted = dict(zip(FIELDS, SCHEDULE)) | dict(
        metadata=(4 + shift) << 12, seqused_k=(1 + shift) << 12, cu_seqlens_k=0,
        leftpad_k=(3 + shift) << 12, cu_seqlens_q=(2 + shift) << 12, seqused_q=0, stream=CURRENT_STREAM,
        struct_size_fits=1)
    got = last_call(library)
    assert got == {name: str(value) for name, value in wanted.items()}, got
assert known(request()) is None
made = plan(request())
assert made.data_ptr() == 4 << 12
check(0)
again = known(request(shift=100))
assert again.data_ptr() == 104 << 12
check(100)
assert hooks.remembered == [(4 << 12, "made for"), (104 << 12, "made for")]
assert hooks.written == [4 << 12, 104 << 12]
_C.forget_calls()
assert known(request()) is None
""",
    )


def test_a_buffer_is_made_where_none_is_given(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        REQUEST
        + """
for get in (plan, known):
    assert get(request(out=None)) is hooks.made[-1] and last_call(library)["metadata"] == str(77 << 12)
assert len(hooks.made) == 2 and hooks.written == [], "nobody has saved what was made here"
assert hooks.remembered == [(77 << 12, "made for")] * 2
assert known(request()) is None, "with a buffer of its own it is another request"
""",
    )


def test_requests_are_told_apart(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        REQUEST
        + """
plan(request())
for changes in (
    dict(cache_seqlens=T(1 << 12, (6,), INT)), dict(cache_seqlens=T(1 << 12, (5,), INT, strides=(2,))),
    dict(cu_seqlens_q=None), dict(cache_leftpad=None), dict(out=T(4 << 12, (34,), INT)), dict(page_table=None),
    dict(page_table=T(5 << 12, (5, 8), INT)), dict(cache_seqlens=T(1 << 12, (5,), INT, device=1)),
    dict(cache_seqlens=T(1 << 12, (5,), "torch.int64")), dict(cache_seqlens=T(1 << 12, (5,), INT, is_cuda=False)),
    dict(cache_seqlens=None), dict(cu_seqlens_q=7),
):
    assert known(request(**changes)) is None, changes
others = dict(enumerate(
    (6, 2, 65, 4, 1, 128, 64, FP16, 32, 0, False, (4, 0), 0, 0, True, 1, False, BF16, 64)))
for i, other in others.items():
    assert other != NUMBERS[i]
    assert known(request(), (*NUMBERS[:i], other, *NUMBERS[i + 1:])) is None, i
assert len(others) == len(NUMBERS)
assert known(request(), list(NUMBERS)) is None
assert known(request()) is not None
""",
    )


def test_a_tensor_among_the_numbers_is_not_known(stub: Path) -> None:  # noqa: F811
    """Its value may have changed since."""
    run(
        stub,
        REQUEST
        + """
for i in range(len(NUMBERS)):
    for value in (T(9 << 12, (), INT), (T(9 << 12, (), INT), 0)):
        numbers = (*NUMBERS[:i], value, *NUMBERS[i + 1:])
        plan(request(), numbers)
        assert known(request(), numbers) is None
plan(request(), None)
assert _C.known_calls_size() == (0, 0) and known(request()) is None
""",
    )


@pytest.mark.parametrize("argument", range(5))
def test_what_is_no_plain_memory_is_not_known(stub: Path, argument: int) -> None:  # noqa: F811
    run(
        stub,
        REQUEST
        + f"""
class Other(ExchangeTensor):
    pass
plan(request())
tensors = list(request())
plain = tensors[{argument}]
tensors[{argument}] = Other(plain.data_ptr(), plain.shape, plain.dtype, plain.stride())
assert known(tensors) is None
tensors[{argument}] = T(0, plain.shape, plain.dtype)
assert known(tensors) is None
assert known(request()) is not None
""",
    )


def test_modes_and_devices(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        REQUEST
        + """
plan(request())
hooks.modes = 1
assert known(request()) is None, "FakeTensorMode and its like"
hooks.modes, hooks.forward_ad["_current_level"] = 0, 0
assert known(request()) is None, "forward-mode AD"
hooks.forward_ad["_current_level"] = -1
hooks.devices = [0]
on_other = tuple(T(x.data_ptr(), x.shape, INT, device=3) for x in request())
plan(on_other, device=3)
assert hooks.devices[:3] == [0, 3, 0], hooks.devices
assert last_call(library)["stream"] == str(CURRENT_STREAM + 3)
assert known(on_other) is not None
""",
    )


def test_what_does_not_fit_is_refused_by_name(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        REQUEST
        + """
for name, tensor in (
    ("out", T(4 << 12, (32,), INT)), ("out", T(4 << 12, (33,), INT, strides=(2,))), ("out", T(4 << 12, (33,), F32)),
    ("cache_seqlens", T(1 << 12, (4,), INT)), ("cache_seqlens", T(1 << 12, (5,), INT, strides=(2,))),
    ("cu_seqlens_q", T(1 << 12, (5,), INT)), ("cache_leftpad", T(1 << 12, (4,), INT)),
    ("cache_leftpad", T(1 << 12, (5, 1), INT)), ("cache_seqlens", None), ("page_table", "x"),
):
    text = error(plan, request(**{name: tensor}))
    assert text.startswith("_C.run_new_metadata: " + name) or f"run_new_metadata: {name}" in text, text
    assert _C.known_calls_size() == (0, 0), "what was refused is not known"
assert "schedule must fit 32 bits" in error(plan, request(), NUMBERS, (*SCHEDULE[:-1], 1 << 40))
for schedule in (SCHEDULE[:-1], list(SCHEDULE), None):
    try:
        plan(request(), NUMBERS, schedule)
        raise AssertionError("no TypeError")
    except TypeError as wrong:
        assert "schedule must be a tuple of 14 items" in str(wrong)
""",
    )
