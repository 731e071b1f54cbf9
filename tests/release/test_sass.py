"""What the kernels became: machine code that multiplies on the tensor cores and copies by the means the family is for.

Needs cuobjdump and nvdisasm: `pip install ".[test]"` brings them, a CUDA toolkit has them too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
from broadhead import capabilities, support
from installed import FAMILIES, needs_kernels

#: An instruction of cuobjdump's listing: its address, a predicate, the opcode up to its first dot.
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)")
FUNCTION = re.compile(r"\s+Function : (\S+)")
#: What every kernel of a family must hold: its matrix instruction (8-bit inputs have another) and its copies.
MULTIPLIES = {"sm80": ("HMMA", "HMMA"), "sm90": ("HGMMA", "QGMMA")}
COPIES = {"sm80": "LDGSTS", "sm90": "UTMALDG"}
#: Kernels beside those of the rows, in the same sources: they merge or convert results, which takes neither.
FINISHING = ("combine_kernel", "finish_dq")
#: Loads and stores of local memory: spilled registers and arrays that are indexed at run time.
LOCAL_MEMORY = {"LDL", "STL"}


@cache
def tool_folders() -> tuple[str, ...]:
    """Where a disassembler may be: the packages of the extra `test`, the toolkit, Triton, PATH. Newest first."""
    folders: list[Path] = []
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        folders += sorted(Path(root).glob("cu*/bin"), reverse=True)
    compilers = (os.environ.get("CUDACXX"), shutil.which("nvcc"))
    folders += [Path(path).resolve().parent for path in compilers if path]
    folders += [Path(root) / "bin" for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    return tuple(str(folder) for folder in folders if folder.is_dir())


@cache
def search_path() -> str:
    return os.pathsep.join((*tool_folders(), os.environ.get("PATH", "")))


def read_listing(lines: Iterable[str]) -> dict[str, set[str]]:
    """The opcodes of each function in a listing of ``cuobjdump -sass``."""
    opcodes: dict[str, set[str]] = defaultdict(set)
    current: set[str] = set()
    for line in lines:
        if match := INSTRUCTION.match(line):
            current.add(match[1])
        elif match := FUNCTION.match(line):
            current = opcodes[match[1]]
    return dict(opcodes)


def disassemble(library: str, arch: str) -> dict[str, set[str]]:
    cuobjdump = shutil.which("cuobjdump", path=search_path())
    if cuobjdump is None or shutil.which("nvdisasm", path=search_path()) is None:
        pytest.skip('cuobjdump or nvdisasm is missing: pip install ".[test]" or a CUDA toolkit brings them')
    command = [cuobjdump, "-sass", "-arch", arch, library]
    environment = {**os.environ, "PATH": search_path()}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        opcodes = read_listing(process.stdout)
    assert process.returncode == 0, f"{' '.join(command)} failed"
    return opcodes


def library_cases() -> list:
    """Each installed library with the architectures to look at: of portable code, which all are alike, the first."""
    cases = []
    for name, family in FAMILIES.items():
        archs = [f"sm_{arch}" for arch in family["archs"].split(";")]
        portable = any(len(row.capabilities) > 1 for row in support.ROWS if row.family == name)
        cases += [pytest.param(name, arch, id=f"{name}-{arch}") for arch in (archs[:1] if portable else archs)]
    return cases


def lacking(family: str, function: str, opcodes: set[str]) -> str:
    """What is wrong with the machine code of a row's kernel ("" if nothing is)."""
    multiply = MULTIPLIES[family]["float_e4m3_t" in function]
    missing = [opcode for opcode in (multiply, COPIES[family]) if opcode not in opcodes]
    return f"no {' and no '.join(missing)}" if missing else ""


@needs_kernels
@pytest.mark.parametrize(("name", "arch"), library_cases())
def test_kernels_use_the_instructions_of_their_family(name: str, arch: str) -> None:
    family = FAMILIES[name]
    report = json.loads(Path(family["path"]).with_suffix(".json").read_text())
    sources = {row.name for row in support.ROWS if row.family == name}
    kernels = [f["function"] for f in report if f["arch"] == arch and f["entry"] and f["source"] in sources]
    assert kernels, f"the report beside {family['path']} names no kernel for {arch}"
    # What is written for one architecture is there, e4m3 and qv rows too; portable rows may be compiled for others.
    own = {
        row.name
        for row in support.ROWS
        if row.id in family["kernels"]
        and len(row.capabilities) == 1
        and capabilities.arch_covers(arch.removeprefix("sm_"), row.capabilities[0])
    }
    missing = own - {f["source"] for f in report if f["arch"] == arch and f["entry"]}
    assert not missing, f"the report beside {family['path']} lacks {sorted(missing)}"
    opcodes = disassemble(family["path"], arch)
    multiplying = [function for function in kernels if not any(name in function for name in FINISHING)]
    assert multiplying, f"the report beside {family['path']} names only kernels that finish, for {arch}"
    wrong = {function: lacking(name, function, opcodes.get(function, set())) for function in multiplying}
    assert not {function: text for function, text in wrong.items() if text}
    spilling = sorted(function for function, found in opcodes.items() if found & LOCAL_MEMORY)
    assert not spilling, f"local memory is read or written by {spilling}"


LISTING = """\
	code for sm_90a
		Function : _ZN9broadhead4goodE
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;             /* 0x00000a00ff017b82 */
                                                                      /* 0x000fe20000000800 */
        /*0010*/              @!P0 UTMALDG.4D [UR8], [UR4], desc[UR6] ;  /* 0x00000a00ff017b82 */
        /*1fab0*/             @UP2 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
		Function : _ZN9broadhead3badE12float_e4m3_t
        /*0000*/                   LDL.64 R2, [R1+0x10] ;             /* 0x00000a00ff017b82 */
"""


def test_a_listing_is_read_right() -> None:
    opcodes = read_listing(LISTING.splitlines())
    assert opcodes == {
        "_ZN9broadhead4goodE": {"LDC", "UTMALDG", "HGMMA"},
        "_ZN9broadhead3badE12float_e4m3_t": {"LDL"},
    }
    (good, found), (bad, spilled) = opcodes.items()
    assert not lacking("sm90", good, found) and not found & LOCAL_MEMORY
    assert lacking("sm90", bad, spilled) == "no QGMMA and no UTMALDG" and spilled & LOCAL_MEMORY
    assert lacking("sm80", good, found) == "no HMMA and no LDGSTS"
