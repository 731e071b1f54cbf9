"""How DTensor may cut the operators: over the heads, and over the batch.

torch keeps such rules in a table of its own, which register() fills once. Until then nothing of torch.distributed is
imported. A cut says, by name, along which dimension tensors are sharded. Those that it does not name are needed whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import chain, combinations
from math import prod
from typing import Any

import torch
from torch.compiler import is_compiling

from ..call.arguments import DIFFERENTIABLE
from ..errors import UnsupportedError

_Shapes = dict[str, tuple[int, ...]]
_Cut = dict[str, int]

#: Where heads are: the place of the dimension from the end, and whether they are heads of q or of k.
_HEADS = {
    **dict.fromkeys(("q", "qv", "out", "dout", "softmax_lse", "dlse", "out_a", "lse_a", "out_b", "lse_b"), (2, "q")),
    **dict.fromkeys(("k", "v", "k_cache", "v_cache", "k_new", "v_new"), (2, "k")),
    **dict.fromkeys(("q_descale", "k_descale", "v_descale"), (1, "k")),
    "sinks": (1, "q"),
}
#: Which rows a merge can be cut into besides: the place of their dimension from the end.
_ROWS = {"out": 3, "out_a": 3, "out_b": 3, "lse_a": 1, "lse_b": 1}
#: What has no entry for each sequence of a dense batch.
_NOT_IN_BATCH = ("sinks", "rotary_cos", "rotary_sin")
#: With one of these there is no batch to cut: the sequences are packed, or the plan is one of all of them.
_NO_BATCH = ("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new", "scheduler_metadata")


def prepare(*values: Any) -> None:
    """Before an operator runs on ``values``: where a DTensor is among them, torch must know how to shard it."""
    if is_compiling():
        _register_while_tracing()
    elif _is_loaded() and any(isinstance(value, sys.modules[_MODULE].DTensor) for value in values):
        register()


def register() -> None:
    """Tell DTensor how it may shard the operators.

    The public functions do it by themselves. Who calls ``torch.ops.broadhead`` directly calls this once before.
    """
    if not _registered:
        _register_all()
        _registered.append(True)


_MODULE = "torch.distributed.tensor"
_registered: list[bool] = []


def _is_loaded() -> bool:
    """Whether this process can have a DTensor at all."""
    return _MODULE in sys.modules


def _register_while_tracing() -> None:
    if _is_loaded():
        register()


# torch.compile runs this while it traces, and traces nothing of it. It is the mark that
# torch.compiler.assume_constant_result sets, which would import the whole compiler.
_register_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _register_all() -> None:
    try:
        from torch.distributed.tensor.experimental import register_sharding
    except ImportError:  # an experimental name; without it DTensor says itself that it can not shard the operator
        return
    gradients = tuple(f"d{name}" for name in DIFFERENTIABLE)
    # Of each operator: its cuts, what its results are cut like, and what it writes.
    for name, cuts, results, written in (
        ("mha_fwd", attention_cuts, ("out", "softmax_lse"), ()),
        ("mha_fwd_out", attention_cuts, ("softmax_lse",), ("out",)),
        ("mha_bwd", attention_cuts, gradients, ()),
        ("merge_states", merge_cuts, ("out_a", "lse_a"), ()),
        ("merge_states_out", merge_cuts, ("lse_a",), ("out",)),
        ("append_kv", append_cuts, ("turned", "cache_seqlens"), ("k_cache", "v_cache")),
        ("get_scheduler_metadata", whole_alone, ("metadata",), ()),
        ("get_scheduler_metadata_out", whole_alone, (), ("out",)),
    ):
        operator = getattr(torch.ops.broadhead, name).default
        register_sharding(operator)(_rule(operator, cuts, results, written))


def _rule(
    operator: Any, cuts: Callable[[_Shapes, Any], Iterator[_Cut]], results: tuple[str, ...], written: tuple[str, ...]
) -> Callable[..., list[tuple[list[Any], list[Any]]]]:
    """What register_sharding asks for: placements of the results and of the arguments, for each acceptable cut."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    names = [argument.name for argument in operator._schema.arguments]

    def placements(*values: Any) -> list[tuple[list[Any], list[Any]]]:
        # In place of tensors come their specs.
        given = {name: value for name, value in zip(names, values) if hasattr(value, "placements")}
        shapes = {name: tuple(spec.shape) for name, spec in given.items()}
        mesh = next(iter(given.values())).mesh

        def place(name: str, cut: _Cut) -> Any:
            if name in cut:
                return Shard(cut[name])
            # Each part of the call gives its share of the gradient of what it needs whole.
            is_share = bool(cut) and name[0] == "d" and name not in names and name[1:] in given
            return Partial() if is_share else Replicate()

        acceptable = [{}, *cuts(shapes, mesh)]
        for name in written:
            if name in given:
                acceptable = [cut for cut in acceptable if set(given[name].placements) == {place(name, cut)}]
                if not acceptable:
                    _refuse_moved(operator, name, given[name].placements)
        return [
            (
                [place(name, cut) for name in results],
                [place(name, cut) if name in given else None for name in names],
            )
            for cut in acceptable
        ]

    return placements


