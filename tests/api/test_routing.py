"""Every argument of every public function reaches its own field of AttentionArgs, and an operator's own argument."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import broadhead
import pytest
import torch
from broadhead.call.arguments import (
    ARGUMENTS,
    OPERATOR_NAMES,
    OPERATOR_SCHEMA,
    AttentionArgs,
)
from broadhead.call.names import shown_name
from broadhead.ops.attention import from_operator, to_operator
from broadhead.run import known

ROOT = Path(__file__).resolve().parents[2]
#: Other spellings of fields.
SPELLINGS = (("block_table", "page_table"), ("s_aux", "sinks"), ("learnable_sink", "sinks"), ("q_v", "qv"))
#: What each function takes besides the fields of AttentionArgs: other spellings, what is appended, what is returned.
BESIDE = {
    "k_new", "v_new", "k", "v", "cu_seqlens_k_new", "rotary_cos", "rotary_sin", "rotary_seqlens", "rotary_interleaved",
    "block_table", "s_aux", "learnable_sink", "q_v", "return_attn_probs", "return_softmax_lse", "deterministic",
    "window_size_left", "window_size_right",
}  # fmt: skip
#: The field that a tensor given as ``causal`` reaches.
OF_TENSORS = "causal_by_sequence"
FUNCTIONS = ("mha_fwd", "flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[AttentionArgs]:
    """The calls that public functions hand over, which then end."""
    calls: list[AttentionArgs] = []

    def know(function: str, need_lse: bool, call: tuple[Any, ...]) -> tuple[Any, Any]:
        calls.append(AttentionArgs._make(call))
        return None, None

    monkeypatch.setattr(known, "run_known", know)
    return calls


def fields_of(function: str) -> dict[str, str]:
    """The parameters of a function that are fields of AttentionArgs, by their names there."""
    parameters = inspect.signature(getattr(broadhead, function)).parameters
    shown = {shown_name(function, field): field for field in AttentionArgs._fields if field != OF_TENSORS}
    return {name: shown[name] for name in parameters if name in shown}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_argument_reaches_its_field(function: str, captured: list[AttentionArgs]) -> None:
    fields = fields_of(function)
    lengths = torch.tensor([3], dtype=torch.int32)
    sentinels: dict[str, Any] = {name: lengths if field == "seqused_k" else object() for name, field in fields.items()}
    getattr(broadhead, function)(**sentinels)
    (call,) = captured
    for name, field in fields.items():
        assert getattr(call, field) is sentinels[name], f"{function}({name}=...) reaches another field than {field}"
    for field in set(AttentionArgs._fields) - set(fields.values()):
        value = getattr(call, field)
        assert value is None or type(value) in (bool, int, float, tuple), f"{function} fills {field} with {value!r}"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_is_left_out(function: str) -> None:
    """What is no field is known to be something else; every field is an argument of some function."""
    parameters = set(inspect.signature(getattr(broadhead, function)).parameters)
    assert parameters - set(fields_of(function)) <= BESIDE
    every = {field for name in FUNCTIONS for field in fields_of(name).values()}
    assert every == set(AttentionArgs._fields) - {OF_TENSORS}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32])
def test_causality_by_sequence_has_a_field_of_its_own(
    function: str, dtype: torch.dtype, captured: list[AttentionArgs]
) -> None:
    required = {
        name: torch.zeros(1, dtype=torch.int32)
        for name, parameter in inspect.signature(getattr(broadhead, function)).parameters.items()
        if parameter.default is inspect.Parameter.empty or name == "cu_seqlens_k"
    }
    by_sequence, one = torch.ones(3, dtype=dtype), torch.ones((), dtype=dtype)
    for causal in (by_sequence, one):
        getattr(broadhead, function)(**required, causal=causal)
    assert captured[0].causal is False and captured[0].causal_by_sequence is by_sequence
    assert captured[1].causal is one and captured[1].causal_by_sequence is None, (
        "a tensor without dimensions is one bool"
    )


@pytest.mark.parametrize(
    ("function", "given", "field"),
    [
        (name, given, field)
        for name in FUNCTIONS
        for given, field in (
            ("block_table", "page_table"),
            ("s_aux", "sinks"),
            ("learnable_sink", "sinks"),
            ("q_v", "qv"),
        )
        if given in inspect.signature(getattr(broadhead, name)).parameters
    ],
)
def test_another_spelling_reaches_the_same_field(
    function: str, given: str, field: str, captured: list[AttentionArgs]
) -> None:
    required = {
        name: object()
        for name, parameter in inspect.signature(getattr(broadhead, function)).parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    if function == "flash_attn_varlen_func":
        required["cu_seqlens_k"] = object()  # or a page table
    sentinel = torch.zeros(1)
    getattr(broadhead, function)(**required, **{given: sentinel})
    assert getattr(captured[0], field) is sentinel


def test_operators_take_every_argument_once() -> None:
    named = {name: object() for name in AttentionArgs._fields}
    args = AttentionArgs(**{**named, "window_size": (3, 5), "causal": False, "page_table": None})
    deterministic, differentiable = object(), object()
    inputs = to_operator("f", args, deterministic, differentiable)  # type: ignore[arg-type]
    assert len(set(map(id, inputs))) == len(inputs) == len(OPERATOR_NAMES)
    back, *how = from_operator(inputs)
    assert how == [deterministic, differentiable, "f"]
    assert back.window_size == (3, 5) and back.out is None
    for name in set(AttentionArgs._fields) - {"window_size", "out"}:
        assert getattr(back, name) is getattr(args, name), name


@pytest.mark.parametrize("operator", ["mha_fwd", "mha_fwd_out", "mha_bwd"])
def test_schemas_are_made_from_the_list(operator: str) -> None:
    names = [argument.name for argument in getattr(torch.ops.broadhead, operator).default._schema.arguments]
    own = [name for name in names if name in OPERATOR_NAMES and name != "out"]
    assert own == list(OPERATOR_NAMES) and len(names) - len(own) <= 4
    assert OPERATOR_SCHEMA.count(",") == len(OPERATOR_NAMES) - 1


def test_the_build_writes_the_list_for_the_compiled_module(tmp_path: Path) -> None:
    target = tmp_path / "arguments.inc"
    command = [sys.executable, str(ROOT / "cmake/generate.py"), "arguments", "--out", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    found = re.findall(r'^BROADHEAD_ARGUMENT\((\w+), "(\w+)", (\w+), (\w+)\)$', target.read_text(), re.MULTILINE)
    assert [name for _, name, _, _ in found] == list(AttentionArgs._fields)
    for constant, name, is_tensor, aligned in found:
        assert constant == "k" + name.title().replace("_", "")
        argument = ARGUMENTS[name]
        assert (is_tensor, aligned) == (str(argument.is_tensor).lower(), str(argument.aligned).lower())
