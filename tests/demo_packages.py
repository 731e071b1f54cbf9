"""The packages of the demo extra, which tests of the demo and of the transformers integration need."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

#: Set where the packages must be there (CI): a missing one then fails, and nothing is skipped for it.
REQUIRED = os.environ.get("BROADHEAD_TEST_REQUIRES_DEMO", "0") not in ("", "0")


def import_package(name: str, minversion: str | None = None) -> Any:
    """The module ``name``; without it the calling test module is skipped, or fails where it is required."""
    return importlib.import_module(name) if REQUIRED else pytest.importorskip(name, minversion=minversion)
