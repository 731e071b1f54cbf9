#!/usr/bin/env python3
"""Writes what follows from the table of kernels (python/broadhead/support.py) and from the list of arguments.

``generate.py sources --archs "80;90a" --out DIR`` writes, for every kernel family, one .cu per tile shape, the registry
of the kernels that this build holds, and ``instantiations.cmake`` which names the sources and their architectures.
``generate.py arguments --out FILE`` writes the arguments of a call (python/broadhead/call/arguments.py) for the
compiled module. ``generate.py matrix docs/support.md [--check]`` rewrites (or verifies) the support matrix between its
two markers.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MATRIX_BEGIN = "<!-- support matrix: written by cmake/generate.py -->"
MATRIX_END = "<!-- end of support matrix -->"
ELEMENTS = {"bf16": "cutlass::bfloat16_t", "fp16": "cutlass::half_t", "float8_e4m3fn": "cutlass::float_e4m3_t"}
#: The only architectures of families with architecture-specific instructions. Others are portable: 90a is built as 90.
SPECIFIC_ARCHS = {"sm90": ("90a",)}
#: Sources that every library holds besides its rows.
COMMON_SOURCES = tuple(
    f"csrc/kernels/{name}.cu"
    for name in (
        "append_kv",
        "backward_prepare",
        "clear_counter",
        "combine",
        "mask_extents",
        "merge_states",
        "scheduler_metadata",
    )
)


def load_module(path: str) -> ModuleType:
    """A module of the package, without importing the package (which needs torch): its folders stand in for it."""
    *folders, stem = Path(path).with_suffix("").parts
    package, folder = "broadhead_sources", ROOT / "python/broadhead"
    for part in ("", *folders):
        package, folder = f"{package}.{part}".rstrip("."), folder / part
        if package not in sys.modules:
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = [str(folder)]
    spec = importlib.util.spec_from_file_location(f"{package}.{stem}", folder / f"{stem}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_table() -> ModuleType:
    return load_module("support.py")


def arguments_inc() -> str:
    """A line for each argument of a call, for an includer that defines BROADHEAD_ARGUMENT."""
    lines = [
        "// The arguments of a call in their order: constant, name, whether it is a tensor, whether kernels choose by",
        "// the alignment of its address. Written by cmake/generate.py from python/broadhead/call/arguments.py.",
    ]
    for name, argument in load_module("call/arguments.py").ARGUMENTS.items():
        constant = "k" + "".join(part.capitalize() for part in name.split("_"))
        flags = (argument.is_tensor, argument.aligned)
        lines.append(f'BROADHEAD_ARGUMENT({constant}, "{name}", {", ".join(str(flag).lower() for flag in flags)})')
    return "\n".join([*lines, ""])


def family_archs(family: str, archs: list[str]) -> list[str]:
    """The architectures, as nvcc knows them, that a family is compiled for."""
    names = [arch.removesuffix("-real") for arch in archs]
    if family in SPECIFIC_ARCHS:
        names = [name for name in names if name in SPECIFIC_ARCHS[family]]
    else:
        names = [re.sub("[af](?=$|-)", "", name) for name in names]
    return list(dict.fromkeys(names))


def capability_of(arch: str) -> tuple[int, int]:
    return load_module("capabilities.py").capability_of(arch)


def row_archs(row, archs: list[str]) -> list[str]:
    """The architectures to compile a row for: those whose own device class it is meant for; for a capability of the row
    that none of these serves, the closest one that can (code for 80 serves 8.6 in a build without 86), machine code
    rather than PTX; and PTX where the row also runs on capabilities that the table does not know."""
    known = load_module("capabilities.py")
    is_ptx, arch_covers = known.is_ptx, known.arch_covers
    chosen = {arch for arch in archs if (row.portable if is_ptx(arch) else row.runs_on(capability_of(arch)))}
    for capability in row.capabilities:
        if any(arch_covers(arch, capability) for arch in chosen):
            continue
        able = [arch for arch in archs if arch_covers(arch, capability)]
        if able:
            chosen.add(max(able, key=lambda arch: (not is_ptx(arch), capability_of(arch))))
    return [arch for arch in archs if arch in chosen]


class Unit(NamedTuple):
    """One generated .cu: rows that differ in dtype only, so that the C++ front end runs once for both."""

    name: str
    archs: tuple[str, ...]
    rows: tuple


def make_units(support: ModuleType, family: str, archs: list[str], pattern: str) -> list[Unit]:
    names = family_archs(family, archs)
    grouped = defaultdict(list)
    for row in support.ROWS:
        targets = row_archs(row, names)
        if row.family == family and targets and re.search(pattern, row.id):
            grouped[row.name, tuple(targets)].append(row)
    return [Unit(name, targets, tuple(rows)) for (name, targets), rows in grouped.items()]


#: The argument block of a kernel of each direction.
PARAMS = {"forward": "AttnParams", "backward": "AttnBwdParams"}
#: Enumerators of host/params.h.
DATA_TYPES = {"bf16": "kBFloat16", "fp16": "kFloat16", "float8_e4m3fn": "kFloat8E4M3"}


def launcher_of(row) -> str:
    """The C++ signature of a row's launcher: a ForwardLauncher or BackwardLauncher of host/kernel_registry.h."""
    params = PARAMS[row.direction]
    return f"int launch_{row.id}(const {params}& params, cudaStream_t stream, char* error, std::size_t error_size)"


