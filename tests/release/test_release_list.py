"""The release's architectures are written in one file: documents, workflows and CI follow it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/cuda_matrix.py"
MATRIX = json.loads((ROOT / ".github/cuda-matrix.json").read_text())


def run_script(*arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(root / "scripts/cuda_matrix.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files that the script reads, in a folder of their own."""
    for name in ("README.md", "CONTRIBUTING.md", ".ci/run", "scripts/cuda_matrix.py", "scripts/build_wheels.sh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    return tmp_path


@pytest.mark.parametrize("build", MATRIX, ids=lambda build: build["label"])
def test_it_prints_what_the_file_has(build: dict[str, str]) -> None:
    for field in ("archs", "label", "image"):
        assert run_script(field, build["cuda"]).stdout == build[field] + "\n"
    printed = run_script("json").stdout
    assert json.loads(printed) == MATRIX and printed.count("\n") == 1, "a workflow's output is one line"


def test_an_unknown_cuda_is_refused() -> None:
    result = run_script("archs", "11.8")
    assert result.returncode != 0 and "no build for CUDA 11.8; accepted: 12.9, 13.0" in result.stderr


def test_everything_follows_the_list() -> None:
    result = run_script("check")
    assert result.returncode == 0, result.stderr


def test_labels_and_images_belong_to_the_cuda_version() -> None:
    for build in MATRIX:
        assert build["label"] == "cu" + build["cuda"].replace(".", "") and build["image"].endswith(build["cuda"])


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        (".github/cuda-matrix.json", ";120-real", ";120-real;121-real", "CONTRIBUTING.md names the architectures"),
        (".github/cuda-matrix.json", ";120-real", ";120-real;121-real", "README.md does not name the architectures"),
        (".ci/run", '"$work/release"', '"$work/release" # 80;90a', ".ci/run names the architectures 80;90a itself"),
        (".github/workflows/wheels.yml", "dist/*.whl", "dist # 80;86;90a", "wheels.yml names the architectures 80;86"),
        ("scripts/build_wheels.sh", '="$archs"', '="80-real;90a-real"', "build_wheels.sh names the architectures"),
    ],
)
def test_drift_is_found(copy: Path, name: str, old: str, new: str, words: str) -> None:
    text = (copy / name).read_text()
    assert old in text
    (copy / name).write_text(text.replace(old, new))
    result = run_script("check", root=copy)
    assert result.returncode == 1 and words in result.stderr, result.stderr


def test_ci_and_workflows_build_by_the_list() -> None:
    """Nothing but the release's own command builds wheels, and it takes the architectures from the list."""
    assert "scripts/build_wheels.sh" in (ROOT / ".ci/run").read_text()
    workflow = (ROOT / ".github/workflows/wheels.yml").read_text()
    assert "scripts/build_wheels.sh" in workflow and "cuda_matrix.py json" in workflow
    script = (ROOT / "scripts/build_wheels.sh").read_text()
    assert "cuda_matrix.py archs" in script and 'BROADHEAD_CUDA_ARCHS="$archs"' in script
    assert "cuda_matrix.py check" in (ROOT / "scripts/lint.sh").read_text()
