"""Stands in for the compiled module, and keeps what it is called with by the names of its type stub."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import broadhead
from torch import Tensor


def binding_parameters(function: str) -> list[str]:
    """The names of the arguments of a function of the compiled module, in order, from its type stub."""
    found = _defined(function)
    return [argument.arg for argument in found.args.posonlyargs + found.args.args]


def keyword_parameters(name: str) -> list[str]:
    """The names of the keyword arguments of a function of the compiled module, or of the constructor of a class."""
    return [argument.arg for argument in _defined(name).args.kwonlyargs]


def _defined(name: str) -> ast.FunctionDef:
    stub = ast.parse((Path(broadhead.__file__).parent / "_C.pyi").read_text())
    found: Any = next(node for node in stub.body if getattr(node, "name", "") == name)
    if isinstance(found, ast.ClassDef):
        found = next(node for node in found.body if isinstance(node, ast.FunctionDef))
    return found


class Recorder:
    """The compiled module: each function keeps its arguments in ``calls``, and a Launch is its own fields."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __getattr__(self, function: str) -> Any:
        names = binding_parameters(function)

        def call(*arguments: Any) -> None:
            assert len(arguments) == len(names)
            self.calls.append(dict(zip(names, arguments, strict=True)))

        return call

    def connect(self, **hooks: Any) -> None:
        assert list(hooks) == keyword_parameters("connect")

    def Launch(self, **fields: Any) -> dict[str, Any]:
        assert list(fields) == keyword_parameters("Launch")
        return fields


def allocate(allocation: tuple[Any, ...], q: Tensor) -> Tensor:
    """What the compiled module does with an allocation."""
    function, arguments, keywords = allocation
    made = function(q) if arguments is None else function(*arguments, **keywords)
    assert made.is_contiguous() and made.device == q.device
    return made
