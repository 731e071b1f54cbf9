"""Mask rules: one normaliser of window_size and the interval of keys that a query sees."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgumentError, InvalidTypeError
from .scalars import read_scalar

#: A window side this large is unbounded: no sequence is that long, and kernels add it to 32-bit positions.
UNBOUNDED_WINDOW = 1 << 30

_ACCEPTED = "None, an int, or a list, tuple or CPU tensor (left, right) of ints (None or negative = unbounded)"


def _side(value: Any, function: str) -> int:
    if value is None:
        return -1
    if type(value) is not int:
        read = read_scalar(function, "window_size", value, _ACCEPTED)
        # Shapes that are traced are ints by their behaviour.
        if isinstance(read, bool) or not isinstance(read, (numbers.Integral, torch.SymInt)):
            raise InvalidTypeError(
                f"{function}: window_size must be {_ACCEPTED}, got a side of type {type(value).__name__}"
            )
        value = int(read) if isinstance(read, numbers.Integral) else read
    return -1 if value < 0 or value >= UNBOUNDED_WINDOW else value


def _sides(window_size: Any, function: str) -> Any:
    """``window_size`` with a tensor or an array of two sides as a list."""
    if getattr(window_size, "ndim", 0) == 0:
        return window_size
    if isinstance(window_size, Tensor) and window_size.device.type != "cpu":
        raise InvalidTypeError(
            f"{function}: window_size must be {_ACCEPTED}, got a tensor on {window_size.device}: it would have to be"
            " read back from the device, which waits for it"
        )
    return window_size.tolist()


def normalize_chunk(attention_chunk: int) -> int:
    """A chunk wider than any sequence is none: 0."""
    return 0 if attention_chunk >= UNBOUNDED_WINDOW else attention_chunk


def normalize_window(window_size: Any, causal: bool, function: str = "normalize_window") -> tuple[int, int]:
    """Turn any accepted ``window_size`` and ``causal`` into ``(left, right)``.

    -1 is unbounded. An int is both sides. Tensors are read, so they must be on the CPU. ``causal`` clamps the right
    side to 0, so causal attention is ``(-1, 0)``.

    Raises:
        InvalidTypeError, InvalidArgumentError: ``window_size`` is none of None, int, pair of ints.
    """
    window_size = _sides(window_size, function)
    if window_size is None:
        left, right = -1, -1
    elif isinstance(window_size, (tuple, list)):
        if len(window_size) != 2:
            raise InvalidArgumentError(f"{function}: window_size must be {_ACCEPTED}, got {len(window_size)} values")
        left, right = _side(window_size[0], function), _side(window_size[1], function)
    else:
        left = right = _side(window_size, function)
    return left, 0 if causal else right


def split_causal(causal: Any) -> tuple[Any, Tensor | None]:
    """``(causal, causal_by_sequence)`` of what a public function takes as its ``causal``.

    A tensor with a dimension says it of each sequence, which stays on its device; the call itself is then not causal.
    Everything else, 0-dim tensors among it, is one value for all sequences, which is read later.
    """
    if isinstance(causal, Tensor) and causal.dim() > 0:
        return False, causal
    return causal, None


def visible_interval(
    query: int, seqlen_q: int, seqlen_k: int, window_left: int, window_right: int, attention_chunk: int = 0
) -> tuple[int, int]:
    """Keys ``[begin, end)`` that query ``query`` sees besides a prefix (``end <= begin``: none).

    Sequences are aligned bottom-right: the query sits at position ``query + seqlen_k - seqlen_q``.
    """
    position = query + seqlen_k - seqlen_q
    begin = max(0, position - window_left) if window_left >= 0 else 0
    end = min(seqlen_k, position + window_right + 1) if window_right >= 0 else seqlen_k
    if attention_chunk > 0:
        chunk_begin = position // attention_chunk * attention_chunk
        begin = max(begin, chunk_begin)
        end = min(end, chunk_begin + attention_chunk)
    return begin, end


def mask_width(seqlen_q: int, seqlen_k: int, window_left: int, window_right: int, attention_chunk: int) -> int:
    """The most keys that the queries of one sequence see together, without a prefix: what a split has to share."""
    width = seqlen_k
    if window_left >= 0 and window_right >= 0:
        width = min(width, seqlen_q + window_left + window_right)
    if attention_chunk > 0:
        width = min(width, seqlen_q + 2 * attention_chunk)
    return width
