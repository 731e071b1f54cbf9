"""The distributions of packages/: each builds a wheel, installs, and is what the checks of its clients find."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import broadhead
import pytest
from broadhead.compat import surfaces

PACKAGES = Path(__file__).resolve().parents[2] / "packages"
SURFACES = {
    "flash-attn-broadhead": "flash_attn",
    "flash-attn-3-broadhead": "flash_attn_interface",
    "flash-attn-4-broadhead": "flash_attn.cute",
}
#: What a client that has the distribution does.
USES = {
    "flash-attn-broadhead": """
import flash_attn, flash_attn.bert_padding, flash_attn.flash_attn_interface
from flash_attn import *
assert flash_attn.__version__ == "2.8.4"
assert flash_attn_func(x, x, x, 0.0, None, True).shape == x.shape
assert callable(flash_attn.bert_padding.unpad_input)
assert callable(flash_attn.flash_attn_interface._wrapped_flash_attn_varlen_backward)
""",
    "flash-attn-3-broadhead": """
import flash_attn_3._C
assert len(torch.ops.flash_attn_3.fwd(x, x, x)) == 4
from flash_attn_interface import *
import flash_attn_interface
from flash_attn_3.flash_attn_interface import _flash_attn_backward
assert _flash_attn_backward is flash_attn_interface._flash_attn_backward
assert flash_attn_func(x, x, x, causal=True).shape == x.shape
""",
    "flash-attn-4-broadhead": """
from flash_attn.cute import flash_attn_func
from flash_attn.cute.interface import _validate_head_dims
assert flash_attn_func(x, x, x)[1] is None
""",
}


def run(*command: str, **environment: str) -> None:
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The path of a folder that the wheels of these distributions are installed in."""
    for name in ("pip", "setuptools"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: it builds the wheels")

    def install(*folders: str) -> str:
        there, wheels = tmp_path_factory.mktemp("installed"), []
        for folder in folders:
            source = tmp_path_factory.mktemp("source") / folder
            shutil.copytree(PACKAGES / folder, source)
            pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
            # setuptools of this environment where it is new enough; else pip fetches one.
            new = int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
            isolation = ["--no-build-isolation"] if new else []
            run(*pip, "wheel", "--no-deps", *isolation, "-w", str(source / "dist"), str(source))
            wheels += map(str, (source / "dist").glob("*.whl"))
        assert len(wheels) == len(folders)
        run(*pip, "install", "--no-deps", "--target", str(there), *wheels)
        return str(there)

    return install


def run_with(path: str, code: str) -> None:
    package = Path(broadhead.__file__).resolve().parents[1]
    head = "import torch\nx = torch.randn(1, 4, 2, 64)\n"
    run(sys.executable, "-c", head + code, PYTHONPATH=os.pathsep.join((path, str(package))))


@pytest.mark.parametrize("folder", SURFACES)
def test_wheel(folder: str, installed: Callable[..., str]) -> None:
    described = surfaces.SURFACES[SURFACES[folder]]
    checks = f"""
import importlib.metadata as metadata
assert metadata.version({described.distribution!r}) == {described.version!r}
assert {described.distribution!r} in metadata.packages_distributions()[{described.probe.partition(".")[0]!r}]
import broadhead
with broadhead.compat.install({SURFACES[folder]!r}):  # a distribution of ours is no installation to be kept
    pass
"""
    run_with(installed(folder), USES[folder] + checks)


def test_two_of_one_package(installed: Callable[..., str]) -> None:
    both = ("flash-attn-broadhead", "flash-attn-4-broadhead")
    run_with(installed(*both), "".join(USES[folder] for folder in both))


@pytest.mark.parametrize("folder", SURFACES)
def test_version_is_that_of_the_surface(folder: str) -> None:
    text = (PACKAGES / folder / "pyproject.toml").read_text(encoding="utf-8")
    name, version = re.findall(r'^(?:name|version) = "(.*)"$', text, re.MULTILINE)
    described = surfaces.SURFACES[SURFACES[folder]]
    assert (name, version) == (described.distribution, described.version)
    assert f"`{name}` {version}" in (PACKAGES / "README.md").read_text(encoding="utf-8")
