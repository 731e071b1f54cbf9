"""A layer of Megatron-LM in one process, by its local spec, with its attention or ours."""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed
from broadhead.integrations.megatron import use_core_attention
from on_device import DEVICE
from torch import Tensor


def _start() -> None:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.utils import GlobalMemoryBuffer

    if DEVICE.type == "cpu":
        # Megatron's own attention makes its buffer on the GPU, and saves the state of the GPU's generator around its
        # dropout, of which there is none here.
        tensor_parallel.get_cuda_rng_tracker = lambda: SimpleNamespace(fork=contextlib.nullcontext)
        GlobalMemoryBuffer.get_tensor = lambda self, shape, dtype, *names, **others: torch.empty(shape, dtype=dtype)
    if not torch.distributed.is_initialized():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        if DEVICE.type == "cuda":
            tensor_parallel.model_parallel_cuda_manual_seed(1)


def make_layer(replaced: bool, dtype: torch.dtype, **changes: Any) -> Any:
    """A transformer layer; replaced: with broadhead's core attention in its spec."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    _start()
    config = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=32, hidden_dropout=0.0,
        attention_dropout=0.0, use_cpu_initialization=True, params_dtype=dtype, bias_dropout_fusion=False,
        bf16=dtype == torch.bfloat16, **changes,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec()
    layer = build_module(use_core_attention(spec) if replaced else spec, config=config, layer_number=1)
    # Megatron makes norms in fp32 and casts whole models (Float16Module): LayerNorm of torch on CUDA mixes no dtypes.
    return layer.to(DEVICE, dtype)


def run_layer(layer: Any, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    length = len(x)
    mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).triu(1)[None, None]
    out = layer(x, attention_mask=mask)[0]
    names, parameters = zip(*sorted(layer.named_parameters()))
    del names
    return [out, *torch.autograd.grad(out.square().sum(), (x, *parameters))]
