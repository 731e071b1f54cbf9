"""Finds the compiled module and describes what was built into it."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import Any, NamedTuple

from ..capabilities import arch_covers, arch_for, is_ptx
from ..errors import FallbackWarning


class FamilyBuild(NamedTuple):
    """One kernel library: its arch targets ("80", "90a", "103-virtual"), its compiler's CUDA and the rows it holds."""

    name: str
    archs: tuple[str, ...]
    cuda_version: tuple[int, ...]
    kernels: frozenset[str]

    def covers(self, capability: tuple[int, int]) -> bool:
        return any(arch_covers(arch, capability) for arch in self.archs)

    def needs_ptx(self, capability: tuple[int, int]) -> bool:
        """Whether nothing but PTX serves a capability: the driver compiles it at the first launch."""
        return not any(arch_covers(arch, capability) for arch in self.archs if not is_ptx(arch))


class BuildDescription(NamedTuple):
    """What this installation holds: hashable, so that a decision can be cached on it."""

    has_module: bool
    families: tuple[FamilyBuild, ...]
    errors: tuple[tuple[str, str], ...]  # (family, why its library did not load)

    def family(self, name: str) -> FamilyBuild | None:
        return next((family for family in self.families if family.name == name), None)

    def common_family(self) -> FamilyBuild | None:
        """The library that serves what every family holds, as csrc/bindings/kernel_library.cpp chooses it."""
        return self.family("sm80") or next(iter(self.families), None)

    def load_error(self, name: str) -> str:
        return dict(self.errors).get(name, "")


NO_KERNELS = BuildDescription(False, (), ())


def parse_cuda_version(text: str | int | None) -> tuple[int, int] | None:
    """``"12.10"``, ``"12.10.1"`` or CUDA's ``12100`` -> ``(12, 10)``: integer tuples, so that 12.10 > 12.3."""
    if text is None or text == "" or text == 0:
        return None
    if isinstance(text, int):
        return text // 1000, text % 1000 // 10
    parts = [int("".join(c for c in part if c.isdigit()) or 0) for part in text.split(".")[:2]]
    return parts[0], parts[1] if len(parts) > 1 else 0


def parse_build_info(info: dict[str, Any]) -> BuildDescription:
    """The dict of ``_C.build_info()`` as a BuildDescription."""
    families = tuple(
        FamilyBuild(
            name,
            tuple(arch for arch in str(family.get("archs", "")).replace(",", ";").split(";") if arch),
            tuple(family.get("cuda") or ()),
            frozenset(family.get("kernels", ())),
        )
        for name, family in sorted(info.get("families", {}).items())
    )
    return BuildDescription(True, families, tuple(sorted(info.get("errors", {}).items())))


@functools.lru_cache(maxsize=1)
def extension() -> ModuleType | None:
    """The compiled module, or None where the package was installed without it."""
    try:
        from .. import _C  # type: ignore[attr-defined,unused-ignore]
    except ImportError:
        return None
    return _C


def build_help(arch: str) -> str:
    """What to do about a kernel that this installation lacks: a source tree builds what it is asked for, and the wheels
    of a release hold kernels."""
    return (
        f'build broadhead where its source is, with nvcc: BROADHEAD_CUDA_ARCHS="{arch}" pip install .; or install a'
        " release: pip install --force-reinstall --no-deps broadhead"
    )


@functools.lru_cache(maxsize=1)
def build_description() -> BuildDescription:
    """What this installation holds; loads the kernel libraries on first use."""
    module = extension()
    build = NO_KERNELS if module is None else parse_build_info(module.build_info())
    if not build.families and not build.errors:
        _note_missing_kernels()
    return build


def _note_missing_kernels() -> None:
    """Tell that the installation is the CPU package on a machine with a GPU: pip hides that the build said so."""
    import torch

    if not torch.cuda.is_available():
        return
    warnings.warn(
        "broadhead: torch sees a CUDA device, but this installation holds no kernels (they were left out when it was "
        "built): calls on CUDA tensors run on the torch fallback. To have kernels "
        + build_help(arch_for(torch.cuda.get_device_capability()))
        + ". `broadhead info` shows what is missing",
        FallbackWarning,
        stacklevel=3,
    )
