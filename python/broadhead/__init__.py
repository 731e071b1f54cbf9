"""Exact attention for PyTorch up to head_dim 512: dense, varlen and paged, on a CPU and on NVIDIA GPUs since SM80."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _installed_version

from . import compat, ops, reference, support
from .api.attention import flash_attn_func, flash_attn_varlen_func, maybe_contiguous, mha_fwd
from .api.backward import mha_bwd
from .api.combine import flash_attn_combine
from .api.explain import SupportEntry, explain, is_supported, support_matrix
from .api.head_dims import _validate_head_dims
from .api.kvcache import flash_attn_with_kvcache
from .api.merge import merge_attn_states
from .api.metadata import get_scheduler_metadata
from .api.packed import flash_attn_kvpacked_func, flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func
from .api.query_ranges import make_query_ranges
from .api.shared_prefix import flash_attn_with_shared_prefix
from .errors import (
    BroadheadError,
    CompatWarning,
    FallbackWarning,
    InvalidArgumentError,
    InvalidTypeError,
    KernelError,
    UnsupportedError,
)
from .run.fallback import last_dispatch

try:
    __version__ = _installed_version("broadhead")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0.0.0+source"

__all__ = [
    "BroadheadError",
    "CompatWarning",
    "FallbackWarning",
    "InvalidArgumentError",
    "InvalidTypeError",
    "KernelError",
    "SupportEntry",
    "UnsupportedError",
    "__version__",
    "_validate_head_dims",
    "compat",
    "explain",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "flash_attn_with_shared_prefix",
    "get_scheduler_metadata",
    "is_supported",
    "last_dispatch",
    "make_query_ranges",
    "maybe_contiguous",
    "merge_attn_states",
    "mha_bwd",
    "mha_fwd",
    "ops",
    "reference",
    "support",
    "support_matrix",
]
