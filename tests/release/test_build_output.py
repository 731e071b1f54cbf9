"""What the kernel build left: no spills, no local memory, shared memory within the limits, no foreign links."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from broadhead import capabilities, support, tiles
from installed import FAMILIES, needs_kernels

from scripts import load_script

ROOT = Path(__file__).resolve().parents[2]


#: Static shared memory of a block, on every device.
STATIC_LIMIT = 48 * 1024


def report_of(family: dict) -> list[dict]:
    path = Path(family["path"]).with_suffix(".json")
    assert path.exists(), f"the build writes its ptxas report to {path}"
    return json.loads(path.read_text())


@needs_kernels
def test_no_spills_and_no_local_memory() -> None:
    for family in FAMILIES.values():
        report = report_of(family)
        for function in report:
            for field in ("spill_stores", "spill_loads", "stack_frame"):
                assert function[field] == 0, f"{function['source']} for {function['arch']}: {field}"


@needs_kernels
def test_the_report_covers_every_kernel_and_architecture() -> None:
    for name, family in FAMILIES.items():
        # ptxas, whose report it is, never sees PTX.
        archs = {f"sm_{arch}" for arch in family["archs"].split(";") if not capabilities.is_ptx(arch)}
        report = report_of(family)
        assert {function["arch"] for function in report} == archs
        sources = {function["source"] for function in report if function["entry"]}
        for row in support.ROWS:
            if row.family == name and row.id in family["kernels"]:
                assert row.name in sources, row.id


@needs_kernels
def test_shared_memory_fits_every_device_of_the_row() -> None:
    rows = {row.id: row for row in support.ROWS}
    for family in FAMILIES.values():
        library = ctypes.CDLL(family["path"])
        for index, row_id in enumerate(family["kernels"]):
            taken, row = library.broadhead_kernel_shared_memory(index), rows[row_id]
            assert 0 < taken <= row.smem_limit, row_id
            for capability in row.capabilities:
                assert taken <= capabilities.SMEM_BY_CAPABILITY[capability], (row_id, capability)
        assert all(function["static_smem"] <= STATIC_LIMIT for function in report_of(family))


@needs_kernels
def test_registers_allow_the_blocks_that_the_row_promises() -> None:
    """min_blocks blocks of a row's threads must fit the 64K registers of a multiprocessor."""
    for name, family in FAMILIES.items():
        report = report_of(family)
        for row in support.ROWS:
            if row.family != name or row.id not in family["kernels"]:
                continue
            element = {"bf16": "bfloat16_t", "fp16": "half_t", "float8_e4m3fn": "float_e4m3_t"}[row.dtype]
            functions = [f for f in report if f["source"] == row.name and element in f["function"] and f["entry"]]
            assert functions, row.id
            if not isinstance(row.tile, tiles.Tile):
                continue  # Hopper kernels move registers between their warpgroups at run time
            threads = 32 * row.tile.warps_m * row.tile.warps_n
            for function in functions:
                assert function["registers"] * threads * row.tile.min_blocks <= 64 * 1024, (row.id, function["arch"])


@needs_kernels
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_libraries_link_no_cuda_torch_or_python() -> None:
    for family in FAMILIES.values():
        result = subprocess.run(["readelf", "--dynamic", family["path"]], capture_output=True, text=True, check=True)
        needed = re.findall(r"\(NEEDED\).*\[(.+)\]", result.stdout)
        assert not [name for name in needed if re.match(r"lib(cuda|cudart|torch|c10|python)", name)], needed


SPILLING = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodv' for 'sm_80'
ptxas info    : Function properties for _Z4goodv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 2 barriers, 2560 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3badv' for 'sm_90'
ptxas info    : Function properties for _Z3badv
    24 bytes stack frame, 28 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size
"""


def test_the_report_is_read_right() -> None:
    good, bad = load_script("cmake/compile_and_check.py").parse_report(SPILLING)
    assert (good["function"], good["arch"], good["entry"]) == ("_Z4goodv", "sm_80", True)
    assert (good["registers"], good["barriers"], good["static_smem"], good["stack_frame"]) == (40, 2, 2560, 0)
    assert (bad["arch"], bad["stack_frame"], bad["spill_stores"], bad["spill_loads"]) == ("sm_90", 24, 28, 32)


@pytest.mark.parametrize(("options", "status"), [([], 1), (["--allow-spills"], 0)])
def test_a_spill_fails_the_build(tmp_path: Path, options: list[str], status: int) -> None:
    target = tmp_path / "kernel.o"
    compiler = [sys.executable, "-c", f"import sys; open({str(target)!r}, 'w'); sys.stderr.write({SPILLING!r})"]
    command = [sys.executable, str(ROOT / "cmake/compile_and_check.py"), *options, "--", *compiler]
    result = subprocess.run([*command, "-c", "kernel.cu", "-o", str(target)], capture_output=True, text=True)
    assert result.returncode == status
    assert "_Z3badv for sm_90: 28 bytes of spill stores" in result.stderr and "_Z4goodv" not in result.stderr
    assert target.exists() == (status == 0), "an object that is left would be taken for built"
    assert len(json.loads((tmp_path / "kernel.o.ptxas.json").read_text())) == 2


SERIALIZED = """\
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the wgmma pipeline in the function '_Z4goodv'
ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum register requirements.
"""


@pytest.mark.parametrize("line", SERIALIZED.splitlines())
@pytest.mark.parametrize(("options", "status"), [([], 1), (["--allow-spills"], 0)])
def test_lost_speed_fails_the_build(tmp_path: Path, options: list[str], status: int, line: str) -> None:
    """ptxas gives it as information among the chatter of -v."""
    target = tmp_path / "kernel.o"
    good = SPILLING[: SPILLING.index("ptxas info    : Compiling entry function '_Z3badv'")]
    words = good + (line + "\n") * 2
    compiler = [sys.executable, "-c", f"import sys; open({str(target)!r}, 'w'); sys.stderr.write({words!r})"]
    command = [sys.executable, str(ROOT / "cmake/compile_and_check.py"), *options, "--", *compiler]
    result = subprocess.run([*command, "-c", "kernel.cu", "-o", str(target)], capture_output=True, text=True)
    assert result.returncode == status and target.exists() == (status == 0)
    assert result.stderr.count("(C75") == 1 and "Potential Performance Loss" in result.stderr
    assert "0 bytes stack frame" not in result.stderr
