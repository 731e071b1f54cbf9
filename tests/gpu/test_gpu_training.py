"""A whole training step in a CUDA graph: forward, backward and the optimizer, replayed on other tokens and lengths."""

from __future__ import annotations

import copy
from collections.abc import Callable

import broadhead
import pytest
import torch
from attention_layer import AttentionLayer
from gpu_calls import capture
from torch import Tensor

pytestmark = pytest.mark.gpu

TOKENS, WIDTH = 256, 64


def attention(window: int) -> Callable[..., Tensor]:
    """Over packed sequences, as Gemma 4 has it: with a window, or (-1) without."""

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, cu_seqlens: Tensor) -> Tensor:
        options = {"causal": True, "window_size": (window, -1), "sinks": sinks, "deterministic": True}
        out = broadhead.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, TOKENS, TOKENS, **options)
        assert broadhead.last_dispatch()[0] == "cuda"
        return out

    return attend


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            AttentionLayer(attention(window), WIDTH, head_dim) for head_dim, window in ((64, -1), (256, 40), (512, -1))
        )

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, cu_seqlens)
        return x.float().square().mean()


def test_step_in_a_graph(cuda: torch.device) -> None:
    """Each replay changes the weights as the eager step does, to the last bit."""
    torch.manual_seed(0)
    eager = Model().to(cuda, torch.bfloat16)
    graphed = copy.deepcopy(eager)
    x = torch.zeros(TOKENS, WIDTH, device=cuda, dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 100, 100, TOKENS], device=cuda, dtype=torch.int32)

    def step(model: Model) -> None:
        """Gradients are made and freed in the step, so that the graph holds no memory of a step before."""
        model(x, cu_seqlens).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad
                parameter.grad = None

    start = copy.deepcopy(graphed.state_dict())
    graph = capture(lambda: step(graphed))
    graphed.load_state_dict(start)  # the warm-up has taken a step
    for ends in ((100, 100), (1, 60), (TOKENS, TOKENS), (0, 7), (255, 256)):
        lengths = (0, *ends, TOKENS)
        cu_seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        x.copy_(torch.randn(TOKENS, WIDTH))
        step(eager)
        graph.replay()
        for (name, got), (_, right) in zip(graphed.named_parameters(), eager.named_parameters(), strict=True):
            assert torch.equal(got, right), f"{name} after a replay with cu_seqlens {lengths}"
    assert any(not torch.equal(start[name], x) for name, x in graphed.state_dict().items())
