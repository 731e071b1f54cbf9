"""Fixtures of the tests of the host side: the compiled module replaced by one that records."""

from __future__ import annotations

import pytest
from broadhead.plan import native
from recorder import Recorder


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    module = Recorder()
    monkeypatch.setattr(native, "extension", lambda: module)
    return module
