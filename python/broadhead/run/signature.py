"""What validation reads of tensors, as a part of the key of a call that need not be validated again."""

from __future__ import annotations

from typing import Any

from ..call.problem import tensor_signature
from ..plan import native
from .cuda_backend import connected_module


def _signature_in_python(*tensors: Any) -> tuple[Any, ...]:
    """As _C.signature, for an installation without the compiled module: the first five also by alignment."""
    return tuple(
        None if t is None else (*tensor_signature(t), t.data_ptr() & 15 if i < 5 else 0) for i, t in enumerate(tensors)
    )


def _find_signature(*tensors: Any) -> Any:
    """Bound on first use: the compiled signature where there is one, else the Python one."""
    global _signature
    _signature = _signature_in_python if native.extension() is None else connected_module().signature
    return _signature(*tensors)


_signature: Any = _find_signature


def signature_of(*tensors: Any) -> Any:
    """What validation reads of tensors: the first five also by alignment. None: they can not be part of a key."""
    return _signature(*tensors)
