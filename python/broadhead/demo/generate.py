"""Greedy generation over a PagedKVCache, and the same tokens from SDPA."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from broadhead.demo.paged_cache import PAGED_ATTENTION, PagedKVCache, register


@dataclass
class Generation:
    """What a greedy generation gave.

    tokens: the new tokens; logits: fp32 ``(new tokens, vocabulary)``, the rows they were chosen from.
    """

    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


@contextmanager
def attention_of(model: Any, name: str) -> Iterator[None]:
    """Run ``model`` with another attention implementation, then put its own back."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def generate_paged(
    model: Any,
    prompt: Tensor,
    max_new_tokens: int,
    page_size: int,
    eos: set[int] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> tuple[Generation, PagedKVCache]:
    """Generate greedily through broadhead's paged attention.

    Args:
        model: a transformers causal language model.
        prompt: int64 ``(1, S)``, on the model's device.
        max_new_tokens: at most this many tokens.
        page_size: tokens a page of the cache.
        eos: tokens that end the text.
        on_token: called with each token as it comes.

    Returns:
        The generation and its cache, whose ``dispatches`` say what ran.
    """
    register()
    result = Generation()
    device = prompt.device
    cache = PagedKVCache(1, prompt.shape[1] + max_new_tokens, page_size, device)
    step = prompt
    with attention_of(model, PAGED_ATTENTION):
        for index in range(max_new_tokens):
            start = time.perf_counter()
            positions = torch.arange(cache.seqlen, cache.seqlen + step.shape[1], device=device)[None]
            output = model(input_ids=step, position_ids=positions, use_cache=False, paged_cache=cache, logits_to_keep=1)
            cache.advance(step.shape[1])
            logits = output.logits[0, -1].float()
            token = int(logits.argmax())
            _synchronize(device)
            elapsed = time.perf_counter() - start
            if index == 0:
                result.prefill_seconds = elapsed
            else:
                result.decode_seconds += elapsed
            result.tokens.append(token)
            result.logits.append(logits)
            if on_token is not None:
                on_token(token)
            if eos and token in eos:
                break
            step = prompt.new_tensor([[token]])
    return result, cache


@torch.inference_mode()
def generate_sdpa(model: Any, prompt: Tensor, max_new_tokens: int, eos: set[int] | None = None) -> list[int]:
    """The greedy tokens of the same model through SDPA, with transformers' own generate and cache."""
    with attention_of(model, "sdpa"):
        sequence = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(eos) if eos else None,
            pad_token_id=sorted(eos)[0] if eos else 0,
        )
    return sequence[0, prompt.shape[1] :].tolist()


@torch.inference_mode()
def teacher_forced_logits(model: Any, prompt: Tensor, tokens: list[int], attention: str) -> Tensor:
    """The logits that ``tokens`` would be chosen from, all in one pass without a cache.

    Returns:
        ``(len(tokens), vocabulary)`` in the model's dtype or better.
    """
    sequence = torch.cat([prompt, prompt.new_tensor([tokens[:-1]])], dim=1)
    with attention_of(model, attention):
        logits = model(input_ids=sequence, use_cache=False, logits_to_keep=len(tokens)).logits[0]
    return logits if logits.dtype == torch.float64 else logits.float()
