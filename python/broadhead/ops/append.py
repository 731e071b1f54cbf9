"""The operator broadhead::append_kv: new keys into a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call.plain import plain_fields
from ..run.append import Append, run_append
from .canonical import canonical

#: The arguments of the operator in their order, fields of Append: type and default in its schema.
_ARGUMENTS = {
    "k_cache": "Tensor(a!)", "v_cache": "Tensor(b!)", "k_new": "Tensor", "v_new": "Tensor", "cache_seqlens": "Tensor",
    "page_table": "Tensor?", "cache_batch_idx": "Tensor?", "cu_seqlens_k_new": "Tensor?", "rotary_cos": "Tensor?",
    "rotary_sin": "Tensor?", "rotary_seqlens": "Tensor?", "rotary_interleaved": "bool", "q": "Tensor?=None",
    "cu_seqlens_q": "Tensor?=None", "causal_or_local": "bool=False", "k_descale": "Tensor?=None",
    "v_descale": "Tensor?=None",
}  # fmt: skip
_DEFAULTS = {"q": None, "cu_seqlens_q": None, "causal_or_local": False, "k_descale": None, "v_descale": None}


def _schema() -> str:
    typed = (kind.partition("=") for kind in _ARGUMENTS.values())
    arguments = (f"{kind} {name}{equals}{default}" for name, (kind, equals, default) in zip(_ARGUMENTS, typed))
    return f"({', '.join(arguments)}) -> (Tensor, Tensor)"


def _append_of(inputs: tuple[Any, ...], named: dict[str, Any]) -> Append:
    """The append that the operator was called with: torch leaves defaults at the end out."""
    call = Append(**{**_DEFAULTS, **dict(zip(_ARGUMENTS, inputs)), **named})
    return call if call.rotary_cos is not None else call._replace(q=None)


@torch.library.custom_op("broadhead::append_kv", mutates_args=("k_cache", "v_cache"), schema=_schema())
def append(*inputs: Any) -> tuple[Tensor, Tensor]:
    """``(q rotated, empty without q; lengths after the append)``."""
    call = plain_fields("append_kv", _append_of(inputs, {}), written=("k_cache", "v_cache"))
    turned, lengths = run_append(call, function="append_kv")
    return call.k_new.new_empty(0) if turned is None else canonical(turned), lengths


@append.register_fake
def _(*inputs: Any, **named: Any) -> tuple[Tensor, Tensor]:
    call = _append_of(inputs, named)
    turned = call.k_new.new_empty(0) if call.q is None else call.q.new_empty(call.q.shape)
    return turned, call.cache_seqlens.new_empty(call.cache_seqlens.shape)
