"""scripts/check_wheel.py takes a fit wheel and finds each way to be unfit."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from broadhead import support

from scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
(BUILD,) = (build for build in json.loads((ROOT / ".github/cuda-matrix.json").read_text()) if build["pypi"])
(VERSION,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
MACHINE = platform.machine()
CUDA = [int(part) for part in BUILD["cuda"].split(".")]
FAMILIES = tuple(dict.fromkeys(row.family for row in support.ROWS))

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or shutil.which("readelf") is None, reason="a C compiler and readelf make the wheels"
)


generate = load_script("cmake/generate.py")


def archs_of(family: str) -> list[str]:
    return generate.family_archs(family, BUILD["archs"].split(";"))


def compile_library(path: Path, source: str, *options: str) -> bytes:
    """Compiles a library to `path`; one without options once for all tests."""
    path.write_bytes(compiled(source) if not options else compile_in(path.parent, source, *options))
    return path.read_bytes()


@functools.lru_cache
def compiled(source: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return compile_in(Path(folder), source)


def compile_in(folder: Path, source: str, *options: str) -> bytes:
    (folder / "source.c").write_text(source)
    command = ["cc", "-shared", "-fPIC", "-o", str(folder / "compiled.so"), str(folder / "source.c"), *options]
    subprocess.run(command, check=True)
    return (folder / "compiled.so").read_bytes()


def fatbin(targets: list[str]) -> bytes:
    """What nvcc puts into a library for a source: a header and, for each architecture, an entry with empty code."""
    entries = b""
    for target in targets:
        kind = 1 if target.endswith("-virtual") else 2
        entries += struct.pack("<HHIQ", kind, 0x101, 64, 8).ljust(28, b"\0")
        entries += struct.pack("<I", int(re.sub(r"\D", "", target))).ljust(36, b"\0") + bytes(8)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def code_of(family: str, archs: list[str]) -> list[list[str]]:
    """The architectures of each source of a library."""
    units = generate.make_units(generate.load_table(), family, archs, "")
    return [list(unit.archs) for unit in units] + [archs] * len(generate.COMMON_SOURCES)


def library_source(family: str, version: int, archs: str, ids: list[str], code: list[list[str]]) -> str:
    """What a kernel library tells of itself, and its section with code."""
    data = ",".join(map(str, b"".join(map(fatbin, code))))
    section = (
        f'__attribute__((section(".nv_fatbin"), used, aligned(8))) static const unsigned char fatbin[] = {{{data}}};\n'
        if code
        else ""
    )
    quoted = ", ".join(f'{{0, 0, "{row_id}"}}' for row_id in ids)
    return section + (
        f'const char* broadhead_build_archs(void) {{ return "{archs}"; }}\n'
        f"int broadhead_cuda_version(void) {{ return {version}; }}\n"
        f"int broadhead_kernel_count(void) {{ return {len(ids)}; }}\n"
        f"static const struct {{ unsigned size, version; const char* id; }} kernels[] = {{{quoted}}};\n"
        "const void* broadhead_kernel_info(int i) { return &kernels[i]; }\n"
    )


MODULE = f"broadhead/_C.cpython-311-{MACHINE}-linux-gnu.so"


class Parts:
    """A wheel in parts, which a test may spoil: its file name and the bytes of its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.version = f"{VERSION}+{BUILD['label']}"
        self.tail = f"cp311-cp311-manylinux_2_28_{MACHINE}.whl"
        self.files: dict[str, bytes] = {"broadhead/__init__.py": b""}
        self.files[MODULE] = compile_library(folder / "module.so", "int a;")
        for family in FAMILIES:
            self.set_library(family)
            self.set_report(family)
        self.notices = {name: (ROOT / name).read_bytes() for name in ("LICENSE", "THIRD_PARTY_NOTICES.txt")}

    def set_library(self, family: str, *options: str, **changes: Any) -> None:
        values: dict[str, Any] = {
            "version": CUDA[0] * 1000 + CUDA[1] * 10, "archs": ";".join(archs_of(family)),
            "ids": [row.id for row in support.ROWS if row.family == family],
            "code": code_of(family, archs_of(family)),
        }  # fmt: skip
        source = library_source(family, **{**values, **changes})
        self.files[f"broadhead/libbroadhead_{family}.so"] = compile_library(
            self.folder / f"{family}.so", source, *options
        )

    def set_report(self, family: str, skip: tuple[str, str] = ("", ""), **changes: int) -> None:
        functions = [
            {"source": row.name, "function": row.id, "arch": f"sm_{arch}", "entry": True, "spill_stores": 0,
             "spill_loads": 0, "stack_frame": 0, **changes}
            for row in support.ROWS
            if row.family == family
            for arch in generate.row_archs(row, archs_of(family))
            if (row.name, arch) != skip and not arch.endswith("-virtual")
        ]  # fmt: skip
        self.files[f"broadhead/libbroadhead_{family}.json"] = json.dumps(functions).encode()

    def write(self, metadata_version: str = "", wrong_record: bool = False) -> Path:
        info = f"broadhead-{self.version}.dist-info"
        files = dict(self.files)
        metadata = f"Metadata-Version: 2.2\nName: broadhead\nVersion: {metadata_version or self.version}\n"
        files[f"{info}/METADATA"] = metadata.encode()
        files |= {f"{info}/licenses/{name}": data for name, data in self.notices.items()}
        record = ""
        for name, data in files.items():
            digest = hashlib.sha256(b"another" if wrong_record else data).digest()
            record += f"{name},sha256={base64.urlsafe_b64encode(digest).rstrip(b'=').decode()},{len(data)}\n"
        files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
        wheel = self.folder / f"broadhead-{self.version}-{self.tail}"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return wheel


