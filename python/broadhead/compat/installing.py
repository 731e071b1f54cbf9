"""install and uninstall: puts the modules of a surface in place of missing ones, and takes them away again."""

from __future__ import annotations

import importlib.util
import sys
import threading
import types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

import torch

from ..errors import InvalidArgumentError, UnsupportedError
from .distributions import Distributions
from .located import is_ours, locate
from .surfaces import SURFACES, Surface, SurfaceModule, contents, find_surface, source

_MISSING: Any = object()
_lock = threading.RLock()


class _Holder(Loader):
    """The loader that the specs of our modules name: the module is there already."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return self._module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing is left to run."""


class _Finder(MetaPathFinder):
    """Finds our modules below packages that nobody has imported yet: the import sets the attribute of the package."""

    def __init__(self) -> None:
        self.modules: dict[str, types.ModuleType] = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        module = self.modules.get(fullname)
        return None if module is None else module.__spec__

    def show(self, modules: dict[str, types.ModuleType]) -> None:
        """Find these from now on. Packages forget those that they hold of the others."""
        for name, module in self.modules.items():
            parent, _, child = name.rpartition(".")
            held = vars(sys.modules[parent]) if parent in sys.modules else {}
            if held.get(child) is module:
                del held[child]
        self.modules = modules
        if modules and self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        elif not modules and self in sys.meta_path:
            sys.meta_path.remove(self)


