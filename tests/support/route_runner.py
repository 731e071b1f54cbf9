"""Runs the cases of sentinels.py in every way, and prints as JSON what was launched and what should have been.

A process of its own: `python route_runner.py DIRECTORY`, with the libraries of stub_cuda.compile_table there and in
BROADHEAD_KERNEL_LIB_DIR. The ways of a call:

- eager: the public function, for the first time;
- known: once more, with tensors at other addresses, which the compiled module runs by itself;
- compiled: traced by torch.compile, through the operators;
- reference: with backend="torch"; a launch then is what the reference was given.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import broadhead
import stub_cuda
import torch
from broadhead import reference
from broadhead.call.validation import clamped
from broadhead.plan import dispatch
from broadhead.reference import append as append_reference
from broadhead.support import FEATURES, MASK_FEATURES
from operation_cases import OPERATION_CASES, OperationCase
from routes import absent_routes, routes_of, row_strides, text
from sentinels import CASES, Arguments, Case
from torch import Tensor

WAYS = ("eager", "known", "compiled", "reference")


def ways_of(case: Case | OperationCase) -> tuple[str, ...]:
    """The ways of a case. Calls that are differentiated are decided every time."""
    if isinstance(case, OperationCase):
        return case.ways
    decides = case.wants_gradients or case.function == "mha_bwd"
    return tuple(way for way in WAYS if way != "known" or not decides)


def main(directory: Path) -> None:
    stub_cuda.install()
    # Some kernels do less than others; that one which did it would be told is tested here all the same.
    dispatch.ROWS = tuple(
        row._replace(
            features=tuple(
                dict.fromkeys((*FEATURES, "deterministic") if row.direction == "backward" else row.features)
                | dict.fromkeys(MASK_FEATURES)
            )
        )
        for row in dispatch.ROWS
    )
    found: dict[str, dict[str, Any]] = {}
    for case in (*CASES, *OPERATION_CASES):
        observed = found[str(case)] = {}
        for way in ways_of(case):
            try:
                with clamped():  # values are not read, as on a device: a kernel that only records writes none
                    observed[way] = _observe(case, way, directory)
            except Exception:
                observed[way] = {"error": traceback.format_exc()}
    print(json.dumps(found))


def _observe(case: Case | OperationCase, way: str, directory: Path) -> dict[str, Any]:
    arguments = case.make()
    function = getattr(broadhead, case.function)
    if way == "known":
        first = case.make()  # kept, so that no address is that of the second call
        with stub_cuda.on_device():
            function(**first.given)
    if way == "compiled":
        torch._dynamo.reset()
        function = torch.compile(function, backend="eager", fullgraph=True)
    if way == "reference":
        arguments = replace(
            arguments,
            given={**arguments.given, "backend": "torch"},
            meant={**arguments.meant, "backend": ("backend",)},
            values={**arguments.values, "backend": "torch"},
        )
    stub_cuda.take_launches(directory)
    stub_cuda.decided.clear()
    with _recorded_reference() as records, stub_cuda.on_device() if way in ("eager", "known") else nullcontext():
        result = _call(case, function, arguments)
    launches = [{**call, "backend": "cuda"} for call in stub_cuda.take_launches(directory)]
    if way == "known":
        assert not stub_cuda.decided, "the second call of a kind is known"
    return {
        "launches": [*launches, *records, result],
        "routes": routes_of(case, arguments, way),
        "absent": absent_routes(case, arguments, way),
    }


def _call(case: Case | OperationCase, function: Any, arguments: Arguments) -> dict[str, str]:
    """Run it, and its backward pass; the addresses of the results."""
    results = function(**arguments.given)
    results = results if isinstance(results, tuple) else (results,)
    if case.wants_gradients:
        results[0].backward(torch.zeros_like(results[0]))
    names = ("dq", "dk", "dv") if case.function == "mha_bwd" else ("out",)
    return {"entry": "result", **dict(zip(names, map(text, results), strict=False))}


@contextmanager
def _recorded_reference() -> Iterator[list[dict[str, str]]]:
    """What the reference is given meanwhile, described as launches are."""
    records: list[dict[str, str]] = []
    run, gradients = reference.run, reference.gradients
    append, turn, lengths = (
        append_reference.append,
        append_reference.apply_rotary_q,
        append_reference.appended_lengths,
    )

    def run_and_note(call: reference.Call, out: Any) -> Any:
        records.append(_describe("forward", {**call._asdict(), "out": out}))
        return run(call, out)

    def gradients_and_note(call: reference.Call, *outputs: Any) -> Any:
        given = dict(zip(("dout", "dlse", "out", "softmax_lse"), outputs, strict=True))
        records.append(_describe("backward", {**call._asdict(), **given}))
        return gradients(call, *outputs)

    def turn_and_note(q: Tensor, *angles: Tensor, **options: Any) -> Tensor:
        turned = turn(q, *angles, **options)
        records.append(_describe("append_kv", {"q": q, "q_out": turned, **options}))
        return turned

    def append_and_note(*tensors: Tensor, **options: Any) -> None:
        named = dict(zip(("k_cache", "v_cache", "k_new", "v_new"), tensors, strict=True))
        records[-1] |= _describe("append_kv", {**named, **options})
        append(*tensors, **options)

    def lengths_and_note(*arguments: Any) -> Tensor:
        found = lengths(*arguments)
        records[-1]["seqlens_out"] = text(found)
        return found

    reference.run, reference.gradients = run_and_note, gradients_and_note
    append_reference.append, append_reference.apply_rotary_q = append_and_note, turn_and_note
    append_reference.appended_lengths = lengths_and_note
    try:
        yield records
    finally:
        reference.run, reference.gradients = run, gradients
        append_reference.append, append_reference.apply_rotary_q = append, turn
        append_reference.appended_lengths = lengths


def _describe(entry: str, values: dict[str, Any]) -> dict[str, str]:
    """Arguments of the reference under the names that the fields of a launch have."""
    found = {"entry": entry, "backend": "torch"}
    for name, value in values.items():
        shown = name.replace("max_seqlen", "seqlen")
        found[shown] = "0" if value is None else text(value)
        if not isinstance(value, Tensor):
            continue
        if name.endswith("descale"):
            found[f"{name}_strides"] = text(value.stride())
        elif name in ("query_ranges", "tree_mask"):
            prefix, packed = name.removeprefix("query_").removesuffix("_mask"), values["q"].dim() == 3
            found[f"{prefix}_batch_stride"] = text(0 if packed else value.stride(0))
            found[f"{prefix}_row_stride"] = text(value.stride(0 if packed else 1))
        elif name == "causal_by_sequence":
            found["causal_is_bool"] = text(value.dtype == torch.bool)
        elif value.dim() >= 3 and "lse" not in name:
            found[f"{name}_strides"] = text(row_strides(value))
        elif name == "page_table":
            found["page_table_batch_stride"] = text(value.stride(0))
        elif name == "sinks":
            found["sinks_are_fp32"] = text(value.dtype == torch.float32)
        elif name in ("rotary_cos", "rotary_sin"):
            found[f"{name[7:]}_stride"] = text(value.stride(0))
        if "lse" in name:
            prefix = name.replace("softmax_", "")
            found[f"{prefix}_batch_stride"] = text(value.stride(0) if value.dim() == 3 else 0)
            found[f"{prefix}_head_stride"] = text(value.stride(-2))
        if name == "q":
            found["num_heads_q"] = text(value.shape[-2])
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
