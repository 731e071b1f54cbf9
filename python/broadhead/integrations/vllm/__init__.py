"""Serves vLLM 0.24 to 0.33 as its attention backend. vLLM finds it by the entry point group ``vllm.general_plugins``.

    vllm serve google/gemma-4-31B-it --attention-backend CUSTOM  # all layers
    BROADHEAD_VLLM=auto vllm serve google/gemma-4-31B-it         # the layers where the kernels of broadhead are ahead
    BROADHEAD_VLLM=on vllm serve google/gemma-4-31B-it           # all layers, without a flag

``broadhead vllm-check`` says whether and why the backend would be taken on a machine. docs/vllm.md has the details.
"""

from __future__ import annotations

from typing import Any

from .policy import VARIABLE, Mode, read_mode
from .registration import BACKEND, register

__all__ = ["BACKEND", "VARIABLE", "BroadheadBackend", "Mode", "read_mode", "register"]


def __getattr__(name: str) -> Any:
    # vLLM is imported with the backend, and only then: the plugin itself also loads where vLLM is being set up.
    if name == "BroadheadBackend":
        from .backend import BroadheadBackend

        return BroadheadBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
