"""The command line of both examples: options that they have in common, how they are read, and the exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from loss_curves import CANNOT_RUN, CannotRunError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: How far the first losses of one seed may lie apart in the mean, as a part of the loss. On a CPU at --size tiny
#: two exact attentions came to 3e-8 in fp32 and 1e-5 in bf16; a window that was one token too short, to 2e-5 in fp32.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-3}
#: Fields of a size that an option of the same name replaces, and their help.
SIZE_OPTIONS = {
    "steps": "steps of the optimizer",
    "context": "tokens of a sequence",
    "batch": "sequences of a batch",
}
STATUS = "The exit status is 0 when the loss falls and the curves agree, 1 when not, 2 when the example can not run."


def make_parser(
    program: str, description: str, sizes: Mapping[str, Any], devices: tuple[str, ...] | None = None
) -> argparse.ArgumentParser:
    """A parser with the options of both examples.

    Args:
        program: the file name of the example.
        sizes: what ``--size`` chooses, by name; named tuples that have the fields of SIZE_OPTIONS.
        devices: what ``--device`` may be; None: any device of torch.
    """
    parser = argparse.ArgumentParser(prog=program, description=f"{description} {STATUS}")
    parser.add_argument("--size", choices=sizes, default="tiny", help="tiny: a CPU does; real: a GPU (default: tiny)")
    for field, text in SIZE_OPTIONS.items():
        defaults = ", ".join(f"{getattr(size, field)} at {name}" for name, size in sizes.items())
        parser.add_argument(f"--{field}", type=positive, help=f"{text} (default: {defaults})")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 is by autocast (default: bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default: 0)")
    parser.add_argument(
        "--device", choices=devices, help="a device of torch (default: cuda where there is one, else cpu)"
    )
    picture = Path(program).with_suffix(".png")
    parser.add_argument("--plot", type=Path, default=picture, help=f"the picture to write (default: {picture})")
    return parser


def choose_size(options: argparse.Namespace, sizes: Mapping[str, Any]) -> Any:
    """The size that was asked for, with the fields that an option replaces."""
    given = {field: getattr(options, field) for field in SIZE_OPTIONS if getattr(options, field) is not None}
    return sizes[options.size]._replace(**given)


def run_example(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], arguments: list[str] | None
) -> int:
    """Parse the command line, run the example, and return the exit status."""
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except CannotRunError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return CANNOT_RUN


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
