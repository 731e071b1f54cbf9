"""Calls of every public function that launches a kernel, in which each argument has a value that nothing else has.

A case is a layout of the tensors, their kind, and a set of options; a function gets those of its arguments that a case
has. All are decode calls of 12 or 16 query rows, whose kernels take every option as it is given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import broadhead
import torch
from broadhead.call.names import shown_name
from torch import Tensor

BATCH, HEADS, KV_HEADS, DIM, DIM_V, WIDE_V, PAGE = 2, 8, 2, 64, 32, 512, 16
BF16, FP8, F32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call."""

    given: dict[str, Any]  # as the function takes them
    meant: dict[str, tuple[str, ...]]  # by each of their names there: the names of what they are in ``values``
    values: dict[str, Any]  # by the names of AttentionArgs, or for what is no part of it of mha_fwd and mha_bwd


@dataclass(frozen=True)
class Case:
    """A call of ``function``: a layout of its tensors, their kind, and options for everything else."""

    function: str
    layout: str
    kind: str  # bf16, fp8, kv8 (k and v alone are 8-bit) or qv
    option: str
    appends: bool = False
    spelled: bool = False  # q_v and block_table in place of qv and page_table

    def __str__(self) -> str:
        flags = "-append" * self.appends + "-spelled" * self.spelled
        return f"{self.function}-{self.layout}-{self.kind}-{self.option}{flags}"

    @property
    def wants_gradients(self) -> bool:
        """Whether a backward pass follows the call."""
        return self.option.startswith("gradient") and self.function != "mha_bwd"

    def make(self) -> Arguments:
        """The arguments, every time with tensors of their own."""
        return _make(self)


# --- tensors ---------------------------------------------------------------------------------------------------------


def rows(*shape: int, pad: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    """Rows that lie ``16 * pad`` elements further apart than they are long."""
    return torch.zeros(*shape[:-1], shape[-1] + 16 * pad).to(dtype)[..., : shape[-1]]


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def table(batch: int, pages: int, pad: int) -> Tensor:
    """The ids of pages; the rows of the table lie ``pad`` further apart than they are long."""
    return (torch.arange(batch * (pages + pad), dtype=torch.int32) % 6).view(batch, -1)[:, :pages]


def factors(pad: int) -> Tensor:
    """Descales, transposed: their strides are 1 and ``BATCH + pad``."""
    return torch.ones(KV_HEADS, BATCH + pad)[:, :BATCH].t()


def queries(kind: str, *lead: int) -> dict[str, Any]:
    """q, and what goes with the kind of a call: factors of 8-bit tensors, or a second query."""
    found: dict[str, Any] = {"q": rows(*lead, HEADS, DIM, pad=1, dtype=FP8 if kind == "fp8" else BF16)}
    if kind == "fp8":
        found["q_descale"] = factors(1)
    if kind in ("fp8", "kv8"):
        found |= {"k_descale": factors(2), "v_descale": factors(3)}
    if kind == "qv":
        found["qv"] = rows(*lead, HEADS, WIDE_V, pad=2)
    found["out"] = rows(*lead, HEADS, WIDE_V if kind == "qv" else DIM_V, pad=6)
    return found


def keys(kind: str, *lead: int) -> dict[str, Any]:
    dtype = FP8 if kind in ("fp8", "kv8") else BF16
    return {
        "k": rows(*lead, KV_HEADS, DIM, pad=2, dtype=dtype),
        "v": rows(*lead, KV_HEADS, WIDE_V if kind == "qv" else DIM_V, pad=7, dtype=dtype),
    }


def packed_queries(kind: str) -> dict[str, Any]:
    return {**queries(kind, 7), "cu_seqlens_q": int32(0, 3, 7), "max_seqlen_q": 4}


def pages() -> dict[str, Any]:
    return {"page_table": table(BATCH, 5, 3), "seqused_k": int32(50, 70), "scheduler_metadata": int32(*[0] * 17)}


LAYOUTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "dense": lambda kind: {**queries(kind, BATCH, 3), **keys(kind, BATCH, 40)},
    "varlen": lambda kind: {
        **packed_queries(kind), **keys(kind, 30), "cu_seqlens_k": int32(0, 12, 30), "max_seqlen_k": 21,
        "seqused_q": int32(2, 4), "seqused_k": int32(11, 17),
    },
    "paged": lambda kind: {
        **queries(kind, BATCH, 3), **keys(kind, 6, PAGE), **pages(), "page_table": table(3, 5, 4),
        "kv_batch_idx": int32(2, 1), "leftpad_k": int32(3, 5),
    },
    "packed_paged": lambda kind: {**packed_queries(kind), **keys(kind, 6, PAGE), **pages()},
    "cache_rows": lambda kind: {
        **queries(kind, BATCH, 3), **keys(kind, 4, 40), "seqused_k": int32(30, 39), "kv_batch_idx": int32(3, 1),
    },
    "shared": lambda kind: {
        **queries(kind, BATCH, 3), **keys(kind, 6, PAGE), **pages(), "prefix_page_table": int32(4, 2, 3),
        "prefix_len": 2 * PAGE,
    },
    "packed_shared": lambda kind: {
        **packed_queries(kind), **keys(kind, 6, PAGE), **pages(), "prefix_page_table": int32(4, 2, 3),
        "prefix_len": 2 * PAGE,
    },
    "in_one": lambda kind: _in_one(kind, BATCH, 3),
    "packed_in_one": lambda kind: {
        **_in_one(kind, 7), "cu_seqlens_q": (offsets := int32(0, 3, 7)), "cu_seqlens_k": offsets, "max_seqlen_q": 4,
        "max_seqlen_k": 4,
    },
    "keys_in_one": lambda kind: {
        "q": rows(BATCH, 3, HEADS, DIM, pad=1), "out": rows(BATCH, 3, HEADS, DIM, pad=3),
        "kv": (kv := rows(BATCH, 40, 2, KV_HEADS, DIM, pad=4)), **dict(zip("kv", kv.unbind(2), strict=True)),
    },
}  # fmt: skip


