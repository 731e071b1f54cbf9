#!/usr/bin/env python3
"""Compiler launcher for nvcc: keeps ptxas's report beside the object and fails the build on spills and lost speed.

``compile_and_check.py [--allow-spills] -- [ccache] nvcc ... -o x.o`` runs the command, writes ``x.o.ptxas.json`` (a
list of ``{function, arch, entry, registers, barriers, stack_frame, spill_stores, spill_loads, static_smem}``) and fails
when a function spills registers or uses local memory, or when ptxas serialises wgmma or ignores setmaxnreg. ptxas must
run with ``-v``; ccache replays its report on a hit.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

ENTRY = re.compile(r"ptxas info\s*: Compiling entry function '(?P<name>[^']+)' for '(?P<arch>[^']+)'")
PROPERTIES = re.compile(r"ptxas info\s*: Function properties for '?(?P<name>[^'\s]+)")
STACK = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
USED = re.compile(r"ptxas info\s*: Used (?P<registers>\d+) registers(?P<rest>.*)")
#: C7508 ("'setmaxnreg' ignored"), C7510 ("wgmma.mma_async instructions are serialized") and their like. They come as
#: information, so that nothing but this would tell.
LOST_SPEED = re.compile(r"ptxas \w+\s*: (?P<text>(\(C75\d\d\)|.*Potential Performance Loss).*)")
#: Lines of ptxas -v that say nothing a reader of the build log needs.
CHATTER = re.compile(r"ptxas info\s*:|\d+ bytes stack frame")


def parse_report(text: str) -> list[dict]:
    """The functions that ptxas reports, in its order."""
    functions: list[dict] = []
    entry, arch = None, ""
    for line in text.splitlines():
        if match := ENTRY.search(line):
            entry, arch = match["name"], match["arch"]
        elif match := PROPERTIES.search(line):
            functions.append({"function": match["name"], "arch": arch, "entry": match["name"] == entry})
        elif functions and (match := STACK.search(line)):
            functions[-1] |= {
                "stack_frame": int(match["stack"]),
                "spill_stores": int(match["stores"]),
                "spill_loads": int(match["loads"]),
            }
        elif functions and (match := USED.search(line)):
            rest = match["rest"]
            barriers = re.search(r"used (\d+) barriers", rest)
            smem = re.search(r"(\d+) bytes smem", rest)
            functions[-1] |= {
                "registers": int(match["registers"]),
                "barriers": int(barriers[1]) if barriers else 0,
                "static_smem": int(smem[1]) if smem else 0,
            }
    return functions


def complaints(functions: list[dict]) -> list[str]:
    return [
        f"{f['function']} for {f['arch']}: {f['spill_stores']} bytes of spill stores, {f['spill_loads']} bytes of "
        f"spill loads, {f['stack_frame']} bytes of local memory (at {f.get('registers', '?')} registers)"
        for f in functions
        if f.get("spill_stores") or f.get("spill_loads") or f.get("stack_frame")
    ]


def lost_speed(text: str) -> list[str]:
    """What ptxas says about instructions that it could not compile as they were meant, each once."""
    return list(dict.fromkeys(match["text"].strip() for match in LOST_SPEED.finditer(text)))


def main() -> int:
    split = sys.argv.index("--")
    allow_spills = "--allow-spills" in sys.argv[1:split]
    command = sys.argv[split + 1 :]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    report = result.stdout + result.stderr
    for text, stream in ((result.stdout, sys.stdout), (result.stderr, sys.stderr)):
        stream.writelines(line for line in text.splitlines(keepends=True) if not CHATTER.search(line))
    if result.returncode != 0 or "-o" not in command or "-c" not in command:
        return result.returncode
    target = command[command.index("-o") + 1]
    functions = parse_report(report)
    with open(f"{target}.ptxas.json", "w", encoding="utf-8") as out:
        json.dump(functions, out, indent=1)
    found = complaints(functions) + lost_speed(report)
    for complaint in found:
        print(f"{target}: {complaint}", file=sys.stderr)
    if found and not allow_spills:
        # Ninja takes an object that is there for done.
        os.unlink(target)
        print(
            "a kernel must not spill or lose speed so (-DBROADHEAD_ALLOW_SPILLS=ON goes on regardless)", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
