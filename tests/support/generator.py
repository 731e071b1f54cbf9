"""cmake/generate.py as a module: what the build writes from the table."""

from __future__ import annotations

from types import ModuleType

from scripts import ROOT, load_script

GENERATE = ROOT / "cmake/generate.py"


def load_generate() -> ModuleType:
    return load_script("cmake/generate.py")
