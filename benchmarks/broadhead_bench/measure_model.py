"""The training step of a model of transformers: Gemma 4's layers, random weights, its loss and all gradients."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from broadhead_bench.accuracy import relative_error, worst
from broadhead_bench.cases_backward import ModelShape, StepCase
from broadhead_bench.model_attention import REFERENCE, register_reference
from broadhead_bench.peers.base import Peer, Skip
from broadhead_bench.task import Prepared, Task

#: Largest relative error of a weight's gradient. In bf16 the layers around attention add their own rounding: six small
#: ones were off by 0.06 to 0.09 with torch's SDPA, against a model in fp32.
MAX_STEP_ERROR = 0.2
#: What the weights are called whose gradients are checked: two of each layer.
WATCHED = ("q_proj.weight", "k_proj.weight")


class StepTask(Task):
    """One model and one sequence for all: attention is what differs. What a step does is counted in tokens."""

    measures_memory = True
    repetitions = 5

    def __init__(self, case: StepCase, device: torch.device) -> None:
        super().__init__(case.area, device)
        self.case = case
        self.max_error = MAX_STEP_ERROR
        self.model = bf16_model(case.model, case.tokens, device)
        self.tokens = torch.randint(case.model.vocabulary, (1, case.tokens), device=device)
        register_reference()
        with torch.enable_grad():
            exact = _step(copy.deepcopy(self.model).float(), self.tokens, REFERENCE)()
        self.reference = exact[: 2 * (case.model.window_layers + 1)]

    def prepare(self, peer: Peer) -> Prepared:
        step = _step(self.model, self.tokens, peer.attention_of_transformers())

        def call() -> list[Tensor]:
            with torch.enable_grad():
                return step()

        # transformers names no backend: this makes a fallback on a CUDA device an error all the same.
        with mock.patch.dict(os.environ, BROADHEAD_STRICT="1"), kernels_of(self.model, peer) as kernels:
            item = self.checked(peer, call, self._error, self.case.tokens)
        return item._replace(kernel=kernels.text())

    def _error(self, gradients: list[Tensor]) -> float:
        return worst([relative_error(found, expected) for found, expected in zip(gradients, self.reference)])


class Kernels:
    """The kernels that ran, each once, in the order of their first calls."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}

    def text(self) -> str | None:
        return ", ".join(self.names) or None


@contextmanager
def kernels_of(model: Any, peer: Peer) -> Iterator[Kernels]:
    """Note the kernel of each layer's attention; on a GPU a layer of broadhead that ran none is an error."""
    found = Kernels()

    def note(*_: Any) -> None:
        name = peer.kernel()
        if name is not None:
            found.names[name] = None

    hooks = [layer.self_attn.register_forward_hook(note) for layer in model.model.layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def bf16_model(shape: ModelShape, tokens: int, device: torch.device) -> Any:
    """random_model in bf16.

    Raises:
        Skip: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise Skip("transformers is not installed: pip install transformers")
    return random_model(shape, tokens, device).to(torch.bfloat16)


def random_model(shape: ModelShape, tokens: int, device: torch.device) -> Any:
    """The model in fp32, its weights the same for the same seed of torch."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    heads, kv_heads, head_dim, window = shape.local
    wide_heads, wide_kv_heads, wide_head_dim, _ = shape.wide
    if heads != wide_heads:
        raise ValueError(f"all layers have the same query heads, got {heads} and {wide_heads}")
    config = Gemma4TextConfig(
        vocab_size=shape.vocabulary,
        vocab_size_per_layer_input=shape.vocabulary,
        hidden_size=shape.hidden,
        hidden_size_per_layer_input=0,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.window_layers + 1,
        layer_types=["sliding_attention"] * shape.window_layers + ["full_attention"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        global_head_dim=wide_head_dim,
        num_global_key_value_heads=wide_kv_heads,
        attention_k_eq_v=True,
        num_kv_shared_layers=0,
        sliding_window=window,
        max_position_embeddings=max(4096, tokens),
        attn_implementation="sdpa",
    )
    with torch.device(device):
        model = Gemma4ForCausalLM(config)
    # Unit norms of q and k would make the softmax nearly an argmax, in which the rounding of bf16 hides all other
    # errors; these give scores of deviation 2.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.fill_(2 * layer.self_attn.head_dim**-0.5)
    return model.train()


def _step(model: Any, tokens: Tensor, attention: str) -> Callable[[], list[Tensor]]:
    """A call that computes and returns the gradients of all weights, those that make queries and keys first."""
    by_name = dict(model.named_parameters())
    order = sorted(by_name, key=lambda name: not name.endswith(WATCHED))
    weights = [by_name[name] for name in order]

    def step() -> list[Tensor]:
        model.config._attn_implementation = attention
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        gradients = [weight.grad for weight in weights]
        for weight in weights:
            weight.grad = None
        return gradients

    return step