def _in_one(kind: str, *lead: int) -> dict[str, Any]:
    """q, k and v as one tensor; out is as wide as q."""
    found = {**queries(kind, *lead), "out": rows(*lead, HEADS, DIM, pad=3), "num_heads_q": HEADS}
    found["qkv"] = rows(*lead, HEADS + 2 * KV_HEADS, DIM, pad=1, dtype=FP8 if kind == "fp8" else BF16)
    parts = found["qkv"].split([HEADS, KV_HEADS, KV_HEADS], dim=-2)
    return found | dict(zip("qkv", parts, strict=True))


def ranges(values: dict[str, Any]) -> Tensor:
    """Ranges of keys of the queries; those of neighbours lie apart."""
    return torch.zeros(*values["q"].shape[:-2], 34, dtype=torch.int32)[..., :2]


def words(values: dict[str, Any]) -> Tensor:
    """Words of the queries; those of neighbours lie apart."""
    return torch.zeros(*values["q"].shape[:-2], 53, dtype=torch.int64)[..., 0]


# --- the other arguments ---------------------------------------------------------------------------------------------

_MASK = {"window_size": (13, 5), "attention_chunk": 11}
_SCORES = {"softmax_scale": 0.37, "softcap": 7.5, "sm_margin": 20, "backend": "cuda"}

