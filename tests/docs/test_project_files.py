"""The files about the project agree with each other: versions, and what a report asks for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_versions_agree() -> None:
    """pyproject.toml, the citation, and the newest version of the changelog with its date."""
    (version,) = re.findall(r'^version = "(.+)"$', text("pyproject.toml"), re.MULTILINE)
    released = re.findall(r"^## \[(\d[^\]]*)\](?: - (\S+))?$", text("CHANGELOG.md"), re.MULTILINE)
    assert released[0][0] == version
    (cited,) = re.findall(r"^version: (.+)$", text("CITATION.cff"), re.MULTILINE)
    (date,) = re.findall(r"^date-released: (.+)$", text("CITATION.cff"), re.MULTILINE)
    assert (cited, date) == released[0]


def test_the_changelog_has_sections_of_known_kinds() -> None:
    kinds = set(re.findall(r"^### (.+)$", text("CHANGELOG.md"), re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert "## [Unreleased]\n" in text("CHANGELOG.md"), "changes to come have no place"


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_every_form_asks_for_the_installation(form: Path) -> None:
    """And does not take a report without it."""
    fields = form.read_text(encoding="utf-8").split("  - type: ")
    (field,) = (field for field in fields if "label: Output of `broadhead info`" in field)
    assert "required: true" in field


def test_no_report_goes_around_the_forms() -> None:
    assert len(FORMS) >= 3 and "blank_issues_enabled: false" in text(".github/ISSUE_TEMPLATE/config.yml")
