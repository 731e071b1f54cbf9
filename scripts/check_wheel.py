#!/usr/bin/env python3
"""Checks built wheels of a release: name, version, kernels, architectures, links, notices and size.

``check_wheel.py WHEEL...`` exits with 1 and says why when a wheel is not fit to ship. ``--tag v0.2.0`` names the
version that it must have instead of the source's, ``--glibc 2.28`` the newest C library that it may need, ``--archs``
what its kernels are for instead of the release's list. It loads the kernel libraries, so it runs where the wheels were
built. Needs ``readelf``.
"""

from __future__ import annotations

import argparse
import base64
import csv
import ctypes
import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import cuda_matrix
import fatbins

sys.path.insert(0, str(cuda_matrix.ROOT / "cmake"))
import generate

#: PyPI's limit for one file.
MAX_BYTES = 100 * 1000 * 1000
#: The driver must not be needed to import, the run-time is linked statically, and torch and Python come by themselves.
FORBIDDEN = re.compile(r"lib(cuda|cudart|cublas\w*|cudnn\w*|nv\w+|nccl|torch\w*|c10\w*|python[\d.]*)\.so")
NAME = re.compile(
    r"broadhead-(?P<version>\d+(\.\d+)+(\.dev\d+)?)(\+(?P<label>\w+))?"
    r"-cp(?P<python>\d+)-cp(?P=python)-(?P<platform>\S+)\.whl"
)
#: e_machine of ELF files by the machine type that ends a platform tag.
MACHINES = {"x86_64": 62, "aarch64": 183}
#: What indexes take: a plain linux tag says nothing about the C library that the wheel needs.
PLATFORM = re.compile(r"(manylinux|musllinux)_\d+_\d+_\w+(\.(manylinux|musllinux)\w+)*")
#: Files that the licences of broadhead and of what is compiled into it ask for.
NOTICES = ("LICENSE", "THIRD_PARTY_NOTICES.txt")
#: Words of each licence that must be there.
NOTICE_WORDS = ("NVIDIA CUTLASS", "NVIDIA CORPORATION & AFFILIATES", "CUDA Runtime", "End User License", "pybind11")


def needed(path: Path) -> list[str]:
    """The shared libraries that `path` asks the loader for."""
    result = subprocess.run(["readelf", "--dynamic", str(path)], capture_output=True, text=True, check=True)
    return re.findall(r"\(NEEDED\).*\[(.+)\]", result.stdout)


class Expected(NamedTuple):
    """What a wheel must be."""

    version: str  # without label
    glibc: tuple[int, ...]  # the newest that it may need; empty: any
    archs: str  # for what its kernels are; empty: what the release has


def source_version() -> str:
    """The version in pyproject.toml."""
    text = (cuda_matrix.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'^version = "(.+)"$', text, re.MULTILINE)[0]


def build_of(label: str | None) -> dict[str, Any] | None:
    """The build of the release that a version label names. Wheels without one are those for PyPI."""
    if label is None:
        return cuda_matrix.pypi_build()
    return next((build for build in cuda_matrix.builds() if build["label"] == label), None)


class KernelInfo(ctypes.Structure):
    """The begin of KernelInfo in csrc/host/params.h."""

    _fields_ = (("struct_size", ctypes.c_uint32), ("abi_version", ctypes.c_uint32), ("id", ctypes.c_char_p))


