"""What vLLM's own selection takes: by flag, by BROADHEAD_VLLM, and what broadhead refuses, on described GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import broadhead
import pytest
from clients import client

client("vllm")
client("vllm", "vllm.v1.attention.backends.flash_attn")

from broadhead.integrations.vllm import BACKEND, BroadheadBackend  # noqa: E402

PROGRAM = Path(__file__).resolve().parents[1] / "support" / "vllm_selection.py"
#: The layers of google/gemma-4-31B-it: images see each other, five layers of six have a window.
GEMMA_LOCAL = {"head_size": 256, "use_mm_prefix": True, "has_sliding_window": True}
GEMMA_GLOBAL = {"head_size": 512, "use_mm_prefix": True}
PLAIN = {"head_size": 128}


FLAGGED = [{**layer, "selected": "CUSTOM"} for layer in (GEMMA_LOCAL, GEMMA_GLOBAL, PLAIN)]
TRITON = {**GEMMA_GLOBAL, "selected": "TRITON_ATTN"}
REQUESTS: dict[str, tuple[str, tuple[int, int], list[dict[str, Any]]]] = {
    "unset": ("", (9, 0), [*FLAGGED, PLAIN, TRITON]),
    "unset before Hopper": ("", (8, 0), [PLAIN]),
    "auto": (
        "auto", (9, 0),
        [{"head_size": 512}, GEMMA_GLOBAL, {**GEMMA_LOCAL, "kv_cache_dtype": "fp8"}, GEMMA_LOCAL,
         PLAIN, {"head_size": 256}, {"head_size": 512, "selected": "TRITON_ATTN"}],
    ),
    "auto before Hopper": ("auto", (8, 0), [GEMMA_LOCAL, GEMMA_GLOBAL, {"head_size": 256}, PLAIN]),
    "on": (
        "on", (9, 0),
        [GEMMA_LOCAL, GEMMA_GLOBAL, PLAIN, {"head_size": 64, "has_sink": True},
         {"head_size": 128, "attn_type": "encoder_only"},
         {"head_size": 80, "kv_cache_dtype": "fp8_e4m3", "use_per_head_quant_scales": True},
         {"head_size": 128, "use_non_causal": True}, {"head_size": 128, "use_kv_connector": True},
         {"head_size": 128, "use_batch_invariant": True}, {"head_size": 576, "use_mla": True, "selected": "CUSTOM"},
         {"head_size": 128, "kv_cache_dtype": "fp8_e5m2", "selected": "CUSTOM"},
         {"head_size": 520, "selected": "CUSTOM"}],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def selected() -> dict[str, list[Any]]:
    """The last part of the path of each class that vLLM takes, or why it refuses; then what it sets for Gemma 4."""
    requests = [{"mode": mode, "capability": where, "cases": cases} for mode, where, cases in REQUESTS.values()]
    run = subprocess.run(
        [sys.executable, str(PROGRAM), json.dumps(requests)], capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads(run.stdout.splitlines()[-1])
    return {
        name: [x if x is None or x.startswith("refused") else x.split(".")[-1] for x in result]
        for name, result in zip(REQUESTS, results, strict=True)
    }


def test_without_the_variable_only_the_flag_takes_it(selected: dict[str, list[Any]]) -> None:
    taken = selected["unset"]
    assert taken[:3] == ["BroadheadBackend"] * 3
    assert "BroadheadBackend" not in taken[3:]


def test_auto_on_hopper(selected: dict[str, list[Any]]) -> None:
    """Head sizes above 256, images at 256, and images over an FP8 cache. A backend that a flag names stays."""
    taken = selected["auto"]
    assert taken[:4] == ["BroadheadBackend"] * 4
    assert "BroadheadBackend" not in taken[4:]
    assert taken[6] == "TritonAttentionBackend"


def test_auto_before_hopper(selected: dict[str, list[Any]]) -> None:
    """From head size 256 on."""
    taken = selected["auto before Hopper"]
    assert taken[:3] == ["BroadheadBackend"] * 3
    assert taken[3] == "FlashAttentionBackend"


def test_gemma_keeps_triton_where_not_all_its_layers_are_taken(selected: dict[str, list[Any]]) -> None:
    """vLLM sets TRITON_ATTN for a Gemma 4 where there is no FlashAttention 4: undone where all layers are taken."""
    assert selected["auto before Hopper"][-2:] == [None, None]
    assert selected["on"][-2:] == [None, None]
    assert selected["auto"][-2:] == [None, "TRITON_ATTN"]
    assert selected["unset before Hopper"][-2:] == [None, "TRITON_ATTN"]


def test_on_takes_every_layer_that_has_kernels(selected: dict[str, list[Any]]) -> None:
    taken = selected["on"]
    assert taken[:8] == ["BroadheadBackend"] * 8
    assert taken[8] != "BroadheadBackend"
    assert "MLA not supported" in taken[9]
    assert "kv_cache_dtype not supported" in taken[10]
    assert "head_size not supported" in taken[11]


def test_the_backend_is_the_member_that_vllm_looks_up() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    broadhead.integrations.vllm.register()  # type: ignore[attr-defined]
    assert AttentionBackendEnum[BroadheadBackend.get_name()].get_path() == BACKEND
    assert AttentionBackendEnum.CUSTOM.get_class() is BroadheadBackend
