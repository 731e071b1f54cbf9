#!/usr/bin/env python3
"""What a release must agree on: tag, version, changelog and the set of wheels.

``release.py check v0.2.0`` fails unless the tag is the version of pyproject.toml and CITATION.cff, where there is one,
and CHANGELOG.md has a dated section with text for it. ``notes v0.2.0`` prints that section. ``complete v0.2.0 DIR``
fails unless DIR holds every wheel of the release and nothing else. ``nightly 20261130`` makes the version one of that
day, before the next release.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import cuda_matrix

ROOT = cuda_matrix.ROOT
#: The Pythons that wheels are built for. 3.14t is none: the module's caches are guarded by the GIL.
PYTHONS = ("310", "311", "312", "313", "314")
VERSION_LINE = re.compile(r'^version = "(?P<version>.+)"$', re.MULTILINE)


def source_version(root: Path) -> str:
    """The version in pyproject.toml."""
    (version,) = VERSION_LINE.findall((root / "pyproject.toml").read_text(encoding="utf-8"))
    return version


def section(root: Path, version: str) -> str | None:
    """The text below the dated heading of a version in CHANGELOG.md; None: there is no such heading."""
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", text, re.MULTILINE)
    if heading is None:
        return None
    return re.split(r"^(?:## |\[[^\]]+\]: )", text[heading.end() :], maxsplit=1, flags=re.MULTILINE)[0].strip()


def tag_problems(root: Path, tag: str) -> list[str]:
    """Why a tag can not be released."""
    if not re.fullmatch(r"v\d+\.\d+\.\d+", tag):
        return [f"the tag {tag} is not of the form v1.2.3"]
    version = tag.removeprefix("v")
    problems = []
    if (found := source_version(root)) != version:
        problems.append(f"the tag is {tag}, pyproject.toml has the version {found}")
    citation = root / "CITATION.cff"
    if citation.exists():
        cited = re.findall(r'^version: "?([^"\s]+)"?$', citation.read_text(encoding="utf-8"), re.MULTILINE)
        if cited != [version]:
            problems.append(f"the tag is {tag}, CITATION.cff has the version {', '.join(cited) or 'none'}")
    text = section(root, version)
    if text is None:
        problems.append(f"CHANGELOG.md has no heading '## [{version}] - YYYY-MM-DD'")
    elif not text:
        problems.append(f"CHANGELOG.md says nothing below the heading of {version}")
    return problems


def expected_files(version: str) -> set[str]:
    """What a release holds, wheels as (name up to the platform, machine type)."""
    files = {f"broadhead-{version}.tar.gz"}
    for build in cuda_matrix.builds():
        labels = [f"+{build['label']}", *([""] if build["pypi"] else [])]
        for label in labels:
            for machine in build["images"]:
                files |= {f"broadhead-{version}{label}-cp{python}-cp{python}-{machine}.whl" for python in PYTHONS}
    return files


def set_problems(version: str, names: list[str]) -> list[str]:
    """What lacks in the files of a release, and what is no part of it. Which manylinux a wheel has is not looked at."""
    found = [re.sub(r"-manylinux\S*?_(x86_64|aarch64)\.whl$", r"-\1.whl", name) for name in names]
    expected = expected_files(version)
    return [
        *(f"{name} is missing" for name in sorted(expected - set(found))),
        *(f"{name} is no part of the release" for name in sorted(set(found) - expected)),
        *(f"{name} is there twice" for name in sorted({name for name in found if found.count(name) > 1})),
    ]


def nightly_version(root: Path, date: str) -> str:
    """A version of `date` (20261130) that comes before the next release and after the last."""
    if not re.fullmatch(r"\d{8}", date):
        raise SystemExit(f"release.py: {date} is no date such as 20261130")
    version = source_version(root)
    if section(root, version) is not None:  # released: the next one is at least a patch later
        major, minor, patch = version.split(".")
        version = f"{major}.{minor}.{int(patch) + 1}"
    return f"{version}.dev{date}"


def fail(problems: list[str]) -> int:
    for problem in problems:
        print(f"release.py: {problem}", file=sys.stderr)
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="What a release must agree on.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the source tree")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("check", "may the tag be released?"),
        ("notes", "print its section of the changelog"),
        ("complete", "are all files of the release there?"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("tag", help="for example v0.2.0")
        if name == "complete":
            command.add_argument("folder", type=Path)
    commands.add_parser("nightly", help="make the version one of a day").add_argument("date", help="such as 20261130")
    options = parser.parse_args()
    if options.command == "check":
        return fail(tag_problems(options.root, options.tag))
    if options.command == "notes":
        text = section(options.root, options.tag.removeprefix("v"))
        if text is None:
            return fail([f"CHANGELOG.md has no section for {options.tag}"])
        print(text)
    elif options.command == "complete":
        names = sorted(path.name for path in options.folder.iterdir())
        return fail(set_problems(options.tag.removeprefix("v"), names))
    else:
        version = nightly_version(options.root, options.date)
        path = options.root / "pyproject.toml"
        text = path.read_text(encoding="utf-8")
        path.write_text(VERSION_LINE.sub(f'version = "{version}"', text), encoding="utf-8")
        print(version)
    return 0


if __name__ == "__main__":
    sys.exit(main())
