"""The operators torch.ops.flash_attn_3: fwd, bwd, fwd_combine and get_scheduler_metadata, on broadhead."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from ..api import combine, metadata
from . import flash_attn_3

NAMESPACE = "flash_attn_3"
_WINDOW = "int window_size_left = -1, int window_size_right = -1"
#: As FlashAttention-3 declares them.
SCHEMAS = {
    "fwd": (
        "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None, Tensor(v_new!)? v_new = None,"
        " Tensor? q_v = None, Tensor(out!)? out = None, Tensor? cu_seqlens_q = None,"
        " Tensor? cu_seqlens_k = None, Tensor? cu_seqlens_k_new = None, Tensor? seqused_q = None,"
        " Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k = None,"
        " Tensor? page_table = None, Tensor? kv_batch_idx = None, Tensor? leftpad_k = None,"
        " Tensor? rotary_cos = None, Tensor? rotary_sin = None, Tensor? seqlens_rotary = None,"
        " Tensor? q_descale = None, Tensor? k_descale = None, Tensor? v_descale = None,"
        f" float? softmax_scale = None, bool is_causal = False, {_WINDOW}, int attention_chunk = 0,"
        " float softcap = 0.0, bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None,"
        " int num_splits = 0, bool? pack_gqa = None, int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor,"
        " Tensor)"
    ),
    "bwd": (
        "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq = None,"
        " Tensor(dk!)? dk = None, Tensor(dv!)? dv = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None,"
        " Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k = None,"
        f" float? softmax_scale = None, bool is_causal = False, {_WINDOW}, float softcap = 0.0,"
        " bool deterministic = False, int sm_margin = 0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "fwd_combine": (
        "fwd_combine(Tensor out_partial, Tensor lse_partial, Tensor(out!)? out = None, ScalarType? out_dtype = None)"
        " -> (Tensor(out!), Tensor)"
    ),
    "get_scheduler_metadata": (
        "get_scheduler_metadata(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, int num_heads_k,"
        " int headdim, int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, Tensor? cu_seqlens_q = None,"
        " Tensor? cu_seqlens_k = None, Tensor? cu_seqlens_k_new = None, Tensor? seqused_q = None,"
        " Tensor? leftpad_k = None, int? page_size = None, int max_seqlen_k_new = 0, bool is_causal = False,"
        f" {_WINDOW}, int attention_chunk = 0, bool has_softcap = False, int num_splits = 0, bool? pack_gqa = None,"
        " int sm_margin = 0) -> Tensor"
    ),
}
_FWD_NAMES = {
    "q_v": "qv",
    "seqlens_rotary": "rotary_seqlens",
    "is_causal": "causal",
    "is_rotary_interleaved": "rotary_interleaved",
}


#: The arguments of each operator and their defaults, in order.
_ARGUMENTS = {
    operator: {argument.name: argument.default_value for argument in torch._C.parse_schema(schema).arguments}
    for operator, schema in SCHEMAS.items()
}


def _bound(operator: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name; the dispatcher leaves out those at the end that have their defaults."""
    return {**_ARGUMENTS[operator], **dict(zip(_ARGUMENTS[operator], args)), **kwargs}


def _fwd(*args: Any, **kwargs: Any) -> Any:
    given = {_FWD_NAMES.get(name, name): value for name, value in _bound("fwd", args, kwargs).items()}
    return flash_attn_3.run_forward(**given)


def _bwd(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    given = _bound("bwd", args, kwargs)
    given["causal"] = given.pop("is_causal")
    nothing = flash_attn_3.run_backward(**given)
    return (nothing, *(nothing.clone() for _ in range(4)))


def _fwd_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Any = None, out_dtype: Any = None
) -> tuple[Tensor, Tensor]:
    return combine.flash_attn_combine(out_partial, lse_partial, out, out_dtype)


def _get_scheduler_metadata(*args: Any, **kwargs: Any) -> Tensor:
    given = _bound("get_scheduler_metadata", args, kwargs)
    given["window_size"] = (given.pop("window_size_left"), given.pop("window_size_right"))
    given["cache_seqlens"], given["cache_leftpad"] = given.pop("seqused_k"), given.pop("leftpad_k")
    given["causal"] = given.pop("is_causal")
    # No plan depends on where the sequences lie in packed tensors, nor on rows of q that are not used.
    del given["cu_seqlens_k"], given["seqused_q"]
    return metadata.get_scheduler_metadata(**given)


_IMPLEMENTATIONS = {
    "fwd": _fwd,
    "bwd": _bwd,
    "fwd_combine": _fwd_combine,
    "get_scheduler_metadata": _get_scheduler_metadata,
}


def are_defined() -> bool:
    """Whether somebody has defined the operators."""
    return f"{NAMESPACE}::fwd" in torch._C._dispatch_get_all_op_names()


def define() -> Library:
    """Define the operators, or give those that are defined another implementation; the library's end takes it back."""
    foreign = are_defined()
    library = Library(NAMESPACE, "IMPL" if foreign else "FRAGMENT")
    for name, implementation in _IMPLEMENTATIONS.items():
        if not foreign:
            library.define(SCHEMAS[name])
            library.impl(name, implementation, "CompositeExplicitAutograd")
            continue
        with warnings.catch_warnings():  # torch tells of an implementation that takes the place of another
            warnings.simplefilter("ignore")
            library.impl(name, implementation, "CUDA")
    return library


#: What defined the operators for the life of the process, for modules on the path.
_kept: list[Library] = []


def define_once() -> Library:
    """define, for a module that is never taken away: later calls return the same library."""
    if not _kept:
        _kept.append(define())
    return _kept[0]
