"""An installation without kernels says so at run time, and what to do about it: pip hides what the build said."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from broadhead.errors import FallbackWarning
from broadhead.plan import native
from broadhead.plan.dispatch import resolve
from described import build_of, h200, problem

pytestmark = pytest.mark.usefixtures("first_rows")

EMPTY = {"families": {}, "errors": {}}
COMMAND = 'BROADHEAD_CUDA_ARCHS="90a" pip install .'


@pytest.fixture(autouse=True)
def _first_use() -> Iterator[None]:
    native.build_description.cache_clear()
    yield
    native.build_description.cache_clear()


def describe(monkeypatch: pytest.MonkeyPatch, info: dict | None, has_gpu: bool) -> list[str]:
    """The notes of the first use, and of the second, of an installation on a machine with or without a GPU."""
    module = None if info is None else SimpleNamespace(build_info=lambda: info)
    monkeypatch.setattr(native, "extension", lambda: module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        native.build_description()
        native.build_description()
    assert all(issubclass(warning.category, FallbackWarning) for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("info", [None, EMPTY], ids=["no module", "no libraries"])
def test_no_kernels_on_a_gpu_is_told_once(monkeypatch: pytest.MonkeyPatch, info: dict | None) -> None:
    (note,) = describe(monkeypatch, info, has_gpu=True)
    assert "this installation holds no kernels" in note and COMMAND in note


@pytest.mark.parametrize(
    ("info", "has_gpu"),
    [
        (None, False),
        (EMPTY, False),
        ({"families": {"sm80": {"archs": "80", "cuda": (13, 0), "kernels": ["a"], "path": "x"}}, "errors": {}}, True),
        ({"families": {}, "errors": {"sm80": "it is of another version"}}, True),  # told by each call
    ],
)
def test_others_are_quiet(monkeypatch: pytest.MonkeyPatch, info: dict | None, has_gpu: bool) -> None:
    assert describe(monkeypatch, info, has_gpu) == []


@pytest.mark.parametrize("build", [native.NO_KERNELS, build_of("80"), build_of("90a", without=("sm90_fwd_d128_bf16",))])
def test_a_refusal_names_the_command_that_works_today(build: native.BuildDescription) -> None:
    """No package index has broadhead with kernels: the words must not send anyone to look for one."""
    reason = resolve(problem(), h200(), build).reason
    assert COMMAND in reason and "where its source is" in reason
    assert "install a CUDA wheel" not in reason