def _refuse_moved(operator: Any, name: str, placements: Any) -> None:
    """What is written stays where it is: of a tensor moved to another placement the copy would be written."""
    raise UnsupportedError(
        f"{operator._schema.name}: {name} is written, and this call can not write it with placements"
        f" {tuple(placements)}; shard it over heads that divide among the ranks, over the batch of a dense call, or not"
        " at all, and alike in all dimensions of its mesh; or pass no tensor to write into"
    )


def whole_alone(shapes: _Shapes, mesh: Any) -> Iterator[_Cut]:
    """No cut: every rank makes the plan of the whole batch."""
    return iter(())


def attention_cuts(shapes: _Shapes, mesh: Any) -> Iterator[_Cut]:
    """The cuts of a call of attention, and of its gradient. Both results follow q, and each gradient its input."""
    q = shapes["q"]
    if len(q) < 3:
        return  # a wrong call, as below
    shapes = {"out": q, "softmax_lse": (*q[:-3], q[-2], q[-3]), **shapes}
    by_batch = batch_cut(shapes, ("k", "v") if "page_table" in shapes or "kv_batch_idx" in shapes else ())
    for cut in (heads_cut(shapes, mesh), by_batch):
        if cut:
            yield cut | {f"d{name}": cut[name] for name in DIFFERENTIABLE if name in cut}


def merge_cuts(shapes: _Shapes, mesh: Any) -> Iterator[_Cut]:
    """The cuts of a merge: it treats every row of every head by itself."""
    yield heads_cut(shapes, mesh)
    yield {name: len(shape) - _ROWS[name] for name, shape in shapes.items()}
    if len(shapes["out_a"]) == 4:
        yield dict.fromkeys(shapes, 0)


def append_cuts(shapes: _Shapes, mesh: Any) -> Iterator[_Cut]:
    """The cuts of an append. The pages of a pool belong to no sequence, so that its batch is not cut."""
    cuts = [heads_cut(shapes, mesh)]
    if "page_table" not in shapes and "cache_batch_idx" not in shapes:
        cuts.append(batch_cut(shapes))
    for cut in cuts:
        if cut:
            turned = {"turned": cut["q"]} if "q" in cut and "rotary_cos" in shapes else {}
            yield cut | turned


def heads_cut(shapes: _Shapes, mesh: Any) -> _Cut:
    """The cut over heads, which keeps the query heads of a KV head with it; empty: there is none."""
    heads: dict[str, list[int]] = {"q": [], "k": []}
    for name, shape in shapes.items():
        if name in _HEADS:
            place, kind = _HEADS[name]
            heads[kind].append(shape[-place] if len(shape) >= place else -1)
    of_queries, of_keys = heads["q"], heads["k"]
    if not (_are_equal(of_queries) and _are_equal(of_keys)):
        return {}  # a wrong call, which fails in the same way on every rank
    are_both = bool(of_queries and of_keys)
    one_for_all = are_both and of_keys[0] == 1
    if are_both and (of_keys[0] < 1 or of_queries[0] % of_keys[0] != 0):
        return {}
    if not _divides((of_queries if one_for_all or not of_keys else of_keys)[0], mesh):
        return {}
    return {
        name: len(shape) - _HEADS[name][0]
        for name, shape in shapes.items()
        if name in _HEADS and not (one_for_all and _HEADS[name][1] == "k")
    }


def _are_equal(sizes: list[int]) -> bool:
    # No set: symbolic sizes are not hashable.
    return all(size == sizes[0] for size in sizes)


def _divides(heads: int, mesh: Any) -> bool:
    """Whether each set of dimensions of the mesh cuts heads equally; torch tries none of more parts than heads."""
    sizes = [mesh.size(dim) for dim in range(mesh.ndim)]
    sets = chain.from_iterable(combinations(sizes, count + 1) for count in range(len(sizes)))
    return all(heads % prod(chosen) == 0 or heads < prod(chosen) for chosen in sets)


def batch_cut(shapes: _Shapes, shared: tuple[str, ...] = ()) -> _Cut:
    """The cut over the sequences of a dense call, which all need what is ``shared``; empty: there is none."""
    if any(name in shapes for name in _NO_BATCH):
        return {}
    if "kv_batch_idx" in shapes:
        shared = (*shared, "page_table")  # which has a row for each entry of the cache then
    cut = [name for name in shapes if name not in _NOT_IN_BATCH and name not in shared]
    is_batch = all(shapes[name] for name in cut) and _are_equal([shapes[name][0] for name in cut])
    return dict.fromkeys(cut, 0) if is_batch else {}
