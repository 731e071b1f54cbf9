"""Makes functions with a foreign signature: real named parameters, neutral values checked, the others handed on."""

from __future__ import annotations

import ast
import linecache
import os
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

from ..call.validation import describe_value
from ..errors import UnsupportedError
from .arguments import NEUTRAL


def refuse(function: str, name: str, value: Any) -> NoReturn:
    """Raise that ``function`` takes no such value of its foreign argument ``name``."""
    neutral = NEUTRAL[name]
    accepted = " or ".join(repr(each) for each in neutral.values or ())
    raise UnsupportedError(f"{function}: {name} must be {accepted}, got {describe_value(value)}: {neutral.advice}")


def _parameters(name: str, signature: str) -> list[str]:
    (function,) = ast.parse(f"def {name}({signature}): ...").body
    assert isinstance(function, ast.FunctionDef)
    return [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]


def _check(argument: str) -> str:
    """The condition under which a value of ``argument`` is refused."""
    values = NEUTRAL[argument].values
    assert values is not None
    if len(values) > 1:
        return f"{argument} not in {values!r}"
    # A comparison with None or False may meet a tensor: identity has no elements.
    return f"{argument} != {values[0]!r}" if type(values[0]) in (int, float) else f"{argument} is not {values[0]!r}"


def declare(
    module: str,
    name: str,
    signature: str,
    run: Callable[..., Any],
    *,
    doc: str,
    renamed: Mapping[str, str] | None = None,
    counterparts: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """A function ``name`` with ``signature``, which calls ``run`` by keywords.

    The source is compiled once, as that of a dataclass's ``__init__`` is: inspect shows a plain function, torch.compile
    traces one, and a call costs one call more than ``run``.

    Args:
        module: where the function can be imported from.
        signature: the text between the brackets of a definition; ``torch`` is known in it.
        run: takes the arguments that NEUTRAL does not name.
        renamed: from the foreign name to the keyword of ``run``, where they differ.
        counterparts: arguments that ``run`` takes although NEUTRAL names them.
    """
    renamed = renamed or {}
    neutral = [each for each in _parameters(name, signature) if each in NEUTRAL and each not in counterparts]
    passed = [each for each in _parameters(name, signature) if each not in neutral]
    # What it calls is in its closure, not in globals: torch.compile looks globals up in the module of that name.
    lines = ["def _enclosed(_run, _refuse):", f"    def {name}({signature}):"]
    for each in neutral:
        if NEUTRAL[each].values is not None:
            lines += [f"        if {_check(each)}:", f"            _refuse({name!r}, {each!r}, {each})"]
    lines.append(f"        return _run({', '.join(f'{renamed.get(each, each)}={each}' for each in passed)})")
    source = "\n".join([*lines, f"    return {name}"]) + "\n"
    # A path in this package: warnings are then told of the frame that called the function.
    filename = os.path.join(os.path.dirname(__file__), f"<{module.rpartition('.')[2]}.{name}>")
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"torch": torch, "__name__": module}
    exec(compile(source, filename, "exec"), namespace)
    function: Callable[..., Any] = namespace["_enclosed"](run, refuse)
    function.__qualname__ = name
    function.__doc__ = doc
    return function
