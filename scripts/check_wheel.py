#!/usr/bin/env python3
"""Checks built wheels of a release: name, kernels, architectures, links, notices and size.

``check_wheel.py WHEEL...`` exits with 1 and says why when a wheel is not fit to ship. It loads the kernel libraries, so
it runs where the wheels were built. Needs ``readelf``.
"""

from __future__ import annotations

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
from pathlib import Path

import cuda_matrix

sys.path.insert(0, str(cuda_matrix.ROOT / "cmake"))
import generate

#: PyPI's limit for one file.
MAX_BYTES = 100 * 1000 * 1000
FORBIDDEN = re.compile(r"lib(cuda|cudart|nvrtc|cublas|torch\w*|c10\w*|python[\d.]*)\.so")
NAME = re.compile(
    r"broadhead-(?P<version>[\d.]+)(\+(?P<label>\w+))?-cp(?P<python>\d+)-cp(?P=python)-(?P<platform>\S+)\.whl"
)
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


def build_of(label: str | None) -> dict[str, str] | None:
    """The build of the release that a version label names. Wheels without one are of the newest CUDA."""
    builds = cuda_matrix.builds()
    return next((build for build in builds if build["label"] == label), None) if label else builds[-1]


class KernelInfo(ctypes.Structure):
    """The begin of KernelInfo in csrc/host/params.h."""

    _fields_ = (("struct_size", ctypes.c_uint32), ("abi_version", ctypes.c_uint32), ("id", ctypes.c_char_p))


def check_library(family: str, path: Path, build: dict[str, str]) -> list[str]:
    """What differs between a kernel library with its report, and the table and the release."""
    table = generate.load_table()
    archs = generate.family_archs(family, build["archs"].split(";"))
    rows = [row for row in table.ROWS if row.family == family]
    problems = []
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return [f"{path.name} cannot be loaded: {error}"]
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
        lacking = [arch for arch in targets if (name, f"sm_{arch}") not in built]
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


def check_package(package: Path, python: str, build: dict[str, str]) -> list[str]:
    """What is wrong with the compiled files of the package."""
    problems = []
    if not any(package.glob(f"_C.cpython-{python}-*.so")):
        problems.append(f"holds no module broadhead/_C for cp{python}")
    # auditwheel puts libraries that it copies beside the package.
    for path in sorted(package.parent.rglob("*.so*")):
        found = [library for library in needed(path) if FORBIDDEN.match(library)]
        if found:
            problems.append(f"{path.name} links {', '.join(found)}")
    families = dict.fromkeys(row.family for row in generate.load_table().ROWS)
    for family in families:
        path = package / f"libbroadhead_{family}.so"
        problems += (
            check_library(family, path, build) if path.exists() else [f"holds no kernels: {path.name} is missing"]
        )
    return problems


def check(wheel: Path) -> list[str]:
    """What is wrong with `wheel`."""
    match = NAME.fullmatch(wheel.name)
    if match is None:
        return ["its name is not broadhead-VERSION[+LABEL]-cpXY-cpXY-PLATFORM.whl"]
    problems = []
    if not PLATFORM.fullmatch(match["platform"]):
        problems.append(f"its platform is {match['platform']}, indexes take manylinux: run auditwheel repair on it")
    build = build_of(match["label"])
    if build is None:
        return [*problems, f"no build of the release has the label {match['label']}"]
    if wheel.stat().st_size > MAX_BYTES:
        problems.append(f"{wheel.stat().st_size} bytes, more than {MAX_BYTES}")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as directory:
        label = f"+{match['label']}" if match["label"] else ""
        problems += check_dist_info(archive, match["version"] + label)
        archive.extractall(directory)
        problems += check_package(Path(directory) / "broadhead", match["python"], build)
    return problems


def main() -> int:
    status = 0
    for wheel in map(Path, sys.argv[1:]):
        problems = check(wheel)
        status |= bool(problems)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB: {'; '.join(problems) or 'fit to ship'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
