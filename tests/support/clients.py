"""Packages of clients: a test skips where one is absent, or fails where BROADHEAD_REQUIRE_CLIENTS names it."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest

#: Names for BROADHEAD_REQUIRE_CLIENTS, a list with commas, and the module that shows a client to be there.
MODULES = {
    "compat": "broadhead.compat",
    "lmdeploy": "lmdeploy",
    "megatron": "megatron.core",
    "sglang": "sglang.srt",
    "slime": "slime_plugins",
    "transformer_engine": "transformer_engine",
    "vllm": "vllm",
}


def required() -> set[str]:
    """The clients whose absence is a failure."""
    names = {name.strip() for name in os.environ.get("BROADHEAD_REQUIRE_CLIENTS", "").split(",")} - {""}
    unknown = names - set(MODULES)
    if unknown:
        raise pytest.UsageError(f"BROADHEAD_REQUIRE_CLIENTS: unknown {sorted(unknown)}, known: {sorted(MODULES)}")
    return names


def client(name: str, module: str | None = None) -> ModuleType:
    """A module of a client; None: the one that shows it to be there. A test module may call it in its first lines."""
    try:
        return importlib.import_module(module or MODULES[name])
    except ImportError as error:
        if name in required():
            pytest.fail(f"BROADHEAD_REQUIRE_CLIENTS asks for {name}, which does not import: {error!r}")
        text = f"the client {name} does not import: {error}"
        pytest.skip(text, allow_module_level=True)
