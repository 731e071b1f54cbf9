"""The release's architectures are written in one file: documents, workflows and CI follow it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from broadhead.capabilities import arch_covers, capability_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/cuda_matrix.py"
MATRIX = json.loads((ROOT / ".github/cuda-matrix.json").read_text())


def run_script(*arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(root / "scripts/cuda_matrix.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files that the script reads, in a folder of their own."""
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/building.md",
        ".ci/run",
        "scripts/cuda_matrix.py",
        "scripts/build_wheels.sh",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    return tmp_path


@pytest.mark.parametrize("build", MATRIX, ids=lambda build: build["label"])
def test_it_prints_what_the_file_has(build: dict[str, str]) -> None:
    for field in ("archs", "cuda"):
        assert run_script(field, build["label"]).stdout == build[field] + "\n"


def test_there_is_a_job_for_each_machine_type() -> None:
    printed = run_script("jobs").stdout
    assert printed.count("\n") == 1, "a workflow's output is one line"
    jobs = json.loads(printed)
    assert {(job["label"], job["machine"], job["image"]) for job in jobs} == {
        (build["label"], machine, image) for build in MATRIX for machine, image in build["images"].items()
    }
    assert {job["machine"]: job["runner"] for job in jobs} == {
        "x86_64": "ubuntu-latest",
        "aarch64": "ubuntu-24.04-arm",
    }


def test_a_release_is_for_these_architectures() -> None:
    """PTX of 10.3 is the newest that also serves 11.0, and serves all that comes later."""
    assert [build["cuda"] for build in MATRIX] == ["12.9", "13.0", "13.2"]
    for build in MATRIX:
        archs = [arch.removesuffix("-real") for arch in build["archs"].split(";")]
        assert archs == ["80", "86", "89", "90a", "100", "103", "120", "121", "103-virtual"]
        assert all(arch.endswith(("-real", "-virtual")) for arch in build["archs"].split(";"))
        assert set(build["images"]) == {"x86_64", "aarch64"}


def test_the_core_leaves_no_device_without_code() -> None:
    for build in MATRIX:
        core = run_script("core", build["label"]).stdout.strip().split(";")
        lost = set(build["archs"].split(";")) - set(core)
        assert lost == {"103-real", "121-real"}
        assert all(
            any(arch_covers(arch, capability_of(gone)) and "virtual" not in arch for arch in core) for gone in lost
        )


def test_one_build_goes_to_pypi() -> None:
    assert run_script("pypi").stdout == "cu130\n" and [build["label"] for build in MATRIX if build["pypi"]] == ["cu130"]


def test_an_unknown_cuda_is_refused() -> None:
    result = run_script("archs", "cu118")
    assert result.returncode != 0 and "no build with the label cu118; accepted: cu129, cu130, cu132" in result.stderr


def test_everything_follows_the_list() -> None:
    result = run_script("check")
    assert result.returncode == 0, result.stderr


def test_labels_belong_to_the_cuda_version() -> None:
    for build in MATRIX:
        assert build["label"] == "cu" + build["cuda"].replace(".", "")


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        (".github/cuda-matrix.json", ";121-real", "", "docs/building.md names the architectures"),
        (".github/cuda-matrix.json", ";121-real", "", "docs/building.md does not name the architectures"),
        (
            "README.md",
            "as a release has it",
            "for `80;86;90a`",
            "README.md names the architectures 80;86;90a, which no",
        ),
        (".ci/run", '"$work/release"', '"$work/release" # 80;90a', ".ci/run names the architectures 80;90a itself"),
        (
            ".github/workflows/wheels.yml",
            "LABEL: ",
            "ARCHS: 80;86;90a LABEL: ",
            "wheels.yml names the architectures 80;86",
        ),
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
    assert "scripts/build_wheels.sh" in workflow and "cuda_matrix.py jobs" in workflow
    script = (ROOT / "scripts/build_wheels.sh").read_text()
    assert "cuda_matrix.py archs" in script and 'BROADHEAD_CUDA_ARCHS="$archs"' in script
    assert "cuda_matrix.py check" in (ROOT / "scripts/lint.sh").read_text()
