"""Remembers which backend and kernel ran last in each thread, and warns once per reason of a fallback."""

from __future__ import annotations

import os
import threading
import warnings

from .errors import FallbackWarning

#: (backend, row id or None, reason)
Dispatch = tuple[str, str | None, str]


_NOTHING: Dispatch = ("none", None, "nothing ran in this thread")


class _State(threading.local):
    last = _NOTHING  # attention
    append = _NOTHING  # appending new keys to a cache
    merge = _NOTHING  # merge_attn_states


state = _State()
_warned: set[str] = set()


def last_dispatch() -> Dispatch:
    """``(backend, row id or None, reason)`` of the last attention call of this thread: what ran, and why."""
    return state.last


def is_strict() -> bool:
    """Whether BROADHEAD_STRICT asks for an error where a call would fall back."""
    return os.environ.get("BROADHEAD_STRICT", "0") not in ("", "0")


def warn_fallback(function: str, device_name: str, reason: str) -> None:
    """Tell once per reason that a call on a CUDA device runs on the torch fallback."""
    if reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(
        f"{function}: runs on the torch fallback, slower and with more memory, on {device_name}: {reason}"
        " (warned once per reason; backend='cuda' or BROADHEAD_STRICT=1 raises instead)",
        FallbackWarning,
        stacklevel=6,
    )