def check_library(family: str, path: Path, build: dict[str, Any]) -> list[str]:
    """What differs between a kernel library with its report, and the table and the release."""
    table = generate.load_table()
    archs = generate.family_archs(family, build["archs"].split(";"))
    rows = [row for row in table.ROWS if row.family == family]
    problems = check_code(family, path, archs)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return [*problems, f"{path.name} cannot be loaded: {error}"]
    library.broadhead_build_archs.restype = ctypes.c_char_p
    library.broadhead_kernel_info.restype = ctypes.POINTER(KernelInfo)
    found = library.broadhead_build_archs().decode()
    if found != ";".join(archs):
        problems.append(f'{path.name} is for "{found}", the release for "{";".join(archs)}"')
    version = library.broadhead_cuda_version()
    cuda = f"{version // 1000}.{version % 1000 // 10}"
    if cuda != build["cuda"]:
        problems.append(f"{path.name} is of CUDA {cuda}, the wheel's name is for {build['cuda']}")
    kernels = range(library.broadhead_kernel_count())
    ids = {library.broadhead_kernel_info(i).contents.id.decode() for i in kernels}
    if missing := sorted({row.id for row in rows} - ids):
        problems.append(f"{path.name} lacks {len(missing)} kernels: {', '.join(missing[:3])}")
    report = path.with_suffix(".json")
    if not report.exists():
        return [*problems, f"{report.name} is missing"]
    functions = json.loads(report.read_text(encoding="utf-8"))
    built = {(function["source"], function["arch"]) for function in functions if function["entry"]}
    for name, targets in {row.name: generate.row_archs(row, archs) for row in rows}.items():
        # ptxas, whose report it is, never sees PTX.
        lacking = [arch for arch in targets if not arch.endswith("-virtual") and (name, f"sm_{arch}") not in built]
        if lacking:
            problems.append(f"{report.name} has no {name} for {', '.join(lacking)}")
    spilling = sorted(
        {
            f"{f['source']} for {f['arch']}"
            for f in functions
            if f["spill_stores"] or f["spill_loads"] or f["stack_frame"]
        }
    )
    if spilling:
        problems.append(f"{report.name} tells of spills: {', '.join(spilling)}")
    return problems


def code_text(codes: frozenset[fatbins.Code]) -> str:
    names = sorted((code.is_ptx, code.arch) for code in codes)
    return ", ".join(f"{'PTX of ' if is_ptx else ''}{arch}" for is_ptx, arch in names) or "nothing"


def expected_code(family: str, archs: list[str]) -> Counter[frozenset[fatbins.Code]]:
    """How many sources have code for each set of architectures."""

    def code_of(targets: list[str] | tuple[str, ...]) -> frozenset[fatbins.Code]:
        numbers = ((re.sub(r"\D", "", target), target.endswith("-virtual")) for target in targets)
        return frozenset(fatbins.Code(int(number), is_ptx) for number, is_ptx in numbers)

    units = generate.make_units(generate.load_table(), family, archs, "")
    found = Counter(code_of(unit.archs) for unit in units)
    found[code_of(archs)] += len(generate.COMMON_SOURCES)
    return found


def check_code(family: str, path: Path, archs: list[str]) -> list[str]:
    """What the library really holds against what it should, source by source: the linker drops no code unnoticed."""
    expected = expected_code(family, archs)
    found = Counter(frozenset(codes) for codes in fatbins.library_code(path))
    return [
        f"{path.name} has {found[codes]} sources with code for {code_text(codes)}, expected {expected[codes]}"
        for codes in sorted(expected.keys() | found.keys(), key=code_text)
        if expected[codes] != found[codes]
    ]


def check_machine(path: Path, platform: str) -> list[str]:
    """Whether a compiled file is of the machine type that the wheel's name has."""
    wanted = next((machine for machine in MACHINES if platform.endswith(machine)), "")
    found = int.from_bytes(path.read_bytes()[18:20], "little")
    return [] if MACHINES.get(wanted) == found else [f"{path.name} is not for {platform}"]


