"""Values of the command line that both examples read alike."""

from __future__ import annotations

import argparse

import torch
from loss_curves import CannotRunError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: How far the first losses of one seed may lie apart in the mean, as a part of the loss. On a CPU at --size tiny
#: two exact attentions came to 3e-8 in fp32 and 1e-5 in bf16; a window that was one token too short, to 2e-5 in fp32.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-3}


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def choose_device(name: str | None) -> torch.device:
    """The device that was asked for, or a GPU where there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise CannotRunError(f"--device must be a torch device such as cpu or cuda, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CannotRunError(f"--device {name}: torch {torch.__version__} sees no CUDA device; use --device cpu")
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype that was asked for, or bf16 on a GPU and fp32 elsewhere. The kernels take no fp32."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]
