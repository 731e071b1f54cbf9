"""Tensors that are no plain memory, as every argument of every public function: right, or refused by name."""

from __future__ import annotations

import broadhead
import pytest
import torch
from entries import KINDS, Entry, Watching, backward_entries, entries, memory_of, tensor_arguments

NAMES = sorted({name for name, _ in tensor_arguments()})


def check_kind(entry: Entry, arguments: list[str], kind: str) -> None:
    """``arguments`` as tensors of ``kind`` give what plain tensors give, or are refused before anything is written."""
    expected, written = entry.run(entry.clone())
    given = entry.clone()
    given |= {argument: KINDS[kind](given[argument]) for argument in arguments}
    before = {name: memory_of(x).clone() for name, x in given.items()}
    try:
        got, got_written = entry.run(given)
    except broadhead.UnsupportedError as refusal:
        assert kind == "negated", f"{arguments} as {kind}: {refusal}"
        assert "is written" in str(refusal) and any(str(refusal).split()[1] == name for name in arguments), refusal
        for name, x in given.items():
            assert torch.equal(memory_of(x), before[name]), f"{name} was written by a call that was refused"
        return
    tolerance = {"atol": 2e-3, "rtol": 2e-3} if expected[0].dtype.itemsize == 2 else {}
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(
            memory_of(a), b, equal_nan=True, **tolerance, msg=lambda text: f"{arguments} as {kind}: {text}"
        )
    for name, x in got_written.items():
        torch.testing.assert_close(
            memory_of(x).float(), written[name].float(), **tolerance, msg=f"{name} is wrong with {arguments} as {kind}"
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_argument(name: str, kind: str) -> None:
    entry = (entries() | backward_entries())[name]
    for argument in entry.tensors:
        check_kind(entry, [argument], kind)
    check_kind(
        entry, [argument for argument in entry.tensors if kind != "negated" or argument not in entry.written], kind
    )


def test_a_subclass_sees_the_operator() -> None:
    """As q or as any other argument: what overrides torch's dispatch is asked."""
    entry = entries()["dense"]
    for argument in entry.tensors:
        given = entry.clone()
        given[argument] = KINDS["watching"](given[argument])
        Watching.seen.clear()
        entry.run(given)
        assert "broadhead.mha_fwd.default" in Watching.seen, argument


def test_layouts_without_strides_are_refused_by_name() -> None:
    q = torch.randn(2, 5, 4, 64)
    with pytest.raises((broadhead.UnsupportedError, broadhead.InvalidArgumentError), match="flash_attn_func: k"):
        broadhead.flash_attn_func(q, q.to_sparse(), q)
