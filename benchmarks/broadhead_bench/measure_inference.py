"""How a model of transformers reads a long prompt and generates, with one attention or another."""

from __future__ import annotations

import copy
import inspect
import os
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from broadhead_bench.accuracy import relative_error, worst
from broadhead_bench.cases_model import InferenceCase
from broadhead_bench.measure_model import bf16_model, kernels_of
from broadhead_bench.model_attention import REFERENCE, register_reference
from broadhead_bench.peers.base import Peer
from broadhead_bench.task import Call, Prepared, Task

#: Largest relative error of a token's logits against the same weights in fp32. The layers around attention round to
#: bf16, too: right ones were off by 0.02 to 0.05, a model that forgot its window by 0.4 to 1.3.
MAX_LOGITS_ERROR = 0.15
#: Tokens of a prompt whose logits are compared, spread over it, and sequences of a batch.
CHECKED_TOKENS, CHECKED_SEQUENCES = 16, 2


class InferenceTask(Task):
    """One model and the same tokens for all: attention is what differs."""

    #: A prompt takes a second with SDPA.
    repetitions = 3

    def __init__(self, case: InferenceCase, device: torch.device) -> None:
        super().__init__(case.area, device)
        self.case = case
        self.max_error = MAX_LOGITS_ERROR
        self.model = bf16_model(case.model, case.tokens + case.new_tokens, device).eval()
        vocabulary = case.model.vocabulary
        self.prompt = torch.randint(vocabulary, (case.batch, case.tokens), device=device)
        #: What is fed in place of what the model says: all implementations see the same tokens, so results compare.
        self.fed = torch.randint(vocabulary, (case.batch, case.new_tokens), device=device)
        self.last = case.new_tokens or torch.linspace(0, case.tokens - 1, CHECKED_TOKENS, device=device).long()
        self.checked_sequences = torch.linspace(0, case.batch - 1, min(CHECKED_SEQUENCES, case.batch)).long().tolist()
        register_reference()
        exact = copy.deepcopy(self.model).float()
        exact.config._attn_implementation = REFERENCE
        tokens = torch.cat((self.prompt, self.fed), dim=1)
        with torch.no_grad():
            self.reference = [
                exact(input_ids=tokens[index, None], use_cache=False, logits_to_keep=self.last).logits[0]
                for index in self.checked_sequences
            ]

    def prepare(self, peer: Peer) -> Prepared:
        attention = peer.attention_of_transformers()
        # transformers names no backend: this makes a fallback on a CUDA device an error all the same.
        with mock.patch.dict(os.environ, BROADHEAD_STRICT="1"), kernels_of(self.model, peer) as kernels:
            item = self.checked(peer, self._call(attention), self._error, self.case.measured_tokens)
        return item._replace(kernel=kernels.text())

    def _call(self, attention: str) -> Call:
        raise NotImplementedError

    def _error(self, logits: Tensor) -> float:
        """The largest of a token."""
        pairs = zip(self.checked_sequences, self.reference)
        return worst([
            relative_error(found, exact)
            for index, expected in pairs
            for found, exact in zip(logits[index], expected)
        ])  # fmt: skip


class PrefillTask(InferenceTask):
    """A prompt, with the cache that generation behind it would read, and the logits of some tokens."""

    measures_memory = True

    def _call(self, attention: str) -> Call:
        def call() -> Tensor:
            self.model.config._attn_implementation = attention
            return self.model(input_ids=self.prompt, use_cache=True, logits_to_keep=self.last).logits

        return call


class GenerationTask(InferenceTask):
    """Steps of generation behind a context that is read beforehand. The cache grows from call to call by what one
    generates, which is little beside the context; each implementation has a cache of its own."""

    repetitions = 5

    def _call(self, attention: str) -> Call:
        from transformers import DynamicCache

        # Layers with a window keep no more than that.
        cache = DynamicCache(config=self.model.config)
        given = {_cache_argument(self.model): cache, "use_cache": True, "logits_to_keep": 1}
        self.model.config._attn_implementation = attention
        with torch.no_grad():
            self.model(input_ids=self.prompt, **given)

        def call() -> Tensor:
            self.model.config._attn_implementation = attention
            steps = [self.model(input_ids=token, **given).logits for token in self.fed.split(1, dim=1)]
            return torch.cat(steps, dim=1)

        return call


def _cache_argument(model: Any) -> str:
    """Its name in this transformers: it was past_key_values until 5.2."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def task_of_inference(case: InferenceCase, device: torch.device) -> Task:
    """The task of a case, its model made and its reference computed."""
    return (GenerationTask if case.new_tokens else PrefillTask)(case, device)
