"""The functions of broadhead.compat by the foreign module that they stand for, without installing anything."""

from __future__ import annotations

from typing import Any

from broadhead.compat import surfaces

#: The names that each foreign module has, by its recorded name.
SOURCES: dict[str, dict[str, Any]] = {}
for _surface in ("flash_attn", "flash_attn_interface", "flash_attn.cute", "vllm_flash_attn", "sgl_kernel.flash_attn"):
    for _module in surfaces.SURFACES[_surface].modules:
        if _module.source:
            SOURCES[_module.name] = {k: v for k, v in surfaces.contents(_module).items() if k != "__version__"}
# The fork's package names are recorded together with those of its interface.
SOURCES["vllm_flash_attn"] |= SOURCES.pop("vllm_flash_attn.flash_attn_interface")
for _name in ("flash_attn", "flash_attn.cute", "flash_attn_3.flash_attn_interface"):
    SOURCES.pop(_name)


def function_of(module: str, name: str) -> Any:
    """The function that stands for ``name`` of the foreign ``module``."""
    return SOURCES[module][name]
