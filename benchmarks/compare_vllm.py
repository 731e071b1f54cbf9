"""vLLM's tokens a second with broadhead, TRITON_ATTN and its FlashAttention 4, on one model, each in its own process.

usage: python benchmarks/compare_vllm.py [--backends auto,triton,fa4] [--rounds 2] [--out FILE] [serve_vllm's options]

It needs a GPU with vLLM, and no network. Backends take turns, round by round, so that a slower clock hits all of them;
the best round of each counts. Greedy tokens are compared with those of --reference. The status is 1 where a backend
fails, or where tokens differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RATES = ("prefill_tokens_per_s", "decode_tokens_per_s")


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="auto,triton,fa4", help="as examples/serve_vllm.py names them")
    parser.add_argument("--reference", default="triton", help="whose tokens the others must give")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--images", action="store_true", help="as a model whose images see each other")
    parser.add_argument("--out", help="write a JSON file of all rounds, without tokens")
    options, rest = parser.parse_known_args(arguments)
    return options, [argument for argument in rest if argument != "--"]


def serve(backend: str, model: Path, rest: list[str]) -> dict[str, Any] | None:
    """What one run measures; None where it fails, of which the end of its output is printed."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "results.json"
        command = [sys.executable, str(EXAMPLES / "serve_vllm.py"), "--backend", backend, "--model", str(model)]
        run = subprocess.run([*command, "--json", str(target), *rest], capture_output=True, text=True)
        taken = [line for line in (run.stdout + run.stderr).splitlines() if "broadhead" in line or "backend" in line]
        print(f"{backend}: status {run.returncode}", *dict.fromkeys(taken[:12]), sep="\n  ")
        if run.returncode:
            print((run.stdout + run.stderr)[-3000:])
            return None
        results: dict[str, Any] = json.loads(target.read_text())
        return results


def agreement(tokens: list[list[int]], reference: list[list[int]]) -> tuple[int, int]:
    """``(requests whose tokens are all equal, tokens before the first difference, over all requests)``."""
    equal = before = 0
    for own, other in zip(tokens, reference, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(own, other)) if a != b), len(own))
        before += same
        equal += same == len(own) == len(other)
    return equal, before


def summarise(rounds: dict[str, list[dict[str, Any]]], reference: str) -> tuple[bool, list[str]]:
    """``(all tokens equal, lines)``: the best round of each backend, and how far its tokens are those of another."""
    best = {name: {rate: max(one[rate] for one in runs) for rate in RATES} for name, runs in rounds.items()}
    lines, same = [], True
    for name, rates in best.items():
        others = [best[other] for other in best if other != name]
        text = f"{name:8}"
        for rate in RATES:
            ratio = f"{rates[rate] / max(other[rate] for other in others):.3f} of the best other" if others else ""
            text += f"  {rate.split('_')[0]} {rates[rate]:10.0f} tokens/s {ratio}"
        if reference in rounds and name != reference:
            tokens = rounds[name][0]["tokens"]
            equal, before = agreement(tokens, rounds[reference][0]["tokens"])
            same &= equal == len(tokens)
            text += f"  {equal} of {len(tokens)} requests as {reference}, {before} of {sum(map(len, tokens))} tokens"
        lines.append(text)
    return same, lines


def main(arguments: list[str] | None = None) -> int:
    options, rest = parse(arguments)
    sys.path.insert(0, str(EXAMPLES))
    import serve_vllm

    rounds: dict[str, list[dict[str, Any]]] = {}
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        make = f"import serve_vllm, pathlib; serve_vllm.make_model(pathlib.Path({folder!r}), {options.images})"
        missing = serve_vllm.missing()
        if missing is not None:
            print(missing)
            return 1
        # In a process of its own: the weights would stay on the GPU.
        subprocess.run([sys.executable, "-c", make], cwd=EXAMPLES, check=True)
        for _ in range(options.rounds):
            for backend in options.backends.split(","):
                results = serve(backend, Path(folder), rest)
                failed |= results is None
                if results is not None:
                    rounds.setdefault(backend, []).append(results)
    same, lines = summarise(rounds, options.reference)
    print("\n".join(lines))
    if options.out:
        kept = {
            name: [{k: v for k, v in one.items() if k != "tokens"} for one in runs] for name, runs in rounds.items()
        }
        Path(options.out).write_text(json.dumps({"options": rest, "summary": lines, "rounds": kept}, indent=1) + "\n")
    return int(failed or not same)


if __name__ == "__main__":
    sys.exit(main())
