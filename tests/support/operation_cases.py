"""Cases as those of sentinels.py, and their routes, of the functions that run no attention: plans and merges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from described import h200
from sentinels import F32, KV_HEADS, Arguments, int32, rows, table
from torch import Tensor

_FP16 = 2  # DataType::kFloat16


@dataclass(frozen=True)
class OperationCase:
    """A call of ``function`` with all of ``values``; ``fields`` of the launch ``entry`` follow from them."""

    function: str
    name: str
    entry: str
    values: Callable[[], dict[str, Any]]
    fields: Callable[[dict[str, Any]], dict[str, dict[str, Any]]]  # by the argument
    ways: tuple[str, ...]  # traced, flash_attn_combine is made of torch ops
    wants_gradients = False

    def __str__(self) -> str:
        return f"{self.function}-{self.name}"

    def make(self) -> Arguments:
        """The arguments, every time with tensors of their own."""
        values = self.values()
        return Arguments(values, {name: (name,) for name in values}, values)


def _plan() -> dict[str, Any]:
    return {
        "batch_size": 2, "max_seqlen_q": 5, "max_seqlen_k": 901, "num_heads_q": 12, "num_heads_kv": 4, "headdim": 64,
        "cache_seqlens": int32(20, 33), "cu_seqlens_q": int32(0, 1, 2), "cache_leftpad": int32(1, 2),
        "max_seqlen_k_new": 8, "window_size": (13, 7), "attention_chunk": 11, "num_splits": 17, "pack_gqa": False,
        "sm_margin": 20, "out": int32(*[0] * 17),
    }  # fmt: skip


def _paged_plan() -> dict[str, Any]:
    changed = {"num_heads": 12, "num_heads_k": 4, "causal": True, "page_size": 16, "page_table": table(2, 9, 1)}
    dropped = ("num_heads_q", "num_heads_kv", "pack_gqa")
    return {name: value for name, value in (_plan() | changed).items() if name not in dropped}


PACKED_HEADS = {"rows_per_token": 3, "heads_in_grid": 4}


def _plan_fields(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    heads = {"rows_per_token": 1, "heads_in_grid": 12} if "pack_gqa" in values else PACKED_HEADS
    keys = values["page_table"].shape[1] * values["page_size"] if "page_table" in values else values["max_seqlen_k"]
    left, right = values["window_size"]
    return {
        "batch_size": {"batch": values["batch_size"]},
        "max_seqlen_q": {"seqlen_q": values["max_seqlen_q"]},
        "max_seqlen_k": {"seqlen_k": keys},
        "page_table": {"seqlen_k": keys},
        "page_size": {"seqlen_k": keys},
        **dict.fromkeys(("num_heads_q", "num_heads_kv", "num_heads", "num_heads_k", "pack_gqa"), heads),
        "headdim": {"tile_m": 16, "tile_n": 32},  # those of the row
        "cache_seqlens": {"seqused_k": values["cache_seqlens"]},
        "cu_seqlens_q": {"cu_seqlens_q": values["cu_seqlens_q"]},
        "cache_leftpad": {"leftpad_k": values["cache_leftpad"]},
        "max_seqlen_k_new": {"seqlen_k_new": values["max_seqlen_k_new"]},
        "causal": {"window_right": 0},
        "window_size": {"window_left": left, "window_right": 0 if values.get("causal") else right},
        "attention_chunk": {"attention_chunk": values["attention_chunk"]},
        "num_splits": {"num_splits": values["num_splits"]},
        "sm_margin": {"target_ctas": h200().sm_count - values["sm_margin"]},
        "out": {"metadata": values["out"]},
    }


def _parts() -> dict[str, Any]:
    return {
        "out_partial": rows(3, 5, KV_HEADS, 32, pad=1, dtype=F32),
        "lse_partial": torch.zeros(3, KV_HEADS, 9)[..., :5].transpose(1, 2),
        "backend": "cuda",
    }


def _parts_and_out() -> dict[str, Any]:
    return {**_parts(), "out": torch.zeros(5, KV_HEADS, 32).half()}


def _parts_and_dtype() -> dict[str, Any]:
    return {**_parts(), "out_dtype": torch.float16}


def _part_fields(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    def part(name: str) -> dict[str, Any]:
        strides = dict(zip(("split", "row", "head"), values[name].stride()[:3], strict=True))
        return {name: values[name]} | {f"{name}_{of}_stride": stride for of, stride in strides.items()}

    return {
        "out_partial": part("out_partial"),
        "lse_partial": part("lse_partial"),
        "out": {"out": values.get("out", 0), "out_dtype": _FP16},
        "out_dtype": {"out_dtype": _FP16},
        "backend": {"backend": "cuda"},
    }


def _states() -> dict[str, Any]:
    """Two results of 2 sequences of 5 tokens; the rows of the log-sum-exps lie apart as well."""
    shape = (2, 5, KV_HEADS, 32)
    return {
        **{name: rows(*shape, pad=pad) for name, pad in (("out_a", 1), ("out_b", 2), ("out", 3))},
        **{name: torch.zeros(2, KV_HEADS, 5 + pad)[..., :5] for name, pad in (("lse_a", 1), ("lse_b", 2))},
        "backend": "cuda",
    }


def _state_fields(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    def strides(name: str, x: Tensor) -> tuple[int, ...]:
        batch, *others = x.stride()[:3]
        return (batch, *(reversed(others) if name.startswith("lse") else others))

    found = {name: {name: x, f"{name}_strides": strides(name, x)} for name, x in values.items() if name != "backend"}
    return found | {"backend": {"backend": "cuda"}}


_ON_OPERATORS = ("eager", "known", "compiled")
OPERATION_CASES = [
    OperationCase("get_scheduler_metadata", "plan", "scheduler_metadata", _plan, _plan_fields, _ON_OPERATORS),
    OperationCase("get_scheduler_metadata", "paged", "scheduler_metadata", _paged_plan, _plan_fields, _ON_OPERATORS),
    OperationCase("flash_attn_combine", "out", "combine", _parts_and_out, _part_fields, ("eager",)),
    OperationCase("flash_attn_combine", "dtype", "combine", _parts_and_dtype, _part_fields, ("eager",)),
    OperationCase("merge_attn_states", "states", "merge_states", _states, _state_fields, _ON_OPERATORS),
]
#: What of get_scheduler_metadata is no number of its launch: these choose the kernel, and so its tiles, or are accepted
#: for the sake of other libraries (tests/run/test_metadata_host.py, tests/api/test_metadata_contract.py).
NO_NUMBER = {
    "get_scheduler_metadata": {
        "qkv_dtype", "kv_dtype", "headdim_v", "has_qv", "tokens_per_split", "has_softcap", "cu_seqlens_k_new",
    },
}  # fmt: skip
