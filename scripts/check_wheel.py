#!/usr/bin/env python3
"""Checks built wheels: size, and that no shared object links CUDA's driver or run-time, torch or Python.

``check_wheel.py WHEEL...`` exits with 1 and says why when a wheel is not fit to ship. Needs ``readelf``.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

#: PyPI's limit for one file.
MAX_BYTES = 100 * 1000 * 1000
FORBIDDEN = re.compile(r"lib(cuda|cudart|nvrtc|cublas|torch\w*|c10\w*|python[\d.]*)\.so")


def needed(path: Path) -> list[str]:
    """The shared libraries that `path` asks the loader for."""
    result = subprocess.run(["readelf", "--dynamic", str(path)], capture_output=True, text=True, check=True)
    return re.findall(r"\(NEEDED\).*\[(.+)\]", result.stdout)


def check(wheel: Path) -> list[str]:
    """What is wrong with `wheel`."""
    problems = []
    if wheel.stat().st_size > MAX_BYTES:
        problems.append(f"{wheel.stat().st_size} bytes, more than {MAX_BYTES}")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as directory:
        objects = [name for name in archive.namelist() if name.endswith(".so")]
        if not any(Path(name).name.startswith("_C.") for name in objects):
            problems.append("holds no broadhead/_C module")
        for name in objects:
            found = [library for library in needed(Path(archive.extract(name, directory))) if FORBIDDEN.match(library)]
            if found:
                problems.append(f"{name} links {', '.join(found)}")
    return problems


def main() -> int:
    status = 0
    for wheel in map(Path, sys.argv[1:]):
        problems = check(wheel)
        status |= bool(problems)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB: {'; '.join(problems) or 'fit to ship'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
