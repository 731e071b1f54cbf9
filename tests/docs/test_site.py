"""The site takes in the pages beside the code, with links that hold there, and CI builds it strictly."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import without_code

from scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
repository_pages = load_script("docs/_site/repository_pages.py")


@pytest.mark.parametrize(
    ("link", "seen"),
    [
        ("[a](../CONTRIBUTING.md#wheels)", "[a](_repository/contributing.md#wheels)"),
        ("[a](../README.md)", "[a](index.md)"),
        ("[a](masks.md#prefix) [b](#here)", "[a](masks.md#prefix) [b](#here)"),
        ("[a](https://example.org/x.md)", "[a](https://example.org/x.md)"),
        ("[a](../benchmarks/results/h200-host.json)", "[a](../benchmarks/results/h200-host.json)"),
        ("![a](images/prefill.svg)", "![a](images/prefill.svg)"),
        ("[a](../benchmarks/results)", "a (`benchmarks/results`)"),
        ("`[a](../CONTRIBUTING.md)`", "`[a](../CONTRIBUTING.md)`"),
        ("```text\n[a](../CONTRIBUTING.md)\n```\n", "```text\n[a](../CONTRIBUTING.md)\n```\n"),
    ],
)
def test_links_are_seen_from_the_site(link: str, seen: str) -> None:
    page = DOCS / "page.md"
    assert repository_pages.relinked(link, page, page) == seen


def test_links_of_a_page_beside_the_code_are_seen_from_its_copy() -> None:
    source, copy = ROOT / "csrc/README.md", DOCS / "_repository/kernel-map.md"
    text = "[a](decode/README.md) [b](../docs/glossary.md#x) [c](host/params.h)"
    expected = "[a](decode-kernels.md) [b](../glossary.md#x) [c](../../csrc/host/params.h)"
    assert repository_pages.relinked(text, source, copy) == expected


def test_every_page_that_is_linked_to_is_on_the_site() -> None:
    """A page of the repository that is not taken in would be a link to nowhere."""
    sources = [*(ROOT / name for name in repository_pages.PAGES)]
    sources += [path for path in DOCS.rglob("*.md") if "_repository" not in path.parts]
    for source in sources:
        for target in re.findall(r"\]\(([^)\s#]+\.md)", without_code(source.read_text(encoding="utf-8"))):
            path = repository_pages.site_path((source.parent / target).resolve())
            assert path.is_relative_to(DOCS), (
                f"{source} links to {target}, which {repository_pages.__file__} leaves out"
            )


def test_pages_that_are_taken_in_stand_in_the_bar_at_the_side() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    for copy in repository_pages.PAGES.values():
        assert f"\n_repository/{copy.removesuffix('.md')}\n" in index


@pytest.mark.parametrize("name", [".ci/run", ".github/workflows/docs.yml", "CONTRIBUTING.md"])
def test_the_site_is_built_strictly(name: str) -> None:
    """A warning of Sphinx, such as a link or an anchor that leads nowhere, is an error."""
    builds = [line for line in (ROOT / name).read_text().splitlines() if "sphinx-build" in line and " -b html " in line]
    assert builds and all(" -W " in line for line in builds)
