"""Trains a small Qwen3.5-like model with transformers' Trainer on broadhead, and once more on torch's SDPA.

usage: python examples/train_transformers.py [--size tiny|real] [--dtype fp32|bf16]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from typing import Any, NamedTuple

import torch
from kernels_ran import KernelsRan
from loss_curves import need_packages, report
from options import TOLERANCES, choose_device, choose_dtype, choose_size, make_parser, run_example
from python_text import VOCABULARY, PythonText

HEAD_DIM = 256


class Size(NamedTuple):
    """What ``--size`` chooses."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    linear_heads: int
    linear_head_dim: int
    context: int
    batch: int
    steps: int
    learning_rate: float


SIZES = {
    "tiny": Size(64, 128, 4, 2, 1, 2, 32, 96, 2, 60, 3e-3),
    "real": Size(1024, 3584, 8, 8, 2, 16, 128, 2048, 2, 200, 3e-4),
}


def make_model(size: Size, attention: str, seed: int) -> Any:
    """A random model whose weights are of ``seed`` alone."""
    import transformers

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": size.context,
        "use_cache": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if hasattr(transformers, "Qwen3_5TextConfig"):
        config = transformers.Qwen3_5TextConfig(
            **common,
            linear_num_key_heads=size.linear_heads,
            linear_num_value_heads=size.linear_heads,
            linear_key_head_dim=size.linear_head_dim,
            linear_value_head_dim=size.linear_head_dim,
        )
    else:
        config = transformers.Qwen3Config(**common)
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def count_kernels(model: Any) -> KernelsRan:
    """Have the layers with attention count the kernels that run them."""
    ran = KernelsRan()
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            # The output projection runs right behind attention, and the gradient of the queries' projection right
            # behind its backward pass, in the thread of that pass.
            module.o_proj.register_forward_pre_hook(lambda *_: ran.note("forward", HEAD_DIM))
            module.q_proj.weight.register_hook(lambda _: ran.note("backward", HEAD_DIM))
    return ran


def train(
    attention: str, size: Size, options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[list[float], KernelsRan]:
    """The loss of each step, and what ran. Two calls differ in ``attention`` alone."""
    import transformers

    model = make_model(size, attention, options.seed)
    ran = count_kernels(model)
    text = PythonText(size.batch, size.context, packed=False, seed=options.seed)
    # transformers shifts the labels itself.
    rows = [{"input_ids": row, "labels": row} for _ in range(size.steps) for row in text.next().tokens]
    losses: list[float] = []

    class Recording(transformers.Trainer):
        """The Trainer, which keeps each loss as it is: its log rounds them."""

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    # The name that newer versions of transformers have for gradient_checkpointing.
    newer = "activation_checkpointing"
    checkpointing = newer if newer in transformers.TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=size.steps,
            per_device_train_batch_size=size.batch,
            learning_rate=size.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(10, size.steps),
            bf16=dtype == torch.bfloat16,
            **{checkpointing: True},
            seed=options.seed,
            use_cpu=device.type == "cpu",
            logging_steps=max(1, size.steps // 5),
            save_strategy="no",
            report_to=[],
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # else several GPUs share a batch, and the curves are of another one
        print(f"{attention}: {type(model).__name__}, head_dim {HEAD_DIM}, {dtype}, gradient checkpointing")
        Recording(model=model, args=arguments, train_dataset=rows).train()
    return losses, ran


def run(options: argparse.Namespace) -> int:
    """Train twice, report, and return the exit status."""
    need_packages("transformers", "accelerate", "matplotlib")
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    import broadhead.integrations.transformers  # noqa: F401

    size = choose_size(options, SIZES)
    curves: dict[str, list[float]] = {}
    curves["broadhead"], ran = train("broadhead", size, options, device, dtype)
    for line in ran.report():
        print(f"  {line}")
    curves["SDPA"], _ = train("sdpa", size, options, device, dtype)
    return report(curves, TOLERANCES[dtype], f"A Qwen3.5-like model in the Trainer ({options.size})", options.plot)


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(
        "train_transformers.py",
        "Train a small random Qwen3.5 (head_dim 256; every fourth layer is full attention) with the Trainer of "
        'transformers, gradient checkpointing and attn_implementation="broadhead" on the help topics of Python, train '
        'it again with "sdpa", and compare the losses. Where transformers has no Qwen3.5, it is a Qwen3 with the same '
        "heads.",
        SIZES,
        devices=("cpu", "cuda"),
    )
    return run_example(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
