"""Models of transformers in bf16, on a GPU where there is one: logits, gradients and tokens against eager attention.

The truth is the same model in fp32, whose own error is nothing beside that of bf16: in fp64 the masks of eager
attention hold numbers that its softmax in fp32 makes infinite.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers_images as images
from on_device import DEVICE
from tolerance import GRADIENT_FACTOR, OUT_FACTOR, assert_close
from transformers_models import batching, ids, integration, make, output_of, padding, transformers

#: Those without experts: a router that is rounded sends tokens to others.
DECODERS = ("llama", "mistral", "gemma2", "gemma4", "gemma4_shared", "qwen3_5", "hrm_text")


@pytest.fixture(scope="module", autouse=True)
def on_the_device() -> Iterator[None]:
    """New tensors are on the device, as the helpers of other tests make them."""
    integration.register()
    with DEVICE:
        yield


def narrow(model: Any) -> Any:
    return model.to(torch.bfloat16)


def exact(model: Any) -> Any:
    """The same weights in fp32."""
    return copy.deepcopy(model).float()


def in_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()}


def three_ways(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Logits of broadhead, and of eager attention in fp32 and in bf16."""
    ways = ((model, "broadhead"), (exact(model), "eager"), (model, "eager"))
    return [output_of(each, attention, **in_dtype(inputs, each.dtype)) for each, attention in ways]


def assert_near(model: Any, rows: torch.Tensor, **inputs: Any) -> None:
    """At most twice the error of eager attention in bf16, on ``rows`` (bool ``(B, S)``)."""
    with torch.no_grad():
        found, truth, naive = (x[rows] for x in three_ways(model, inputs))
    assert_close("logits", found, truth, naive, torch.bfloat16, OUT_FACTOR, "model")


@pytest.mark.attends("forward")
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_logits(name: str, side: str | None) -> None:
    mask = torch.ones(3, 70, dtype=torch.long) if side is None else padding(3, 70, side)
    given = {} if side is None else {"attention_mask": mask}
    assert_near(narrow(make(name)), mask.bool(), input_ids=ids(3, 70), use_cache=False, **given)


@pytest.mark.attends("forward")
def test_encoder_and_decoder() -> None:
    encoder, decoder = padding(3, 40, "left"), padding(3, 30, "right")
    inputs = {"input_ids": ids(3, 40), "attention_mask": encoder, "decoder_input_ids": ids(3, 30)}
    assert_near(narrow(make("t5gemma")), decoder.bool(), decoder_attention_mask=decoder, use_cache=False, **inputs)


@pytest.mark.attends("forward")
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", list(images.TOKENS))
def test_images(name: str, side: str | None) -> None:
    """Gemma 3 and 4 and PaliGemma: images whose tokens see each other, cut by windows; prefixes."""
    inputs = images.prompt(name, 60, side)
    assert_near(narrow(images.make(name)), inputs["attention_mask"].bool(), use_cache=False, **inputs)


@pytest.mark.attends("forward", "backward")
@pytest.mark.parametrize("name", ["llama", "gemma4_shared", "qwen3_5", "hrm_text", "gemma3", "gemma4"])
def test_gradients(name: str) -> None:
    """A training step: each parameter's gradient, by its norm, and with images for the two models that take them."""
    if name in images.TOKENS:
        model, inputs = narrow(images.make(name)), images.prompt(name, 40, "right")
    else:
        mask = padding(2, 60, "right")
        model, inputs = narrow(make(name)), {"input_ids": ids(2, 60), "attention_mask": mask}
    inputs |= {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100), "use_cache": False}
    ways = ((model, "broadhead"), (exact(model), "eager"), (model, "eager"))
    found, truth, naive = (gradients(*way, inputs) for way in ways)
    assert found.keys() == truth.keys()
    # Backward kernels read an output that is rounded: where terms cancel, as in a tower for images, eager is nearer.
    noise = 2**-6 * 1e-2 * max(float(x.norm()) for x in truth.values())
    for key, x in truth.items():
        error, allowed = (float((each[key].float() - x).norm()) for each in (found, naive))
        assert error <= GRADIENT_FACTOR * allowed + 2**-8 * float(x.norm()) + noise, key