class _Active:
    """One surface that is installed, and how often."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.surface: Surface = SURFACES[name]
        self.count = 0
        self.real_paths: dict[str, list[str]] = {}
        self.modules: list[tuple[SurfaceModule, types.ModuleType]] = []

    def build(self) -> None:
        for each in self.surface.modules:
            module = types.ModuleType(each.name, f"{each.name} by broadhead.compat.")
            spec = ModuleSpec(each.name, _Holder(module), is_package=each.is_package)
            if each.is_package:
                # Other parts of a package that is installed stay importable.
                module.__path__ = spec.submodule_search_locations = self.real_paths.get(each.name, [])
            module.__spec__, module.__loader__ = spec, spec.loader
            module.__package__ = spec.parent
            vars(module).update(contents(each))
            self.modules.append((each, module))


#: The surfaces that are installed, in their order.
_active: dict[str, _Active] = {}
#: sys.modules as it was below the names that we touch, before the first of them was touched.
_before: dict[str, Any] = {}
#: The prefixes that ``_before`` knows.
_known: set[str] = set()
#: Attributes of packages that are not ours, as they were: (package, name) -> value.
_attributes: dict[tuple[int, str], tuple[types.ModuleType, Any]] = {}
_distributions = Distributions()
_finder = _Finder()
#: What defines torch.ops.flash_attn_3, if anything of ours does.
_libraries: list[torch.library.Library] = []


class Installation:
    """A surface in place. Ends with `uninstall`, or with the ``with`` block that it opens."""

    def __init__(self, surface: str) -> None:
        self.surface = surface
        self._ended = False

    def uninstall(self) -> None:
        """Take the surface away, unless another installation of it is left. A second call does nothing."""
        with _lock:
            if not self._ended:
                self._ended = True
                _release(self.surface)

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *_: object) -> None:
        self.uninstall()

    def __repr__(self) -> str:
        return f"<{self.surface} by broadhead.compat{', uninstalled' if self._ended else ''}>"


def install(surface: str, *, override: bool = False) -> Installation:
    """Let ``import`` find broadhead under the name of another attention package.

    Args:
        surface: "flash_attn" (FlashAttention-2), "flash_attn_interface" or "flash_attn_3" (FlashAttention-3, with
            torch.ops.flash_attn_3), "flash_attn.cute" (FlashAttention-4), "vllm_flash_attn" or "vllm.vllm_flash_attn"
            (vLLM's fork), "sgl_kernel.flash_attn" (SGLang).
        override: also where the other package is installed. Modules that were imported from it before keep what they
            imported.

    ``importlib.metadata.version`` finds the distribution that clients look for, as ``<version>+broadhead``.

    Returns:
        An `Installation`: ``with install(...):`` ends it with the block, its uninstall() at any time.

    Raises:
        InvalidArgumentError: there is no such surface, or the package that it is a part of is not installed.
        UnsupportedError: the other package is installed, and override is False.
    """
    name = find_surface("install", surface)
    with _lock:
        active = _active.get(name)
        if active is None:
            active = _prepare(name, override)
            _remember(active)
            _active[name] = active
            try:
                _rebuild()
            except BaseException:
                del _active[name]
                _rebuild()
                raise
        active.count += 1
        return Installation(name)


def uninstall(surface: str) -> None:
    """Take away a surface, however often it was installed.

    Raises:
        InvalidArgumentError: there is no such surface, or it is not installed.
    """
    name = find_surface("uninstall", surface)
    with _lock:
        if name not in _active:
            raise InvalidArgumentError(f"uninstall: surface {surface!r} is not installed by broadhead.compat.install")
        _active[name].count = 1
        _release(name)


def _release(name: str) -> None:
    active = _active.get(name)
    if active is None:
        return
    active.count -= 1
    if active.count == 0:
        del _active[name]
        _rebuild()


def _prepare(name: str, override: bool) -> _Active:
    active = _Active(name)
    surface = active.surface
    if surface.inside is not None and surface.inside not in sys.modules and locate(surface.inside) is None:
        raise InvalidArgumentError(
            f"install: {name!r} is a part of the package {surface.inside}, which is not installed; install it, or use"
            " another surface"
        )
    found = locate(surface.probe)
    if found is not None and not is_ours(found) and not override:
        raise UnsupportedError(
            f"install: {surface.probe} is installed already ({found.origin or 'a namespace package'}) and keeps its"
            " place; pass override=True to run broadhead in its place, or uninstall it"
        )
    for module in surface.modules:
        spec = locate(module.name) if module.is_package else None
        active.real_paths[module.name] = list((spec.submodule_search_locations if spec else None) or ())
    active.build()
    return active


def _below(prefix: str) -> list[str]:
    return [name for name in sys.modules if name == prefix or name.startswith(f"{prefix}.")]


def _prefixes(surface: Surface) -> set[str]:
    """What our modules lie below; of packages that are not ours only our part."""
    return {surface.probe} if surface.inside else set(surface.top_level)


def _remember(active: _Active) -> None:
    for prefix in _prefixes(active.surface) - _known:
        _known.add(prefix)
        _before.update({name: sys.modules[name] for name in _below(prefix)})


def _rebuild() -> None:
    """Put everything back as it was, then the surfaces that are left in their order."""
    # What was imported beside ours stays: some packages can not be imported twice.
    for name in [name for prefix in _known for name in _below(prefix) if name not in _before and _is_below_ours(name)]:
        del sys.modules[name]
    sys.modules.update(_before)
    for (_, attribute), (package, value) in _attributes.items():
        if value is _MISSING:
            vars(package).pop(attribute, None)
        else:
            setattr(package, attribute, value)
    _attributes.clear()
    waiting: dict[str, types.ModuleType] = {}
    for active in _active.values():
        waiting |= _place(active)
    _finder.show(waiting)
    _distributions.show({a.surface.distribution: a.surface for a in _active.values() if a.surface.distribution})
    _settle_operators()
    if not _active:
        _before.clear()
        _known.clear()
    importlib.invalidate_caches()


def _is_below_ours(name: str) -> bool:
    """Whether the module, or a package that it lies in, is one of ours."""
    parts = name.split(".")
    modules = [sys.modules.get(".".join(parts[:end])) for end in range(1, len(parts) + 1)]
    return any(isinstance(getattr(module, "__loader__", None), _Holder) for module in modules)


def _place(active: _Active) -> dict[str, types.ModuleType]:
    """Put the modules in place; returns those that wait for the import of the package that they are below."""
    waiting = {}
    for described, module in active.modules:
        # A parent without names gives way to one that is installed, or that another surface has put there.
        is_parent = described.is_package and not described.source
        if is_parent and (described.name in sys.modules or locate(described.name) is not None):
            continue
        parent, _, child = described.name.rpartition(".")
        if parent and parent not in sys.modules:
            waiting[described.name] = module
            sys.modules.pop(described.name, None)
            continue
        sys.modules[described.name] = module
        if parent:
            _set_attribute(sys.modules[parent], child, module)
    # A package that takes the place of another surface's parent holds that surface's modules, too.
    placed = {described.name for described, module in active.modules if sys.modules.get(described.name) is module}
    for name in list(sys.modules):
        parent, _, child = name.rpartition(".")
        if parent in placed and child not in vars(sys.modules[parent]):
            _set_attribute(sys.modules[parent], child, sys.modules[name])
    return waiting


def _set_attribute(package: types.ModuleType, name: str, value: Any) -> None:
    _attributes.setdefault((id(package), name), (package, vars(package).get(name, _MISSING)))
    setattr(package, name, value)


def _settle_operators() -> None:
    """Define torch.ops.flash_attn_3 while a surface needs it."""
    wanted = any(active.surface.operators for active in _active.values())
    if wanted and not _libraries:
        _libraries.append(source("flash_attn_3_ops").define())
    elif not wanted and _libraries:
        _libraries.pop()._destroy()
