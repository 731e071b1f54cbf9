"""scripts/pin_images.sh writes the digests that the registry answers, and finds images without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLD = "sha256:" + "0" * 64
IMAGES = ["pytorch/one:cuda1.0", f"pytorch/two:cuda2.0@{OLD}"]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A tree with a list of two images, of which one has a digest, and a docker that knows the digest of each."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/pin_images.sh", tmp_path / "scripts")
    (tmp_path / ".github").mkdir()
    (tmp_path / ".github/cuda-matrix.json").write_text(json.dumps([{"images": dict(zip("ab", IMAGES))}]))
    docker = tmp_path / "bin/docker"
    docker.parent.mkdir()
    docker.write_text('#!/bin/sh\necho "$*" >>"$LOG"\necho "${ANSWER:-sha256:$(printf %064d 7)}"\n')
    docker.chmod(0o755)
    return tmp_path


def run(copy: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    path = f"{copy / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = [str(copy / "scripts/pin_images.sh"), *arguments]
    env = {**os.environ, "PATH": path, "LOG": str(copy / "log"), **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True)


def images(copy: Path) -> list[str]:
    ((build),) = json.loads((copy / ".github/cuda-matrix.json").read_text())
    return list(build["images"].values())


def test_images_without_a_digest_get_one(copy: Path) -> None:
    result = run(copy, "--check")
    assert (
        result.returncode == 1 and "pytorch/one:cuda1.0 has no digest" in result.stderr and "two" not in result.stderr
    )
    assert run(copy).returncode == 0
    assert images(copy) == [f"pytorch/one:cuda1.0@sha256:{7:064d}", IMAGES[1]]
    assert "two" not in (copy / "log").read_text()
    assert run(copy, "--check").returncode == 0


def test_an_update_asks_for_all_of_them_by_their_tags(copy: Path) -> None:
    assert run(copy, "--update").returncode == 0
    assert images(copy) == [f"pytorch/{name}@sha256:{7:064d}" for name in ("one:cuda1.0", "two:cuda2.0")]
    assert OLD not in (copy / "log").read_text()


def test_an_answer_that_is_no_digest_is_not_written(copy: Path) -> None:
    result = run(copy, ANSWER="not found")
    assert result.returncode == 1 and 'answers "not found" for pytorch/one' in result.stderr
    assert images(copy) == IMAGES


def test_the_list_is_what_the_script_reads() -> None:
    """Every image of the release is found by it, and has the CUDA version and machine type of its job in its name."""
    for build in json.loads((ROOT / ".github/cuda-matrix.json").read_text()):
        for machine, image in build["images"].items():
            name, _, tag = image.partition("@")[0].partition(":")
            assert name == f"pytorch/manylinux{'2_28' if machine == 'x86_64' else 'aarch64'}-builder"
            assert tag.partition("-")[0] == f"cuda{build['cuda']}"
