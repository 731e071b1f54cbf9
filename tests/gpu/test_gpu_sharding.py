"""Attention on DTensors of two GPUs, over NCCL: kernels run on both, and give what one GPU gives."""

from __future__ import annotations

import broadhead
import pytest
import torch
from ranks import RANKS, run_ranks
from sharded_calls import BATCH, HEADS, check_tensor, place
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


class Layer(torch.nn.Module):
    """A layer of attention, as a model has it."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.project = torch.nn.Linear(64, 8 * head_dim, bias=False)
        self.merge = torch.nn.Linear(4 * head_dim, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (8, self.head_dim)).split((4, 2, 2), dim=2)
        return x + self.merge(attend(q, k, v).flatten(2))


def check_fully_sharded(rank: int, head_dim: int) -> None:
    """Two layers under FSDP2 in bf16, each rank with its part of the batch: the gradients are those of all of it."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    x = torch.randn(2, 200, 64, dtype=torch.bfloat16)
    model = torch.nn.Sequential(Layer(head_dim), Layer(head_dim)).to(torch.bfloat16)
    model(x).float().square().mean().backward()
    right = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    for module in (*model, model):
        fully_shard(module, mesh=init_device_mesh("cuda", (RANKS,)))
    model(x[rank : rank + 1]).float().square().mean().backward()
    for name, parameter in model.named_parameters():
        got, whole = parameter.grad.full_tensor().float(), right[name].float()
        assert (got - whole).norm() < 0.02 * whole.norm(), name


@pytest.mark.parametrize("placement", [HEADS, BATCH], ids=["heads", "batch"])
@pytest.mark.parametrize("head_dim", [64, 256, 512])
def test_attention(head_dim: int, placement: Placement) -> None:
    run_ranks(check_attention, head_dim, placement, device="cuda")


def test_fully_sharded() -> None:
    run_ranks(check_fully_sharded, 256, device="cuda")
