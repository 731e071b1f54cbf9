#!/usr/bin/env python3
"""Reads the release builds of .github/cuda-matrix.json, the one list of CUDA versions and architectures.

``cuda_matrix.py archs 13.0`` prints the architectures of that build for BROADHEAD_CUDA_ARCHS, ``label 13.0`` its
version label, ``json`` all builds on one line. ``check`` fails when the documents name other architectures than the
release has, or when a workflow or a script names any.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MATRIX = ROOT / ".github/cuda-matrix.json"
#: Which documents must name the architectures of the release, as "80;86;90a".
DOCUMENTS = ("CONTRIBUTING.md", "README.md")
#: What must take them from here instead of naming any.
AUTOMATION = (".ci/run", ".github/workflows/*.yml", "scripts/build_wheels.sh")
#: Two architectures or more: "80;90a", "80-real;86-real".
ARCH_LIST = re.compile(r"(?<![\w;])\d{2,3}[af]?(?:-real)?(?:;\d{2,3}[af]?(?:-real)?)+(?![\w;])")
#: What examples build for: a list that is meant to be short.
EXAMPLE = "80;90a"


def builds() -> list[dict[str, str]]:
    """The builds of a release: each has cuda, label, image and archs."""
    return json.loads(MATRIX.read_text(encoding="utf-8"))


def build_for(cuda: str) -> dict[str, str]:
    """The build of one CUDA version ("13.0")."""
    for build in builds():
        if build["cuda"] == cuda:
            return build
    known = ", ".join(build["cuda"] for build in builds())
    raise SystemExit(f"cuda_matrix.py: {MATRIX.name} has no build for CUDA {cuda}; accepted: {known}")


def plain(archs: str) -> str:
    """The architectures without "-real", as the documents name them."""
    return archs.replace("-real", "")


def drift(root: Path = ROOT) -> list[str]:
    """Where the architectures differ from those of the release."""
    released = {plain(build["archs"]) for build in builds()}
    problems = []
    for name in DOCUMENTS:
        found = {plain(text) for text in ARCH_LIST.findall((root / name).read_text(encoding="utf-8"))} - {EXAMPLE}
        problems += [
            f"{name} names the architectures {text}, which no release has" for text in sorted(found - released)
        ]
        problems += [f"{name} does not name the architectures {text}" for text in sorted(released - found)]
    for pattern in AUTOMATION:
        for path in sorted(root.glob(pattern)):
            for text in ARCH_LIST.findall(path.read_text(encoding="utf-8")):
                problems.append(f"{path.relative_to(root)} names the architectures {text} itself")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description="The CUDA builds of a release.")
    commands = parser.add_subparsers(dest="command", required=True)
    for field in ("archs", "label", "image"):
        command = commands.add_parser(field, help=f"the {field} of one build")
        command.add_argument("cuda", help="its CUDA version, for example 13.0")
    commands.add_parser("json", help="all builds, for a workflow's matrix")
    commands.add_parser("check", help="do documents and automation follow the list?")
    options = parser.parse_args()
    if options.command == "json":
        print(json.dumps(builds(), separators=(",", ":")))
    elif options.command == "check":
        problems = drift()
        for problem in problems:
            print(f"cuda_matrix.py: {problem}; {MATRIX.name} is the list", file=sys.stderr)
        return 1 if problems else 0
    else:
        print(build_for(options.cuda)[options.command])
    return 0


if __name__ == "__main__":
    sys.exit(main())
