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


def _call_signature_in_python(call: Any, others: Any) -> tuple[Any, ...]:
    """As _C.call_signature: values by type as well, as 1, 1.0 and True are equal."""
    values = (*call, *others)
    is_tensor = [hasattr(value, "data_ptr") for value in values]
    tensors = [value if given else None for value, given in zip(values, is_tensor, strict=True)]
    return _signature_in_python(*tensors), tuple(
        None if given else _typed(value) for value, given in zip(values, is_tensor, strict=True)
    )


def _typed(value: Any) -> Any:
    return tuple(map(_typed, value)) if isinstance(value, (list, tuple)) else (type(value), value)


def _find_signature(*tensors: Any) -> Any:
    """Bound on first use: the compiled signature where there is one, else the Python one."""
    global _signature
    _signature = _signature_in_python if native.extension() is None else connected_module().signature
    return _signature(*tensors)


def _find_call_signature(call: Any, others: Any) -> Any:
    """Likewise, of a call."""
    global _call_signature
    _call_signature = _call_signature_in_python if native.extension() is None else connected_module().call_signature
    return _call_signature(call, others)


_signature: Any = _find_signature
_call_signature: Any = _find_call_signature


def signature_of(*tensors: Any) -> Any:
    """What validation reads of tensors: the first five also by alignment. None: they can not be part of a key."""
    return _signature(*tensors)


def call_signature_of(call: tuple[Any, ...], others: tuple[Any, ...]) -> Any:
    """What validation reads of the fields of AttentionArgs and of ``others``, values by type too; None: no key."""
    return _call_signature(call, others)