#: What is a function there is one of the other arguments.
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "causal": lambda: {
        **_MASK, **_SCORES, "causal": True, "prefix_lens": int32(2, 4), "sinks": torch.zeros(HEADS), "num_splits": 3,
        "pack_gqa": False, "return_softmax_lse": True,
    },
    "window": lambda: {
        **_MASK, **_SCORES, "causal": False, "learnable_sink": torch.zeros(HEADS, dtype=BF16), "num_splits": 6,
        "return_attn_probs": True, "query_ranges": ranges, "ranges_in_window": True,
    },
    "tree": lambda: {
        **_SCORES, "window_size": (13, -1), "causal_by_sequence": int32(1, 0), "tree_mask": words, "num_splits": 10,
    },
    "ranges": lambda: {
        **_SCORES, "causal_by_sequence": torch.tensor([True, False]), "query_ranges": ranges, "num_splits": 14,
        "prefix_lens": int32(2, 4),
    },
    "sides": lambda: {
        **_SCORES, "window_left": 13, "window_right": 5, "s_aux": torch.zeros(HEADS), "num_splits": 7,
    },
    "cells": lambda: {"tokens_per_split": 192, "num_splits": 0, "s_aux": torch.zeros(HEADS), "backend": "cuda"},
    "gradient": lambda: {**_MASK, **_SCORES, "sinks": torch.zeros(HEADS), "deterministic": True},
    "gradient_causal": lambda: {**_SCORES, "causal": True, "prefix_lens": int32(2, 4), "deterministic": True},
    "gradient_sides": lambda: {
        **_SCORES, "window_left": 13, "window_right": 5, "sinks": torch.zeros(HEADS, dtype=BF16),
    },
    "gradient_ranges": lambda: {
        **_MASK, **_SCORES, "causal_by_sequence": torch.tensor([True, False]), "query_ranges": ranges,
        "ranges_in_window": True,
    },
    # One launch over a shared prefix takes no mask but a causal one.
    "prefix": lambda: {
        "softmax_scale": 0.37, "softcap": 7.5, "backend": "cuda", "causal": False, "sinks": torch.zeros(HEADS),
        "num_splits": 9, "return_softmax_lse": True,
    },
}  # fmt: skip


def new_keys(*lead: int) -> dict[str, Any]:
    """What is appended, under the names that it has in mha_fwd."""
    found = {
        "k_new": rows(*lead, KV_HEADS, DIM, pad=3), "v_new": rows(*lead, KV_HEADS, DIM_V, pad=8),
        "rotary_cos": torch.ones(200, 28)[:, :8], "rotary_sin": torch.zeros(200, 36)[:, :8],
        "rotary_seqlens": int32(31, 44), "rotary_interleaved": False,
    }  # fmt: skip
    return found if len(lead) > 1 else {**found, "cu_seqlens_k_new": int32(0, 2, lead[0])}


def gradients(values: dict[str, Any]) -> dict[str, Any]:
    """What mha_bwd takes beside a call."""
    q, k, v, out = (values[name] for name in ("q", "k", "v", "out"))
    shape = (HEADS, q.shape[0]) if q.dim() == 3 else (BATCH, HEADS, q.shape[1])
    return {
        "dout": rows(*out.shape, pad=9), "softmax_lse": torch.zeros(*shape[:-1], shape[-1] + 20)[..., :-20],
        "dlse": torch.zeros(*shape[:-1], shape[-1] + 24)[..., :-24], "dq": rows(*q.shape), "dk": rows(*k.shape),
        "dv": rows(*v.shape),
    }  # fmt: skip


# --- cases -----------------------------------------------------------------------------------------------------------

#: Other spellings of fields.
SPELLINGS = {"block_table": "page_table", "s_aux": "sinks", "learnable_sink": "sinks", "q_v": "qv"}
_SPELLED = {"page_table": "block_table", "qv": "q_v"}
_SIDES = {"window_left": "window_size_left", "window_right": "window_size_right"}