def run(wheel: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts/check_wheel.py"), *options, str(wheel)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("label", [True, False])
def test_a_release_wheel_is_fit(tmp_path: Path, label: bool) -> None:
    """With the label of its build; without one it is the one for PyPI."""
    parts = Parts(tmp_path)
    parts.version = parts.version if label else VERSION
    result = run(parts.write(), "--glibc", "2.28", "--tag", f"v{VERSION}")
    assert result.returncode == 0 and "fit to ship" in result.stdout, result.stdout + result.stderr


def plain_linux(parts: Parts) -> None:
    parts.tail = f"cp311-cp311-linux_{MACHINE}.whl"


def no_kernels(parts: Parts) -> None:
    for name in [name for name in parts.files if "libbroadhead" in name]:
        del parts.files[name]


def no_hopper_kernels(parts: Parts) -> None:
    del parts.files["broadhead/libbroadhead_sm90.so"]


def an_unknown_label(parts: Parts) -> None:
    parts.version = f"{VERSION}+cu999"


def another_cuda(parts: Parts) -> None:
    parts.set_library("sm80", version=12090)


def an_architecture_less(parts: Parts) -> None:
    """As told; the code is there."""
    parts.set_library("sm80", archs=";".join(archs_of("sm80")[:-1]))


def no_code_at_all(parts: Parts) -> None:
    parts.set_library("sm80", code=[])


def a_source_without_one_architecture(parts: Parts) -> None:
    code = code_of("sm80", archs_of("sm80"))
    parts.set_library("sm80", code=[code[0][1:], *code[1:]])


def no_ptx(parts: Parts) -> None:
    code = code_of("sm80", archs_of("sm80"))
    parts.set_library("sm80", code=[[arch for arch in archs if not arch.endswith("-virtual")] for archs in code])


def another_version(parts: Parts) -> None:
    parts.version = f"9.9.9+{BUILD['label']}"


def another_machine(parts: Parts) -> None:
    parts.files[MODULE] = parts.files[MODULE][:18] + b"\x08\0" + parts.files[MODULE][20:]  # MIPS


def a_newer_glibc(parts: Parts) -> None:
    parts.tail = f"cp311-cp311-manylinux_2_34_{MACHINE}.whl"


def a_kernel_less(parts: Parts) -> None:
    parts.set_library("sm80", ids=[row.id for row in support.ROWS if row.family == "sm80"][1:])


def no_code_for_one_architecture(parts: Parts) -> None:
    parts.set_report("sm80", skip=("sm80_fwd_d64", "120"))


def a_spill(parts: Parts) -> None:
    parts.set_report("sm80", spill_stores=4)


def local_memory(parts: Parts) -> None:
    parts.set_report("sm90", stack_frame=8)


def no_report(parts: Parts) -> None:
    del parts.files["broadhead/libbroadhead_sm90.json"]


def no_module(parts: Parts) -> None:
    del parts.files[MODULE]


def a_module_of_another_python(parts: Parts) -> None:
    parts.files[MODULE.replace("311", "312")] = parts.files.pop(MODULE)


def no_notices(parts: Parts) -> None:
    del parts.notices["THIRD_PARTY_NOTICES.txt"]


def a_notice_less(parts: Parts) -> None:
    text = parts.notices["THIRD_PARTY_NOTICES.txt"]
    parts.notices["THIRD_PARTY_NOTICES.txt"] = text[: text.index(b"== pybind11")].replace(b"pybind11", b"")


def a_link_to_cuda(parts: Parts) -> None:
    compile_library(parts.folder / "libcudart.so", "int b;", "-Wl,-soname,libcudart.so.99")
    parts.set_library("sm80", f"-L{parts.folder}", "-Wl,--no-as-needed", "-lcudart")


def a_library_that_does_not_load(parts: Parts) -> None:
    compile_library(parts.folder / "libnowhere.so", "int b;", "-Wl,-soname,libnowhere.so.1")
    parts.set_library("sm80", f"-L{parts.folder}", "-Wl,--no-as-needed", "-lnowhere")


def no_licence(parts: Parts) -> None:
    del parts.notices["LICENSE"]


def no_notice_of_the_runtime(parts: Parts) -> None:
    notices = parts.notices["THIRD_PARTY_NOTICES.txt"]
    parts.notices["THIRD_PARTY_NOTICES.txt"] = notices.replace(b"CUDA Runtime", b"")


def no_notice_of_cutlass(parts: Parts) -> None:
    notices = parts.notices["THIRD_PARTY_NOTICES.txt"]
    parts.notices["THIRD_PARTY_NOTICES.txt"] = notices.replace(b"NVIDIA CUTLASS", b"")


def a_link_to_torch(parts: Parts) -> None:
    compile_library(parts.folder / "libtorch_cpu.so", "int b;")
    parts.files[MODULE] = compile_library(
        parts.folder / "module.so", "int a;", f"-L{parts.folder}", "-Wl,--no-as-needed", "-ltorch_cpu"
    )


def too_big(parts: Parts) -> None:
    parts.files["broadhead/data"] = bytes(100 * 1000 * 1000)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (plain_linux, "platform is linux_"),
        (no_kernels, "holds no kernels: libbroadhead_sm80.so is missing"),
        (no_hopper_kernels, "holds no kernels: libbroadhead_sm90.so is missing"),
        (an_unknown_label, "no build of the release has the label cu999"),
        (another_cuda, "libbroadhead_sm80.so is of CUDA 12.9, the wheel's name is for 13.0"),
        (another_version, "its version is 9.9.9, the release is "),
        (another_machine, "_C.cpython-311-"),
        (a_newer_glibc, "it needs glibc 2.34, newer than 2.28"),
        (no_code_at_all, "sources with code for 80, 86, 89, 90, 100, 103, 120, 121, PTX of 103, expected "),
        (a_source_without_one_architecture, "has 1 sources with code for 86, 89, 90, 100, "),
        (no_ptx, "sources with code for 80, 86, 89, 90, 100, 103, 120, 121, PTX of 103, expected "),
        (an_architecture_less, 'libbroadhead_sm80.so is for "'),
        (a_kernel_less, "libbroadhead_sm80.so lacks 1 kernels: sm80_fwd_d64_bf16"),
        (no_code_for_one_architecture, "libbroadhead_sm80.json has no sm80_fwd_d64 for"),
        (a_spill, "libbroadhead_sm80.json tells of spills: "),
        (local_memory, "libbroadhead_sm90.json tells of spills: "),
        (no_report, "libbroadhead_sm90.json is missing"),
        (no_module, "holds no module broadhead/_C for cp311"),
        (a_module_of_another_python, "holds no module broadhead/_C for cp311"),
        (no_notices, "holds no THIRD_PARTY_NOTICES.txt"),
        (a_notice_less, "THIRD_PARTY_NOTICES.txt does not name: pybind11"),
        (no_licence, "holds no LICENSE"),
        (no_notice_of_the_runtime, "THIRD_PARTY_NOTICES.txt does not name: CUDA Runtime"),
        (no_notice_of_cutlass, "THIRD_PARTY_NOTICES.txt does not name: NVIDIA CUTLASS"),
        (a_link_to_torch, "_C.cpython-311-"),
        (a_link_to_cuda, "libbroadhead_sm80.so links libcudart.so.99"),
        (a_library_that_does_not_load, "libbroadhead_sm80.so cannot be loaded: libnowhere.so.1"),
        (too_big, "more than 100000000"),
    ],
)
def test_one_wrong_thing_is_found(tmp_path: Path, spoil: Callable[[Parts], None], words: str) -> None:
    parts = Parts(tmp_path)
    spoil(parts)
    result = run(parts.write(), "--glibc", "2.28")
    assert result.returncode == 1 and words in result.stdout, result.stdout + result.stderr
    # Nothing that is right is called wrong. Code that is missing is so for every set of architectures.
    problems = result.stdout.split(" MB: ")[1].split("; ")
    if spoil in (no_code_at_all, no_ptx, a_source_without_one_architecture):
        assert all("sources with code for" in problem for problem in problems), problems
    else:
        assert len(problems) == (2 if spoil in (no_kernels, a_link_to_cuda) else 1), problems


