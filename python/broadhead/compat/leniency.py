"""What FlashAttention takes and the native functions refuse: metadata of any origin, scales that nothing reads."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import CompatWarning, InvalidArgumentError, InvalidTypeError
from ..run.fallback import callers_level, kind_of

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
#: The kinds of refusals that were told.
_told: set[str] = set()
_MAX_TOLD = 256


def with_metadata(run: Callable[..., Any], scheduler_metadata: Any, arguments: dict[str, Any]) -> Any:
    """``run`` with the metadata, or without it and with one warning where ``run`` refuses it.

    A call that is refused has written nothing, so the second one starts from the same caches.
    """
    if scheduler_metadata is None:
        return run(**arguments)
    try:
        return run(scheduler_metadata=scheduler_metadata, **arguments)
    except (InvalidArgumentError, InvalidTypeError) as error:
        text = str(error)
        if ": scheduler_metadata " not in text:
            raise
    tell_once(text)
    return run(**arguments)


def tell_once(reason: str) -> None:
    """Warn once a kind of reason that scheduler metadata is ignored."""
    kind = kind_of(reason)
    if kind in _told:
        return
    if len(_told) >= _MAX_TOLD:
        _told.clear()
    _told.add(kind)
    warnings.warn(
        f"scheduler_metadata is ignored, and the call plans for itself: {reason} (warned once per kind of reason)",
        CompatWarning,
        stacklevel=callers_level(),
    )


def scale_of(descale: Tensor | None, x: Any) -> Tensor | None:
    """The descale of ``x``, or None: FlashAttention reads none where ``x`` is not float8."""
    return descale if descale is not None and isinstance(x, Tensor) and x.dtype in _FLOAT8 else None
