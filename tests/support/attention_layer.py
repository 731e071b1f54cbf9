"""A layer of attention, as the models have it that tests train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class AttentionLayer(torch.nn.Module):
    """Projections around attention with sinks, and what comes in is added to what goes out.

    Args:
        attend: ``(q, k, v, sinks, *others) -> out``, ``(..., heads, head_dim)`` of four query heads and two KV heads.
        width: elements of a token.
    """

    def __init__(self, attend: Callable[..., Tensor], width: int, head_dim: int) -> None:
        super().__init__()
        self.attend, self.head_dim = attend, head_dim
        self.project = torch.nn.Linear(width, 8 * head_dim, bias=False)
        self.merge = torch.nn.Linear(4 * head_dim, width)
        self.sinks = torch.nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (8, self.head_dim)).split((4, 2, 2), dim=-2)
        return x + self.merge(self.attend(q, k, v, self.sinks, *others).flatten(-2))
