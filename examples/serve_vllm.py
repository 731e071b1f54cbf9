"""Serves a Gemma-4-shaped model with random weights by vLLM, and prints what took its attention and how fast it is.

usage: python examples/serve_vllm.py [--backend auto|on|custom|triton|fa4] [--images] [--model DIR] [--json FILE] ...

It downloads nothing: gemma4_like.py makes the model. vLLM 0.24 or newer and a GPU are needed; without them the program
says what is missing. vLLM 0.24 reads Gemma 4 by transformers up to 5.12, not by those that hold head sizes by layer.

The engine runs in this process. It captures CUDA graphs for batches that decode, and compiles nothing with Inductor:
that starts in a third of the time and is the same for every backend. --compile takes vLLM's own defaults instead.
A step has at most 8192 tokens, as in vLLM's server, so that long prompts are prefilled in chunks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gemma4_like

#: What each backend sets: BROADHEAD_VLLM, and what --attention-backend of vLLM would say.
BACKENDS: dict[str, tuple[str | None, str | None]] = {
    "auto": ("auto", None),
    "on": ("on", None),
    "custom": (None, "CUSTOM"),
    "triton": (None, "TRITON_ATTN"),
    "fa4": (None, "FLASH_ATTN"),  # vLLM takes version 4 of it for Gemma 4
}
#: Nothing is asked of a network, and the engine stays in this process.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
#: Tokens of a step of which vLLM tells the log-probabilities.
ALTERNATIVES = 5
_GRAPHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="who runs attention; default: %(default)s")
    parser.add_argument("--model", help="folder of the model; default: one is made for this run")
    parser.add_argument("--images", action="store_true", help="a model with images; a load with images is added")
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "fp8"))
    parser.add_argument("--prompts", type=int, default=8, help="long prompts; default: %(default)s")
    parser.add_argument("--prompt-tokens", type=int, default=32768, help="tokens of each; default: %(default)s")
    parser.add_argument("--concurrency", type=int, default=128, help="requests that decode; default: %(default)s")
    parser.add_argument("--context", type=int, default=2048, help="tokens before each decodes; default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens that each decodes; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each load; the best counts")
    parser.add_argument("--checked", type=int, default=32, help="requests whose tokens are told; default: %(default)s")
    parser.add_argument("--checked-tokens", type=int, default=32, help="tokens of each; default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="vLLM's own defaults for compilation and CUDA graphs")
    parser.add_argument("--json", help="write results, with the tokens, to this file after each load")
    return parser.parse_args(arguments)


def make_engine(options: argparse.Namespace, folder: str) -> Any:
    """vLLM on the model. The environment must say BROADHEAD_VLLM before: its processes load the plugin."""
    from vllm import LLM

    flag = BACKENDS[options.backend][1]
    arguments: dict[str, Any] = {} if flag is None else {"attention_backend": flag}
    if not options.compile:
        sizes = [size for size in _GRAPHS if size < options.concurrency] + [options.concurrency]
        arguments["compilation_config"] = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": sizes,
        }
    if options.images:
        arguments |= {"limit_mm_per_prompt": {"image": 1, "video": 0}, "skip_mm_profiling": True}
    else:
        arguments["skip_tokenizer_init"] = True
    return LLM(
        model=folder,
        dtype="bfloat16",
        max_model_len=max(options.prompt_tokens, options.context + options.new_tokens) + gemma4_like.IMAGE_TOKENS + 16,
        max_num_seqs=options.concurrency,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        kv_cache_dtype=options.kv_cache_dtype,
        gpu_memory_utilization=0.7,
        **arguments,
    )


def prompts(count: int, tokens: int, seed: int, images: bool = False, ragged: bool = False) -> list[Any]:
    """Prompts of random words, of between a quarter and all of ``tokens`` where they are ragged."""
    draw = random.Random(seed)
    make = gemma4_like.image_prompt if images else gemma4_like.text_prompt
    return [make(draw, draw.randrange(tokens // 4, tokens) if ragged else tokens) for _ in range(count)]


def timed(engine: Any, requests: list[Any], new_tokens: int) -> float:
    """Seconds that all requests take, greedy."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    engine.generate(requests, sampling, use_tqdm=False)
    return time.perf_counter() - begin


