"""Tensors that are no plain memory, as every argument of every public function: right, or refused by name."""

from __future__ import annotations

import broadhead
import pytest
import torch
from entries import backward_entries, entries, tensor_arguments
from tensor_kinds import KINDS, Watching, check_kind

NAMES = sorted({name for name, _ in tensor_arguments()})


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