def _make(case: Case) -> Arguments:
    parameters = inspect.signature(getattr(broadhead, case.function)).parameters
    values = LAYOUTS[case.layout](case.kind)
    values |= {name: value(values) if callable(value) else value for name, value in OPTIONS[case.option]().items()}
    if case.function == "mha_bwd":
        values |= gradients(values)
    elif case.wants_gradients:
        del values["out"]
    if case.appends:
        values |= new_keys(*((6,) if "cu_seqlens_q" in values else (BATCH, 4)))
    given: dict[str, Any] = {}
    meant: dict[str, tuple[str, ...]] = {}
    kept: dict[str, Any] = {}
    for name, value in values.items():
        shown = _shown(case, name)
        if shown in parameters:
            given[shown] = values.get(shown, value) if shown in ("qkv", "kv") else value
            meant[shown] = (*meant.get(shown, ()), SPELLINGS.get(name, name))
            kept[SPELLINGS.get(name, name)] = value
    if case.option.startswith("gradient"):
        for name in ("q", "k", "v", "k_cache", "v_cache", "qkv", "kv", "sinks"):
            if name in given and case.wants_gradients:
                given[name].requires_grad_(True)
    return Arguments(given, meant, kept)


def _shown(case: Case, name: str) -> str:
    """What a function calls one of the values of a case."""
    if name in ("k_new", "v_new") and case.function == "flash_attn_with_kvcache":
        return name[0]
    if case.spelled and name in _SPELLED:
        return _SPELLED[name]
    if name in ("qkv", "kv"):
        return ""  # q, k and v are shown as it
    return shown_name(case.function, _SIDES.get(name, name))


def _cases(function: str, *described: str) -> list[Case]:
    """Cases by ``layout kind option``, and what else they are: ``append``, ``spelled``."""
    found = []
    for words in map(str.split, described):
        layout, kind, option, *flags = words
        found.append(Case(function, layout, kind, option, "append" in flags, "spelled" in flags))
    return found


CASES = [
    *_cases(
        "flash_attn_func",
        "dense bf16 causal", "dense fp8 window", "dense qv causal", "dense qv cells spelled", "dense bf16 gradient",
        "dense bf16 tree", "dense bf16 ranges", "dense bf16 gradient_ranges",
    ),
    *_cases(
        "flash_attn_varlen_func",
        "varlen bf16 causal", "packed_paged fp8 window", "varlen qv window", "packed_paged qv cells spelled",
        "varlen bf16 gradient", "packed_paged bf16 tree", "varlen bf16 ranges", "varlen bf16 gradient_ranges",
    ),
    *_cases(
        "flash_attn_with_kvcache",
        "paged bf16 causal", "packed_paged fp8 window", "cache_rows qv causal", "paged qv cells spelled",
        "paged bf16 causal append", "packed_paged kv8 window append", "dense bf16 gradient",
        "paged kv8 tree", "packed_paged qv tree", "paged bf16 ranges append",
    ),
    *_cases(
        "flash_attn_with_shared_prefix", "shared bf16 prefix", "packed_shared fp8 prefix",
    ),
    *_cases(
        "flash_attn_qkvpacked_func",
        "in_one bf16 causal", "in_one fp8 window", "in_one bf16 cells", "in_one bf16 gradient", "in_one bf16 tree",
    ),
    *_cases(
        "flash_attn_kvpacked_func",
        "keys_in_one bf16 causal", "keys_in_one bf16 window", "keys_in_one bf16 cells", "keys_in_one bf16 gradient",
        "keys_in_one bf16 tree",
    ),
    *_cases(
        "flash_attn_varlen_qkvpacked_func",
        "packed_in_one bf16 causal", "packed_in_one bf16 window", "packed_in_one bf16 cells",
        "packed_in_one bf16 gradient", "packed_in_one bf16 tree",
    ),
    *_cases(
        "mha_fwd",
        "varlen bf16 causal", "dense fp8 window", "cache_rows qv sides", "paged qv cells spelled",
        "paged bf16 causal append", "packed_paged kv8 window append", "varlen bf16 gradient",
        "varlen bf16 tree", "packed_paged bf16 ranges", "paged bf16 tree append",
    ),
    *_cases(
        "mha_bwd", "dense bf16 gradient", "varlen bf16 gradient_causal", "dense bf16 gradient_sides",
        "dense bf16 gradient_ranges", "varlen bf16 gradient_ranges",
    ),
]  # fmt: skip
