"""A pytest plugin that writes down which rows of the table each test is collected with.

`python -m pytest -p forced_rows --collect-only` writes them to the file that the environment names, as JSON: by
``module.function`` the ids of the rows among its parameters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from broadhead.support import KernelRow

FILE_VARIABLE = "BROADHEAD_TEST_FORCED_ROWS"


def pytest_collection_finish(session: pytest.Session) -> None:
    found: dict[str, set[str]] = {}
    for item in session.items:
        assert isinstance(item, pytest.Function)
        rows = set(_rows_of(item))
        if rows:
            found.setdefault(f"{item.module.__name__}.{item.originalname}", set()).update(rows)
    Path(os.environ[FILE_VARIABLE]).write_text(json.dumps({test: sorted(rows) for test, rows in found.items()}))


def _rows_of(item: pytest.Function) -> Iterator[str]:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    for value in parameters.values():
        yield from (x.id for x in (value if type(value) is tuple else (value,)) if isinstance(x, KernelRow))
