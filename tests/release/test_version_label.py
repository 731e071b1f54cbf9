"""The build backend puts a version label into wheels and prepared metadata: two CUDA versions make two file names."""

from __future__ import annotations

import base64
import csv
import hashlib
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
#: That of pyproject.toml.
(VERSION,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
METADATA = (
    f"Metadata-Version: 2.2\nName: broadhead\nVersion: {VERSION}\nRequires-Dist: torch>=2.6\n\n# text\nVersion: 9\n"
)


label = load_script("cmake/version_label.py")


def make_wheel(folder: Path) -> Path:
    wheel = folder / f"broadhead-{VERSION}-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("broadhead/__init__.py", f"version = '{VERSION}'\n")
        info = zipfile.ZipInfo("broadhead/_C.so", (2026, 1, 2, 3, 4, 6))
        info.external_attr = 0o100755 << 16
        archive.writestr(info, b"\x7fELF")
        archive.writestr(f"broadhead-{VERSION}.dist-info/METADATA", METADATA)
        archive.writestr(f"broadhead-{VERSION}.dist-info/RECORD", "broadhead/__init__.py,,\n")
    return wheel


def test_a_wheel_gets_the_label(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    name = label.label_wheel(wheel, "cu130")
    assert name == f"broadhead-{VERSION}+cu130-cp311-cp311-linux_x86_64.whl"
    assert [path.name for path in tmp_path.iterdir()] == [name], "the wheel without a label must be gone"
    with zipfile.ZipFile(tmp_path / name) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
        mode = archive.getinfo("broadhead/_C.so").external_attr
    folder = f"broadhead-{VERSION}+cu130.dist-info"
    assert set(files) == {"broadhead/__init__.py", "broadhead/_C.so", f"{folder}/METADATA", f"{folder}/RECORD"}
    assert files[f"{folder}/METADATA"].decode() == METADATA.replace(
        f"Version: {VERSION}\n", f"Version: {VERSION}+cu130\n"
    )
    assert mode == 0o100755 << 16
    rows = {row[0]: row[1:] for row in csv.reader(files.pop(f"{folder}/RECORD").decode().splitlines())}
    assert rows.pop(f"{folder}/RECORD") == ["", ""] and rows.keys() == files.keys()
    for path, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        assert rows[path] == [f"sha256={digest}", str(len(data))]


def test_wheels_of_two_cuda_versions_have_two_names(tmp_path: Path) -> None:
    names = set()
    for cuda in ("cu129", "cu130"):
        (tmp_path / cuda).mkdir()
        names.add(label.label_wheel(make_wheel(tmp_path / cuda), cuda))
    assert len(names) == 2


def test_prepared_metadata_get_it_too(tmp_path: Path) -> None:
    """pip compares them with those of the wheel."""
    (tmp_path / f"broadhead-{VERSION}.dist-info").mkdir()
    (tmp_path / f"broadhead-{VERSION}.dist-info/METADATA").write_text(METADATA)
    name = label.label_directory(tmp_path, f"broadhead-{VERSION}.dist-info", "cu129")
    assert name == f"broadhead-{VERSION}+cu129.dist-info"
    assert f"\nVersion: {VERSION}+cu129\n" in (tmp_path / name / "METADATA").read_text()


@pytest.mark.parametrize("value", ["+cu130", "cu13 0", "CU130", "cu130."])
def test_a_bad_label_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("BROADHEAD_VERSION_LABEL", value)
    with pytest.raises(SystemExit, match="is no version label; accepted"):
        label.wanted_label()


@pytest.mark.parametrize(("value", "version"), [("", VERSION), ("cu130", f"{VERSION}+cu130")])
def test_the_backend_asks_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, version: str
) -> None:
    """Both hooks that name a version: without a label nothing changes."""
    pytest.importorskip("scikit_build_core")
    monkeypatch.syspath_prepend(str(ROOT / "cmake"))
    monkeypatch.setitem(sys.modules, "version_label", label)
    monkeypatch.setenv("BROADHEAD_VERSION_LABEL", value)
    backend = load_script("cmake/build_backend.py")
    monkeypatch.setattr(backend, "_build_wheel", lambda folder, settings, metadata: make_wheel(Path(folder)).name)
    monkeypatch.chdir(ROOT)
    assert backend.build_wheel(str(tmp_path)) == f"broadhead-{version}-cp311-cp311-linux_x86_64.whl"
    name = backend.prepare_metadata_for_build_wheel(str(tmp_path), {"cmake.define.BROADHEAD_CUDA_ARCHS": "none"})
    assert name == f"broadhead-{version}.dist-info"
    assert f"\nVersion: {version}\n" in (tmp_path / name / "METADATA").read_text()
    for notice in ("LICENSE", "THIRD_PARTY_NOTICES.txt"):
        assert (tmp_path / name / "licenses" / notice).exists()


def test_an_sdist_holds_what_its_tests_and_builds_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scikit_build_core")
    monkeypatch.syspath_prepend(str(ROOT / "cmake"))
    monkeypatch.chdir(ROOT)
    name = load_script("cmake/build_backend.py").build_sdist(str(tmp_path))
    with tarfile.open(tmp_path / name) as archive:
        names = {path.partition("/")[2] for path in archive.getnames()}
    wanted = {".ci/run", ".github/cuda-matrix.json", ".github/workflows/wheels.yml", "scripts/build_wheels.sh"}
    assert names >= {*wanted, "LICENSE", "THIRD_PARTY_NOTICES.txt", "cmake/version_label.py"}
    assert names >= {"benchmarks/run.py", "benchmarks/broadhead_bench/peers/base.py"}
    assert names >= {"tests/README.md", "tests/conftest.py", "tests/support/calls.py"}
    assert not [name for name in names if name.startswith("benchmarks/results")]
