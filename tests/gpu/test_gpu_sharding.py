"""Attention on DTensors of two GPUs, over NCCL: kernels run on both, and give what one GPU gives."""

from __future__ import annotations

import broadhead
import pytest
import torch
from attention_layer import AttentionLayer
from ranks import RANKS, run_ranks
from sharded_calls import BATCH, HEADS, causal_attention, check_tensor, fully_sharded_gradients, place
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two CUDA devices"),
]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return broadhead.flash_attn_func(q, k, v, causal=True, deterministic=True)


def check_attention(rank: int, head_dim: int, placement: Placement) -> None:
    """A head is the same arithmetic whatever heads and sequences are beside it: equal to the last bit."""
    mesh = init_device_mesh("cuda", (RANKS,))
    torch.manual_seed(head_dim)
    plain = [torch.randn(2, 300, heads, head_dim, dtype=torch.bfloat16).requires_grad_() for heads in (4, 2, 2)]
    sharded = [place(x.detach(), mesh, placement).requires_grad_() for x in plain]
    right, out = attend(*plain), attend(*sharded)
    backend, row, reason = broadhead.last_dispatch()
    assert backend == "cuda", f"rank {rank}: {backend} ran ({reason}), not {row}"
    check_tensor("out", out, right, placement)
    weights = torch.randn_like(right)
    right.backward(weights)
    out.backward(place(weights, mesh, placement))
    for name, got, x in zip("qkv", sharded, plain, strict=True):
        check_tensor(f"gradient of {name}", got.grad, x.grad, placement)


def check_fully_sharded(rank: int, head_dim: int) -> None:
    """Two layers in bf16: the gradients are those of the whole batch, but for how their sums are rounded."""
    torch.manual_seed(0)
    x = torch.randn(2, 200, 64, dtype=torch.bfloat16)
    layers = (AttentionLayer(causal_attention, 64, head_dim) for _ in range(2))
    model = torch.nn.Sequential(*layers).to(torch.bfloat16)
    for name, got, right in fully_sharded_gradients(rank, model, x):
        whole = right.float()
        assert (got.full_tensor().float() - whole).norm() < 0.02 * whole.norm(), name


@pytest.mark.parametrize("placement", [HEADS, BATCH], ids=["heads", "batch"])
@pytest.mark.parametrize("head_dim", [64, 256, 512])
def test_attention(head_dim: int, placement: Placement) -> None:
    run_ranks(check_attention, head_dim, placement, device="cuda")


def test_fully_sharded() -> None:
    run_ranks(check_fully_sharded, 256, device="cuda")
