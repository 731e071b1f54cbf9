"""broadhead under the names of other attention packages: opt-in, reversible, and never over a real installation.

``with broadhead.compat.install("flash_attn_interface"):`` lets ``import flash_attn_interface`` find broadhead.
docs/coming-from-flash-attention.md lists every argument.
"""

from __future__ import annotations

from .installing import Installation, install, uninstall

__all__ = ["Installation", "install", "uninstall"]
