"""The torch.library operators `broadhead::*`: what torch.compile, export, FakeTensor and DTensor see of the package."""

from __future__ import annotations

from . import append, attention, merge, metadata, sharding

__all__ = ["append", "attention", "merge", "metadata", "sharding"]
