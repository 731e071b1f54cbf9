"""Shows importlib.metadata the distributions that version checks look for, while their surfaces are installed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from typing import Any

from .surfaces import Surface


class _SurfaceDistribution(Distribution):
    """A distribution that is not on the disk."""

    def __init__(self, name: str, surface: Surface) -> None:
        self._texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {surface.version}\n"
            "Summary: broadhead under the name that version checks look for\n",
            "top_level.txt": "\n".join(surface.top_level) + "\n",
        }

    def read_text(self, filename: Any) -> str | None:
        return self._texts.get(str(filename))

    def locate_file(self, path: Any) -> Path:
        return Path(path)


class Distributions(DistributionFinder):
    """A finder on sys.meta_path, which finds no module."""

    def __init__(self) -> None:
        self._shown: dict[str, _SurfaceDistribution] = {}

    def show(self, surfaces: Mapping[str, Surface]) -> None:
        """Show these distributions from now on, and no others."""
        self._shown = {name: _SurfaceDistribution(name, surface) for name, surface in surfaces.items()}
        if self._shown and self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        elif not self._shown and self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """Modules are found elsewhere."""

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        """The distribution of the name that is asked for, or all."""
        wanted = None if context is None else context.name
        if wanted is None:
            return list(self._shown.values())
        found = self._shown.get(wanted.lower().replace("_", "-").replace(".", "-"))
        return [] if found is None else [found]