def workspace_of(row) -> str:
    """The C++ signature of what a row says of its scratch: a ForwardWorkspace or BackwardWorkspace."""
    return f"std::int64_t workspace_{row.id}(const {PARAMS[row.direction]}& params)"


def instantiation(unit: Unit) -> str:
    parts = [
        f"// Instantiates {', '.join(row.id for row in unit.rows)}. Written by cmake/generate.py from the table.",
        *(f'#include "{header}"' for header in dict.fromkeys(row.template.header for row in unit.rows)),
        "",
        "namespace broadhead {",
    ]
    for row in unit.rows:
        head_dims = (row.head_dim, row.head_dim_v) if row.template.takes_head_dim_v else (row.head_dim,)
        values = ", ".join(str(value) for value in (*head_dims, *row.tile, row.smem_limit))
        parts += [
            "",
            f"using Traits_{row.id} = {row.template.traits}<{element_of(row)}, {values}>;",
            f"static_assert(sizeof(Traits_{row.id}::SharedStorage) <= {row.smem_limit});",
            f"extern const int shared_memory_{row.id} = sizeof(Traits_{row.id}::SharedStorage);",
            f"{launcher_of(row)} {{",
            f'  return {row.template.launcher}<Traits_{row.id}>("{row.id}", params, stream, error, error_size);',
            "}",
        ]
        parts.append(f"{workspace_of(row)} {{ return {row.template.workspace}<Traits_{row.id}>(params); }}")
    return "\n".join([*parts, "", "}  // namespace broadhead", ""])


def element_of(row) -> str:
    """The C++ type that the traits of a row are made for."""
    return ELEMENTS[(row.kv_dtype or row.dtype) if row.template.of_kv_dtype else row.dtype]


def kernel_info(row) -> str:
    """A row as a KernelInfo of host/params.h."""
    fields = (
        "sizeof(KernelInfo)",
        "kAbiVersion",
        f'"{row.id}"',
        f"Direction::k{row.direction.capitalize()}",
        f"Phase::k{row.phase.capitalize()}",
        *(f"DataType::{DATA_TYPES[dtype]}" for dtype in (row.dtype, row.kv_dtype or row.dtype)),
        *map(str, (row.head_dim, row.head_dim_v, row.tile.tile_m, row.tile.tile_n)),
        f'"{" ".join(row.features)}"',
    )
    return f"{{{', '.join(fields)}}}"