def greedy(engine: Any, requests: list[Any], new_tokens: int) -> list[dict[str, Any]]:
    """For each request its tokens, and for each of them the log-probabilities of the likeliest ones."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, logprobs=ALTERNATIVES
    )
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "likeliest": [{str(t): p.logprob for t, p in step.items()} for step in output.outputs[0].logprobs],
            "image": "multi_modal_data" in request,
        }
        for request, output in zip(requests, engine.generate(requests, sampling, use_tqdm=False), strict=True)
    ]


def measure(engine: Any, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Results after each load, each with those before: long prompts, requests that decode together, their tokens."""
    results: dict[str, Any] = {"backend": options.backend, "kv_cache_dtype": options.kv_cache_dtype}
    repeats = range(options.repeats)
    timed(engine, prompts(2, 256, seed=9), 8)  # what is compiled when it is first used
    timed(engine, prompts(1, options.prompt_tokens, seed=8), 2)
    long = min(timed(engine, prompts(options.prompts, options.prompt_tokens, seed=1 + i), 1) for i in repeats)
    results["prefill_tokens_per_s"] = options.prompts * options.prompt_tokens / long
    yield results
    requests = prompts(options.concurrency, options.context, seed=2)
    first = min(timed(engine, requests, 1) for _ in repeats)
    both = min(timed(engine, requests, options.new_tokens) for _ in repeats)
    # Prefill of the same requests is taken off.
    results["decode_tokens_per_s"] = options.concurrency * (options.new_tokens - 1) / max(both - first, 1e-9)
    results["served_tokens_per_s"] = options.concurrency * options.new_tokens / both
    yield results
    results["requests"] = greedy(
        engine, prompts(options.checked, options.context, 3, ragged=True), options.checked_tokens
    )
    yield results
    if options.images:
        pictures = prompts(options.checked, options.context, seed=4, images=True, ragged=True)
        timed(engine, pictures[:2], 2)
        both = min(timed(engine, pictures, 1) for _ in repeats)
        results["image_requests_per_s"] = options.checked / both
        results["requests"] += greedy(engine, pictures, options.checked_tokens)
        yield results


def missing() -> str | None:
    """What keeps vLLM from serving here; None: nothing."""
    from broadhead.integrations.vllm.check import look, report

    usable, text = report(look())
    return None if usable else text


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    os.environ.pop("BROADHEAD_VLLM", None)
    variable = BACKENDS[options.backend][0]
    if variable is not None:
        os.environ["BROADHEAD_VLLM"] = variable
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    text = missing()
    if text is not None:
        print(text)
        return 1
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            gemma4_like.make_model(Path(folder), options.images)
        engine = make_engine(options, options.model or folder)
        print(f"started after {time.perf_counter() - begin:.0f} s", flush=True)
        results: dict[str, Any] = {}
        for results in measure(engine, options):
            if options.json:
                Path(options.json).write_text(json.dumps(results))
            print(f"loads done after {time.perf_counter() - begin:.0f} s", flush=True)
    print(f"backend {options.backend}, cache {options.kv_cache_dtype}")
    print(f"prefill: {results['prefill_tokens_per_s']:.0f} tokens/s, {options.prompt_tokens} tokens a prompt")
    print(f"decode:  {results['decode_tokens_per_s']:.0f} tokens/s, {options.concurrency} requests")
    if options.images:
        print(f"images:  {results['image_requests_per_s']:.1f} requests/s, one image in each")
    print(f"first tokens of the first request: {results['requests'][0]['tokens'][:8]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
