"""The surfaces: which modules each one puts on the path, with which names, and which distribution clients look for."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from ..errors import InvalidArgumentError


class SurfaceModule(NamedTuple):
    """One foreign module."""

    name: str
    source: str = ""  # the module of this package whose names it has; "": it has none
    names: str = ""  # the tuple of them in ``source``
    is_package: bool = False


class Surface(NamedTuple):
    """What install() puts in place."""

    modules: tuple[SurfaceModule, ...]  # parents first
    probe: str  # the module that a real installation has
    distribution: str | None = None  # the name that version checks look for
    version_of: str = ""  # the module of this package that holds the version
    operators: bool = False  # torch.ops.flash_attn_3
    inside: str | None = None  # a package that must be installed: the module is a part of it

    @property
    def version(self) -> str:
        return str(vars(source(self.version_of))["__version__"]) + "+broadhead" if self.version_of else ""

    @property
    def top_level(self) -> tuple[str, ...]:
        """The importable names without a dot."""
        return tuple(dict.fromkeys(module.name.partition(".")[0] for module in self.modules))


_FA2, _FA3, _FA4 = "flash_attn_2", "flash_attn_3", "flash_attn_4"


def _forks(name: str, inside: str | None) -> Surface:
    modules = (
        SurfaceModule(name, "vllm_flash_attn", "PACKAGE_NAMES", is_package=True),
        SurfaceModule(f"{name}.flash_attn_interface", "vllm_flash_attn", "INTERFACE_NAMES"),
    )
    return Surface(modules, probe=name, version_of="vllm_flash_attn", inside=inside)


SURFACES = {
    "flash_attn": Surface(
        (
            SurfaceModule("flash_attn", _FA2, "PACKAGE_NAMES", is_package=True),
            SurfaceModule("flash_attn.flash_attn_interface", _FA2, "INTERFACE_NAMES"),
            SurfaceModule("flash_attn.bert_padding", "bert_padding", "NAMES"),
        ),
        probe="flash_attn.flash_attn_interface",
        distribution="flash-attn",
        version_of=_FA2,
    ),
    "flash_attn_interface": Surface(
        (
            SurfaceModule("flash_attn_interface", _FA3, "NAMES"),
            SurfaceModule("flash_attn_3", is_package=True),
            SurfaceModule("flash_attn_3._C"),  # some import it to have the operators defined
            SurfaceModule("flash_attn_3.flash_attn_interface", _FA3, "NAMES"),
        ),
        probe="flash_attn_interface",
        distribution="flash-attn-3",
        version_of=_FA3,
        operators=True,
    ),
    "flash_attn.cute": Surface(
        (
            SurfaceModule("flash_attn", is_package=True),
            SurfaceModule("flash_attn.cute", _FA4, "PACKAGE_NAMES", is_package=True),
            SurfaceModule("flash_attn.cute.interface", _FA4, "INTERFACE_NAMES"),
        ),
        probe="flash_attn.cute.interface",
        distribution="flash-attn-4",
        version_of=_FA4,
    ),
    "vllm_flash_attn": _forks("vllm_flash_attn", None),
    "vllm.vllm_flash_attn": _forks("vllm.vllm_flash_attn", "vllm"),
    "sgl_kernel.flash_attn": Surface(
        (SurfaceModule("sgl_kernel.flash_attn", "sgl_kernel", "NAMES"),),
        probe="sgl_kernel.flash_attn",
        inside="sgl_kernel",
    ),
}
#: Other names of a surface: that of its distribution, and of a module of it.
_SYNONYMS = {
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_3.flash_attn_interface": "flash_attn_interface",
    "flash_attn.flash_attn_interface": "flash_attn",
    "flash_attn.cute.interface": "flash_attn.cute",
}


def find_surface(function: str, name: Any) -> str:
    """The name of the surface in SURFACES.

    Raises:
        InvalidArgumentError: there is no such surface.
    """
    found = _SYNONYMS.get(name, name) if isinstance(name, str) else None
    if found not in SURFACES:
        accepted = ", ".join(repr(each) for each in (*SURFACES, *_SYNONYMS))
        raise InvalidArgumentError(f"{function}: surface must be one of {accepted}, got {name!r}")
    return found


def source(name: str) -> Any:
    """The module of this package that has the functions."""
    return importlib.import_module(f"{__package__}.{name}")


def contents(module: SurfaceModule) -> dict[str, Any]:
    """What the foreign module holds."""
    if not module.source:
        return {}
    names = vars(source(module.source))
    found = {name: names[name] for name in names[module.names]}
    if module.is_package and "__version__" in names:
        found["__version__"] = names["__version__"]
    return found


def fill(namespace: dict[str, Any], surface: str) -> None:
    """Give a module of a distribution what the foreign module of its name holds, and its ``__all__``.

    Args:
        namespace: the ``globals()`` of the module.
        surface: a name in SURFACES.
    """
    (module,) = [each for each in SURFACES[surface].modules if each.name == namespace["__name__"]]
    held = contents(module)
    namespace.update(held)
    namespace["__all__"] = [name for name in held if not name.startswith("_")]
