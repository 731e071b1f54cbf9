"""Plugs broadhead into SGLang as the attention backend "broadhead", by the entry point group ``sglang.srt.plugins``.

    python -m sglang.launch_server --model-path google/gemma-4-31B-it --attention-backend broadhead

The backend is SGLang's own FlashAttention backend, with its paging, its speculative decoding and its CUDA graphs; only
the attention functions that it calls are ours. ``SGLANG_PLUGINS`` of SGLang, a list of names, can leave the plugin out.
"""

from __future__ import annotations

from .plugin import NAME, obstacle, register

__all__ = ["NAME", "obstacle", "register"]
