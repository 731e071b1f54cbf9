"""Trains a small GPT of Megatron-LM whose layers run broadhead, by a module spec. It runs in one process, on a CPU too.

usage: python examples/train_megatron.py [--spec megatron|slime]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed
from broadhead.integrations.megatron import BroadheadCoreAttention, use_core_attention
from kernels_ran import KernelsRan

VOCABULARY = 64
HEAD_DIM = 64
LENGTHS = (24, 9, 31)  # of the sequences that slime packs into one row


def make_own_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("train_megatron.py", description=__doc__)
    parser.add_argument(
        "--spec",
        choices=("megatron", "slime"),
        default="megatron",
        help="megatron: two rows a step; slime: packed sequences, with one learnable logit a head (default: megatron)",
    )
    parser.add_argument("--steps", type=int, default=40, help="(default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    return parser


def make_model(spec: str, dtype: torch.dtype) -> Any:
    """Megatron's GPT with 2 layers of head_dim 64, where slime's learns its softmax offsets."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
        parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=2,
        hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=HEAD_DIM,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        softmax_type="learnable" if spec == "slime" else "vanilla",
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
    )
    return GPTModel(
        config=config,
        # The one line that puts broadhead in place.
        transformer_layer_spec=use_core_attention(get_gpt_layer_local_spec()),
        vocab_size=VOCABULARY,
        max_sequence_length=sum(LENGTHS),
        position_embedding_type="learned_absolute",
        parallel_output=False,
    )


def make_batch(spec: str, device: str) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Tokens that count up from a random start, their positions, and for slime where the sequences lie."""
    if spec == "megatron":
        start = torch.randint(VOCABULARY, (2, 1))
        positions = torch.arange(32).expand(2, -1)
        return ((start + positions) % VOCABULARY).to(device), positions.to(device), None
    from megatron.core.packed_seq_params import PackedSeqParams

    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    start = torch.cat([torch.randint(VOCABULARY, (1,)).expand(length) for length in LENGTHS])
    offsets = torch.tensor([0, *LENGTHS], device=device).cumsum(0).int()
    longest = max(LENGTHS)
    packed = PackedSeqParams("thd", offsets, offsets, max_seqlen_q=longest, max_seqlen_kv=longest)
    return ((start + positions) % VOCABULARY).to(device), positions.to(device), packed


def count_kernels(model: Any) -> KernelsRan:
    """Have the layers count the kernels that run them."""
    ran = KernelsRan()
    for name, module in model.named_modules():
        if isinstance(module, BroadheadCoreAttention):
            module.register_forward_hook(lambda *_: ran.note("forward", HEAD_DIM))
        elif name.endswith("linear_qkv"):
            # Its gradient comes right behind the backward pass of attention, in the thread of that.
            module.weight.register_hook(lambda _: ran.note("backward", HEAD_DIM))
    return ran


def main(arguments: list[str] | None = None) -> int:
    options = make_own_parser().parse_args(arguments)
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # kernels take no fp32
    model = make_model(options.spec, dtype).to(device, dtype)
    ran = count_kernels(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    layers = [module for module in model.modules() if isinstance(module, BroadheadCoreAttention)]
    print(f"{len(layers)} layers run {type(layers[0]).__name__}, on {device}, {dtype}")
    first = loss = torch.zeros(())
    for step in range(options.steps):
        tokens, positions, packed = make_batch(options.spec, device)
        logits = model(tokens, positions, None, packed_seq_params=packed)
        follows = positions[:, 1:] > positions[:, :-1]  # the next token is of the same sequence
        loss = torch.nn.functional.cross_entropy(logits[:, :-1][follows].float(), tokens[:, 1:][follows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0:
            first = loss.detach()
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step:3d}: loss {loss.item():.3f}")
    for layer in layers:
        if layer.softmax_offset is not None:
            print("softmax offsets:", " ".join(f"{value:+.3f}" for value in layer.softmax_offset.tolist()))
    for line in ran.report():
        print(f"  {line}")
    on_kernels = device == "cpu" or all("reference" not in kernel for _, _, kernel in ran.calls)
    return 0 if loss < first / 2 and on_kernels else 1


if __name__ == "__main__":
    raise SystemExit(main())
