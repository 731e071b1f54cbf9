"""The functions of vLLM's fork: module vllm_flash_attn, in vLLM vllm.vllm_flash_attn."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..api import attention, metadata
from ..api.attention import maybe_contiguous
from ..errors import UnsupportedError
from .advice import tell_if_faster_elsewhere
from .declare import declare
from .leniency import scale_of, with_metadata
from .obstacle import device_obstacle

#: The release whose signatures these are.
__version__ = "2.7.2.post1"
_SURFACE = "vllm_flash_attn"
_MODULE = __name__
_VERSIONS = (2, 3, 4)


def _varlen(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scheduler_metadata: Any,
    return_softmax_lse: bool,
    return_attn_probs: bool,
    **others: Any,
) -> Any:
    """Attention of packed queries over packed or paged keys. return_attn_probs returns nothing more, as in the fork."""
    tell_if_faster_elsewhere(_SURFACE, q)
    for name, tensor in (("q_descale", q), ("k_descale", k), ("v_descale", v)):
        others[name] = scale_of(others[name], tensor)
    others.update(q=q, k=k, v=v, return_softmax_lse=return_softmax_lse)
    return with_metadata(attention.flash_attn_varlen_func, scheduler_metadata, others)


def _check_version(fa_version: int) -> None:
    if fa_version not in _VERSIONS:
        raise AssertionError(f"fa_version must be 2, 3 or 4, got {fa_version!r}")


def fa_version_unsupported_reason(fa_version: int, device: Any = None) -> str | None:
    """Why no kernel of this installation runs on the device; None if one does, whichever version is asked for."""
    _check_version(fa_version)
    return device_obstacle(device)


def is_fa_version_supported(fa_version: int, device: Any = None) -> bool:
    """Whether kernels of this installation run on the device, whichever version is asked for."""
    return fa_version_unsupported_reason(fa_version, device) is None


def _refuse_sparse(**_: Any) -> None:
    raise UnsupportedError("sparse_attn_func, sparse_attn_varlen_func: vertical and slash sparsity is not available")


flash_attn_varlen_func = declare(
    _MODULE,
    "flash_attn_varlen_func",
    "q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None, q_v=None, dropout_p=0.0,"
    " softmax_scale=None, causal=False, window_size=None, softcap=0.0, alibi_slopes=None, deterministic=False,"
    " return_attn_probs=False, block_table=None, return_softmax_lse=False, out=None, scheduler_metadata=None,"
    " q_descale=None, k_descale=None, v_descale=None, num_splits=0, fa_version=2, s_aux=None, cp_world_size=1,"
    " cp_rank=0, cp_tot_seqused_k=None",
    _varlen,
    doc="Attention of vLLM's fork: max_seqlen_q stands before cu_seqlens_q; fa_version selects nothing here.",
    renamed={"q_v": "qv", "block_table": "page_table", "s_aux": "sinks"},
)
get_scheduler_metadata = declare(
    _MODULE,
    "get_scheduler_metadata",
    "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens,"
    " qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None,"
    " page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), has_softcap=False, num_splits=0,"
    " pack_gqa=None, sm_margin=0",
    metadata.get_scheduler_metadata,
    doc="The plan of a decode step, int32 ``(1 + 4 * round_up(batch, 4),)`` whatever the arguments.",
)
_SPARSE = "q, k, v, block_count, block_offset, column_count, column_index"
_SPARSE_TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, softcap=0.0, alibi_slopes=None, deterministic=False,"
    " return_attn_probs=False, *, return_softmax_lse=False, out=None"
)
sparse_attn_func = declare(
    _MODULE, "sparse_attn_func", f"{_SPARSE}, {_SPARSE_TAIL}", _refuse_sparse, doc="Raises UnsupportedError."
)
sparse_attn_varlen_func = declare(
    _MODULE,
    "sparse_attn_varlen_func",
    f"{_SPARSE}, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {_SPARSE_TAIL}",
    _refuse_sparse,
    doc="Raises UnsupportedError.",
)
#: What the package exports, and what its module flash_attn_interface holds.
PACKAGE_NAMES = (
    "fa_version_unsupported_reason", "flash_attn_varlen_func", "get_scheduler_metadata", "is_fa_version_supported",
    "sparse_attn_func", "sparse_attn_varlen_func",
)  # fmt: skip
INTERFACE_NAMES = PACKAGE_NAMES + ("maybe_contiguous",)
__all__ = ["maybe_contiguous"]
