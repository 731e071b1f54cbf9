"""The torch reference under masks that are values: in chunks, with lengths that nobody reads, traced, in one memory."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from broadhead import reference
from broadhead.reference import core as reference_core
from broadhead.reference import sdpa
from calls import Built, build
from checks import check_against, check_dead_rows, check_gradients, check_new_rows, random_gradients
from dispatch_modes import LargestTensor, NoSync
from random_calls import drawn_call
from torch import Tensor
from torch.fx.experimental import _config as shape_config

LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "varlen": {"ragged_q": True, "packed_k": True},
    "paged": {"page_size": 16},
    "ragged_paged": {"ragged_q": True, "page_size": 16},
    "dense_q_packed_k": {"packed_k": True},
    "leftpad": {"leftpad": True, "used_k": True},
    "used_q": {"ragged_q": True, "used_q": True, "page_size": 3},
}
EACH = (True, False, False)
MASKS: dict[str, dict[str, Any]] = {
    "ranges": {"causal": True, "ranges": "random"},
    "ranges_sliding": {"window": (5, 0), "ranges": "single"},
    "ranges_in_window": {"window": (9, 1), "ranges": "random", "ranges_in_window": True},
    "ranges_chunk": {"attention_chunk": 7, "window": (4, 0), "ranges": "pages", "ranges_in_window": True},
    "ranges_prefix": {"window": (3, 0), "prefix": True, "ranges": "far"},
    "each": {"causal_each": EACH, "window": (-1, 4)},
    "each_ranges": {"causal_each": EACH, "window": (6, -1), "ranges": "random", "causal_dtype": torch.int32},
    "tree": {"causal": True, "tree": "words"},
    "tree_window": {"window": (65, -1), "tree": "eagle", "causal_each": EACH},
}
CPU = torch.device("cpu")

on_a_cpu = functools.partial(reference.attention, read_lengths=True)
on_a_device = functools.partial(reference.attention, read_lengths=False)


def drawn(rng: random.Random, layout: str, mask: str, **options: Any) -> Built:
    sizes = {"batch": 3, "longest_k": 150} if "tree" in mask else {"batch": 3}
    return build(drawn_call(rng, **{**sizes, **LAYOUTS[layout], **MASKS[mask], **options}), CPU, rng)


def check(built: Built, fn: Any) -> None:
    """Forward, into an ``out`` that holds NaN, and the gradients where there are any."""
    out, lse = fn(**built.normalised())
    check_against(built, out, lse)
    check_new_rows(built, out, lse)
    built.out.fill_(float("nan"))
    fn(**built.normalised(), out=built.out)
    check_dead_rows(built, built.out)
    if built.call.tree:
        return
    leaves = built.requires_grad()
    check_gradients(built, *random_gradients(built, leaves, *fn(**built.normalised())))


@pytest.mark.parametrize("read", [True, False], ids=["on a CPU", "as on a device"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks(layout: str, mask: str, read: bool, rng: random.Random) -> None:
    check(drawn(rng, layout, mask), on_a_cpu if read else on_a_device)


@pytest.mark.parametrize("mask", MASKS)
def test_chunks_of_queries(mask: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """A query a chunk: each reads its own ranges and words."""
    monkeypatch.setattr(reference_core, "CPU_QUERIES", 1)
    monkeypatch.setattr(reference_core, "CPU_SCORES", 1)
    check(drawn(rng, "ragged_paged", mask, sinks="fp32", dtype=torch.bfloat16), on_a_cpu)
    check(drawn(rng, "dense", mask, softcap=2.0), on_a_device)


@pytest.mark.parametrize("mask", MASKS)
def test_no_tensor_is_read(mask: str, rng: random.Random) -> None:
    for layout in ("varlen", "ragged_paged"):
        built = drawn(rng, layout, mask)
        with NoSync():
            on_a_device(**built.normalised())


@pytest.mark.parametrize("mask", MASKS)
def test_kernels_of_torch_are_not_asked(mask: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """They know none of these masks: not even where all others of a call are full or causal."""
    planned: list[Any] = []
    plan = sdpa._plan
    monkeypatch.setattr(sdpa, "_plan", lambda *given: planned.append(plan(*given)) or planned[-1])
    built = drawn(rng, "dense", mask, window=(-1, -1), attention_chunk=0, prefix=False)
    on_a_cpu(**built.normalised())
    assert planned and not any(planned)


@shape_config.patch(use_duck_shape=False)
@pytest.mark.parametrize("mask", ["ranges_in_window", "each_ranges", "tree"])
def test_compiles_with_dynamic_shapes(mask: str, rng: random.Random) -> None:
    """One compiled graph serves another batch, other lengths and another pool."""
    torch._dynamo.reset()
    compiled = torch.compile(reference.attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for changes in ({}, {"batch": 5, "longest_q": 29, "longest_k": 77}):
        if "causal_each" in MASKS[mask]:
            changes = {**changes, "causal_each": EACH + (True, False) * (len(changes) > 0)}
        built = drawn(rng, "ragged_paged", mask, **changes)
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile" if "batch" in changes else "default"):
            out, lse = compiled(**built.normalised())
        check_against(built, out, lse)
        check_new_rows(built, out, lse)


@pytest.mark.parametrize("mask", [name for name, options in MASKS.items() if "tree" not in options])
def test_gradcheck(mask: str, rng: random.Random) -> None:
    sizes = {"batch": 3, "longest_q": 3, "longest_k": 9, "head_dim": 2, "dtype": torch.float64}
    built = drawn(rng, "dense", mask, **sizes)
    leaves = built.requires_grad()
    for leaf in leaves.values():
        leaf.data.nan_to_num_()  # keys that no query sees

    def function(*tensors: Tensor) -> Tensor:
        return reference.attention(**{**built.normalised(), **dict(zip(leaves, tensors, strict=True))})[0]

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def test_memory_is_bounded(rng: random.Random) -> None:
    """8k x 8k (67M scores) with a range for each query: neither scores nor their mask are held at once."""
    sizes = {"batch": 1, "longest_q": 8192, "longest_k": 8192, "heads_q": 1, "heads_kv": 1, "head_dim": 8}
    built = drawn(rng, "dense", "ranges_in_window", **sizes)
    leaves = built.requires_grad()
    with LargestTensor() as largest:
        out, _ = on_a_cpu(**built.normalised())
        torch.autograd.grad(out.sum(), list(leaves.values()))
    assert largest.numel <= reference_core.CPU_SCORES
