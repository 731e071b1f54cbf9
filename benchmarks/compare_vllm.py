"""vLLM's tokens a second with broadhead, TRITON_ATTN and its FlashAttention 4, on one model, each in its own process.

usage: python benchmarks/compare_vllm.py [--backends auto,triton,fa4] [--rounds 1] [--images] [--out FILE]
       [serve_vllm's options]

It needs a GPU with vLLM, and no network. Backends take turns, round by round, so that a slower clock hits all of them;
the best round of each counts. A backend that takes longer than --limit is stopped; what it measured before counts.

Greedy tokens are compared with those of --reference, request by request, up to the first that differs: after it the two
read different texts. The head of the model is bfloat16, whose steps are 0.03 at the size of its largest logits, so that
two right backends may disagree where two tokens are nearly as likely. A first difference is a near tie where each of
the two backends gives the other's token a log-probability at most --margin below that of its own; else it is a
failure. The default is five such steps. A wrong backend fails at once: its token is one of 32768.

The status is 1 where a backend fails, and where tokens of broadhead's (auto, on, custom) differ by more than a near
tie. Differences of vLLM's own backends are told, and are no failure: FlashAttention 4 of vLLM 0.24 loses the window and
the positions of a batch with images.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RATES = {
    "prefill_tokens_per_s": "prefill tokens/s",
    "decode_tokens_per_s": "decode tokens/s",
    "served_tokens_per_s": "served tokens/s",
    "image_requests_per_s": "image requests/s",
}
OWN = ("auto", "on", "custom")


class Agreement(NamedTuple):
    """How far the tokens of a backend are those of the reference."""

    requests: int
    equal: int  # requests whose tokens are all equal
    compared: int  # tokens up to the first difference of each request
    near_ties: int  # first differences within the margin
    failures: list[str]  # the others, told
    noise: float  # the greatest difference of a log-probability of a token that both took


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="auto,triton,fa4", help="as examples/serve_vllm.py names them")
    parser.add_argument("--reference", default="triton", help="whose tokens the others must give")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--margin", type=float, default=0.15, help="of a near tie, in nats; default: %(default)s")
    parser.add_argument("--limit", type=float, default=150, help="seconds of one run; default: %(default)s")
    parser.add_argument("--images", action="store_true", help="a model with images, and a load with images")
    parser.add_argument("--logs", help="folder for the whole output of each backend")
    parser.add_argument("--out", help="write a JSON file of all rounds, without tokens")
    options, rest = parser.parse_known_args(arguments)
    return options, [argument for argument in rest if argument != "--"] + ["--images"] * options.images


def serve(backend: str, model: Path, rest: list[str], limit: float, logs: Path | None = None) -> dict[str, Any]:
    """What one run measures, with ``failed``; of a run that fails, the end of its output is printed."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "results.json"
        command = [sys.executable, "-u", str(EXAMPLES / "serve_vllm.py"), "--backend", backend, "--model", str(model)]
        with open(Path(folder) / "log", "w+") as log:
            try:
                run = subprocess.run(
                    [*command, "--json", str(target), *rest], stdout=log, stderr=subprocess.STDOUT, timeout=limit
                )
                status = f"status {run.returncode}"
            except subprocess.TimeoutExpired:
                status = f"stopped after {limit:.0f} s"
            log.seek(0)
            output = log.read()
        failed = status != "status 0"
        taken = [line for line in output.splitlines() if "broadhead" in line or "backend" in line or " after " in line]
        print(f"{backend}: {status}", *[line[:200] for line in dict.fromkeys(taken)][:14], sep="\n  ", flush=True)
        if logs is not None:
            with open(logs / f"{backend}.log", "a") as kept:
                kept.write(output)
        if failed:
            print("\n".join(output.splitlines()[-30:])[-4000:], flush=True)
        results: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
        return {**results, "failed": failed}


def agreement(own: list[dict[str, Any]], reference: list[dict[str, Any]], margin: float) -> Agreement:
    """Compare the requests of two backends, as ``serve_vllm.greedy`` tells them."""
    equal = compared = near_ties = 0
    failures = []
    noise = 0.0
    for number, (mine, theirs) in enumerate(zip(own, reference)):
        pairs = list(zip(mine["tokens"], theirs["tokens"], strict=True))
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        same = len(pairs) if first is None else first
        compared += same
        for i in range(same):
            token = str(pairs[i][0])
            noise = max(noise, abs(mine["likeliest"][i][token] - theirs["likeliest"][i][token]))
        if first is None:
            equal += 1
            continue
        behind = [
            _behind(told["likeliest"][first], chosen, other)
            for told, chosen, other in (
                (mine, pairs[first][0], pairs[first][1]),
                (theirs, pairs[first][1], pairs[first][0]),
            )
        ]
        if max(behind) <= margin:
            near_ties += 1
        else:
            kind = "image" if mine["image"] else "text"
            failures.append(
                f"request {number} ({kind}), token {first}: {pairs[first][0]}, not {pairs[first][1]}; the other's token"
                f" is {behind[0]:.3f} and {behind[1]:.3f} behind"
            )
    return Agreement(min(len(own), len(reference)), equal, compared, near_ties, failures, noise)


