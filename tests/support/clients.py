"""Packages of clients whose own code the tests run. Without one its tests skip, or fail where it was asked for."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest

#: Names, separated by commas, of clients that must be there: CI of the clients sets it.
REQUIRED = "BROADHEAD_REQUIRE_CLIENTS"


def is_required(client: str) -> bool:
    return client in os.environ.get(REQUIRED, "").replace(" ", "").split(",")


def need(client: str, module: str | None = None) -> ModuleType:
    """The module of a client. For the first lines of a test module, which skips as a whole without it.

    Raises:
        pytest.UsageError: it can not be imported, and BROADHEAD_REQUIRE_CLIENTS names the client.
    """
    name = module or client
    try:
        return importlib.import_module(name)
    except ImportError as error:
        text = f"{name} can not be imported ({error}); scripts/client_sources.py {client} DIR fetches it"
        if is_required(client):
            raise pytest.UsageError(f"{REQUIRED} asks for {client}: {text}") from error
        pytest.skip(text, allow_module_level=True)
