#!/usr/bin/env python3
"""Writes a package index of static files (PEP 503 pages, PEP 691 JSON) with one index for each version label.

``make_index.py OUT FILE...`` copies wheels to OUT/LABEL/broadhead/ beside the pages; those without one go to OUT/pypi.
``make_index.py OUT --releases FILE.json`` links the wheels of GitHub releases where they lie; the file is what
``gh api --paginate --slurp repos/OWNER/NAME/releases`` prints. ``--prereleases`` takes the wheels of pre-releases, else
those of releases. pip takes an index by ``--index-url .../LABEL``, which may be a ``file://`` folder.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import re
import shutil
import sys
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "broadhead"
WHEEL = re.compile(rf"{PROJECT}-(?P<version>[^-+]+)(\+(?P<label>[^-]+))?(-[^-]+){{3}}\.whl")
#: The version of the protocol that pages and JSON follow (PEP 629).
API_VERSION = "1.0"
#: Where wheels without a label are found.
NO_LABEL = "pypi"


class File(NamedTuple):
    """One wheel of an index."""

    name: str
    url: str  # relative to the project's page, or absolute
    sha256: str
    metadata_sha256: str  # of the METADATA beside the wheel; empty: none lies there
    size: int

    @property
    def version(self) -> str:
        match = WHEEL.fullmatch(self.name)
        assert match is not None
        label = f"+{match['label']}" if match["label"] else ""
        return match["version"] + label


def requires_python() -> str:
    """What pip compares with its own Python before it downloads."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'^requires-python = "(.+)"$', text, re.MULTILINE)[0]


def label_of(name: str) -> str:
    """The index that a wheel belongs to.

    Raises:
        SystemExit: the name is no wheel's of this project.
    """
    match = WHEEL.fullmatch(name)
    if match is None:
        raise SystemExit(
            f"make_index.py: {name} is no wheel of {PROJECT}: {PROJECT}-VERSION[+LABEL]-PYTHON-ABI-PLATFORM"
        )
    return match["label"] or NO_LABEL


def copy_wheel(path: Path, out: Path) -> tuple[str, File]:
    """Copies a wheel and its METADATA into its index. -> (label, the entry)"""
    label = label_of(path.name)
    folder = out / label / PROJECT
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / path.name)
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        metadata = archive.read(name)
    (folder / f"{path.name}.metadata").write_bytes(metadata)
    digests = hashlib.sha256(path.read_bytes()).hexdigest(), hashlib.sha256(metadata).hexdigest()
    return label, File(path.name, quote(path.name), *digests, path.stat().st_size)


def released_wheels(releases: list[dict[str, Any]], prereleases: bool) -> list[tuple[str, File]]:
    """The wheels of GitHub releases that are no drafts: (label, entry)."""
    found = []
    for release in releases:
        if release["draft"] or release["prerelease"] != prereleases:
            continue
        for asset in release["assets"]:
            if not asset["name"].endswith(".whl"):
                continue
            algorithm, _, digest = (asset.get("digest") or "").partition(":")
            if algorithm != "sha256" or not re.fullmatch("[0-9a-f]{64}", digest):
                raise SystemExit(f"make_index.py: {asset['name']} of {release['tag_name']} has no SHA-256 digest")
            name = unquote(asset["browser_download_url"].rsplit("/", 1)[1])
            found.append((label_of(name), File(name, asset["browser_download_url"], digest, "", asset["size"])))
    return found


def page(title: str, links: list[str]) -> str:
    """A page of PEP 503."""
    body = "\n".join(f"    {link}<br>" for link in links)
    return (
        "<!DOCTYPE html>\n<html>\n  <head>\n"
        f'    <meta charset="utf-8">\n    <meta name="pypi:repository-version" content="{API_VERSION}">\n'
        f"    <title>{html.escape(title)}</title>\n  </head>\n  <body>\n{body}\n  </body>\n</html>\n"
    )


def file_link(file: File, python: str) -> str:
    attributes = f' data-requires-python="{html.escape(python)}"'
    if file.metadata_sha256:
        # The second name is the one of pip before 23.3.
        attributes += f' data-core-metadata="sha256={file.metadata_sha256}"'
        attributes += f' data-dist-info-metadata="sha256={file.metadata_sha256}"'
    return f'<a href="{html.escape(file.url)}#sha256={file.sha256}"{attributes}>{html.escape(file.name)}</a>'


def file_entry(file: File, python: str) -> dict[str, Any]:
    """A file of PEP 691."""
    return {
        "filename": file.name,
        "url": file.url,
        "hashes": {"sha256": file.sha256},
        "requires-python": python,
        "core-metadata": {"sha256": file.metadata_sha256} if file.metadata_sha256 else False,
        "size": file.size,
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps({"meta": {"api-version": API_VERSION}, **value}, indent=1) + "\n", encoding="utf-8")


def write_index(root: Path, files: list[File]) -> None:
    """The pages of one label: its list of projects, which is one, and the project's files."""
    python = requires_python()
    folder = root / PROJECT
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(files, key=lambda file: file.name)
    links = [file_link(file, python) for file in files]
    (folder / "index.html").write_text(page(f"Links for {PROJECT}", links), encoding="utf-8")
    entries = [file_entry(file, python) for file in files]
    versions = sorted({file.version for file in files})
    write_json(folder / "index.json", {"name": PROJECT, "versions": versions, "files": entries})
    (root / "index.html").write_text(page("Simple index", [f'<a href="{PROJECT}/">{PROJECT}</a>']), encoding="utf-8")
    write_json(root / "index.json", {"projects": [{"name": PROJECT}]})


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes a package index of static files.")
    parser.add_argument("out", type=Path, help="the folder of the index")
    parser.add_argument("files", nargs="*", type=Path, help="wheels to copy into it")
    parser.add_argument("--releases", type=Path, help="JSON of GitHub releases, whose wheels are linked")
    parser.add_argument("--prereleases", action="store_true", help="the wheels of pre-releases instead")
    options = parser.parse_args()
    found = [copy_wheel(path, options.out) for path in options.files]
    if options.releases:
        text = options.releases.read_text(encoding="utf-8")
        releases = [release for page in json.loads(text) for release in page]
        found += released_wheels(releases, options.prereleases)
    indexes: dict[str, dict[str, File]] = defaultdict(dict)
    for label, file in found:
        if file.name in indexes[label]:
            raise SystemExit(f"make_index.py: {file.name} is there twice")
        indexes[label][file.name] = file
    for label, files in indexes.items():
        write_index(options.out / label, list(files.values()))
        print(f"{options.out / label}: {len(files)} wheels")
    if not indexes:
        raise SystemExit("make_index.py: there are no wheels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
