"""Where the benchmark program lies and what it imports: beside the package, in no circle, and started by path."""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import broadhead
import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
PACKAGE = "broadhead_bench"
ADAPTERS = ("broadhead_api", "flash_attention", "flashinfer_wrappers", "torch_flex", "torch_sdpa")
#: Adapters that vary another one, by their names.
VARIANTS = {"broadhead_variants": "broadhead_api", "broadhead_rows": "broadhead_api"}


def modules(folder: Path = BENCHMARKS / PACKAGE) -> dict[str, Path]:
    """The files of a package by the names of their modules."""
    names = {}
    for path in folder.rglob("*.py"):
        words = path.relative_to(folder.parent).with_suffix("").parts
        names[".".join(words[:-1] if words[-1] == "__init__" else words)] = path
    return names


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules among `known` that a file imports, in functions as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(known)


def sort(known: dict[str, Path]) -> list[str]:
    """The modules in an order in which each comes behind what it imports; CycleError if there is none."""
    return list(
        graphlib.TopologicalSorter({name: imported(path, known) for name, path in known.items()}).static_order()
    )


def test_imports_make_no_circle() -> None:
    known = modules()
    order = sort(known)
    assert set(order) == set(known)
    assert (
        order.index(f"{PACKAGE}.peers.base") < order.index(f"{PACKAGE}.peers.registry") < order.index(f"{PACKAGE}.cli")
    )


def test_a_circle_would_be_found(tmp_path: Path) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "first.py").write_text("from some import second\n")
    (folder / "second.py").write_text("def late():\n    from some.first import thing\n")
    with pytest.raises(graphlib.CycleError):
        sort(modules(folder))


def test_adapters_import_the_base_and_the_registry_imports_the_adapters() -> None:
    known = {name: path for name, path in modules().items() if name.startswith(f"{PACKAGE}.peers.")}
    base, registry = f"{PACKAGE}.peers.base", f"{PACKAGE}.peers.registry"
    adapters = {f"{PACKAGE}.peers.{name}" for name in ADAPTERS}
    variants = {f"{PACKAGE}.peers.{name}": {f"{PACKAGE}.peers.{of}"} for name, of in VARIANTS.items()}
    assert set(known) == {base, registry, *adapters, *variants}
    assert imported(known[base], known) == set()
    assert {name: imported(known[name], known) for name in adapters} == {name: {base} for name in adapters}
    assert {name: imported(known[name], known) - {base} for name in variants} == variants
    assert imported(known[registry], known) == {base, *adapters, *variants}


def run(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )


SCRIPTS = (
    ("run.py", "--quick"), ("compare_installations.py", "--base DIR"), ("time_rows.py", "--seeds"),
    ("fit_costs.py", "--judge"),
)  # fmt: skip


@pytest.mark.parametrize(("script", "option"), SCRIPTS)
def test_scripts_start_by_path_from_anywhere(script: str, option: str, tmp_path: Path) -> None:
    """With a broadhead that is installed elsewhere on PYTHONPATH."""
    installed = str(Path(broadhead.__file__).resolve().parent.parent)
    result = run(tmp_path, str(BENCHMARKS / script), "--help", PYTHONPATH=installed)
    assert result.returncode == 0, result.stderr
    assert option in result.stdout
    assert f"python benchmarks/{script}" in result.stdout, "the usage is the command line of the README"
    assert f"python benchmarks/{script} " in (BENCHMARKS / "README.md").read_text()


def test_the_comparison_needs_no_broadhead_of_its_own(tmp_path: Path) -> None:
    """Only its two processes import one, each its own."""
    hide = "import sys; sys.modules['broadhead'] = None; import broadhead_bench.compare"
    result = run(tmp_path, "-c", hide, PYTHONPATH=str(BENCHMARKS))
    assert result.returncode == 0, result.stderr
