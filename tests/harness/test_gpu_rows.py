"""The GPU suite forces every kernel that a device can run, in every test that takes rows of the table."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from broadhead import support
from broadhead.support import KernelRow

GPU_TESTS = Path(__file__).parent / "gpu"
sys.path.insert(0, str(GPU_TESTS))

#: Tests that are about some rows of a phase: what those have. All others take every row of the phases that they take.
PARTS = {
    # 8-bit q on tensor cores of its own: what these tests ask, no other row does.
    "test_gpu_fp8": lambda row: row.dtype == "float8_e4m3fn",
    "test_gpu_qv": lambda row: "qv" in row.requires,
    # A prefix shared by the batch is no call with qv.
    "test_gpu_shared_prefix.test_every_row": lambda row: "qv" not in row.requires,
    # Rows of fp16 and bf16 differ in their numbers alone; test_curated.test_row takes them all.
    "test_gpu_graphs.test_prefill_in_a_graph": lambda row: row.dtype != "fp16",
    "test_curated.test_prefill_row": lambda row: row.dtype != "fp16" or bool(row.requires),
    # Sanitizers take seconds a call; test_gpu_edges takes every row.
    "test_curated.test_edges": lambda row: row in importlib.import_module("edge_rows").ONE_OF_A_KIND,
}

ParameterSet = type(pytest.param())
Forced = dict[str, frozenset[KernelRow]]


def forced_rows(modules: Iterable[ModuleType]) -> Forced:
    """The rows that each test function of the modules is parametrised with, by ``module.function``."""
    found = {}
    for module in modules:
        for name, function in vars(module).items():
            rows = frozenset(_rows_of(function)) if name.startswith("test_") else frozenset()
            if rows:
                found[f"{module.__name__}.{name}"] = rows
    return found


def _rows_of(function: object) -> Iterator[KernelRow]:
    for mark in getattr(function, "pytestmark", ()):
        if mark.name != "parametrize":
            continue
        for value in mark.args[1]:
            values = value.values if isinstance(value, ParameterSet) else value if type(value) is tuple else (value,)
            yield from (x for x in values if isinstance(x, KernelRow))


def left_out(forced: Forced, table: tuple[KernelRow, ...]) -> dict[str, list[str]]:
    """By test: rows of its phases that it should take and does not, by id."""
    missing = {}
    for test, rows in forced.items():
        phases = {row.phase for row in rows}
        part = PARTS.get(test, PARTS.get(test.split(".")[0], lambda row: True))
        wanted = {row for row in table if row.phase in phases and part(row)}
        if wanted - rows:
            missing[test] = sorted(row.id for row in wanted - rows)
    return missing


@pytest.fixture(scope="module")
def forced() -> Forced:
    names = sorted(path.stem for path in GPU_TESTS.glob("test_*.py"))
    return forced_rows(importlib.import_module(name) for name in names)


FORWARD = tuple(row for row in support.ROWS if row.direction == "forward")


def test_every_test_takes_every_row(forced: Forced) -> None:
    assert len(forced) > 30, sorted(forced)
    assert left_out(forced, FORWARD) == {}


@pytest.mark.parametrize("capability", support.CAPABILITIES, ids=str)
def test_every_row_of_a_device_is_forced(capability: tuple[int, int], forced: Forced) -> None:
    """Among many tests and among those that the sanitizers run; only_row skips what the device has not."""
    runnable = {row for row in FORWARD if capability in row.capabilities}
    for kind in ("test_gpu_", "test_curated", "test_gpu_fuzz", "test_gpu_edges"):
        union = frozenset().union(*(rows for test, rows in forced.items() if test.startswith(kind)))
        assert {row for row in union if capability in row.capabilities} == runnable, kind


def test_a_row_left_out_is_told(forced: Forced) -> None:
    """In whichever test it is."""
    for row in FORWARD:
        spoilt = {test: rows - {row} for test, rows in forced.items()}
        told = left_out(spoilt, FORWARD)
        assert set(told) == {test for test, rows in forced.items() if row in rows}, row.id
        assert all(ids == [row.id] for ids in told.values()), told


def test_parts_name_tests_that_exist(forced: Forced) -> None:
    for name in PARTS:
        assert any(test == name or test.split(".")[0] == name for test in forced), name