def _behind(likeliest: dict[str, float], chosen: int, other: int) -> float:
    """How far the log-probability of another token is below that of the chosen one; infinite where it is not told."""
    value = likeliest.get(str(other))
    return float("inf") if value is None else likeliest[str(chosen)] - value


def summarise(rounds: dict[str, list[dict[str, Any]]], reference: str, margin: float) -> tuple[bool, list[str]]:
    """``(tokens of broadhead agree, lines)``: the best round of each backend, and how far its tokens agree."""
    best = {
        name: {rate: max((one.get(rate, 0.0) for one in runs), default=0.0) for rate in RATES}
        for name, runs in rounds.items()
    }
    told = {name: next((one["requests"] for one in runs if "requests" in one), None) for name, runs in rounds.items()}
    lines, fine = [], True
    for name, rates in best.items():
        for rate, label in RATES.items():
            if not rates[rate]:
                continue
            others = [best[other][rate] for other in best if other != name and best[other][rate]]
            ratio = f"{rates[rate] / max(others):.3f} of the best other" if others else ""
            lines.append(f"{name:8} {label:17} {rates[rate]:12.1f} {ratio}".rstrip())
        own, other = told[name], told.get(reference)
        if name == reference or own is None or other is None:
            if name in OWN and name != reference:
                fine = False
                lines.append(f"{name:8} tokens were not compared")
            continue
        for kind in ("text", "image"):
            mine, theirs = ([one for one in told_by if one["image"] == (kind == "image")] for told_by in (own, other))
            if not mine:
                continue
            found = agreement(mine, theirs, margin)
            lines.append(
                f"{name:8} {kind} requests: {found.equal} of {found.requests} as {reference}, {found.near_ties} differ"
                f" by a near tie, {len(found.failures)} by more; {found.compared} tokens equal, of log-probabilities up"
                f" to {found.noise:.3f} apart"
            )
            lines += [f"{name:8}   {text}" for text in found.failures[:4]]
            if name in OWN and found.failures:
                fine = False
    return fine, lines


def main(arguments: list[str] | None = None) -> int:
    options, rest = parse(arguments)
    sys.path.insert(0, str(EXAMPLES))
    import serve_vllm

    missing = serve_vllm.missing()
    if missing is not None:
        print(missing)
        return 1
    logs = None if options.logs is None else Path(options.logs)
    rounds: dict[str, list[dict[str, Any]]] = {}
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        make = f"import gemma4_like, pathlib; gemma4_like.make_model(pathlib.Path({folder!r}), {options.images})"
        # In a process of its own: the weights would stay on the GPU.
        subprocess.run([sys.executable, "-c", make], cwd=EXAMPLES, check=True)
        for _ in range(options.rounds):
            for backend in options.backends.split(","):
                results = serve(backend, Path(folder), rest, options.limit, logs)
                failed |= results["failed"]
                rounds.setdefault(backend, []).append(results)
                _write(options, rounds)
    fine, lines = summarise(rounds, options.reference, options.margin)
    print("\n".join(lines))
    _write(options, rounds, lines)
    return int(failed or not fine)


def _write(
    options: argparse.Namespace, rounds: dict[str, list[dict[str, Any]]], lines: list[str] | None = None
) -> None:
    """After each run, so that what was measured stays where a later one is stopped."""
    if options.out:
        kept = {
            name: [{k: v for k, v in one.items() if k != "requests"} for one in runs] for name, runs in rounds.items()
        }
        written = {**environment(), "summary": lines, "rounds": kept}
        Path(options.out).write_text(json.dumps(written, indent=1) + "\n")


def environment() -> dict[str, Any]:
    """Device, versions, command and date. It makes no CUDA context, as the servers want the memory."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True).stdout.splitlines() if shutil.which(query[0]) else []
    device, driver = (told[0].split(", ") if told else ["unknown", "unknown"])[:2]
    versions = {"python": platform.python_version(), "driver": driver}
    for name in ("broadhead", "torch", "vllm", "triton", "transformers", "nvidia-cutlass-dsl"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    words = [os.path.basename(word) if os.sep in word else word for word in sys.argv[1:]]
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    command = shlex.join(["python", "benchmarks/compare_vllm.py", *words])
    return {"device": device, "versions": versions, "command": command, "date": date}


if __name__ == "__main__":
    sys.exit(main())
