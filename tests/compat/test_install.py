"""install and uninstall: what import, metadata and the operators find, and that all of it goes away again."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import broadhead
import pytest
import torch
from broadhead.compat import advice, surfaces
from foreign import raises_by_name

STANDALONE = [name for name, surface in surfaces.SURFACES.items() if surface.inside is None]


def state() -> tuple[dict[str, Any], list[Any]]:
    """sys.modules without what is loaded once and stays ours, and the finders."""
    ours = {name: module for name, module in sys.modules.items() if not name.startswith("broadhead.")}
    return ours, list(sys.meta_path)


@pytest.mark.parametrize("surface", STANDALONE)
def test_import_finds_it_and_all_goes_away(surface: str) -> None:
    with broadhead.compat.install(surface):  # what is imported on the first time stays
        pass
    before = state()
    installation = broadhead.compat.install(surface)
    for module in surfaces.SURFACES[surface].modules:
        found = importlib.import_module(module.name)
        assert found.__name__ == module.name and importlib.util.find_spec(module.name) is not None
        assert set(surfaces.contents(module)) <= set(vars(found))
    installation.uninstall()
    installation.uninstall()
    assert state() == before
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(surfaces.SURFACES[surface].probe)


def test_version_checks_find_the_distribution() -> None:
    names = {"flash_attn": "flash-attn", "flash_attn_interface": "flash-attn-3", "flash_attn.cute": "flash-attn-4"}
    for surface, distribution in names.items():
        with broadhead.compat.install(surface):
            version = importlib.metadata.version(distribution.replace("-", "_"))
            assert version.endswith("+broadhead")
            top = surface.partition(".")[0]
            assert distribution in importlib.metadata.packages_distributions()[top]
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(distribution)


def test_surfaces_of_one_package_in_any_order() -> None:
    before = state()
    cute = broadhead.compat.install("flash_attn.cute")
    fa2 = broadhead.compat.install("flash_attn")
    import flash_attn

    assert flash_attn.flash_attn_func is not flash_attn.cute.flash_attn_func
    cute.uninstall()
    assert flash_attn is sys.modules["flash_attn"] and "flash_attn.cute" not in sys.modules
    assert not hasattr(flash_attn, "cute")
    cute = broadhead.compat.install("flash_attn.cute")
    fa2.uninstall()
    from flash_attn.cute import interface

    assert interface.flash_attn_func.__module__ == "broadhead.compat.flash_attn_4"
    assert not hasattr(sys.modules["flash_attn"], "flash_attn_func")
    cute.uninstall()
    assert state() == before


def test_the_same_surface_twice() -> None:
    with broadhead.compat.install("flash_attn_3"):
        with broadhead.compat.install("flash_attn_interface"):
            pass
        assert "flash_attn_interface" in sys.modules and hasattr(torch.ops.flash_attn_3, "fwd")
    assert "flash_attn_interface" not in sys.modules


def test_uninstall_by_name() -> None:
    broadhead.compat.install("flash_attn")
    broadhead.compat.install("flash_attn")
    broadhead.compat.uninstall("flash_attn")
    assert "flash_attn" not in sys.modules
    raises_by_name(lambda: broadhead.compat.uninstall("flash_attn"), "uninstall", "flash_attn", "not installed")


def test_operators_come_and_go() -> None:
    for _ in range(2):
        with broadhead.compat.install("flash_attn_interface"):
            x = torch.randn(1, 4, 2, 64)
            assert len(torch.ops.flash_attn_3.fwd(x, x, x)) == 4
        assert not hasattr(torch.ops.flash_attn_3, "fwd")


def write_package(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text, encoding="utf-8")


def test_a_real_installation_keeps_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path, "flash_attn", "raise AssertionError('nobody may import this')\n")
    (tmp_path / "flash_attn" / "flash_attn_interface.py").write_text("real = True\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    raises_by_name(lambda: broadhead.compat.install("flash_attn"), "flash_attn_interface.py", "override=True")
    with broadhead.compat.install("flash_attn", override=True):
        import flash_attn

        assert flash_attn.flash_attn_func.__module__ == "broadhead.compat.flash_attn_2"


def test_override_restores_what_was_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path, "flash_attn", "from . import flash_attn_interface\nreal = 1\n")
    (tmp_path / "flash_attn" / "flash_attn_interface.py").write_text("real = 2\n", encoding="utf-8")
    (tmp_path / "flash_attn" / "layers.py").write_text("real = 3\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    real = importlib.import_module("flash_attn")
    try:
        before = state()
        with broadhead.compat.install("flash_attn", override=True):
            assert importlib.import_module("flash_attn") is not real
            # Other parts of the real package can still be imported.
            assert importlib.import_module("flash_attn.layers").real == 3
        assert state() == before
        assert importlib.import_module("flash_attn") is real and real.flash_attn_interface.real == 2
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
            del sys.modules[name]


def test_beside_a_real_package_without_the_surface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real FlashAttention-2 stays, and flash_attn.cute comes into it."""
    write_package(tmp_path, "flash_attn", "real = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with broadhead.compat.install("flash_attn.cute"):
            import flash_attn.cute.interface

            assert flash_attn.real == 1
            assert flash_attn.cute.interface.flash_attn_func.__module__ == "broadhead.compat.flash_attn_4"
        assert "flash_attn.cute" not in sys.modules and not hasattr(sys.modules.get("flash_attn"), "cute")
    finally:
        sys.modules.pop("flash_attn", None)


@pytest.mark.parametrize(
    ("surface", "parent"), [("vllm.vllm_flash_attn", "vllm"), ("sgl_kernel.flash_attn", "sgl_kernel")]
)
@pytest.mark.parametrize("imported", [False, True])
def test_parts_of_other_packages(
    surface: str, parent: str, imported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(parent) is None:
        raises_by_name(lambda: broadhead.compat.install(surface), surface, f"package {parent}", "not installed")
    write_package(tmp_path / "first", parent, "real = 1\n")
    monkeypatch.syspath_prepend(tmp_path / "first")
    child = surface.rpartition(".")[2]
    try:
        if imported:
            importlib.import_module(parent)
        with broadhead.compat.install(surface):
            module = importlib.import_module(surface)
            assert module.flash_attn_varlen_func.__module__.startswith("broadhead.compat.")
            assert importlib.import_module(parent).real == 1
            namespace: dict[str, Any] = {}
            exec(f"from {parent} import {child} as found", namespace)
            assert namespace["found"] is module
        assert surface not in sys.modules and not hasattr(importlib.import_module(parent), child)
    finally:
        sys.modules.pop(parent, None)


def test_names_that_are_no_surface() -> None:
    raises_by_name(lambda: broadhead.compat.install("xformers"), "install", "surface must be one of", "xformers")
    raises_by_name(lambda: broadhead.compat.install(None), "install", "None")  # type: ignore[arg-type]


def test_functions_can_be_pickled() -> None:
    with broadhead.compat.install("flash_attn"):
        from flash_attn import flash_attn_func

    assert pickle.loads(pickle.dumps(flash_attn_func)) is flash_attn_func


def test_nothing_is_loaded_before_it_is_asked_for() -> None:
    code = (
        "import sys, broadhead\n"
        "loaded = [m for m in sys.modules if m.startswith('broadhead.compat.flash') or m.startswith('flash_attn')]\n"
        "assert loaded == [], loaded\n"
        "broadhead.compat.install('flash_attn_interface')\n"
        "import flash_attn_interface\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_faster_package_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On compute capability 10.x at head dims 64 to 256; the tensor only says where it is and how wide."""
    monkeypatch.setattr(advice, "_told", set())

    class Described(torch.Tensor):
        device = torch.device("cuda", 0)

        def get_device(self) -> int:
            return 0

    def told(major: int, head_dim: int) -> list[str]:
        monkeypatch.setattr(advice, "_major", lambda index: major)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            advice.tell_if_faster_elsewhere("flash_attn", torch.empty(1, 1, 1, head_dim).as_subclass(Described))
        return [str(each.message) for each in caught]

    assert told(9, 128) == [] and told(10, 512) == [] and told(10, 40) == []
    (text,) = told(10, 128)
    assert "10.x" in text and "flash-attn-4" in text and "head_dim 128" in text
    assert told(10, 128) == []
