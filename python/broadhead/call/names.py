"""What each public function calls the canonical arguments: errors speak the caller's names."""

from __future__ import annotations

#: The functions whose k and v are always a cache.
KVCACHE_FUNCTIONS = ("flash_attn_with_kvcache", "flash_attn_with_shared_prefix")
_KVCACHE_NAMES = {
    "k": "k_cache",
    "v": "v_cache",
    "seqused_k": "cache_seqlens",
    "leftpad_k": "cache_leftpad",
    "kv_batch_idx": "cache_batch_idx",
}
#: In every function.
_COMMON_NAMES = {"causal_by_sequence": "causal"}
_QKV_NAMES = {"q": "qkv", "k": "qkv", "v": "qkv"}
_ONE_LENGTH = {
    "cu_seqlens_q": "cu_seqlens",
    "cu_seqlens_k": "cu_seqlens",
    "max_seqlen_q": "max_seqlen",
    "max_seqlen_k": "max_seqlen",
}
_NAMES: dict[str, dict[str, str]] = {
    **dict.fromkeys(KVCACHE_FUNCTIONS, _KVCACHE_NAMES),
    "flash_attn_qkvpacked_func": _QKV_NAMES,
    "flash_attn_kvpacked_func": {"k": "kv", "v": "kv"},
    "flash_attn_varlen_qkvpacked_func": {**_QKV_NAMES, **_ONE_LENGTH},
}


def shown_name(function: str, name: str) -> str:
    """The name under which ``function`` takes the canonical argument ``name``."""
    name = _COMMON_NAMES.get(name, name)
    names = _NAMES.get(function)
    return name if names is None else names.get(name, name)