def gradients(model: Any, attention: str, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.set_attn_implementation(attention)
    model(**in_dtype(inputs, model.dtype)).loss.backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def assert_greedy(model: Any, prompt: torch.Tensor, tokens: torch.Tensor, **inputs: Any) -> None:
    """Each token is, for the model in fp32, as likely as the likeliest, but for what bf16 changes of logits.

    prompt, tokens: ``(B, S)`` and ``(B, new)``, one sequence behind the other.
    """
    whole = torch.cat((prompt, tokens), dim=1)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, tokens.shape[1]), value=1)
    rows = slice(prompt.shape[1] - 1, -1)
    with torch.no_grad():
        truth, naive = (
            output_of(each, "eager", input_ids=whole, use_cache=False, **inputs)[:, rows].double()
            for each in (exact(model), model)
        )
    lost = truth.amax(-1) - truth.gather(-1, tokens[..., None])[..., 0]
    # Both logits may be off by twice the error of eager attention.
    allowed = 4 * (naive - truth).abs().max() + 2**-7 * truth.abs().max()
    assert (lost <= allowed).all(), f"a token's logit is {float(lost.max()):.3g} below the best, allowed {allowed:.3g}"
    assert allowed < 3 * truth.std(), "the judge would let any token pass"


GENERATING = ("llama", "mistral", "gemma4", "hrm_text")


@pytest.mark.attends("forward")
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", GENERATING)
def test_generate(name: str, cache: str | None) -> None:
    model, mask, prompt = narrow(make(name)), padding(2, 33, "left"), ids(2, 33)
    model.set_attn_implementation("broadhead")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    out = model.generate(prompt, attention_mask=mask, cache_implementation=cache, **options)
    assert_greedy(model, prompt, out[:, 33:], attention_mask=mask)


@pytest.mark.attends("forward")
@pytest.mark.parametrize("name", ["llama", "gemma4"])
def test_compiled_decoding_over_a_static_cache(name: str) -> None:
    torch._dynamo.reset()
    model, mask, prompt = narrow(make(name)), padding(2, 9, "left"), ids(2, 9)
    model.set_attn_implementation("broadhead")
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    step = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        logits = model(input_ids=prompt, attention_mask=mask, past_key_values=cache).logits
        tokens = [logits[:, -1:].argmax(-1)]
        longer = torch.nn.functional.pad(mask, (0, 7), value=1)
        for _ in range(4):
            logits = step(input_ids=tokens[-1], attention_mask=longer, past_key_values=cache).logits
            tokens.append(logits[:, -1:].argmax(-1))
    assert_greedy(model, prompt, torch.cat(tokens, dim=1), attention_mask=mask)


@pytest.mark.attends("forward")
@pytest.mark.parametrize(
    ("name", "asked"), [("llama", "broadhead_flash_3"), ("mistral", "broadhead"), ("gemma2", "broadhead")]
)
def test_continuous_batching(name: str, asked: str) -> None:
    """generate_batch over pages of a cache, requests of several lengths."""
    pages = batching(name, 16, num_blocks=32, max_batch_tokens=64)
    model = narrow(make(name))
    prompts = [ids(1, length) for length in (5, 21, 3)]
    model.set_attn_implementation(asked)
    config = transformers.GenerationConfig(eos_token_id=-1, pad_token_id=0, max_new_tokens=5, do_sample=False)
    results = model.generate_batch(
        inputs=[prompt[0].tolist() for prompt in prompts], generation_config=config,
        continuous_batching_config=pages, progress_bar=False,
    )  # fmt: skip
    # What the thread of transformers raises is caught there, and only told by the results.
    failed = {request: result.error for request, result in results.items() if result.error}
    assert not failed and len(results) == len(prompts), f"{len(results)} of {len(prompts)} came back, failed: {failed}"
    by_length = {len(result.prompt_ids): result.generated_tokens for result in results.values()}
    for prompt in prompts:
        assert_greedy(model, prompt, torch.tensor([list(by_length[prompt.shape[1]])]))
