"""torch's context_parallel on broadhead in the processes of a group: out and gradients are those of one process."""

from __future__ import annotations

import broadhead
import oracle
import torch
import torch.nn.functional as F
from sdpa_calls import check
from torch import Tensor


def run_context_parallel(rank: int, head_dims: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Every head_dim and dtype, causal and not, with and without the balance of work that torch offers for causal."""
    seqlen = 64 if torch.get_default_device().type == "cpu" else 1024
    for head_dim in head_dims:
        for dtype in dtypes:
            for causal, balanced in ((True, True), (True, False), (False, False)):
                check_parts(rank, (2, 8, seqlen, head_dim), (2, 2, seqlen, head_dim), dtype, causal, balanced)


def check_parts(
    rank: int, shape_q: tuple[int, ...], shape_k: tuple[int, ...], dtype: torch.dtype, causal: bool, balanced: bool
) -> None:
    """Each process has the whole ``(B, H, S, D)`` and computes its part of it."""
    from broadhead.integrations import torch_attention
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import _cp_options, context_parallel_unshard

    ranks = torch.distributed.get_world_size()
    torch.manual_seed(shape_q[3])
    q, k, v, dout = whole = [torch.randn(shape).to(dtype) for shape in (shape_q, shape_k, shape_k, shape_q)]
    # The head and the tail of a sequence together are even work under a causal mask; torch refuses that without one.
    _cp_options.enable_load_balance = balanced
    mesh = init_device_mesh(q.device.type, (ranks,))
    with torch_attention.activate(q.device.type):
        parts = [x.clone() for x in whole]
        with context_parallel(mesh, buffers=parts, buffer_seq_dims=[2] * 4, no_restore_buffers=set(parts)):
            leaves = [x.requires_grad_() for x in parts[:3]]
            assert leaves[0].shape[2] * ranks == q.shape[2], "q was not cut"
            out: Tensor = F.scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=True)
            backend, row, reason = broadhead.last_dispatch()
            assert backend == ("cuda" if q.is_cuda else "torch"), f"rank {rank}: {backend} ran {row} ({reason})"
            grads = torch.autograd.grad(out, leaves, parts[3])
            found = context_parallel_unshard(mesh, [out.detach(), *grads], [2] * 4)
    rule = oracle.Rule(scale=q.shape[3] ** -0.5, window=(-1, 0 if causal else -1))
    check((q, k, v), found[0], rule, grads=found[1:], dout=dout)
