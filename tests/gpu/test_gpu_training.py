"""A whole training step in a CUDA graph: forward, backward and the optimizer, replayed on other tokens and lengths."""

from __future__ import annotations

import copy

import broadhead
import pytest
import torch
from gpu_calls import capture
from torch import Tensor

pytestmark = pytest.mark.gpu

TOKENS, WIDTH = 256, 64


class Layer(torch.nn.Module):
    """Attention over packed sequences, as Gemma 4 has it: with a window or without."""

    def __init__(self, head_dim: int, window: int) -> None:
        super().__init__()
        self.head_dim, self.window = head_dim, window
        self.project = torch.nn.Linear(WIDTH, 8 * head_dim, bias=False)
        self.merge = torch.nn.Linear(4 * head_dim, WIDTH)
        self.sinks = torch.nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (8, self.head_dim)).split((4, 2, 2), dim=1)
        out = broadhead.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            TOKENS,
            TOKENS,
            causal=True,
            window_size=(self.window, -1),
            sinks=self.sinks,
            deterministic=True,
        )
        assert broadhead.last_dispatch()[0] == "cuda"
        return x + self.merge(out.flatten(1))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(64, -1), Layer(256, 40), Layer(512, -1)])

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
