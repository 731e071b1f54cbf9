"""CI runs the tests on the oldest torch that the package asks for: the newest alone hides what only newer ones know."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CI = (ROOT / ".ci/run").read_text().splitlines()


def oldest() -> str:
    """The lower bound of the dependency, such as 2.6."""
    (version,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    return version


def test_ci_reads_the_version_of_the_package() -> None:
    (line,) = [line for line in CI if line.startswith("oldest=")]
    command = ["bash", "-c", f'{line}\necho "$oldest"']
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == oldest() + "\n"


def test_ci_runs_all_cpu_tests_on_it() -> None:
    (install,) = [i for i, line in enumerate(CI) if '"torch==$oldest.*"' in line]
    tests = [line for line in CI[install + 1 :] if '"$work/oldest/bin/pytest"' in line]
    assert len(tests) == 1 and '-m "not gpu"' in tests[0], "after the installation, once"
    arguments = tests[0].split('"not gpu"')[1].split()
    assert arguments == ["-n", '"$(nproc)"', "-q"], "no test, no folder is picked or left out"


def test_the_workflow_has_it_too() -> None:
    workflow = (ROOT / ".github/workflows/build-and-test.yml").read_text()
    assert re.findall(r"torch: torch==(\S+)\.\*", workflow) == [oldest()]
