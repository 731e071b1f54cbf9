"""Workflows run what they name and may do no more than they need."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

WORKFLOWS = sorted((Path(__file__).resolve().parents[2] / ".github/workflows").glob("*.yml"))
#: What a job may write, by workflow: nothing else.
WRITES = {
    "release.yml": {"id-token", "attestations", "contents", "pages"},
    "nightly.yml": {"id-token", "contents", "pages"},
    "pages.yml": {"id-token", "pages"},
}


def runs(text: str) -> str:
    """What the steps of a workflow run: the value of each key `run`, whose further lines stand deeper than the key."""
    found, column = [], -1
    for line in text.splitlines():
        if match := re.match(r"([ -]*)run: (.*)", line):
            column = len(match[1])
            found.append(match[2])
        elif column >= 0 and len(line) - len(line.lstrip()) > column:
            found.append(line)
        elif line.strip():
            column = -1
    return "\n".join(found)


def test_runs_finds_commands_alone() -> None:
    first = "    - run: a ${{ x }}\n      env:\n        B: c\n"
    steps = first + "    - name: d\n      run: |\n        e\n\n        f\n      env:\n        G: h"
    assert runs(steps).split() == ["a", "${{", "x", "}}", "|", "e", "f"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit_with_their_version(path: Path) -> None:
    for used in re.findall(r"uses: (.+)", path.read_text()):
        assert used.startswith("./.github/workflows/") or re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)+", used), (
            used
        )


def test_one_commit_for_each_action() -> None:
    used = {used for path in WORKFLOWS for used in re.findall(r"uses: ([\w.-]+/.+)", path.read_text())}
    names = [name.partition("@")[0] for name in used]
    assert len(names) == len(set(names)), sorted(used)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_reads_and_jobs_write_what_they_need(path: Path) -> None:
    text = path.read_text()
    assert "\npermissions:\n  contents: read\n" in text
    written = set(re.findall(r"^ {6}([\w-]+): write", text, re.MULTILINE))
    assert written == WRITES.get(path.name, set()) and not re.search(r"^ {0,4}[\w-]+: write", text, re.MULTILINE)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_no_text_of_others_becomes_a_command(path: Path) -> None:
    """Expressions reach scripts by the environment."""
    assert "${{" not in runs(path.read_text())


def test_a_release_checks_and_tries_before_it_publishes() -> None:
    text = (WORKFLOWS[0].parent / "release.yml").read_text()
    needs = dict(re.findall(r"^  (\w+):\n(?:    .*\n)*?    needs: (.+)$", text, re.MULTILINE))
    assert needs == {
        "wheels": "check", "complete": "wheels", "gpu": "complete", "github": "[complete, gpu]",
        "pypi": "[complete, gpu]", "pages": "github",
    }  # fmt: skip
    assert "release.py check" in text and "release.py complete" in text and "pin_images.sh --check" in text
    assert "smoke_test.py --kernel" in text and "smoke_test.py" in (WORKFLOWS[0].parent / "wheels.yml").read_text()
