"""Finds installed modules without importing them or their parents."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

#: A module with this in its first lines is one of ours: a distribution that hands a surface of this package on.
MARKER = "broadhead.compat"
_HEAD = 2048


def locate(name: str) -> ModuleSpec | None:
    """The spec of an installed module; None if there is none. Nothing is imported, sys.modules is not asked."""
    path = None
    spec: ModuleSpec | None = None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        spec = _find(".".join(parts[:end]), path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return spec


def _find(name: str, path: list[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        spec: ModuleSpec | None = None if find_spec is None else find_spec(name, path, None)
        if spec is not None:
            return spec
    return None


def is_ours(spec: ModuleSpec) -> bool:
    """Whether the module is of a distribution of ours."""
    if spec.origin is None or not spec.origin.endswith(".py"):
        return False
    try:
        with Path(spec.origin).open(encoding="utf-8", errors="replace") as file:
            return MARKER in file.read(_HEAD)
    except OSError:
        return False
