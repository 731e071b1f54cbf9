"""scripts/release.py compares a tag with version and changelog, and the files of a release with those it must have."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHANGELOG = """\
# Changelog

## [Unreleased]

## [9.1.0] - 2026-12-01

### Added

- A thing.

## [9.0.0] - 2026-11-01

## [0.1.0]

- The first.

[9.1.0]: https://example.org
"""


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts/release.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree of version 9.1.0."""
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "broadhead"\nversion = "9.1.0"\n')
    return tmp_path


def test_a_tag_of_the_version_with_a_section_passes(tree: Path) -> None:
    result = run("--root", tree, "check", "v9.1.0")
    assert result.returncode == 0, result.stderr
    (tree / "CITATION.cff").write_text('cff-version: 1.2.0\nversion: "9.1.0"\n')
    assert run("--root", tree, "check", "v9.1.0").returncode == 0


@pytest.mark.parametrize(
    ("tag", "version", "words"),
    [
        ("9.1.0", "9.1.0", "the tag 9.1.0 is not of the form v1.2.3"),
        ("v9.1", "9.1", "is not of the form v1.2.3"),
        ("v9.1.0", "9.2.0", "the tag is v9.1.0, pyproject.toml has the version 9.2.0"),
        ("v9.0.0", "9.0.0", "CHANGELOG.md says nothing below the heading of 9.0.0"),
        ("v9.2.0", "9.2.0", "CHANGELOG.md has no heading '## [9.2.0] - YYYY-MM-DD'"),
        ("v0.1.0", "0.1.0", "CHANGELOG.md has no heading '## [0.1.0] - YYYY-MM-DD'"),
    ],
)
def test_one_wrong_thing_stops_a_release(tree: Path, tag: str, version: str, words: str) -> None:
    (tree / "pyproject.toml").write_text(f'version = "{version}"\n')
    result = run("--root", tree, "check", tag)
    assert result.returncode == 1 and words in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_another_version_in_the_citation_stops_a_release(tree: Path) -> None:
    (tree / "CITATION.cff").write_text("version: 9.0.0\n")
    result = run("--root", tree, "check", "v9.1.0")
    assert result.returncode == 1 and "CITATION.cff has the version 9.0.0" in result.stderr


def test_the_notes_are_the_section(tree: Path) -> None:
    assert run("--root", tree, "notes", "v9.1.0").stdout == "### Added\n\n- A thing.\n"
    assert run("--root", tree, "notes", "v9.9.0").returncode == 1


def test_a_nightly_version_lies_between_releases(tree: Path) -> None:
    """Of a version that is released the next patch; of one that is not, it comes before it."""
    assert run("--root", tree, "nightly", "20261202").stdout == "9.1.1.dev20261202\n"
    assert 'version = "9.1.1.dev20261202"\n' in (tree / "pyproject.toml").read_text()
    (tree / "pyproject.toml").write_text('version = "9.2.0"\n')
    assert run("--root", tree, "nightly", "20261202").stdout == "9.2.0.dev20261202\n"
    assert "is no date" in run("--root", tree, "nightly", "today").stderr


def release_files() -> list[str]:
    """Every file of a release of 9.1.0."""
    names = ["broadhead-9.1.0.tar.gz"]
    for label in ("+cu129", "+cu130", "+cu132", ""):
        for machine in ("x86_64", "aarch64"):
            for python in range(310, 315):
                names.append(
                    f"broadhead-9.1.0{label}-cp{python}-cp{python}-manylinux_2_27_{machine}.manylinux_2_28_{machine}.whl"
                )
    return names


def fill(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return folder


def test_a_complete_release_passes(tmp_path: Path) -> None:
    result = run("complete", "v9.1.0", fill(tmp_path / "dist", release_files()))
    assert result.returncode == 0, result.stderr


def test_a_missing_and_a_foreign_file_are_found(tmp_path: Path) -> None:
    names = release_files()
    lacking = names.pop(7)
    foreign = names[5].replace("9.1.0", "9.0.0")
    result = run("complete", "v9.1.0", fill(tmp_path / "dist", [*names, foreign]))
    shown = re.sub("-manylinux.*_", "-", lacking).replace("-64.whl", "-x86_64.whl")
    assert result.returncode == 1 and result.stderr.count("\n") == 2
    assert f"{shown} is missing" in result.stderr and "broadhead-9.0.0+cu129-" in result.stderr


def test_the_pythons_are_those_of_the_package() -> None:
    """The classifiers, the wheel job and the completeness check name the same."""
    classifiers = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    expected = [f"cp3{version.partition('.')[2]}" for version in classifiers]
    workflow = (ROOT / ".github/workflows/wheels.yml").read_text()
    (pythons,) = re.findall(r"PYTHONS: (.*)", workflow)
    assert pythons.split() == [f"{name}-{name}" for name in expected]
    (names,) = re.findall(r"^PYTHONS = \((.*)\)$", (ROOT / "scripts/release.py").read_text(), re.MULTILINE)
    assert re.findall(r'"(\d+)"', names) == [name.removeprefix("cp") for name in expected]
