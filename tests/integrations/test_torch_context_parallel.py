"""torch's context_parallel runs broadhead: two processes give what one gives, forward and backward."""

from __future__ import annotations

import pytest
import torch

if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
    pytest.skip(f"torch {torch.__version__} has no registry of flash attention", allow_module_level=True)

from context_parallel_calls import run_context_parallel
from ranks import RANKS, run_ranks


def test_two_processes_by_gloo() -> None:
    run_ranks(run_context_parallel, (32, 512), (torch.float32, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two CUDA devices")
def test_two_gpus_by_nccl() -> None:
    run_ranks(run_context_parallel, (64, 128, 256, 512), (torch.bfloat16,), device="cuda")
