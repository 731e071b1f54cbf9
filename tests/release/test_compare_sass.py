"""scripts/compare_sass.py on listings: names may change, code may not."""

from __future__ import annotations

from collections import Counter, defaultdict
from types import ModuleType

import pytest

from scripts import load_script

#: One function of cuobjdump's listing: two instructions, of which the first reads a parameter.
FUNCTION = """
	code for {arch}
		Function : {name}
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][{parameter}] ;                /* {encoding} */
                                                                                /* 0x000fe20000000800 */
        /*0010*/                   {last} ;                                     /* 0x000000000000794d */
                                                                                /* {control} */
		..........
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("scripts/compare_sass.py")


def function(name: str, **changes: str) -> str:
    fields = {
        "arch": "sm_90a", "parameter": "0x210", "encoding": "0x00000a00ff017b82", "last": "EXIT",
        "control": "0x000fea0003800000",
    }  # fmt: skip
    return FUNCTION.format(name=name, **(fields | changes))


def read(script: ModuleType, *listings: str, archs: str = "", any_offset: bool = False) -> dict:
    functions: dict = defaultdict(Counter)
    for arch, name, code in script.read_functions("".join(listings).splitlines(), {*archs.split()}, any_offset):
        functions[arch, name][code] += 1
    return functions


def test_the_same_code(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    build = (function("one"), function("two", last="RET"))
    assert script.compare(read(script, *build), read(script, *build)) == 0
    assert "sm_90a 2. Identical: 2, identical under another name: 0, different or on one side only: 0" in (
        capsys.readouterr().out
    )


def test_another_name(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.compare(read(script, function("old")), read(script, function("new"))) == 0
    assert "identical under another name: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change", [{"last": "RET"}, {"control": "0x000fe20000000800"}, {"parameter": "0x218"}], ids=str
)
def test_other_code(script: ModuleType, change: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert script.compare(read(script, function("f")), read(script, function("f", **change))) == 1
    assert "sm_90a f: differs; instructions [2] and [2]" in capsys.readouterr().out


def test_parameters_may_move_on_demand(script: ModuleType) -> None:
    moved = function("f", parameter="0x218", encoding="0x00000a20ff017b82")
    assert script.compare(read(script, function("f")), read(script, moved)) == 1
    sides = [read(script, listing, any_offset=True) for listing in (function("f"), moved)]
    assert script.compare(*sides) == 0


def test_one_side_only(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    more = function("one") + function("two", last="RET")
    assert script.compare(read(script, more), read(script, function("one"))) == 1
    assert "sm_90a two: only in the old build" in capsys.readouterr().out
    assert script.compare(read(script, function("one")), read(script, more)) == 1
    assert "sm_90a two: only in the new build" in capsys.readouterr().out
    twice = function("one") * 2
    assert script.compare(read(script, function("one")), read(script, twice)) == 1, "as often as before"


def test_architectures_do_not_mix(script: ModuleType) -> None:
    old = function("f") + function("f", arch="sm_80", last="RET")
    new = function("f", last="RET") + function("f", arch="sm_80")
    assert script.compare(read(script, old), read(script, new)) == 1
    assert script.compare(read(script, old, archs="sm_90a"), read(script, function("f"), archs="sm_90a")) == 0


def test_nothing_to_compare(script: ModuleType) -> None:
    assert script.compare(read(script), read(script, function("f"))) == 2


def test_namespaces_are_not_part_of_a_name(script: ModuleType) -> None:
    names = ["_ZN1a6kernelEi", "_ZN1b1c6kernelEi"]
    plain = script.plain_names(names, script.search_path())
    assert len(set(plain.values())) == (1 if plain[names[0]] != names[0] else 2)
