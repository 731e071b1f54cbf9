"""Validates the arguments of get_scheduler_metadata: which attention call its metadata is for."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..errors import InvalidArgumentError, InvalidTypeError
from . import validation as check
from .masking import normalize_chunk, normalize_window
from .problem import DTYPE_NAMES, AttentionProblem

FUNCTION = "get_scheduler_metadata"
#: Without has_qv a call of these head dims is taken for absorbed MLA: (largest headdim, largest headdim_v without qv).
ABSORBED_HEAD_DIMS = (64, 256)


class MetadataRequest(NamedTuple):
    """One validated get_scheduler_metadata call without its tensors."""

    problem: AttentionProblem
    seqlen_k_new: int
    explicit_length: bool  # seqlen_k was derived from a page table by the length rule
    guessed_qv: bool  # the caller did not say whether the call has qv
    guessed_kv: bool  # the caller did not say the dtype of k and v: qkv_dtype may be theirs or that of q


def describe_request(
    batch_size: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    num_heads_q: Any,
    num_heads_kv: Any,
    headdim: Any,
    headdim_v: Any,
    qkv_dtype: Any,
    page_size: Any,
    max_seqlen_k_new: Any,
    causal: Any,
    window_size: Any,
    attention_chunk: Any,
    num_splits: Any,
    pack_gqa: Any,
    sm_margin: Any,
    page_table: Any,
    has_qv: Any = None,
    kv_dtype: Any = None,
    tokens_per_split: Any = 0,
) -> MetadataRequest:
    """Validate the arguments that describe the attention call."""
    batch_size = check.check_int(FUNCTION, "batch_size", batch_size)
    max_seqlen_q = check.check_int(FUNCTION, "max_seqlen_q", max_seqlen_q)
    max_seqlen_k = check.check_int(FUNCTION, "max_seqlen_k", max_seqlen_k)
    num_heads_q = check.check_int(FUNCTION, "num_heads_q", num_heads_q, 1, check.MAX_NUM_HEADS)
    num_heads_kv = check.check_int(FUNCTION, "num_heads_kv", num_heads_kv, 1, check.MAX_NUM_HEADS)
    if num_heads_q % num_heads_kv:
        raise InvalidArgumentError(
            f"{FUNCTION}: num_heads_q must be a multiple of num_heads_kv, got {num_heads_q} and {num_heads_kv}"
        )
    headdim = check.check_int(FUNCTION, "headdim", headdim, 1)
    headdim_v = headdim if headdim_v is None else check.check_int(FUNCTION, "headdim_v", headdim_v, 1)
    for name, size in (("headdim", headdim), ("headdim_v", headdim_v)):
        if size % 8:
            raise InvalidArgumentError(f"{FUNCTION}: {name} must be a multiple of 8, got {size}")
    if qkv_dtype not in DTYPE_NAMES:
        accepted = ", ".join(str(dtype) for dtype in DTYPE_NAMES)
        raise InvalidTypeError(f"{FUNCTION}: qkv_dtype must be one of {accepted}, got {qkv_dtype!r}")
    guessed_kv = kv_dtype is None
    if guessed_kv:
        kv_dtype = qkv_dtype
    elif kv_dtype not in DTYPE_NAMES or not check.keys_fit_queries(kv_dtype, qkv_dtype):
        raise InvalidTypeError(
            f"{FUNCTION}: kv_dtype must be None, qkv_dtype ({qkv_dtype}), or, with bf16 or fp16 qkv_dtype,"
            f" torch.float8_e4m3fn, got {kv_dtype!r}"
        )
    page_size = 0 if page_size is None else check.check_int(FUNCTION, "page_size", page_size, 1)
    max_seqlen_k_new = check.check_int(FUNCTION, "max_seqlen_k_new", max_seqlen_k_new)
    causal = check.check_bool(FUNCTION, "causal", causal)
    window_left, window_right = normalize_window(window_size, causal, FUNCTION)
    attention_chunk = normalize_chunk(check.check_attention_chunk(FUNCTION, attention_chunk))
    num_splits = check.check_num_splits(FUNCTION, num_splits)
    tokens_per_split = check.check_tokens_per_split(FUNCTION, tokens_per_split, num_splits)
    has_qv = check.check_optional_bool(FUNCTION, "has_qv", has_qv)
    guessed_qv = has_qv is None
    if guessed_qv:
        has_qv = headdim <= ABSORBED_HEAD_DIMS[0] and headdim_v > ABSORBED_HEAD_DIMS[1]
    if page_table is not None:
        if not page_size:
            raise InvalidArgumentError(f"{FUNCTION}: page_size must be given with page_table, got None")
        # The length rule: what the forward call derives from the same table.
        max_seqlen_k = page_table.shape[1] * page_size
    max_seqlen_k = check.clamp_seqlen_k(max_seqlen_k)
    problem = AttentionProblem(
        dtype=qkv_dtype,
        kv_dtype=kv_dtype,
        batch=batch_size,
        seqlen_q=max_seqlen_q,
        seqlen_k=max_seqlen_k,
        num_heads_q=num_heads_q,
        num_heads_kv=num_heads_kv,
        head_dim=headdim,
        head_dim_v=headdim_v,
        page_size=page_size,
        window=(window_left, window_right),
        attention_chunk=attention_chunk,
        num_splits=num_splits,
        pack_gqa=check.check_optional_bool(FUNCTION, "pack_gqa", pack_gqa),
        has_metadata=True,
        sm_margin=check.check_int(FUNCTION, "sm_margin", sm_margin),
        tokens_per_split=tokens_per_split,
        qv=has_qv,
    )
    # Lengths are at most max_seqlen_k before the append, and both together must fit what kernels count in.
    max_seqlen_k_new = min(max_seqlen_k_new, check.MAX_SEQLEN_K - max_seqlen_k)
    return MetadataRequest(problem, max_seqlen_k_new, page_table is not None, guessed_qv, guessed_kv)
