"""Says once a surface that FlashAttention-4 has faster kernels for a call: head dims 64 to 256 on 10.x."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from ..errors import CompatWarning
from ..run.fallback import callers_level

#: Head dims of which FlashAttention-4's kernels on compute capability 10.x are faster.
_FASTER_HEAD_DIMS = range(64, 257)
_told: set[str] = set()


@functools.cache
def _major(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0]


def tell_if_faster_elsewhere(surface: str, q: Any) -> None:
    """Warn if FlashAttention-4 has a faster kernel for ``q`` on its device."""
    if surface in _told or not isinstance(q, Tensor) or q.device.type != "cuda" or torch.compiler.is_compiling():
        return
    if _major(q.get_device()) != 10 or q.shape[-1] not in _FASTER_HEAD_DIMS:
        return
    _told.add(surface)
    warnings.warn(
        f"{surface} runs on broadhead, on a device of compute capability 10.x at head_dim {q.shape[-1]}, where"
        " FlashAttention-4 (distribution flash-attn-4) has faster kernels; for the fastest of them do not install this"
        " surface here (warned once per surface)",
        CompatWarning,
        stacklevel=callers_level(),
    )
