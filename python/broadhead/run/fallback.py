"""Allows or refuses a fallback to torch ops, one rule for every operation; remembers what ran last in each thread."""

from __future__ import annotations

import os
import re
import sys
import threading
import warnings
from collections.abc import Callable

from ..errors import FallbackWarning, InvalidArgumentError, UnsupportedError
from ..plan.device import DeviceDescription

#: (backend, row id or None, reason)
Dispatch = tuple[str, str | None, str]


#: The reason where a caller says backend="torch".
ASKED_FOR_TORCH = "backend='torch' was asked for"

_NOTHING: Dispatch = ("none", None, "nothing ran in this thread")

#: Spellings of the environment variable BROADHEAD_STRICT, in any case.
_STRICT_VALUES = {"1": True, "true": True, "on": True, "yes": True}
_STRICT_VALUES |= {"": False, "0": False, "false": False, "off": False, "no": False}

#: A number, or a tuple of numbers such as strides, that is no part of a name: "head_dim 72" but not "d128" or "bf16".
_NUMBERS = re.compile(r"(?<![A-Za-z_0-9])(?:\(-?\d+(?:, -?\d+)*,?\)|-?\d+(?:\.\d+)*)(?![A-Za-z_0-9])")


class _State(threading.local):
    last = _NOTHING  # attention
    append = _NOTHING  # appending new keys to a cache
    merge = _NOTHING  # merge_attn_states


state = _State()
#: The kinds of reasons that were told.
_warned: set[str] = set()
#: Beyond it all are told again: more kinds than the code has texts come from texts of others, such as load errors.
_MAX_WARNED = 256


def last_dispatch() -> Dispatch:
    """``(backend, row id or None, reason)`` of the last attention call of this thread: what ran, and why."""
    return state.last


def is_strict() -> bool:
    """Whether BROADHEAD_STRICT asks for an error where a call would fall back.

    Raises:
        InvalidArgumentError: it has another value than those that mean yes or no.
    """
    text = os.environ.get("BROADHEAD_STRICT", "")
    strict = _STRICT_VALUES.get(text.strip().lower())
    if strict is None:
        raise InvalidArgumentError(
            "the environment variable BROADHEAD_STRICT must be 1, true, on or yes (raise where a call on a CUDA device"
            f" would fall back) or 0, false, off, no or empty (warn), got {text!r}"
        )
    return strict


def settle_fallback(
    function: str, device: DeviceDescription, backend: str | None, reason: str, refusal: Callable[[], str]
) -> None:
    """Allow an operation to run on torch ops because of ``reason``; on a CUDA device a warning tells it.

    Args:
        backend: as the caller gave it; "torch" is no fallback.
        refusal: makes the text of the error, which names the function.

    Raises:
        UnsupportedError: ``backend="cuda"`` or BROADHEAD_STRICT=1 asks for a kernel.
    """
    if backend == "torch":
        return
    if backend == "cuda":
        raise UnsupportedError(refusal())
    if device.type != "cuda":
        return
    if is_strict():
        raise UnsupportedError("BROADHEAD_STRICT=1: " + refusal())
    warn_fallback(function, device.label(), reason)


def settle_operation(
    function: str, operation: str, device: DeviceDescription, backend: str | None, obstacle: str
) -> None:
    """As settle_fallback, for an operation beside attention: one that a kernel of every library does.

    Args:
        operation: its name in the warning and in the error, as in ``the {operation} kernel``.
        obstacle: why the kernel does not take the call.
    """
    settle_fallback(
        function,
        device,
        backend,
        f"the {operation} kernel does not take this call: {obstacle}",
        lambda: f"{function}: the {operation} kernel does not take this call: {obstacle}. Device: {device.label()}",
    )


def kind_of(reason: str) -> str:
    """``reason`` without its numbers: what calls that fall back for one cause have in common."""
    return _NUMBERS.sub("N", reason)


def warn_fallback(function: str, device_name: str, reason: str) -> None:
    """Tell once a kind of reason that a call on a CUDA device runs on the torch fallback."""
    kind = kind_of(reason)
    if kind in _warned:
        return
    if len(_warned) >= _MAX_WARNED:
        _warned.clear()
    _warned.add(kind)
    warnings.warn(
        f"{function}: runs on the torch fallback, slower and with more memory, on {device_name}: {reason}"
        " (warned once per kind of reason; backend='cuda' or BROADHEAD_STRICT=1 raises instead)",
        FallbackWarning,
        stacklevel=callers_level(),
    )


def callers_level() -> int:
    """The stacklevel of the first frame outside this package, as seen from the function that calls this one."""
    package = os.path.dirname(os.path.dirname(__file__)) + os.sep
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        level, frame = level + 1, frame.f_back
    return level
