#!/usr/bin/env python3
"""Calls an installed broadhead once in each direction and compares with fp64: what a release does with each wheel.

``smoke_test.py`` runs the torch reference on the CPU; ``smoke_test.py --kernel`` runs kernels on the CUDA device and
fails where a call would fall back. Both load every kernel library of the installation. It is started outside the source
tree.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings

import torch


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention in fp64 of (batch, seqlen, heads, head_dim), the last query at the last key."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(k.shape[2] - q.shape[2] + 1)
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).masked_fill(hidden, -math.inf)
    return (scores.softmax(3) @ v).transpose(1, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description="Calls an installed broadhead once in each direction.")
    parser.add_argument("--kernel", action="store_true", help="kernels on the CUDA device instead of the reference")
    options = parser.parse_args()
    import broadhead
    from broadhead import _C

    info = _C.build_info()
    print(f"broadhead {broadhead.__version__} at {broadhead.__path__[0]}")
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}")
    if info["errors"] or not info["families"]:
        print(f"smoke_test.py: kernel libraries: {info['errors'] or 'there are none'}", file=sys.stderr)
        return 1
    for name, family in sorted(info["families"].items()):
        print(f"{name}: {len(family['kernels'])} kernels for {family['archs']}, CUDA {family['cuda']}")
    device = torch.device("cuda" if options.kernel else "cpu")
    torch.manual_seed(0)
    for head_dim in (64, 512):
        made = [
            torch.randn(2, length, heads, head_dim, device=device).bfloat16().requires_grad_()
            for length, heads in ((33, 4), (97, 2), (97, 2))
        ]
        asked = broadhead.explain(*made, causal=True, device=device)
        print(next(line for line in asked.splitlines() if line.startswith("runs on")))
        with warnings.catch_warnings():
            if options.kernel:
                warnings.simplefilter("error", broadhead.FallbackWarning)
            out = broadhead.flash_attn_func(*made, causal=True)
        weight = torch.randn_like(out)
        found = [out, *torch.autograd.grad(out, made, weight)]
        exact = [x.detach().double().requires_grad_() for x in made]
        wanted = attention(*exact)
        expected = [wanted, *torch.autograd.grad(wanted, exact, weight.double())]
        for name, result, want in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            error = ((result.double() - want).abs().max() / want.abs().max()).item()
            print(f"head_dim {head_dim}, {name}: error {error:.1e} of the largest value")
            if not error < 2e-2:
                print(f"smoke_test.py: {name} is wrong", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
