"""The folders of csrc: who may include whom, and what every file begins with."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cuh", ".cu", ".cpp"})
INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
MOST_LINES = 400
#: An instruction of its own. Empty templates only hold the compiler back.
PTX = re.compile(r'\basm(?: volatile)?\(\s*"[^"]')

#: What the files of a folder may include beside their own folder. host/library.cpp alone calls kernels.
MAY_INCLUDE = {
    "host": {"common"},
    "bindings": {"host"},
    "common": {"host"},
    "kernels": {"common", "host"},
    "mma_sync": {"common"},
    "tma": {"common", "host", "kernels"},
    "sm80": {"common", "host", "kernels", "mma_sync"},
    "decode": {"common", "host", "mma_sync"},
    "sm90": {"common", "host", "kernels", "tma"},
}
#: Written by the build.
GENERATED = {"bindings/arguments.inc"}
NAMES = [path.relative_to(CSRC).as_posix() for path in FILES]


def test_folders_are_known() -> None:
    assert {name.split("/")[0] for name in NAMES} == MAY_INCLUDE.keys()


@pytest.mark.parametrize("name", NAMES)
def test_includes(name: str) -> None:
    folder = name.split("/")[0]
    allowed = {folder} | MAY_INCLUDE[folder] | ({"kernels"} if name == "host/library.cpp" else set())
    for included in INCLUDE.findall((CSRC / name).read_text(encoding="utf-8")):
        assert (CSRC / included).is_file() or included in GENERATED, (
            f"{name} includes {included}: names are relative to csrc"
        )
        assert included.split("/")[0] in allowed, f"{name} includes {included}"


@pytest.mark.parametrize("name", NAMES)
def test_files_say_what_they_are_for(name: str) -> None:
    lines = (CSRC / name).read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("// "), f"{name} does not begin with its job"
    assert len(lines) <= MOST_LINES, f"{name} has {len(lines)} lines: split it by job"


def opening_comment(text: str) -> str:
    lines = text.splitlines()
    return "\n".join(itertools.takewhile(lambda line: line.startswith("//"), lines))


def test_what_is_ptx_says_why() -> None:
    """Instructions are CUTLASS's where it has them; a file with others gives the reason before its code."""
    texts = {name: (CSRC / name).read_text(encoding="utf-8") for name in NAMES}
    own = {name for name, text in texts.items() if PTX.search(text)}
    assert own, "no PTX is found: the pattern is wrong"
    for name in own:
        comment = opening_comment(texts[name])
        assert "PTX" in comment, f"{name} has PTX; its opening comment must say why CUTLASS's function does not serve"
    readme = (CSRC / "README.md").read_text(encoding="utf-8")
    listed = re.search(r"The PTX that is left stands in (.*?), and says there", readme, re.DOTALL)
    assert listed, "csrc/README.md does not list the files with PTX"
    assert set(re.findall(r"`([^`]+)`", listed[1])) == own
