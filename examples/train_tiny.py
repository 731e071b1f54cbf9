"""Trains a small GPT with the attention of Gemma 4 on broadhead, and from the same seed on another attention.

usage: python examples/train_tiny.py [--size tiny|real] [--layout dense|packed] [--against sdpa|torch]
"""

from __future__ import annotations

import argparse
import math
import sys
import time

import torch
import torch.nn.functional as F
from loss_curves import need_packages, report
from options import TOLERANCES, choose_device, choose_dtype, choose_size, make_parser, run_example
from python_text import IGNORED, PythonText
from tiny_gpt import SIZES, Attend, BroadheadAttention, Size, TinyGpt, sdpa_attention

WARMUP_STEPS = 10


def make_own_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "train_tiny.py",
        "Train a small GPT with Gemma-4-like layers (5 with a window at head_dim 256, 1 global at 512) on the help "
        "topics of Python with broadhead, train it again with another attention, and compare the losses.",
        SIZES,
    )
    parser.add_argument(
        "--layout",
        choices=("dense", "packed"),
        default="dense",
        help="dense: flash_attn_func; packed: flash_attn_varlen_func, where no paragraph sees another (default: dense)",
    )
    parser.add_argument(
        "--against",
        choices=("sdpa", "torch"),
        default="sdpa",
        help='the attention of the second curve: torch\'s SDPA, or broadhead with backend="torch" (default: sdpa)',
    )
    parser.add_argument("--checkpoint", action="store_true", help="recompute each layer in the backward pass")
    parser.add_argument("--deterministic", action="store_true", help="gradients that are the same in every run")
    return parser


def rate_at(step: int, steps: int) -> float:
    """The factor of the learning rate: a warm-up, then half a cosine."""
    warmup = min(WARMUP_STEPS, steps)
    return min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def train(
    name: str, size: Size, attend: Attend, options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> list[float]:
    """The loss of each step. Two calls differ in ``attend`` alone."""
    from tqdm import tqdm

    torch.manual_seed(options.seed)
    with device:
        model = TinyGpt(size, attend, checkpoints=options.checkpoint)
    text = PythonText(size.batch, size.context, options.layout == "packed", options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, size.steps))
    losses: list[float] = []
    started = time.perf_counter()
    with tqdm(total=size.steps, desc=name, unit="step", file=sys.stdout, mininterval=0.5) as bar:
        for _ in range(size.steps):
            batch = text.next().to(device)
            # The parameters stay fp32; autocast makes the products, and so q, k and v, bf16.
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = model(batch.tokens, batch.packing)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
            bar.update()
    tokens = size.steps * size.batch * size.context
    print(f"{name}: {tokens / (time.perf_counter() - started):.0f} tokens/s, with the start")
    return losses


def run(options: argparse.Namespace) -> int:
    """Train twice, report, and return the exit status."""
    need_packages("matplotlib", "tqdm")
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    size = choose_size(options, SIZES)
    torch.use_deterministic_algorithms(options.deterministic, warn_only=True)
    ours = BroadheadAttention(deterministic=options.deterministic)
    other: Attend = sdpa_attention if options.against == "sdpa" else BroadheadAttention(backend="torch")
    other_name = "SDPA" if options.against == "sdpa" else "torch reference"
    curves = {"broadhead": train("broadhead", size, ours, options, device, dtype)}
    for line in ours.ran.report():
        print(f"  {line}")
    curves[other_name] = train(other_name, size, other, options, device, dtype)
    return report(curves, TOLERANCES[dtype], f"A Gemma-4-like GPT ({options.size}, {options.layout})", options.plot)


def main(arguments: list[str] | None = None) -> int:
    return run_example(make_own_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
