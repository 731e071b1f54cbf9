"""Two processes on one CPU that talk by gloo, or on two GPUs by NCCL: what tests of sharded tensors run in."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

RANKS = 2
#: What a process says that torch's gloo ends by an abort behind the last line of the program, now and then: a thread of
#: gloo lets go of a tensor while Python is shutting down, and CPython before 3.14 ends such a thread inside of a
#: destructor. The program itself is right then, and is run again.
TORN_DOWN = "terminate called without an active exception"
ATTEMPTS = 4


def run_ranks(function: Callable[..., None], *arguments: Any, ranks: int = RANKS, device: str = "cpu") -> None:
    """``function(rank, *arguments)`` in each of the processes, of one process group; the first failure is raised.

    On ``"cuda"`` each process has a GPU of its own, where its new tensors are.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, args=(ranks, Path(folder) / "store", device, function, arguments), nprocs=ranks)


def _run(
    rank: int, ranks: int, store: Path, device: str, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
        torch.set_default_device(torch.device("cuda", rank))
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=240),
    )
    try:
        function(rank, *arguments)
        torch.distributed.barrier()  # a process that ends while another still talks to it may abort
    finally:
        torch.distributed.destroy_process_group()
    # Nothing is left to do, and a shutdown of Python may abort: see TORN_DOWN.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_program(source: str) -> None:
    """A program of two processes, as torchrun starts it; an AssertionError has what it printed if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(source, encoding="utf-8")
        result = torchrun(path)
    assert result.returncode == 0, result.stdout + result.stderr


def torchrun(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What the program and its processes printed, and their exit status; run again where only its shutdown failed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    for _ in range(ATTEMPTS):
        result = subprocess.run([*launcher, str(program), *arguments], capture_output=True, text=True, timeout=200)
        if result.returncode == 0 or TORN_DOWN not in result.stderr:
            break
    return result
