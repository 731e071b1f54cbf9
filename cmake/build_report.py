#!/usr/bin/env python3
"""Gathers the ptxas reports of a library's objects into one JSON file beside the library.

The file is a list of ``{source, function, arch, entry, registers, barriers, stack_frame, spill_stores, spill_loads,
static_smem}``; ``source`` is the name of the .cu without its suffix.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description="Gathers ptxas reports.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("objects", type=Path, nargs="+")
    options = parser.parse_args()
    functions = []
    for path in options.objects:
        report = path.with_name(path.name + ".ptxas.json")
        source = path.name.split(".")[0]
        functions += [{"source": source, **function} for function in json.loads(report.read_text(encoding="utf-8"))]
    options.out.write_text(json.dumps(functions, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
