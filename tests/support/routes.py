"""Where each argument of a public function must arrive: in which field of which launch, and with which value.

A launch of the reference is described by the same names (route_runner.py), so that one list serves both.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from described import h200
from operation_cases import OperationCase
from sentinels import PAGE, Arguments, Case
from torch import Tensor

#: A value that is not known before the launch: anything but 0.
NOT_NULL = "not null"
#: What only kernels are told: the reference neither divides its work nor plans it, and adds in one order.
OF_KERNELS = {
    "num_splits", "pack_gqa", "sm_margin", "scheduler_metadata", "tokens_per_split", "deterministic",
    "return_softmax_lse", "return_attn_probs",
}  # fmt: skip


class Route(NamedTuple):
    """One field that must hold one value."""

    launch: str  # its entry; with [1] the second launch of that entry
    field: str
    value: str  # "append_kv.q_out": whatever that field holds


def text(value: Any) -> str:
    """A value as a field of a launch shows it: pointers and flags as integers, numbers in fp32."""
    if isinstance(value, Tensor):
        return str(value.data_ptr())
    if isinstance(value, float):
        return f"{ctypes.c_float(value).value:.9g}"
    if isinstance(value, tuple):
        return ",".join(map(text, value))
    return value if isinstance(value, str) else str(int(value))


def row_strides(x: Tensor) -> tuple[int, int, int]:
    """The strides of a sequence, a token and a head, as TensorStrides has them: packed rows have no sequence."""
    return (x.stride(0) if x.dim() == 4 else 0, x.stride(-3), x.stride(-2))


Fields = dict[str, Any]
Values = Mapping[str, Any]


def _address(name: str) -> Callable[[Any, Values], Fields]:
    return lambda value, values: {name: value}


def _rows(name: str) -> Callable[[Any, Values], Fields]:
    return lambda value, values: {name: value, f"{name}_strides": row_strides(value)}


def _factor(name: str) -> Callable[[Any, Values], Fields]:
    return lambda value, values: {name: value, f"{name}_strides": value.stride()}


def _sides(value: tuple[int, int], values: Values) -> Fields:
    return {"window_left": value[0], "window_right": 0 if values.get("causal") else value[1]}


def _of_tokens(name: str, prefix: str) -> Callable[[Any, Values], Fields]:
    """A mask with an entry for each token of q, which has a dimension less where q is packed."""

    def fields(value: Tensor, values: Values) -> Fields:
        packed = values["q"].dim() == 3
        row = 0 if packed else 1
        return {
            name: value, f"{prefix}_row_stride": value.stride(row),
            f"{prefix}_batch_stride": 0 if packed else value.stride(0),
        }  # fmt: skip

    return fields


def _max_blocks(value: int, values: Values) -> Fields:
    return {"max_blocks": h200().sm_count - value}  # of a row with one CTA a multiprocessor


#: The fields that follow from each argument of AttentionArgs, and the two sides of its window.
FIELDS: dict[str, Callable[[Any, Values], Fields]] = {
    **{name: _rows(name) for name in ("q", "k", "v", "qv", "out")},
    **{name: _factor(name) for name in ("q_descale", "k_descale", "v_descale")},
    **{
        name: _address(name)
        for name in (
            "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "kv_batch_idx", "leftpad_k", "prefix_lens",
            "scheduler_metadata", "softmax_scale", "softcap", "attention_chunk", "pack_gqa",
        )
    },
    "page_table": lambda value, values: {"page_table": value, "page_table_batch_stride": value.stride(0)},
    "sinks": lambda value, values: {"sinks": value, "sinks_are_fp32": value.element_size() == 4},
    "query_ranges": _of_tokens("query_ranges", "ranges"),
    "ranges_in_window": _address("ranges_in_window"),
    "tree_mask": _of_tokens("tree_mask", "tree"),
    "causal_by_sequence": lambda value, values: {
        "causal_by_sequence": value, "causal_is_bool": value.element_size() == 1,
    },
    "max_seqlen_q": _address("seqlen_q"),
    "max_seqlen_k": _address("seqlen_k"),
    "causal": lambda value, values: {"window_right": 0 if value else values.get("window_size", (-1, -1))[1]},
    "window_size": _sides,
    "window_left": _address("window_left"),
    "window_right": _address("window_right"),
    # Kernels that cut the keys at multiples of tokens_per_split split nothing else.
    "num_splits": lambda value, values: {"num_splits": 1 if values.get("tokens_per_split") else value},
    "sm_margin": _max_blocks,
    "tokens_per_split": lambda value, values: {"cell_blocks": value // 64},
    "backend": lambda value, values: {"backend": value},
}  # fmt: skip

#: What an append kernel is told of the arguments of attention.
APPEND_FIELDS: dict[str, Callable[[Any, Values], Fields]] = {
    "q": _rows("q"),
    "k": _rows("k_cache"),
    "v": _rows("v_cache"),
    "seqused_k": _address("cache_seqlens"),
    "kv_batch_idx": _address("cache_batch_idx"),
    "window_size": lambda value, values: {"causal_or_local": 1},
    "causal": lambda value, values: {"causal_or_local": 1},
    "causal_by_sequence": lambda value, values: {"causal_or_local": 1},
    **{name: FIELDS[name] for name in ("cu_seqlens_q", "k_descale", "v_descale", "page_table")},
    "k_new": _rows("k_new"),
    "v_new": _rows("v_new"),
    "rotary_cos": lambda value, values: {"rotary_cos": value, "cos_stride": value.stride(0)},
    "rotary_sin": lambda value, values: {"rotary_sin": value, "sin_stride": value.stride(0)},
    **{name: _address(name) for name in ("rotary_seqlens", "rotary_interleaved", "cu_seqlens_k_new")},
}
#: What the attention behind an append reads in place of an argument.
_AFTER_APPEND = {"q": {"q": "append_kv.q_out"}, "seqused_k": {"seqused_k": "append_kv.seqlens_out"}}

_BACKWARD_FIELDS: dict[str, Callable[[Any, Values], Fields]] = {
    "dout": _rows("dout"),
    "softmax_lse": lambda value, values: {
        "softmax_lse": value, "lse_batch_stride": value.stride(0) if value.dim() == 3 else 0,
        "lse_head_stride": value.stride(-2),
    },
    "dlse": lambda value, values: {
        "dlse": value, "dlse_batch_stride": value.stride(0) if value.dim() == 3 else 0,
        "dlse_head_stride": value.stride(-2),
    },
    "deterministic": _address("deterministic"),
}  # fmt: skip


def routes_of(case: Case | OperationCase, arguments: Arguments, way: str) -> dict[str, list[Route]]:
    """The routes of each argument that a case gives, by its name in the function. ``way``: see route_runner.py."""
    if isinstance(case, OperationCase):
        fields = case.fields(arguments.values)
        return {name: _at(case.entry, fields[name]) for name in arguments.given}
    return {
        shown: [route for name in names for route in _routes(case, name, arguments.values, way)]
        for shown, names in arguments.meant.items()
        if way != "reference" or not OF_KERNELS.issuperset(names)
    }


def _at(launch: str, fields: Fields) -> list[Route]:
    return [Route(launch, field, text(value)) for field, value in fields.items()]


def _routes(case: Case, name: str, values: Values, way: str) -> list[Route]:
    value = values[name]
    if name == "backend":
        return _at("backward" if case.function == "mha_bwd" else "forward", {"backend": value})
    if name in ("return_softmax_lse", "return_attn_probs"):
        return _at("forward", {"softmax_lse": NOT_NULL})
    if name == "num_heads_q":
        return _at("forward", {"num_heads_q": value})
    if case.function == "mha_bwd":
        return _backward_routes(name, value, values)
    if case.function == "flash_attn_with_shared_prefix":
        return _shared_routes(name, value, values, way)
    found: list[Route] = []
    if case.appends and name in APPEND_FIELDS:
        found += _at("append_kv", APPEND_FIELDS[name](value, values))
    if name in FIELDS:
        fields = _AFTER_APPEND.get(name) if case.appends else None
        found += _at("forward", fields or FIELDS[name](value, values))
    if case.wants_gradients:
        found += _at("backward", (FIELDS | _BACKWARD_FIELDS)[name](value, values))
    return found


def _backward_routes(name: str, value: Any, values: Values) -> list[Route]:
    if name in ("dq", "dk", "dv"):
        return _at("result", {name: value})
    return _at("backward", (FIELDS | _BACKWARD_FIELDS)[name](value, values))


def _shared_routes(name: str, value: Any, values: Values, way: str) -> list[Route]:
    """One launch over the prefix and what follows it; traced or on torch, a call over each and a merge."""
    if way in ("eager", "known"):
        prefix = {"prefix_len": "shared_seqlen_k", "prefix_page_table": "shared_page_table"}
        return _at("forward", {prefix[name]: value} if name in prefix else FIELDS[name](value, values))
    if name == "prefix_len":
        return _at("forward[1]", {"seqlen_k": -(-value // PAGE) * PAGE})
    if name == "prefix_page_table":
        return _at("forward[1]", {"page_table": value})
    if name == "sinks":
        return _at("forward[1]", FIELDS[name](value, values))
    if name == "out":
        return _at("result" if way == "reference" else "merge_states", {"out": value})
    found = _at("forward", FIELDS[name](value, values))
    if name in ("k", "v", "softmax_scale", "softcap", "num_splits", "q_descale", "k_descale", "v_descale"):
        found += [Route("forward[1]", *route[1:]) for route in found if not route.field.endswith("descale_strides")]
    return found


def absent_routes(case: Case | OperationCase, arguments: Arguments, way: str) -> dict[str, list[Route]]:
    """What a launch of attention, or of its gradient, holds in the fields of arguments that are not given."""
    if isinstance(case, OperationCase):
        return {}
    nulls = dict.fromkeys(_NULLS, "0") | {"window_left": "-1", "window_right": "-1"}
    entry = "forward"
    if case.function == "mha_bwd":
        entry = "backward"
        nulls = {field: value for field, value in nulls.items() if field not in _FORWARD_NULLS}
    elif way != "reference":
        nulls |= dict.fromkeys(("scheduler_metadata", "cell_blocks", "max_blocks"), "0")
        if way != "compiled" and case.function != "mha_fwd" and not case.wants_gradients:
            nulls["softmax_lse"] = "0"
    given = {route.field for routes in routes_of(case, arguments, way).values() for route in routes}
    return {field: [Route(entry, field, value)] for field, value in nulls.items() if field not in given}


_FORWARD_NULLS = ("qv", "page_table", "kv_batch_idx", "leftpad_k", "q_descale", "k_descale", "v_descale")
_NULLS = (
    *_FORWARD_NULLS, "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "sinks", "prefix_lens", "softcap",
    "attention_chunk", "query_ranges", "ranges_in_window", "causal_by_sequence", "tree_mask",
)  # fmt: skip


def differences(launches: list[dict[str, str]], routes: Mapping[str, list[Route]]) -> list[str]:
    """What did not arrive where it must, in words; routes that come out of JSON are taken as well."""
    found = []
    for argument, route in ((argument, Route(*route)) for argument, all_of in routes.items() for route in all_of):
        got = _read(launches, route.launch, route.field)
        launch, dot, field = route.value.partition(".")
        value = _read(launches, launch, field) if dot and launch == "append_kv" else route.value
        arrived = got not in (None, "0") if value == NOT_NULL else got == value
        if route.field == "max_blocks":  # of a row whose multiprocessor has two CTAs twice as many
            arrived = got in (value, str(2 * int(value or 0)))
        if got is None or not arrived:
            found.append(f"{argument}: {route.launch}.{route.field} is {got}, not {value}")
    return found


def _read(launches: list[dict[str, str]], place: str, field: str) -> str | None:
    entry, _, number = place.rstrip("]").partition("[")
    of_entry = [launch for launch in launches if launch["entry"] == entry]
    index = int(number or 0)
    return of_entry[index].get(field) if index < len(of_entry) else None
