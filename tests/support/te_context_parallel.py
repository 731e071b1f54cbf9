"""Transformer Engine's module of context parallelism, without the compiled parts of it that no CPU loads."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from clients import required

_PACKAGE = "transformer_engine.pytorch.attention.dot_product_attention"
_TARGET = f"{_PACKAGE}.context_parallel"
#: Names a checkout of Transformer Engine, which then need not be installed.
SOURCE = "BROADHEAD_TRANSFORMER_ENGINE_SOURCE"


class _Stub(types.ModuleType):
    """A module of Transformer Engine that needs its compiled library. Nothing else of it is run."""

    @staticmethod
    def jit_fuser(function: Any) -> Any:
        return function

    class FlashAttentionUtils:
        """The version of FlashAttention-2 that Transformer Engine found: none."""

        v2_3_plus = v2_6_0_plus = v2_7_0_plus = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"name": name})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in ("transformer_engine", "transformer_engine_torch") or name == _TARGET:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _Stub(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """A stub has nothing to run."""


@functools.cache
def load() -> Any:
    """The module, from its source in the installed package; skips or fails where that is absent."""
    found = importlib.util.find_spec("transformer_engine")
    roots = [Path(root) for root in (found.submodule_search_locations or ())] if found else []
    if SOURCE in os.environ:
        # A checkout on the import path would break Megatron, which imports Transformer Engine where it finds it.
        roots = [Path(os.environ[SOURCE]) / "transformer_engine"]
    source = next(
        (path for root in roots if (path := root.joinpath(*_TARGET.split(".")[1:]).with_suffix(".py")).is_file()), None
    )
    if source is None:
        text = "the client transformer_engine is absent, or its source of context parallelism"
        if "transformer_engine" in required():
            pytest.fail(f"BROADHEAD_REQUIRE_CLIENTS asks for it: {text}")
        pytest.skip(text)
    before = dict(sys.modules)
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        spec = importlib.util.spec_from_file_location(_TARGET, source)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.meta_path.remove(finder)
        # The stubs must not be what another test finds.
        for name in set(sys.modules) - set(before):
            if name.partition(".")[0].startswith("transformer_engine"):
                del sys.modules[name]
