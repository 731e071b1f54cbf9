"""Scalar arguments: what is accepted for an int, a bool or a number, turned into Python's own; refusals by name."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgumentError, InvalidTypeError

INT32_MAX = 2**31 - 1
#: The most splits that the kernels take: what merges them keeps a weight for each in shared memory.
MAX_SPLITS = 128
#: The most that a caller may ask for, as FlashAttention-3 allows; it is a bound, and MAX_SPLITS fulfil it.
MAX_SPLITS_ASKED = 256

#: Characters of a value that an error shows.
_MAX_SHOWN = 100


def describe_value(value: object) -> str:
    """What came, in a few words."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    name = type(value).__name__
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and len(shape) > 0:
        return f"a {type(value).__module__}.{name} of shape {shape}, dtype {getattr(value, 'dtype', 'unknown')}"
    text = repr(value)
    return f"{text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + '...'} ({name})"


def read_scalar(function: str, name: str, value: Any, accepted: str = "a Python number") -> Any:
    """``value``, or the number in it where it is a 0-dim tensor on the CPU or a NumPy scalar.

    Raises:
        InvalidTypeError: a tensor of other dimensions, on another device, or one that a gradient is asked for.
    """
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise InvalidTypeError(f"{function}: {name} must be {accepted}, got {describe_value(value)}")
        if value.device.type != "cpu":
            raise InvalidTypeError(
                f"{function}: {name} must be {accepted} or a 0-dim tensor on the CPU, got {describe_value(value)}:"
                f" it would have to be read back from the device, which waits for it; read {name} once, with .item()"
            )
        if value.requires_grad and torch.is_grad_enabled():
            raise InvalidTypeError(
                f"{function}: {name} has no gradient, got {describe_value(value)} that requires grad; pass"
                f" {name}.detach()"
            )
        return value.item()
    # NumPy's scalars and 0-dim arrays, without importing NumPy.
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value


def check_int(function: str, name: str, value: object, low: int = 0, high: int = INT32_MAX) -> int:
    """An int in [low, high]: Python's, NumPy's, or a 0-dim tensor on the CPU."""
    read = value if type(value) is int else read_scalar(function, name, value, "a Python int")
    if isinstance(read, bool) or not isinstance(read, numbers.Integral):
        raise InvalidTypeError(f"{function}: {name} must be a Python int, got {describe_value(value)}")
    number = int(read)
    if not low <= number <= high:
        raise InvalidArgumentError(f"{function}: {name} must be an int in [{low}, {high}], got {number}")
    return number


def check_bool(function: str, name: str, value: object) -> bool:
    """A truth value: a bool or an int, Python's, NumPy's, or a 0-dim tensor of these on the CPU."""
    if isinstance(value, bool):
        return value
    read = read_scalar(function, name, value, "True or False")
    if not isinstance(read, numbers.Integral):
        raise InvalidTypeError(f"{function}: {name} must be True or False, got {describe_value(value)}")
    return bool(read)


def check_optional_bool(function: str, name: str, value: object) -> bool | None:
    return None if value is None else check_bool(function, name, value)


def check_number(function: str, name: str, value: object, *, minimum: float | None = None) -> float:
    """A finite number, at least ``minimum``: Python's, NumPy's, or a 0-dim tensor on the CPU."""
    read = value if type(value) is float else read_scalar(function, name, value)
    if isinstance(read, bool) or not isinstance(read, numbers.Real):
        raise InvalidTypeError(f"{function}: {name} must be a Python number, got {describe_value(value)}")
    number = float(read)
    if not math.isfinite(number) or (minimum is not None and number < minimum):
        accepted = "a finite number" if minimum is None else f"a finite number >= {minimum}"
        raise InvalidArgumentError(f"{function}: {name} must be {accepted}, got {number}")
    return number


def check_softcap(function: str, softcap: object) -> float:
    """The cap of the scores; None is 0, off."""
    return 0.0 if softcap is None else check_number(function, "softcap", softcap, minimum=0.0)


def check_attention_chunk(function: str, attention_chunk: object) -> int:
    """Positions of a chunk; None is 0, off."""
    return 0 if attention_chunk is None else check_int(function, "attention_chunk", attention_chunk)


def check_num_splits(function: str, num_splits: object) -> int:
    """The bound of the splits of a row of keys, 0: the heuristic. Above what kernels take it bounds nothing."""
    return min(check_int(function, "num_splits", num_splits, 0, MAX_SPLITS_ASKED), MAX_SPLITS)
