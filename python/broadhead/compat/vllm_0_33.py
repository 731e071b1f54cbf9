"""The functions of vLLM's own module vllm.vllm_flash_attn, which has more arguments than the fork's."""

from __future__ import annotations

from typing import Any

from ..api.attention import maybe_contiguous
from . import vllm_flash_attn as fork
from .declare import declare
from .obstacle import device_obstacle
from .vllm_flash_attn import get_scheduler_metadata, sparse_attn_func, sparse_attn_varlen_func

_MODULE = __name__
#: What vLLM asks of the module before it uses it: both are the same kernels here.
FA2_AVAILABLE = FA3_AVAILABLE = True


def fa_version_unsupported_reason(fa_version: int) -> str | None:
    """Why no kernel of this installation runs on the current device; None if one does, for 2, 3 and 4 alike.

    Raises:
        ValueError: there is no such version.
    """
    if fa_version not in fork.VERSIONS:
        raise ValueError(f"fa_version must be 2, 3 or 4, got {fa_version!r}")
    return device_obstacle()


def is_fa_version_supported(fa_version: int) -> bool:
    """Whether kernels of this installation run on the current device, whichever version is asked for."""
    return fa_version_unsupported_reason(fa_version) is None


def _varlen(*, causal: Any, dynamic_causal: Any, **others: Any) -> Any:
    """dynamic_causal, int32 ``(B,)``, says causality by sequence, as a tensor for ``causal`` does here."""
    return fork.run_varlen(causal=causal if dynamic_causal is None else dynamic_causal, **others)


def _compile(**_: Any) -> None:
    """Nothing is compiled at run time."""


flash_attn_varlen_func = declare(
    _MODULE,
    "flash_attn_varlen_func",
    "q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None, q_v=None, dropout_p=0.0,"
    " softmax_scale=None, causal=False, window_size=None, softcap=0.0, alibi_slopes=None, deterministic=False,"
    " return_attn_probs=False, block_table=None, return_softmax_lse=False, out=None, scheduler_metadata=None,"
    " q_descale=None, k_descale=None, v_descale=None, num_splits=0, output_scale=None, fa_version=2, s_aux=None,"
    " cp_world_size=1, cp_rank=0, cp_tot_seqused_k=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None,"
    " aux_tensor_leading_dims=None, dynamic_causal=None, gather_kv_indices=None, gather_kv_valid_length=None",
    _varlen,
    doc="Attention as vLLM calls it: max_seqlen_q stands before cu_seqlens_q; fa_version selects nothing here.",
    renamed={"q_v": "qv", "block_table": "page_table", "s_aux": "sinks"},
)
compile_flash_attn_varlen_func_from_specs = declare(
    _MODULE,
    "compile_flash_attn_varlen_func_from_specs",
    "*, q_shape, k_shape, v_shape, q_dtype, v_stride=None, k_stride=None, cu_seqlens_q_shape=None,"
    " cu_seqlens_k_shape=None, max_seqlen_q=None, max_seqlen_k=None, dropout_p=0.0, softmax_scale=None, causal=False,"
    " window_size=None, deterministic=False, return_softmax_lse=False, num_splits=0, fa_version=2,"
    " seqused_k_shape=None, page_table_shape=None, softcap=None",
    _compile,
    doc="Returns None: there is nothing to compile ahead of a call.",
)
#: What the package exports, and what its module flash_attn_interface holds.
PACKAGE_NAMES = (
    "FA2_AVAILABLE", "FA3_AVAILABLE", "compile_flash_attn_varlen_func_from_specs", "fa_version_unsupported_reason",
    "flash_attn_varlen_func", "get_scheduler_metadata", "is_fa_version_supported",
)  # fmt: skip
INTERFACE_NAMES = PACKAGE_NAMES + ("maybe_contiguous", "sparse_attn_func", "sparse_attn_varlen_func")
__all__ = ["get_scheduler_metadata", "maybe_contiguous", "sparse_attn_func", "sparse_attn_varlen_func"]
