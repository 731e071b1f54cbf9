"""The build backend: scikit-build-core, with CUTLASS where kernels are built and a version label where it is asked for.

A CPU-only `pip install .` therefore needs a C++ compiler and nothing big. The decision mirrors CudaArchs.cmake.
BROADHEAD_VERSION_LABEL=cu130 makes the wheel of version 0.1.0 one of 0.1.0+cu130.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scikit_build_core.build import (
    build_editable,
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
)
from scikit_build_core.build import build_wheel as _build_wheel
from scikit_build_core.build import get_requires_for_build_editable as _requires_for_editable
from scikit_build_core.build import get_requires_for_build_wheel as _requires_for_wheel
from scikit_build_core.build import prepare_metadata_for_build_wheel as _prepare_metadata
from version_label import label_directory, label_wheel, wanted_label

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

CUTLASS = "nvidia-cutlass==4.2.0.0"
Settings = Mapping[str, Any] | None


def _option(name: str, config_settings: Settings) -> str:
    """A build option from `-C cmake.define.NAME=...`, else from the environment."""
    value = (config_settings or {}).get(f"cmake.define.{name}")
    return str(value if value is not None else os.environ.get(name, ""))


def _has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0 and result.stdout[:1].isdigit()


def _cutlass(config_settings: Settings) -> list[str]:
    """What the kernels of this build need from PyPI: nothing when there are none, or when the headers are named."""
    archs = _option("BROADHEAD_CUDA_ARCHS", config_settings)
    given = _option("BROADHEAD_KERNEL_DIR", config_settings) or _option("BROADHEAD_CUTLASS_DIR", config_settings)
    if given or archs == "none":
        return []
    has_nvcc = bool(os.environ.get("CUDACXX") or shutil.which("nvcc"))
    return [CUTLASS] if archs or (has_nvcc and _has_gpu()) else []


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*_requires_for_wheel(config_settings), *_cutlass(config_settings)]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*_requires_for_editable(config_settings), *_cutlass(config_settings)]


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    label = wanted_label()
    # Metadata that were prepared have their label; scikit-build-core compares them with its own, which have none.
    name = _build_wheel(wheel_directory, config_settings, None if label else metadata_directory)
    return label_wheel(Path(wheel_directory, name), label) if label else name


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    label = wanted_label()
    name = _prepare_metadata(metadata_directory, config_settings)
    return label_directory(Path(metadata_directory), name, label) if label else name
