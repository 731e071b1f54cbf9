"""The kernel libraries of the installed package, for tests of what a build holds."""

from __future__ import annotations

import pytest


def installed_families() -> dict:
    try:
        from broadhead import _C
    except ImportError:
        return {}
    return _C.build_info()["families"]


FAMILIES = installed_families()
needs_kernels = pytest.mark.skipif(not FAMILIES, reason="no kernel library is installed: built without kernels")
