"""Stands in for the compiled modules of vLLM where only its Python code is there."""

from __future__ import annotations

import sys
import types
from pathlib import Path

COMPILED = (
    "_C", "_C_stable_libtorch", "_moe_C_stable_libtorch", "_qutlass_C",
    "vllm_flash_attn._vllm_fa2_C", "vllm_flash_attn._vllm_fa3_C",
)  # fmt: skip


def leave_out_compiled() -> None:
    """Compiled modules that are not there are empty: nothing of them runs."""
    import vllm

    root = Path(vllm.__file__).parent
    for name in COMPILED:
        if not list(root.glob(f"{name.replace('.', '/')}*.so")):
            sys.modules[f"vllm.{name}"] = types.ModuleType(f"vllm.{name}")
