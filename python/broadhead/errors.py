"""The exceptions and warnings of broadhead: every refusal is one of these."""

from __future__ import annotations


class BroadheadError(Exception):
    """Base of every error that broadhead raises on purpose."""


class InvalidArgumentError(BroadheadError, ValueError):
    """An argument has a wrong value, shape, stride or device."""


class InvalidTypeError(BroadheadError, TypeError):
    """An argument has a wrong Python type or dtype."""


class UnsupportedError(BroadheadError, NotImplementedError):
    """The call is well formed, but no kernel here runs it; the text says why and what to do."""


class KernelError(BroadheadError, RuntimeError):
    """A CUDA launch failed; the text names the kernel and the shape."""


class FallbackWarning(UserWarning):
    """A call on a CUDA device ran on the torch fallback; issued once per kind of reason."""


class CompatWarning(UserWarning):
    """A surface of broadhead.compat ignored an argument, or runs where another package has faster kernels."""
