"""Compiles tests/host/test_*.cpp as plain C++ and runs them: mask, block range and scheduler code of the kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "tests/host").glob("test_*.cpp"))
#: Headers of sources that compile device code: emulation/ stands in for its instructions.
EMULATED = ('"backward_calls.h"', '"emulation/')
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def test_there_are_sources() -> None:
    assert len(SOURCES) >= 5


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_host(source: Path, tmp_path: Path) -> None:
    if COMPILER is None:
        pytest.skip("no C++ compiler: set CXX or install g++")
    program = tmp_path / source.stem
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/host'}"]
    if any(header in source.read_text() for header in EMULATED):
        include = [f"-I{ROOT / 'tests/host/emulation'}", *include]
        options += ["-O2", "-DBROADHEAD_DEVICE=inline", "-Wno-unknown-pragmas"]
    build = subprocess.run(
        [COMPILER, *options, *include, str(source), "-o", str(program)], capture_output=True, text=True
    )
    assert build.returncode == 0, build.stderr
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