def registry_entry(row) -> str:
    """A row as a RegisteredKernel of host/kernel_registry.h."""
    own, other = f"&launch_{row.id}, &workspace_{row.id}", "nullptr, nullptr"
    functions = f"{own}, {other}" if row.direction == "forward" else f"{other}, {own}"
    return f"    {{{kernel_info(row)}, &shared_memory_{row.id}, {functions}}},"


def registry(units: list[Unit], archs: list[str]) -> str:
    rows = [row for unit in units for row in unit.rows]
    declarations = [
        f"extern const int shared_memory_{row.id};\n{launcher_of(row)};\n{workspace_of(row)};" for row in rows
    ]
    return "\n".join(
        [
            "// The kernels that this library holds. Written by cmake/generate.py from the table.",
            '#include "host/kernel_registry.h"',
            "",
            "namespace broadhead {",
            "",
            *declarations,
            "",
            "const RegisteredKernel kKernels[] = {",
            *(registry_entry(row) for row in rows),
            "    {},",
            "};",
            f"const int kKernelCount = {len(rows)};",
            f'const char* const kBuildArchs = "{";".join(archs)}";',
            "",
            "}  // namespace broadhead",
            "",
        ]
    )


def write_if_changed(path: Path, text: str) -> None:
    """An unchanged file keeps its time stamp, so that configuring again compiles nothing again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_sources(archs: list[str], pattern: str, out: Path) -> int:
    """Writes all families below `out`; returns the number of kernels."""
    support = load_table()
    is_ptx = load_module("capabilities.py").is_ptx
    kernels = 0
    families = []
    lines = ["# Sources by family and architecture set. Written by cmake/generate.py from the table."]
    for family in dict.fromkeys(row.family for row in support.ROWS):
        units = make_units(support, family, archs, pattern)
        if not units:
            continue
        names = family_archs(family, archs)
        families.append(family)
        kernels += sum(len(unit.rows) for unit in units)
        groups = defaultdict(list)
        wanted = set()
        for unit in units:
            path = out / family / f"{unit.name}.cu"
            write_if_changed(path, instantiation(unit))
            wanted.add(path)
            groups[unit.archs].append(path.as_posix())
        for stale in set((out / family).glob("*.cu")) - wanted:
            stale.unlink()
        write_if_changed(out / family / "registry.cpp", registry(units, names))
        groups[tuple(names)] += [(ROOT / source).as_posix() for source in COMMON_SOURCES]
        labels = []
        for targets, sources in groups.items():
            label = f"{family}_{'_'.join(targets)}".replace("-virtual", "ptx")
            labels.append(label)
            spelled = ";".join(target if is_ptx(target) else f"{target}-real" for target in targets)
            lines.append(f'set(BROADHEAD_ARCHS_{label} "{spelled}")')
            lines += [f"set(BROADHEAD_SOURCES_{label}", *(f'  "{source}"' for source in sources), ")"]
        lines.append(f'set(BROADHEAD_GROUPS_{family} "{";".join(labels)}")')
        lines.append(f'set(BROADHEAD_REGISTRY_{family} "{(out / family / "registry.cpp").as_posix()}")')
    lines += [f'set(BROADHEAD_FAMILIES "{";".join(families)}")', f"set(BROADHEAD_KERNEL_COUNT {kernels})", ""]
    write_if_changed(out / "instantiations.cmake", "\n".join(lines))
    return kernels


def capability_text(capabilities) -> str:
    return ", ".join(f"{major}.{minor}" for major, minor in capabilities)


def execution_text(support: ModuleType) -> list[str]:
    """Where kernels have been executed, and what serves capabilities that the table does not know."""
    executed = load_module("capabilities.py").EXECUTED
    others = [capability for capability in support.CAPABILITIES if capability not in executed]
    return [
        "",
        f"Kernels have been executed on compute capability {capability_text(executed)} alone.",
        f"On {capability_text(others)} they are **compiled, never executed**.",
        "A later capability that the table does not know, such as 11.0, runs the rows for all capabilities within 99",
        "KB of shared memory, from PTX where the build holds it: compiled, never executed, either.",
    ]


def special_text(support: ModuleType, row) -> str:
    """What sets a row apart: features of the common ones that it lacks, and those that only some rows have."""
    words = [f"no {feature}" for feature in support.FEATURES if feature not in row.features]
    for feature in row.features:
        if feature in row.requires:
            words.append(f"{feature}: only calls with it")
        elif feature not in support.FEATURES:
            words.append(feature)
    return ", ".join(words) or "-"


def support_matrix() -> str:
    """What all rows of the table have in common, and a line for each tile shape.

    There is a column for K and V of another dtype where some row has them.
    """
    support = load_table()
    grouped = defaultdict(list)
    for row in support.ROWS:
        grouped[row.name].append(row)
    columns = ["kernel", "direction", "phase", "head_dim", "head_dim_v", "dtype"]
    columns += ["K/V dtype"] if any(row.kv_dtype for row in support.ROWS) else []
    columns += ["special", "compute capability", "shared memory"]
    lines = [
        "Every kernel has every mask, layout and option of the public functions, unless its row says otherwise.",
        f'"All" compute capabilities are {capability_text(support.CAPABILITIES)}.',
        *execution_text(support),
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for name, rows in grouped.items():
        row = rows[0]
        kv_dtype = f" {row.kv_dtype or 'as q'} |" if "K/V dtype" in columns else ""
        everywhere = set(row.capabilities) == set(support.CAPABILITIES)
        lines.append(
            f"| `{name}` | {row.direction} | {row.phase} | up to {row.head_dim} | up to {row.head_dim_v} "
            f"| {', '.join(r.dtype for r in rows)} |{kv_dtype} {special_text(support, row)} "
            f"| {'all' if everywhere else capability_text(row.capabilities)} | {row.smem_limit // 1024} KB |"
        )
    return "\n".join(lines)


def update_matrix(path: Path, check: bool) -> int:
    """Puts the matrix between the markers; with `check` only says whether it is there. Returns an exit status."""
    text = path.read_text(encoding="utf-8")
    begin, end = text.find(MATRIX_BEGIN), text.find(MATRIX_END)
    if begin < 0 or end < begin:
        print(f"generate.py: {path} lacks the markers '{MATRIX_BEGIN}' and '{MATRIX_END}'", file=sys.stderr)
        return 1
    wanted = f"{text[:begin]}{MATRIX_BEGIN}\n\n{support_matrix()}\n\n{text[end:]}"
    if text == wanted:
        return 0
    if check:
        print(f"generate.py: {path}: the matrix is out of date: run cmake/generate.py matrix {path}", file=sys.stderr)
        return 1
    path.write_text(wanted, encoding="utf-8")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes what follows from the kernel table.")
    commands = parser.add_subparsers(dest="command", required=True)
    sources = commands.add_parser("sources", help="instantiations, registries and instantiations.cmake")
    sources.add_argument("--archs", required=True, help='semicolon-separated, e.g. "80;90a"')
    sources.add_argument("--filter", default="", help="regular expression on kernel ids")
    sources.add_argument("--out", type=Path, required=True)
    arguments = commands.add_parser("arguments", help="the arguments of a call, for the compiled module")
    arguments.add_argument("--out", type=Path, required=True)
    matrix = commands.add_parser("matrix", help="the support matrix")
    matrix.add_argument("path", type=Path, help="the page with the two markers: docs/support.md")
    matrix.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    options = parser.parse_args()
    if options.command == "matrix":
        return update_matrix(options.path, options.check)
    if options.command == "arguments":
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_if_changed(options.out, arguments_inc())
        return 0
    archs = [arch for arch in re.split(r"[;, ]+", options.archs) if arch]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?(-real|-virtual)?", arch):
            parser.error(f'--archs: "{arch}" is not an architecture; write for example "80;90a;100a"')
    if write_sources(archs, options.filter, options.out.resolve()) == 0:
        parser.error(f'no kernel of the table fits --archs "{options.archs}" and --filter "{options.filter}"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
