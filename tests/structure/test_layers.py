"""Imports of the package point one way: api > ops > run > plan > call > support, the reference beside plan."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import broadhead
import pytest

PACKAGE = Path(broadhead.__file__).parent
#: A module imports from its own layer and from those below. What is not named here is on top.
LAYERS = {
    "errors": 0, "capabilities": 0, "tiles": 0, "support": 0, "costs": 0, "_C": 0,
    "call": 1, "plan": 2, "reference": 2, "run": 3, "ops": 4, "api": 5,
}  # fmt: skip
TOP = 6


def name_of(path: Path) -> str:
    """The dotted name below the package; "" is the package itself."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(path: Path, modules: set[str]) -> set[str]:
    """The modules of the package that ``path`` imports anywhere, functions included."""
    package = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - (node.level - 1)]
            elif (node.module or "").split(".")[0] == "broadhead":
                base = ()
            else:
                continue
            named = (node.module or "").removeprefix("broadhead").strip(".") if not node.level else node.module or ""
            full = ".".join([*base, *([named] if named else [])])
            for alias in node.names:
                inner = f"{full}.{alias.name}".strip(".")
                found.add(inner if inner in modules else full)
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("broadhead").strip(".")
                for alias in node.names
                if alias.name.split(".")[0] == "broadhead"
            }
    return found


def graph() -> dict[str, set[str]]:
    paths = sorted(PACKAGE.rglob("*.py"))
    modules = {name_of(path) for path in paths} | {"_C"}
    return {name_of(path): imported_by(path, modules) - {name_of(path)} for path in paths}


def layer_of(module: str) -> int:
    return LAYERS.get(module.split(".")[0], TOP)


def runs_up(imports: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} imports {other}"
        for module, others in imports.items()
        for other in sorted(others)
        if layer_of(other) > layer_of(module) or {module.split(".")[0], other.split(".")[0]} == {"plan", "reference"}
    ]


def circle(imports: dict[str, set[str]]) -> list[str]:
    # A package is initialised before what is in it: that is no import of ours.
    edges = {
        module: {other for other in others if not module.startswith(f"{other}.")} for module, others in imports.items()
    }
    try:
        list(TopologicalSorter(edges).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_point_down() -> None:
    imports = graph()
    assert len(imports) > 60 and "call.problem" in imports["plan.dispatch"]
    assert runs_up(imports) == []


def test_there_is_no_circle() -> None:
    assert circle(graph()) == []


@pytest.mark.parametrize(
    ("module", "other"),
    [("call.problem", "run.forward"), ("run.forward", "ops.attention"), ("plan.dispatch", "reference.core")],
)
def test_what_runs_up_is_found(module: str, other: str) -> None:
    imports = graph()
    imports[module] = imports[module] | {other}
    assert runs_up(imports) == [f"{module} imports {other}"]


def test_a_circle_is_found() -> None:
    imports = graph()
    imports["call.validation"] = imports["call.validation"] | {"call.problem"}
    assert {"call.validation", "call.problem"} <= set(circle(imports))
