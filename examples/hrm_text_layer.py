"""The attention layer of HRM-Text, a prefix-LM, on broadhead: in two passes that write one output, and in one pass.

usage: python examples/hrm_text_layer.py [--device cpu|cuda] [--sequences N] [--seed N]

A prefix is seen by all tokens of its sequence; what follows is causal. HRM-Text computes the prefixes without a mask
and then the rest with a causal one. ``prefix_lens`` says the same in one call.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, NamedTuple

import broadhead
import torch
from loss_curves import CANNOT_RUN, FAILED, OK, CannotRunError
from options import choose_device, positive
from torch import Tensor

HEADS, HEAD_DIM = 10, 128  # of HRM-Text L
#: The largest difference of both ways from attention in fp64, as a part of its largest value.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Batch(NamedTuple):
    """Packed sequences, each with a prefix."""

    cu_seqlens: Tensor  # int32 (B + 1,)
    prefix_lens: Tensor  # int32 (B,)
    max_seqlen: int


class TwoPasses(torch.autograd.Function):
    """HRM-Text's own way: two forward calls write rows of one output, two backward calls give parts of gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        out = torch.zeros_like(q)
        lses = [broadhead.mha_fwd(q, k, v, out=out, **options)[1] for options in _passes(batch)]
        ctx.save_for_backward(q, k, v, out, *lses)
        ctx.batch = batch
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *lses = ctx.saved_tensors
        parts = [
            broadhead.mha_bwd(grads[0], q, k, v, out, lse, **options)[:3]
            for lse, options in zip(lses, _passes(ctx.batch))
        ]
        # Rows that a pass does not own have gradients of 0 in it.
        dq, dk, dv = (first + second for first, second in zip(*parts))
        return dq, dk, dv, None


def _passes(batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the calls: prefixes among themselves, and the rest over whole sequences, aligned at their ends."""
    cu, prefix = batch.cu_seqlens, batch.prefix_lens
    common = {"cu_seqlens_k": cu, "max_seqlen_q": batch.max_seqlen, "max_seqlen_k": batch.max_seqlen}
    rest_begins = torch.cat((cu[:-1] + prefix, cu[-1:]))
    first = {"cu_seqlens_q": cu, "seqused_q": prefix, "seqused_k": prefix, "causal": False}
    second = {"cu_seqlens_q": rest_begins, "seqused_q": cu.diff() - prefix, "causal": True}
    return {**common, **first}, {**common, **second}


def two_passes(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    out: Tensor = TwoPasses.apply(q, k, v, batch)
    return out


def one_pass(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    out = broadhead.flash_attn_varlen_func(
        q,
        k,
        v,
        batch.cu_seqlens,
        batch.cu_seqlens,
        batch.max_seqlen,
        batch.max_seqlen,
        causal=True,
        prefix_lens=batch.prefix_lens,
    )
    assert isinstance(out, Tensor)
    return out


def plainly(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """Attention with a matrix of scores for each sequence, in fp64."""
    outs = []
    bounds = batch.cu_seqlens.tolist()
    for begin, end, prefix in zip(bounds[:-1], bounds[1:], batch.prefix_lens.tolist()):
        a, b, c = (x[begin:end].double().transpose(0, 1) for x in (q, k, v))
        place = torch.arange(end - begin, device=q.device)
        seen = (place[None, :] <= place[:, None]) | (place[None, :] < prefix)
        scores = (a @ b.transpose(1, 2) * HEAD_DIM**-0.5).masked_fill(~seen, float("-inf"))
        outs.append((scores.softmax(2) @ c).transpose(0, 1))
    return torch.cat(outs)


def draw(sequences: int, device: torch.device, dtype: torch.dtype, seed: int) -> tuple[list[Tensor], Batch]:
    """q, k, v and the gradient of the output, ``(T, H, D)``, of sequences of random lengths and prefixes."""
    torch.manual_seed(seed)
    lengths = torch.randint(2, 97, (sequences,), dtype=torch.int32)
    prefix_lens = (lengths * torch.rand(sequences)).to(torch.int32)
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)))
    drawn = [torch.randn(int(lengths.sum()), HEADS, HEAD_DIM).to(device, dtype) for _ in range(4)]
    return drawn, Batch(cu_seqlens.to(device), prefix_lens.to(device), int(lengths.max()))


def results(attend: Any, drawn: list[Tensor], batch: Batch) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in drawn[:3]]
    out = attend(*leaves, batch)
    return [out.detach(), *torch.autograd.grad(out, leaves, drawn[3].to(out.dtype))]


def run(options: argparse.Namespace) -> int:
    """Compare both ways with attention in fp64; the exit status."""
    device = choose_device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    drawn, batch = draw(options.sequences, device, dtype, options.seed)
    truth = results(plainly, drawn, batch)
    print(f"{options.sequences} sequences, {len(drawn[0])} tokens, {HEADS} heads of {HEAD_DIM}, {dtype}")
    status = OK
    for name, attend in (("two passes", two_passes), ("one pass", one_pass)):
        found = results(attend, drawn, batch)
        errors = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, truth)]
        backend, row, _ = broadhead.last_dispatch()
        shown = ", ".join(f"{what} {error:.1e}" for what, error in zip(("out", "dq", "dk", "dv"), errors))
        print(f"  {name:10} {shown} ({row or backend})")
        if not max(errors) <= TOLERANCES[dtype]:
            print(f"  differs from attention in fp64 by more than {TOLERANCES[dtype]}")
            status = FAILED
    return status


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="hrm_text_layer.py",
        description="Compare HRM-Text's attention in two passes and in one pass with attention in fp64. The exit "
        "status is 0 when both are right, 1 when not, 2 when the example can not run.",
    )
    parser.add_argument("--device", help="a device of torch (default: cuda where there is one, else cpu)")
    parser.add_argument("--sequences", type=positive, default=6)
    parser.add_argument("--seed", type=int, default=0)
    try:
        return run(parser.parse_args(arguments))
    except CannotRunError as error:
        print(f"hrm_text_layer.py: {error}", file=sys.stderr)
        return CANNOT_RUN


if __name__ == "__main__":
    sys.exit(main())
