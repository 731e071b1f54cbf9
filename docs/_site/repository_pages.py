"""Sphinx extension: pages that lie beside the code become pages of the site, and links to them lead there.

The repository keeps some pages outside of ``docs``, where a reader of the code looks for them. Each is copied to
``docs/_repository`` before the site is read. A link to another file of the repository becomes a download.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
COPIES = DOCS / "_repository"
#: Of each page outside of docs its name on the site. README.md says what the front page says.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    "csrc/README.md": "kernel-map.md",
    "csrc/decode/README.md": "decode-kernels.md",
    "packages/README.md": "packages.md",
}
#: Code, whose brackets are no links: fences, then spans.
CODE = re.compile(r"^(```+).*?^\1[ \t]*$|(`+)(?!`).+?(?<!`)\2(?!`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")


def site_path(path: Path) -> Path:
    """Where the site has the file ``path`` of the repository."""
    if path == ROOT / "README.md":
        return DOCS / "index.md"
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
    return COPIES / PAGES[name] if name in PAGES else path


def relinked(text: str, source: Path, page: Path) -> str:
    """``text`` of ``source`` with its links as they are seen from ``page``."""

    def relink(match: re.Match[str]) -> str:
        words, name, anchor = match[1], match[2], match[3] or ""
        if not name or re.match(r"[a-z]+:", name):
            return match[0]
        target = site_path((source.parent / name).resolve())
        if target.is_dir():  # the site has no page for it
            return f"{words} (`{target.relative_to(ROOT).as_posix()}`)"
        return f"[{words}]({Path(os.path.relpath(target, page.parent)).as_posix()}{anchor})"

    pieces, end = [], 0
    for code in CODE.finditer(text):
        pieces += [LINK.sub(relink, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*pieces, LINK.sub(relink, text[end:])])


def copy_pages(app: Sphinx) -> None:
    COPIES.mkdir(exist_ok=True)
    for name, copy in PAGES.items():
        text = relinked((ROOT / name).read_text(encoding="utf-8"), ROOT / name, COPIES / copy)
        if not (COPIES / copy).exists() or (COPIES / copy).read_text(encoding="utf-8") != text:
            (COPIES / copy).write_text(text, encoding="utf-8")


def relink_page(app: Sphinx, name: str, source: list[str]) -> None:
    page = DOCS / f"{name}.md"
    if page.exists() and not page.is_relative_to(COPIES):
        source[0] = relinked(source[0], page, page)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", copy_pages)
    app.connect("source-read", relink_page)
    return {"parallel_read_safe": True}
