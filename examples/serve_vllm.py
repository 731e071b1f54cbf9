"""Serves a Gemma-4-shaped model with random weights by vLLM, and prints what took its attention and how fast it is.

usage: python examples/serve_vllm.py [--backend auto|on|custom|triton|fa4] [--model DIR] [--json FILE] ...

It downloads nothing: the model is made here, with head_dim 256 and a window in five layers of six, and head_dim 512 in
the others. vLLM 0.24 or newer and a GPU are needed; without them the program says what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: What each backend sets: BROADHEAD_VLLM, and what --attention-backend of vLLM would say.
BACKENDS: dict[str, tuple[str | None, str | None]] = {
    "auto": ("auto", None),
    "on": ("on", None),
    "custom": (None, "CUSTOM"),
    "triton": (None, "TRITON_ATTN"),
    "fa4": (None, "FLASH_ATTN"),  # vLLM takes version 4 of it for Gemma 4
}
VOCABULARY = 32768
#: The attention of Gemma 4 26B-A4B, in a smaller model.
SHAPE = {
    "hidden_size": 2816, "intermediate_size": 8448, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 8, "num_global_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512,
    "sliding_window": 1024, "vocab_size": VOCABULARY, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
    "max_position_embeddings": 131072, "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="who runs attention; default: %(default)s")
    parser.add_argument("--model", help="folder of the model; default: one is made for this run")
    parser.add_argument("--images", action="store_true", help="as a model with images; none are sent")
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "fp8"))
    parser.add_argument("--prompts", type=int, default=4, help="long prompts; default: %(default)s")
    parser.add_argument("--prompt-tokens", type=int, default=16384, help="tokens of each; default: %(default)s")
    parser.add_argument("--concurrency", type=int, default=128, help="requests that decode; default: %(default)s")
    parser.add_argument("--context", type=int, default=2048, help="tokens before each decodes; default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens that each decodes; default: %(default)s")
    parser.add_argument("--json", help="write results, with the tokens, to this file")
    return parser.parse_args(arguments)


def make_model(folder: Path, images: bool) -> None:
    """Write a model with random weights: real ones would not fit, and dummy ones of vLLM make all logits equal."""
    import torch
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(**SHAPE, bos_token_id=2, eos_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Gemma4ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    if images:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "is_mm_prefix_lm": True}))


def make_engine(options: argparse.Namespace, folder: str) -> Any:
    """vLLM on the model. The environment must say BROADHEAD_VLLM before: its processes load the plugin."""
    from vllm import LLM

    flag = BACKENDS[options.backend][1]
    longest = max(options.prompt_tokens, options.context + options.new_tokens) + 16
    return LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=longest,
        max_num_seqs=options.concurrency,
        enable_prefix_caching=False,
        kv_cache_dtype=options.kv_cache_dtype,
        gpu_memory_utilization=0.8,
        **({} if flag is None else {"attention_backend": flag}),
    )


def prompts(count: int, tokens: int, seed: int) -> list[Any]:
    draw = random.Random(seed)
    return [{"prompt_token_ids": [draw.randrange(3, VOCABULARY) for _ in range(tokens)]} for _ in range(count)]


def timed(engine: Any, requests: list[Any], new_tokens: int) -> tuple[float, list[list[int]]]:
    """``(seconds, tokens of each request)``, greedy."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    outputs = engine.generate(requests, sampling, use_tqdm=False)
    return time.perf_counter() - begin, [list(output.outputs[0].token_ids) for output in outputs]


def measure(engine: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of long prompts, and of requests that decode together."""
    timed(engine, prompts(2, 256, seed=9), 8)  # what is compiled when it is first used
    timed(engine, prompts(1, options.prompt_tokens, seed=8), 1)
    long, _ = timed(engine, prompts(options.prompts, options.prompt_tokens, seed=1), 1)
    requests = prompts(options.concurrency, options.context, seed=2)
    first, _ = timed(engine, requests, 1)
    both, tokens = timed(engine, requests, options.new_tokens)
    return {
        "backend": options.backend,
        "kv_cache_dtype": options.kv_cache_dtype,
        "prefill_tokens_per_s": options.prompts * options.prompt_tokens / long,
        # Prefill of the same requests is taken off.
        "decode_tokens_per_s": options.concurrency * (options.new_tokens - 1) / max(both - first, 1e-9),
        "tokens": tokens,
    }


def missing() -> str | None:
    """What keeps vLLM from serving here; None: nothing."""
    from broadhead.integrations.vllm.check import look, report

    usable, text = report(look())
    return None if usable else text


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    text = missing()
    if text is not None:
        print(text)
        return 1
    variable = BACKENDS[options.backend][0]
    os.environ.pop("BROADHEAD_VLLM", None)
    if variable is not None:
        os.environ["BROADHEAD_VLLM"] = variable
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            make_model(Path(folder), options.images)
        results = measure(make_engine(options, options.model or folder), options)
    print(f"backend {options.backend}, cache {options.kv_cache_dtype}")
    print(f"prefill: {results['prefill_tokens_per_s']:.0f} tokens/s, {options.prompt_tokens} tokens a prompt")
    print(f"decode:  {results['decode_tokens_per_s']:.0f} tokens/s, {options.concurrency} requests")
    print(f"first tokens of the first request: {results['tokens'][0][:8]}")
    if options.json:
        Path(options.json).write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