def check_dist_info(archive: zipfile.ZipFile, version: str) -> list[str]:
    """What is wrong with the wheel's own description."""
    folders = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    folder = f"broadhead-{version}.dist-info"
    if folders != {folder}:
        return [f"its description lies in {', '.join(sorted(folders)) or 'no folder'}, expected {folder}"]
    problems = []
    metadata = archive.read(f"{folder}/METADATA").decode()
    if f"\nVersion: {version}\n" not in metadata:
        problems.append(f"METADATA does not have the version {version}")
    texts = {name: f"{folder}/licenses/{name}" for name in NOTICES}
    problems += [f"holds no {name}" for name, path in texts.items() if path not in archive.namelist()]
    if texts[NOTICES[1]] in archive.namelist():
        text = archive.read(texts[NOTICES[1]]).decode()
        problems += [f"{NOTICES[1]} does not name: {words}" for words in NOTICE_WORDS if words not in text]
    rows = csv.reader(io.StringIO(archive.read(f"{folder}/RECORD").decode()))
    recorded = {row[0]: row[1] for row in rows}
    for name in archive.namelist():
        digest = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=").decode()
        if not name.endswith(("/", "/RECORD")) and recorded.get(name) != f"sha256={digest}":
            problems.append(f"RECORD does not have {name} as it is")
    return problems


def check_package(package: Path, python: str, platform: str, build: dict[str, Any]) -> list[str]:
    """What is wrong with the compiled files of the package."""
    problems = []
    if not any(package.glob(f"_C.cpython-{python}-*.so")):
        problems.append(f"holds no module broadhead/_C for cp{python}")
    # auditwheel puts libraries that it copies beside the package.
    for path in sorted(package.parent.rglob("*.so*")):
        found = [library for library in needed(path) if FORBIDDEN.match(library)]
        if found:
            problems.append(f"{path.name} links {', '.join(found)}")
        problems += check_machine(path, platform)
    families = dict.fromkeys(row.family for row in generate.load_table().ROWS)
    for family in families:
        path = package / f"libbroadhead_{family}.so"
        problems += (
            check_library(family, path, build) if path.exists() else [f"holds no kernels: {path.name} is missing"]
        )
    return problems


def check_platform(platform: str, glibc: tuple[int, ...]) -> list[str]:
    """Whether indexes and old systems take the platform tag."""
    if not PLATFORM.fullmatch(platform):
        return [f"its platform is {platform}, indexes take manylinux: run auditwheel repair on it"]
    needed = min(tuple(map(int, found)) for found in re.findall(r"linux_(\d+)_(\d+)_", platform))
    if glibc and needed > glibc:
        return [f"it needs glibc {needed[0]}.{needed[1]}, newer than {glibc[0]}.{glibc[1]}: build it in the image"]
    return []


def check(wheel: Path, expected: Expected) -> list[str]:
    """What is wrong with `wheel`."""
    match = NAME.fullmatch(wheel.name)
    if match is None:
        return ["its name is not broadhead-VERSION[+LABEL]-cpXY-cpXY-PLATFORM.whl"]
    problems = check_platform(match["platform"], expected.glibc)
    if match["version"] != expected.version:
        problems.append(f"its version is {match['version']}, the release is {expected.version}")
    build = build_of(match["label"])
    if build is None:
        return [*problems, f"no build of the release has the label {match['label']}"]
    if expected.archs:
        build = {**build, "archs": expected.archs}
    if wheel.stat().st_size > MAX_BYTES:
        problems.append(f"{wheel.stat().st_size} bytes, more than {MAX_BYTES}")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as directory:
        label = f"+{match['label']}" if match["label"] else ""
        problems += check_dist_info(archive, match["version"] + label)
        archive.extractall(directory)
        problems += check_package(Path(directory) / "broadhead", match["python"], match["platform"], build)
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description="Says whether wheels are fit to ship.")
    parser.add_argument("--tag", help="the release's tag, for example v0.2.0; default: the version of the source")
    parser.add_argument("--glibc", default="", help="the newest that a wheel may need, for example 2.28; default: any")
    parser.add_argument("--archs", default="", help="architectures of the kernels; default: those of the release")
    parser.add_argument("wheels", nargs="+", type=Path)
    options = parser.parse_args()
    version = options.tag.removeprefix("v") if options.tag else source_version()
    glibc = tuple(map(int, options.glibc.split("."))) if options.glibc else ()
    expected = Expected(version, glibc, options.archs)
    status = 0
    for wheel in options.wheels:
        problems = check(wheel, expected)
        status |= bool(problems)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB: {'; '.join(problems) or 'fit to ship'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
