"""A program: which backends vLLM's own selection takes on described GPUs. Prints a JSON list, one item a request.

    python vllm_selection.py '[{"mode": "auto", "capability": [9, 0], "cases": [{"head_size": 512}]}]'

It stands in a process of its own, because it puts a described platform in the place of vLLM's. The build is one of all
kernels. A case has fields of AttentionSelectorConfig, and "selected" for what --attention-backend says; the two last
results are what vLLM sets for a Gemma 4, with FlashAttention 4 and without.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch
from described import FULL
from vllm_compiled import leave_out_compiled


def describe_platform(capability: tuple[int, int]) -> Any:
    """A CUDA platform of vLLM with that capability, in the place of the one that was found."""
    import vllm.platforms
    from vllm.platforms import cuda
    from vllm.platforms.interface import DeviceCapability

    class Described(cuda.CudaPlatformBase):  # type: ignore[misc,name-defined]
        device_name = "described"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(*capability)

    vllm.platforms.current_platform = Described()
    return vllm.platforms.current_platform


def gemma_config(fa4: bool) -> Any:
    """What Gemma4Config of vLLM leaves of a VllmConfig without a flag, where FlashAttention 4 is there or not."""
    from vllm.model_executor.models import config as models
    from vllm.v1.attention.backends import fa_utils

    fa_utils.is_fa_version_supported = lambda version: fa4

    class Layers:
        total_num_hidden_layers = 2

    # Newer versions read head sizes by layer, older ones from the text config.
    if "model_arch_config" in inspect.getsource(models.Gemma4Config):
        Layers.__getitem__ = lambda self, i: SimpleNamespace(head_size=(256, 512)[i])  # type: ignore[attr-defined]
    text = SimpleNamespace(head_dim=256, global_head_dim=512, layer_types=["sliding_attention", "full_attention"])
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_text_config=text, model_arch_config=Layers(), dtype=torch.bfloat16, is_mm_prefix_lm=False
        ),
        attention_config=SimpleNamespace(backend=None, flash_attn_version=None),
        cache_config=SimpleNamespace(cache_dtype="auto"),
    )
    models.Gemma4Config.verify_and_update_config(config)
    return config.attention_config.backend and config.attention_config.backend.name


def answer(request: dict[str, Any]) -> list[str | None]:
    os.environ["BROADHEAD_VLLM"] = request["mode"]
    platform = describe_platform(tuple(request["capability"]))
    from broadhead.integrations.vllm import register
    from vllm.model_executor.models.config import Gemma4Config
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    original = Gemma4Config.verify_and_update_config
    register()
    register()  # plugins are loaded more than once
    results: list[str | None] = []
    for case in request["cases"]:
        name = case.pop("selected", None)
        options = {"dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16, **case}
        options = {key: value for key, value in options.items() if key in AttentionSelectorConfig._fields}
        selected = None if name is None else AttentionBackendEnum[name]
        try:
            path = platform.get_attn_backend_cls(
                selected, attn_selector_config=AttentionSelectorConfig(**options), num_heads=32
            )
        except ValueError as error:
            path = f"refused: {error}"
        results.append(path)
    results += [gemma_config(fa4=True), gemma_config(fa4=False)]
    Gemma4Config.verify_and_update_config = staticmethod(original)
    return results


def main(requests: list[dict[str, Any]]) -> list[list[str | None]]:
    leave_out_compiled()
    describe_platform((9, 0))
    from broadhead.api import explain
    from broadhead.integrations.vllm import policy
    from broadhead.plan import dispatch
    from vllm.config import vllm as current

    for module in (explain, dispatch, policy):
        module.build_description = lambda: FULL  # type: ignore[attr-defined]
    current._current_vllm_config = SimpleNamespace(
        model_config=None,
        cache_config=SimpleNamespace(cache_dtype="auto"),
        attention_config=SimpleNamespace(flash_attn_version=None),
    )
    return [answer(request) for request in requests]


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
