"""Generates with transformers' continuous batching on broadhead: requests come and go, keys lie in pages of one cache.

usage: python examples/generate_continuous_batching.py [--model NAME] [--prompt TEXT ...] [--new-tokens N]

Without ``--model`` it is a tiny random model, and the tokens are compared with those of eager attention, one by one.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from typing import Any

import torch
from loss_curves import CANNOT_RUN, FAILED, OK, CannotRunError, need_packages
from options import choose_device, positive

VOCABULARY = 97
PROMPT_LENGTHS = (5, 19, 3, 11, 8)


def make_tiny(seed: int) -> Any:
    """A random Qwen 3 with GQA and a window of 7 in one layer, its weights large enough that a wrong mask shows."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        use_sliding_window=True,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=0,
        eos_token_id=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="broadhead")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


def generate_batch(
    model: Any, prompts: list[list[int]], new_tokens: int, eos: int, pages: dict[str, int]
) -> list[list[int]]:
    """The greedy tokens of each prompt, by continuous batching; ``pages`` has sizes of the cache.

    Raises:
        RuntimeError: a request failed; the text says why.
    """
    import transformers

    config = transformers.GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=0)
    results = model.generate_batch(
        inputs=prompts,
        generation_config=config,
        continuous_batching_config=transformers.ContinuousBatchingConfig(**pages),
        progress_bar=False,
    )
    by_id = sorted(results.values(), key=lambda result: int(result.request_id.rpartition("_")[2]))
    failed = [f"{result.request_id}: {result.error}" for result in by_id if result.error]
    if failed or len(by_id) < len(prompts):  # transformers only logs what its thread raised
        raise RuntimeError(f"{len(by_id)} of {len(prompts)} requests came back; " + "; ".join(failed))
    return [list(result.generated_tokens) for result in by_id]


def pages_of_a_tiny_cache() -> dict[str, int]:
    """Sizes of the cache for the tiny model, which would otherwise take nine tenths of a GPU's memory."""
    import transformers

    # Older versions of transformers call pages blocks.
    size = "page_size" if "page_size" in transformers.ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
    return {size: 4, "num_blocks": 64, "max_batch_tokens": 64}


def generate_one_by_one(model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The same by eager attention."""
    model.set_attn_implementation("eager")
    options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    inputs = [torch.tensor([prompt], device=model.device) for prompt in prompts]
    return [model.generate(x, **options)[0, x.shape[1] :].tolist() for x in inputs]


def are_likeliest(model: Any, prompts: list[list[int]], found: list[list[int]]) -> bool:
    """Whether eager attention in fp32 holds each token of ``found`` for the likeliest, up to the rounding of 16 bits.

    The rounding of a logit is that which eager attention in 16 bits has; two logits may be off by twice as much.
    """
    exact = copy.deepcopy(model).float()
    for each in (model, exact):
        each.set_attn_implementation("eager")
    for prompt, tokens in zip(prompts, found):
        whole = torch.tensor([prompt + tokens], device=model.device)
        with torch.no_grad():
            rounded, truth = (each(whole).logits[0, len(prompt) - 1 : -1].float() for each in (model, exact))
        lost = truth.amax(1) - truth.gather(1, whole[0, len(prompt) :, None])[:, 0]
        if not bool((lost <= 4 * (rounded - truth).abs().max()).all()):
            return False
    return True


def run_tiny(options: argparse.Namespace, device: torch.device) -> int:
    """Generate with the random model and compare."""
    # Kernels take 16 bits; the torch reference, which takes others, can not be in a CUDA graph.
    model = make_tiny(options.seed).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    prompts = [torch.randint(3, VOCABULARY, (length,)).tolist() for length in PROMPT_LENGTHS]
    begin = time.perf_counter()
    found = generate_batch(model, prompts, options.new_tokens, -1, pages_of_a_tiny_cache())
    seconds = time.perf_counter() - begin
    print(f"{len(prompts)} requests, {sum(map(len, found))} new tokens in {seconds:.1f} s by continuous batching")
    for prompt, tokens in zip(prompts, found):
        print(f"  {len(prompt):2} tokens -> {' '.join(map(str, tokens))}")
    if found == generate_one_by_one(model, prompts, options.new_tokens):
        print("eager attention gives the same tokens")
        return OK
    if device.type == "cuda" and are_likeliest(model, prompts, found):
        print("eager attention gives other tokens, which in fp32 are as likely: the logits of 16 bits are rounded")
        return OK
    print("eager attention gives other tokens")
    return FAILED


def run_model(options: argparse.Namespace, device: torch.device) -> int:
    """Generate with a model of the hub, or of a folder."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.model, attn_implementation="broadhead", dtype=torch.bfloat16, device_map=device
    )
    prompts = [tokenizer(text)["input_ids"] for text in options.prompt]
    found = generate_batch(model, prompts, options.new_tokens, tokenizer.eos_token_id, {})
    for text, tokens in zip(options.prompt, found):
        print(f"{text!r} -> {tokenizer.decode(tokens, skip_special_tokens=True)!r}")
    return OK


def run(options: argparse.Namespace) -> int:
    need_packages("transformers", "accelerate")
    import transformers

    if not hasattr(transformers, "ContinuousBatchingConfig"):
        raise CannotRunError(f"a transformers with ContinuousBatchingConfig is needed, got {transformers.__version__}")
    import broadhead.integrations.transformers  # noqa: F401

    device = choose_device(options.device)
    return run_model(options, device) if options.model else run_tiny(options, device)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="generate_continuous_batching.py",
        description="Generate with transformers' continuous batching on broadhead. The exit status is 0 when all went "
        "well, 1 when the tiny model gives other tokens than eager attention, 2 when the example can not run.",
    )
    parser.add_argument("--model", help="a model of the hub or a folder (default: a tiny random one)")
    parser.add_argument("--prompt", nargs="+", default=["The capital of France is"], help="prompts for --model")
    parser.add_argument("--new-tokens", type=positive, default=6)
    parser.add_argument("--device", help="a device of torch (default: cuda where there is one, else cpu)")
    parser.add_argument("--seed", type=int, default=0)
    try:
        return run(parser.parse_args(arguments))
    except CannotRunError as error:
        print(f"generate_continuous_batching.py: {error}", file=sys.stderr)
        return CANNOT_RUN


if __name__ == "__main__":
    sys.exit(main())
