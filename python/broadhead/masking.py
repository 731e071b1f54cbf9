"""Mask rules: one normaliser of window_size and the interval of keys that a query sees."""

from __future__ import annotations

from .errors import InvalidArgumentError, InvalidTypeError

#: A window side this large is unbounded: no sequence is that long, and kernels add it to 32-bit positions.
UNBOUNDED_WINDOW = 1 << 30

_ACCEPTED = "None, an int, or a list or tuple (left, right) of ints (None or negative = unbounded)"


def _side(value: object, function: str) -> int:
    if value is None:
        return -1
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidTypeError(
            f"{function}: window_size must be {_ACCEPTED}, got a side of type {type(value).__name__}"
        )
    return -1 if value < 0 or value >= UNBOUNDED_WINDOW else value


def normalize_chunk(attention_chunk: int) -> int:
    """A chunk wider than any sequence is none: 0."""
    return 0 if attention_chunk >= UNBOUNDED_WINDOW else attention_chunk


def normalize_window(window_size: object, causal: bool, function: str = "normalize_window") -> tuple[int, int]:
    """Turn any accepted ``window_size`` and ``causal`` into ``(left, right)``.

    -1 is unbounded. An int is both sides. ``causal`` clamps the right side to 0, so causal attention is ``(-1, 0)``.

    Raises:
        InvalidTypeError, InvalidArgumentError: ``window_size`` is none of None, int, pair of ints.
    """
    if window_size is None:
        left, right = -1, -1
    elif isinstance(window_size, (tuple, list)):
        if len(window_size) != 2:
            raise InvalidArgumentError(f"{function}: window_size must be {_ACCEPTED}, got {len(window_size)} values")
        left, right = _side(window_size[0], function), _side(window_size[1], function)
    else:
        left = right = _side(window_size, function)
    return left, 0 if causal else right


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
