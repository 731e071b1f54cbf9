"""The GPU suite forces every kernel that a device can run, in every test that takes rows of the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from broadhead import support
from broadhead.support import KernelRow
from edge_rows import ONE_OF_A_KIND
from forced_rows import FILE_VARIABLE
from gpu_calls import value_masks_of

TESTS = Path(__file__).resolve().parents[1]

#: Tests that are about some rows of a phase: what those have. All others take every row of the phases that they take.
PARTS = {
    # 8-bit q on tensor cores of its own: what these tests ask, no other row does.
    "test_gpu_fp8": lambda row: row.dtype == "float8_e4m3fn",
    "test_gpu_qv": lambda row: "qv" in row.requires,
    # A prefix shared by the batch is no call with qv.
    "test_gpu_shared_prefix.test_every_row": lambda row: "qv" not in row.requires,
    # Sequences are given to calls as q, k and v.
    "test_gpu_plain_calls.test_all_forms_of_a_call_agree": lambda row: "qv" not in row.requires,
    # Rows that nothing but costs chooses.
    "test_gpu_plain_calls.test_steps_over_few_keys": lambda row: row.by_cost,
    "test_gpu_plain_calls.test_metadata_is_not_for_them": lambda row: row.by_cost,
    # Rows of fp16 and bf16 differ in their numbers alone; test_curated.test_row takes them all.
    "test_gpu_graphs.test_prefill_in_a_graph": lambda row: row.dtype != "fp16",
    "test_curated.test_prefill_row": lambda row: row.dtype != "fp16" or bool(row.requires),
    # Fused kernels add dq in no order.
    "test_gpu_backward.test_sums_have_an_order": lambda row: "deterministic" in row.features,
    # Masks that a row lists or does not.
    "test_gpu_mask_values.test_rows_without_a_mask_refuse_it": lambda row: (
        row.direction == "forward" and len(value_masks_of(row)) < 3
    ),
    "test_gpu_mask_values.test_ranges_about_tiles": lambda row: "query_ranges" in row.features,
    "test_gpu_mask_values.test_chunked_prefill": lambda row: "query_ranges" in row.features,
    "test_gpu_mask_values.test_drafts": lambda row: "tree_mask" in row.features,
    "test_gpu_mask_values.test_causality_of_many": lambda row: "causal_by_sequence" in row.features,
    "test_gpu_mask_values": lambda row: bool(value_masks_of(row)),
    "test_curated.test_mask_values": lambda row: bool(value_masks_of(row)) and row in ONE_OF_A_KIND,
    "test_gpu_edges.test_another_stream_changes_the_masks": lambda row: bool(value_masks_of(row)),
    "test_gpu_edges.test_row_values": lambda row: bool(value_masks_of(row)),
    "test_gpu_backward.test_rows_without_a_mask_refuse_it": lambda row: (
        row.direction == "backward" and len(value_masks_of(row)) < 2
    ),
    "test_gpu_backward.test_ranges_about_tiles": lambda row: "query_ranges" in row.features,
    # Sanitizers take seconds a call; test_gpu_edges takes every row.
    "test_curated.test_edges": lambda row: row in ONE_OF_A_KIND,
}

#: Tests, by the beginning of their names, that together take every row of a direction.
KINDS = {
    "forward": ("test_gpu_", "test_curated", "test_gpu_fuzz", "test_gpu_edges"),
    "backward": ("test_gpu_backward.test_random_calls", "test_gpu_backward.test_dense"),
}

Forced = dict[str, frozenset[KernelRow]]


def left_out(forced: Forced, table: tuple[KernelRow, ...]) -> dict[str, list[str]]:
    """By test: rows of its directions and phases that it should take and does not, by id."""
    missing = {}
    for test, rows in forced.items():
        kinds = {(row.direction, row.phase) for row in rows}
        part = PARTS.get(test, PARTS.get(test.split(".")[0], lambda row: True))
        wanted = {row for row in table if (row.direction, row.phase) in kinds and part(row)}
        if wanted - rows:
            missing[test] = sorted(row.id for row in wanted - rows)
    return missing


@pytest.fixture(scope="module")
def forced(tmp_path_factory: pytest.TempPathFactory) -> Forced:
    """The rows that each test function of the GPU suite is collected with, by ``module.function``."""
    target = tmp_path_factory.mktemp("forced") / "rows.json"
    path = os.pathsep.join([str(TESTS / "support"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, FILE_VARIABLE: str(target)}
    environment.pop("BROADHEAD_TEST_SHARD", None)
    command = [sys.executable, "-m", "pytest", str(TESTS / "gpu"), "-p", "forced_rows", "--collect-only", "-q"]
    command += ["-c", str(TESTS.parent / "pyproject.toml"), "-p", "no:cacheprovider"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    rows = {row.id: row for row in support.ROWS}
    return {test: frozenset(rows[i] for i in ids) for test, ids in json.loads(target.read_text()).items()}


def test_every_test_takes_every_row(forced: Forced) -> None:
    assert len(forced) > 30, sorted(forced)
    assert left_out(forced, support.ROWS) == {}


@pytest.mark.parametrize("capability", support.CAPABILITIES, ids=str)
def test_every_row_of_a_device_is_forced(capability: tuple[int, int], forced: Forced) -> None:
    """Among many tests and among those that the sanitizers run; only_row skips what the device has not."""
    for direction, kinds in KINDS.items():
        runnable = {row for row in support.ROWS if row.direction == direction and capability in row.capabilities}
        for kind in kinds:
            union = frozenset().union(*(rows for test, rows in forced.items() if test.startswith(kind)))
            found = {row for row in union if row.direction == direction and capability in row.capabilities}
            assert found == runnable, kind


def test_a_row_left_out_is_told(forced: Forced) -> None:
    """In whichever test it is."""
    for row in support.ROWS:
        spoilt = {test: rows - {row} for test, rows in forced.items()}
        told = left_out(spoilt, support.ROWS)
        assert set(told) == {test for test, rows in forced.items() if row in rows}, row.id
        assert all(ids == [row.id] for ids in told.values()), told


def test_parts_name_tests_that_exist(forced: Forced) -> None:
    for name, part in PARTS.items():
        known = any(test == name or test.split(".")[0] == name for test in forced)
        assert known or not any(map(part, support.ROWS)), name
