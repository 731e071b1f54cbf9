"""The surfaces of broadhead.compat against recorded signatures: names, orders, kinds and defaults, by inspect."""

from __future__ import annotations

import inspect
import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import broadhead
import pytest
import torch
from broadhead.compat import surfaces
from surface_modules import SOURCES, function_of

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "signatures.json").read_text(encoding="utf-8"))
FUNCTIONS = [(module, name) for module, entry in RECORDED.items() for name in entry.get("functions", ())]
#: What differs on purpose, and why. A name that is here and does not differ fails.
DIFFERENT: dict[tuple[str, str], str] = {}


def recorded(module: str, name: str) -> list[tuple[str, str, Any]]:
    """``(name, kind, default)`` of each parameter; a default that is missing is inspect's mark of that."""
    found, kind = [], "POSITIONAL_OR_KEYWORD"
    for parameter, *default in RECORDED[module]["functions"][name]["parameters"]:
        if parameter == "*":
            kind = "KEYWORD_ONLY"
        else:
            value = eval(default[0], {"torch": torch}) if default else inspect.Parameter.empty
            found.append((parameter, kind, value))
    return found


def ours(function: Any) -> list[tuple[str, str, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.kind.name, parameter.default) for parameter in parameters]


@pytest.mark.parametrize(("module", "name"), FUNCTIONS, ids=[".".join(each) for each in FUNCTIONS])
def test_signature(module: str, name: str) -> None:
    assert (ours(function_of(module, name)) != recorded(module, name)) == ((module, name) in DIFFERENT)


#: Names of the foreign modules that ours do not have, and why.
_AUTOGRAD = "a class of the package's own autograd; the functions that apply it are there"
_KERNELS = "a part of how the package picks, compiles or launches its own kernels"
ABSENT: dict[str, dict[str, str]] = {
    "flash_attn.flash_attn_interface": {"FlashAttn*": _AUTOGRAD},
    "flash_attn.bert_padding": {"Index*": _AUTOGRAD},
    "flash_attn_interface": {"FlashAttn*": _AUTOGRAD, "_backward": _AUTOGRAD, "setup_context": _AUTOGRAD},
    "flash_attn.cute.interface": {
        "FlashAttn*": _AUTOGRAD,
        "_[!v]*": _KERNELS,
        "_validate_[!h]*": _KERNELS,
        "?wdConfig": _KERNELS,
        "make_fake_bwd_tensors": _KERNELS,
        "num_splits_heuristic": _KERNELS,
    },
    "vllm_flash_attn": {"_is_fa?_supported": "is_fa_version_supported asks them; here one question answers for all"},
    "sgl_kernel.flash_attn": {},
}
#: Results that differ, and why; the tests of calls hold the others to the number that is recorded.
RESULTS = {
    "softmax_d": "an intermediate of FlashAttention's kernels, padded to their tiles: a tensor without elements",
    "out_accum, softmax_lse_accum": "results of single splits, which FlashAttention returns too: without elements",
    "S_dmask, rng_state": "of a dropout that did not happen: without elements, and two numbers that mean nothing",
    "SchedulerMetadataTensorsTorch": "of FlashAttention-4's tiles: get_scheduler_metadata refuses",
}


def test_every_name_is_there_or_listed() -> None:
    assert set(ABSENT) == set(SOURCES)
    for module, patterns in ABSENT.items():
        others = RECORDED[module]["others"]
        for name in others:
            assert any(fnmatch(name, pattern) for pattern in patterns), f"{module}.{name}"
            assert name not in SOURCES[module]
        for pattern in patterns:
            assert any(fnmatch(name, pattern) for name in others), f"{module}: {pattern} is no name of it"


def test_nothing_is_there_that_is_not_recorded() -> None:
    """Beside the wrapped names and those that apply a class, which the recorded modules assign."""
    assigned = {"index_first_axis", "index_first_axis_residual", "index_put_first_axis"}
    for module, names in SOURCES.items():
        extra = set(names) - set(RECORDED[module]["functions"])
        assert {name for name in extra if not name.startswith("_wrapped_")} <= assigned, module
        assert set(names) >= set(RECORDED[module]["functions"]), module


def test_wrapped_names_are_the_functions() -> None:
    module = "flash_attn.flash_attn_interface"
    wrapped = [name for name in SOURCES[module] if name.startswith("_wrapped_")]
    assert len(wrapped) == 4
    for name in wrapped:
        assert function_of(module, name) is function_of(module, name.removeprefix("_wrapped"))


def test_a_difference_is_found() -> None:
    assert ours(broadhead.flash_attn_func) != recorded("flash_attn_interface", "flash_attn_func")
    assert recorded("flash_attn.flash_attn_interface", "flash_attn_func")[3] == (
        "dropout_p",
        "POSITIONAL_OR_KEYWORD",
        0.0,
    )


def test_functions_are_plain_functions() -> None:
    """Some clients ask inspect for the names, others for the code; torch.compile traces code."""
    for module, name in FUNCTIONS:
        function = function_of(module, name)
        assert inspect.isfunction(function) and function.__name__ == name, (module, name)
        assert inspect.getsource(function).lstrip().startswith(f"def {name}"), (module, name)
        assert function.__doc__, (module, name)


def test_operators() -> None:
    from broadhead.compat import flash_attn_3_ops

    schemas = RECORDED["torch.ops.flash_attn_3"]["schemas"]
    assert set(schemas) == set(flash_attn_3_ops.SCHEMAS) == {"fwd", "bwd", "fwd_combine", "get_scheduler_metadata"}
    for name, schema in schemas.items():
        assert str(torch._C.parse_schema(flash_attn_3_ops.SCHEMAS[name])) == str(torch._C.parse_schema(schema))


@pytest.mark.parametrize("surface", surfaces.SURFACES)
def test_modules_hold_what_they_name(surface: str) -> None:
    for module in surfaces.SURFACES[surface].modules:
        if module.source:
            held = surfaces.contents(module)
            assert set(held) - {"__version__"} == set(vars(surfaces.source(module.source))[module.names])


def test_the_page_names_every_argument() -> None:
    """Of the public functions; the arguments that describe a metadata request are native ones."""
    page = (Path(__file__).resolve().parents[2] / "docs/coming-from-flash-attention.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    shown = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    releases = {name: row.split("|")[2] for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    marks = {"flash_attn.flash_attn_interface": "2", "flash_attn_interface": "3", "flash_attn.cute.interface": "4"}
    marks |= {"vllm_flash_attn": "v", "sgl_kernel.flash_attn": "s"}
    checked = 0
    for module, mark in marks.items():
        for name in RECORDED[module]["functions"]:
            if not name.startswith("flash_attn"):
                continue
            for parameter, _, _ in recorded(module, name):
                if parameter in ("k", "v") and "kvcache" in name:
                    continue  # new keys
                assert parameter in shown, f"{module}.{name}: {parameter}"
                assert "window" in parameter or mark in releases[parameter], f"{module}.{name}: {parameter} in {mark}"
                checked += 1
    assert checked > 200
