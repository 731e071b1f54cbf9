#!/usr/bin/env python3
"""Reads the builds of a release, .github/cuda-matrix.json: the one list of CUDA versions, architectures and images.

``cuda_matrix.py archs cu130`` prints the architectures of that build for BROADHEAD_CUDA_ARCHS, ``core cu130`` those
without the ones that run the code of another, ``cuda cu130`` its CUDA version, ``jobs`` a job for each build and
machine type on one line. ``check`` fails when the documents name other architectures than the release has, or when a
workflow or a script names any.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MATRIX = ROOT / ".github/cuda-matrix.json"
#: Which documents must name the architectures of the release, as "80;86;90a".
DOCUMENTS = ("docs/building.md",)
#: Which may name none but those of a release and the example.
PAGES = ("CONTRIBUTING.md", "README.md", *DOCUMENTS)
#: What must take them from here instead of naming any.
AUTOMATION = (".ci/run", ".github/workflows/*.yml", "scripts/build_wheels.sh")
#: Two architectures or more: "80;90a", "80-real;86-real;103-virtual".
ARCH = r"\d{2,3}[af]?(?:-real|-virtual)?"
ARCH_LIST = re.compile(rf"(?<![\w;]){ARCH}(?:;{ARCH})+(?![\w;])")
#: What examples build for: a list that is meant to be short.
EXAMPLE = "80;90a"
#: Devices of 10.3 and 12.1 run the machine code for 10.0 and 12.0: only releases compile for them.
COVERED = ("103-real", "121-real")
#: The hosted runner of each machine type.
RUNNERS = {"x86_64": "ubuntu-latest", "aarch64": "ubuntu-24.04-arm"}


def builds() -> list[dict[str, Any]]:
    """The builds of a release: each has cuda, label, archs, images by machine type, and whether it goes to PyPI."""
    found: list[dict[str, Any]] = json.loads(MATRIX.read_text(encoding="utf-8"))
    return found


def build_for(label: str) -> dict[str, Any]:
    """The build of one label ("cu130")."""
    for build in builds():
        if build["label"] == label:
            return build
    known = ", ".join(build["label"] for build in builds())
    raise SystemExit(f"cuda_matrix.py: {MATRIX.name} has no build with the label {label}; accepted: {known}")


def pypi_build() -> dict[str, Any]:
    """The build whose wheels go to PyPI, where no label is accepted."""
    (build,) = (build for build in builds() if build["pypi"])
    return build


def core(archs: str) -> str:
    """The architectures without those that run the code of another."""
    return ";".join(arch for arch in archs.split(";") if arch not in COVERED)


def jobs() -> list[dict[str, str]]:
    """A job for each build and machine type."""
    return [
        {"label": build["label"], "machine": machine, "image": image, "runner": RUNNERS[machine]}
        for build in builds()
        for machine, image in build["images"].items()
    ]


def plain(archs: str) -> str:
    """The architectures without "-real", as the documents name them."""
    return archs.replace("-real", "")


def drift(root: Path = ROOT) -> list[str]:
    """Where the architectures differ from those of the release."""
    released = {plain(build["archs"]) for build in builds()}
    problems = []
    for name in PAGES:
        found = {plain(text) for text in ARCH_LIST.findall((root / name).read_text(encoding="utf-8"))} - {EXAMPLE}
        problems += [
            f"{name} names the architectures {text}, which no release has" for text in sorted(found - released)
        ]
        lacking = sorted(released - found) if name in DOCUMENTS else []
        problems += [f"{name} does not name the architectures {text}" for text in lacking]
    for pattern in AUTOMATION:
        for path in sorted(root.glob(pattern)):
            for text in ARCH_LIST.findall(path.read_text(encoding="utf-8")):
                problems.append(f"{path.relative_to(root)} names the architectures {text} itself")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description="The CUDA builds of a release.")
    commands = parser.add_subparsers(dest="command", required=True)
    for field in ("archs", "core", "cuda"):
        command = commands.add_parser(field, help=f"the {field} of one build")
        command.add_argument("label", help="its label, for example cu130")
    commands.add_parser("jobs", help="a job for each build and machine type, for a workflow's matrix")
    commands.add_parser("pypi", help="the label of the build that goes to PyPI")
    commands.add_parser("check", help="do documents and automation follow the list?")
    options = parser.parse_args()
    if options.command == "jobs":
        print(json.dumps(jobs(), separators=(",", ":")))
    elif options.command == "pypi":
        print(pypi_build()["label"])
    elif options.command == "check":
        problems = drift()
        for problem in problems:
            print(f"cuda_matrix.py: {problem}; {MATRIX.name} is the list", file=sys.stderr)
        return 1 if problems else 0
    else:
        build = build_for(options.label)
        print(core(build["archs"]) if options.command == "core" else build[options.command])
    return 0


if __name__ == "__main__":
    sys.exit(main())
