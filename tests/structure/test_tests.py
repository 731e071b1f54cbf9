"""The rules of the tests themselves: folders that README.md names, helpers in support/, files of bearable length."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
FILES = sorted(path for kind in ("*.py", "*.cpp", "*.h") for path in TESTS.rglob(kind))
MODULES = [path for path in FILES if path.suffix == ".py"]
README = (TESTS / "README.md").read_text(encoding="utf-8")
MOST_LINES = 400


def imported(source: str) -> set[str]:
    """The modules that a source names in its imports, at any depth of it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def among_tests(modules: set[str]) -> set[str]:
    return {name for name in modules if re.match(r"(.*\.)?test_", name) or name == "conftest"}


def test_folders_are_those_of_the_page() -> None:
    named = set(re.findall(r"`([a-z]+)/`", README))
    assert named == {path.name for path in TESTS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert "build" not in named, "pytest does not look into a folder of that name"


def test_files_that_the_page_names_exist() -> None:
    named = re.findall(r"`([a-z]+/[a-z_]+\.py)`", README)
    assert len(named) > 5
    for name in named:
        assert (TESTS / name).is_file(), name


def test_every_test_is_in_a_folder() -> None:
    assert [path.name for path in TESTS.glob("test_*")] == []
    for path in MODULES:
        assert path.parent == TESTS / "support" or path.name.startswith(("test_", "conftest")), path
        assert path.parent != TESTS / "support" or not path.name.startswith("test_"), path


def test_names_of_modules_are_unique() -> None:
    """Test modules are of no package: two of one name would hide each other."""
    counts = Counter(path.stem for path in MODULES if path.name != "conftest.py")
    assert [name for name, count in counts.items() if count > 1] == []


def test_no_test_is_imported() -> None:
    for path in MODULES:
        assert among_tests(imported(path.read_text(encoding="utf-8"))) == set(), path


def test_an_import_of_a_test_is_found() -> None:
    for line in (
        "from test_a import b",
        "import test_a",
        "def f():\n    from tests.test_a import b",
        "import conftest",
    ):
        assert among_tests(imported(line)), line
    assert not among_tests(imported("import torch.testing\nfrom calls import build"))


def test_files_are_not_too_long() -> None:
    lengths = {path.relative_to(TESTS).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    long = {name for name, lines in lengths.items() if lines > MOST_LINES}
    assert long == set()
