#!/usr/bin/env python3
"""Says whether two builds have the same machine code, whatever their functions and source files are called.

``compare_sass.py OLD NEW`` takes two files (cubins, fatbins, objects, libraries) or two folders. It disassembles
both with ``cuobjdump -sass`` and compares instructions and encodings function by function, for each architecture by
itself. Functions are matched by their names without namespaces; those that are left, by their code. The exit status is
0 when every function has its equal, 1 when one differs or stands on one side only, 2 when nothing could be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

ARCH = re.compile(r"\s+code for (sm_\w+)")
FUNCTION = re.compile(r"\s+Function : (\S+)")
#: A line of code: the address of an instruction, which a second line of encoding lacks; its text; its encoding.
CODE = re.compile(r"\s+(?:/\*[0-9a-f]{4,}\*/\s+(?P<text>.*?;))?\s*/\* (?P<encoding>0x[0-9a-f]{16}) \*/")
#: Kernel parameters lie in constant bank 0, behind what the driver keeps there.
PARAMETER = re.compile(r"c\[0x0\]\[[^]]*\]")
#: What a demangled name may begin with, or hold in its template arguments.
NAMESPACE = re.compile(r"(?:\(anonymous namespace\)|\b[A-Za-z_]\w*)::")
#: An unnamed namespace of a CUDA source, whose name has a hash of the file's path in it.
UNNAMED = re.compile(r"_GLOBAL__N__\w+|_INTERNAL_\w+?_cu_\w+")
SUFFIXES = ({".cubin", ".fatbin", ".o"}, {".so"})


class Code(NamedTuple):
    """One function: a digest of its code, and its length."""

    digest: str
    instructions: int


#: (architecture, name) -> every function of that name, as often as it was found.
Functions = dict[tuple[str, str], Counter[Code]]


def search_path() -> str:
    """PATH behind the places where a wheel or a toolkit keeps cuobjdump, nvdisasm and cu++filt."""
    folders: list[Path] = []
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        folders += sorted(Path(root).glob("cu*/bin"), reverse=True)
    folders += [Path(root) / "bin" for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root]
    return os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])


def give_up(reason: str) -> NoReturn:
    print(f"compare_sass.py: {reason}", file=sys.stderr)
    raise SystemExit(2)


def listing(path: Path, tools: str) -> Iterator[str]:
    """The lines of ``cuobjdump -sass``; none for a file without device code."""
    program = shutil.which("cuobjdump", path=tools)
    if program is None:
        give_up('cuobjdump is missing: pip install ".[test]" brings it')
    command = [program, "-sass", str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, "PATH": tools}) as process:
        assert process.stdout is not None and process.stderr is not None
        yield from process.stdout
        errors = process.stderr.read()
    if process.returncode and "does not contain device code" not in errors:
        give_up(f"cuobjdump {path}: {errors.strip()}")


def read_functions(lines: Iterable[str], archs: set[str], any_offset: bool) -> Iterator[tuple[str, str, Code]]:
    """(architecture, mangled name, code) of every function in a listing."""
    arch = name = ""
    digest = hashlib.sha256()
    instructions = 0
    for line in lines:
        if match := ARCH.match(line) or FUNCTION.match(line):
            if name:
                yield arch, name, Code(digest.hexdigest(), instructions)
            name = ""
            if match.re is ARCH:
                arch = match[1]
            elif not archs or arch in archs:
                name = match[1]
                digest = hashlib.sha256()
                instructions = 0
        elif name and (match := CODE.match(line)):
            text = match["text"] or ""
            instructions += bool(text)
            # The offset of a parameter is part of the encoding, so it can not be left out of the one alone.
            digest.update((PARAMETER.sub("c[0x0][]", text) if any_offset else text + match["encoding"]).encode())
    if name:
        yield arch, name, Code(digest.hexdigest(), instructions)


def plain_names(names: Iterable[str], tools: str) -> dict[str, str]:
    """Mangled names -> what they mean, without namespaces. The names themselves where nothing can demangle them."""
    names = sorted(set(names))
    program = shutil.which("cu++filt", path=tools) or shutil.which("c++filt", path=tools)
    if program is None:
        return {name: name for name in names}
    text = "\n".join(names)
    result = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
    demangled = result.stdout.splitlines()
    return {name: NAMESPACE.sub("", UNNAMED.sub("", plain)) for name, plain in zip(names, demangled, strict=True)}


def files_of(path: Path) -> list[Path]:
    """A file, or the objects below a folder; where there are none its libraries."""
    if not path.is_dir():
        return [path]
    found: list[Path] = []
    for suffixes in SUFFIXES:
        found = found or sorted(file for file in path.rglob("*") if file.suffix in suffixes)
    return found


def read_build(path: Path, archs: set[str], any_offset: bool) -> Functions:
    tools = search_path()
    found = [code for file in files_of(path) for code in read_functions(listing(file, tools), archs, any_offset)]
    plain = plain_names((name for _, name, _ in found), tools)
    functions: Functions = defaultdict(Counter)
    for arch, name, code in found:
        functions[arch, plain[name]][code] += 1
    return functions


def leave_out_renamed(old: Functions, new: Functions) -> int:
    """Drops from both sides what has an equal of another name; their number."""
    by_code = defaultdict(list)
    for key, codes in new.items():
        for code in codes:
            by_code[key[0], code].append(key)
    renamed = 0
    for key, codes in old.items():
        for code in list(codes):
            for other in by_code[key[0], code]:
                common = min(codes[code], new[other][code])
                codes[code] -= common
                new[other][code] -= common
                renamed += common
    return renamed


def total(functions: Functions) -> int:
    return sum(codes.total() for codes in functions.values())


def compare(old: Functions, new: Functions) -> int:
    """Prints what differs and a summary for each architecture; returns the exit status."""
    if not old or not new:
        print(f"compare_sass.py: no functions in the {'old' if not old else 'new'} build", file=sys.stderr)
        return 2
    archs = sorted({arch for arch, _ in (*old, *new)})
    counts = {arch: (sum(c.total() for (a, _), c in old.items() if a == arch)) for arch in archs}
    rest_old = {key: codes - new.get(key, Counter()) for key, codes in old.items()}
    rest_new = {key: codes - old.get(key, Counter()) for key, codes in new.items()}
    same = total(old) - total(rest_old)
    renamed = leave_out_renamed(rest_old, rest_new)
    different = 0
    for arch, name in sorted({*rest_old, *rest_new}):
        before, after = (
            sorted(code.instructions for code in rest.get((arch, name), Counter()).elements())
            for rest in (rest_old, rest_new)
        )
        if not before and not after:
            continue
        different += max(len(before), len(after))
        where = "differs" if before and after else "only in the old build" if before else "only in the new build"
        print(f"{arch} {name}: {where}; instructions {before or '-'} and {after or '-'}")
    found = ", ".join(f"{arch} {count}" for arch, count in counts.items())
    print(f"functions of the old build: {found}. Identical: {same}, identical under another name: {renamed}, ", end="")
    print(f"different or on one side only: {different}")
    return 1 if different else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares the machine code of two builds.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--archs", default="", help='only these, e.g. "sm_80,sm_90a"')
    parser.add_argument(
        "--any-parameter-offset", action="store_true", help="let parameters lie anywhere; encodings are not compared"
    )
    options = parser.parse_args()
    for path in (options.old, options.new):
        if not path.exists():
            parser.error(f"{path} does not exist")
    archs = {arch for arch in options.archs.split(",") if arch}
    old, new = (read_build(path, archs, options.any_parameter_offset) for path in (options.old, options.new))
    return compare(old, new)


if __name__ == "__main__":
    sys.exit(main())