def test_other_architectures_are_fit_only_where_they_are_asked_for(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    archs = {"sm80": ["80", "90"], "sm90": ["90a"]}
    for family, names in archs.items():
        parts.set_library(family, archs=";".join(names), code=code_of(family, names))
    wheel = parts.write()
    assert run(wheel).returncode == 1
    result = run(wheel, "--archs", "80-real;90a-real")
    assert result.returncode == 0, result.stdout


def test_a_tag_is_the_version_that_is_expected(tmp_path: Path) -> None:
    wheel = Parts(tmp_path).write()
    assert run(wheel, "--tag", f"v{VERSION}").returncode == 0
    result = run(wheel, "--tag", "v8.8.8")
    assert result.returncode == 1 and f"its version is {VERSION}, the release is 8.8.8" in result.stdout


def test_a_version_that_differs_is_found(tmp_path: Path) -> None:
    result = run(Parts(tmp_path).write(metadata_version="0.2.0"))
    assert result.returncode == 1 and "METADATA does not have the version" in result.stdout


def test_a_wrong_record_is_found(tmp_path: Path) -> None:
    result = run(Parts(tmp_path).write(wrong_record=True))
    assert result.returncode == 1 and "RECORD does not have broadhead/__init__.py as it is" in result.stdout


def test_a_foreign_name_is_found(tmp_path: Path) -> None:
    wheel = Parts(tmp_path).write()
    other = wheel.rename(tmp_path / f"broadhead-{VERSION}-py3-none-any.whl")
    result = run(other)
    assert result.returncode == 1 and "its name is not broadhead-VERSION" in result.stdout
