"""torch's context_parallel on broadhead: attention over a long sequence on several GPUs, beside the same on one.

usage: torchrun --nproc-per-node 2 examples/context_parallel.py [--size tiny|middle|real] [--rotate allgather|alltoall]

With ``--share-gpu`` all processes of a host run on its first GPU: that shows whether results are right, and no speed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import broadhead
import torch
import torch.nn.functional as F
from kernels_ran import KernelsRan
from loss_curves import CANNOT_RUN, FAILED, OK, CannotRunError
from torch import Tensor


class Case(NamedTuple):
    """One attention, of one sequence."""

    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int


class Size(NamedTuple):
    """What ``--size`` chooses."""

    cases: tuple[Case, ...]
    repeats: int  # runs that are timed, of which the median counts


SIZES = {
    "tiny": Size((Case(256, 4, 2, 32), Case(192, 2, 1, 64)), 2),
    "middle": Size((Case(16384, 32, 8, 128), Case(8192, 16, 2, 256)), 2),
    "real": Size((Case(131072, 32, 8, 128), Case(131072, 16, 2, 256)), 5),
}
#: |parallel - alone| / |alone| may be so much. Each part of a sum is rounded to the dtype before they are added: a few
#: roundings of 2^-9 in bf16.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
#: A part of the work that is twice as fast on two GPUs, less what they tell each other.
BAR = 0.85

Results = list[Tensor]  # out, and the gradients of q, k and v


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="context_parallel.py",
        description="Run causal attention, forward and backward, through torch's context_parallel on broadhead, "
        "compare it with one GPU that has the whole sequence, and print how much faster it is. Start it with torchrun. "
        "The exit status is 0 when the results agree and, at --size real, two GPUs are at least 1.7 times as fast as "
        "one; 1 when not, 2 when the example can not run.",
    )
    parser.add_argument(
        "--size", choices=SIZES, default="tiny", help="tiny: a CPU does; middle: up to 16k tokens; real: 128k on GPUs"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    parser.add_argument("--seqlen", type=int, help="tokens, in place of those of the size")
    parser.add_argument(
        "--rotate",
        choices=("allgather", "alltoall"),
        default="allgather",
        help="how torch hands keys and values round (default: allgather)",
    )
    parser.add_argument(
        "--share-gpu",
        action="store_true",
        help="all processes take the first GPU and tell each other by gloo, through the CPU; not for --size real",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for one record of each case")
    return parser


def choose_device(options: argparse.Namespace) -> torch.device:
    """The device of this process.

    Raises:
        CannotRunError: the text says what is missing.
    """
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        raise CannotRunError(f"torch >= 2.10 is needed, got {torch.__version__}: its SDPA takes no other kernels")
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise CannotRunError("one process has nothing to share; start it with torchrun --nproc-per-node 2")
    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.share_gpu and (kind == "cpu" or options.size == "real"):
        raise CannotRunError("--share-gpu is for a GPU, and for --size tiny or middle: it shows no speed")
    if kind == "cpu":
        if options.size != "tiny":
            raise CannotRunError(f"--size {options.size} is for GPUs; use --size tiny on a CPU")
        torch.set_num_threads(1)
        return torch.device("cpu")
    if options.share_gpu:
        torch.cuda.set_device(0)
        return torch.device("cuda", 0)
    rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if rank >= count:
        raise CannotRunError(
            f"each process needs a GPU of its own: process {rank} of this host, and {count} GPUs; see --share-gpu"
        )
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


@contextlib.contextmanager
def staged_through_cpu() -> Iterator[None]:
    """Have torch's context_parallel hand tensors round by way of the CPU.

    NCCL takes no two processes of one GPU. gloo does, but of what context_parallel uses, its all-gather into one tensor
    reads and writes the addresses as if they were the host's.
    """
    import torch.distributed._functional_collectives as collectives

    # The first name is that of torch 2.13, the second that of 2.11.
    names = ("all_gather_single", "all_gather_tensor", "permute_tensor")
    originals = {name: getattr(collectives, name) for name in names if hasattr(collectives, name)}

    def staged(name: str) -> Callable[..., Tensor]:
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            arrived = collectives.wait_tensor(originals[name](x.cpu(), *args, **kwargs))
            return arrived.to(x.device)

        return call

    for name in originals:
        setattr(collectives, name, staged(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(collectives, name, original)


def draw(case: Case, device: torch.device, seed: int) -> Results:
    """q, k, v and the gradient of out, ``(1, H, S, D)``, the same in every process."""
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = [
        (1, heads, case.seqlen, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    ]
    drawn = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    for x in drawn:
        shared = x if torch.distributed.get_backend() == "nccl" else x.cpu()
        torch.distributed.broadcast(shared, 0)
        x.copy_(shared)
    return drawn


def attend(inputs: Results, ran: KernelsRan) -> Results:
    """One forward and backward pass; ``ran`` counts the kernels of both."""
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    head_dim = q.shape[3]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    ran.note("forward", head_dim)
    hook = q.register_hook(lambda _: ran.note("backward", head_dim))
    grads = torch.autograd.grad(out, (q, k, v), inputs[3])
    hook.remove()
    return [out.detach(), *grads]


def timed(run: Callable[[], Results], repeats: int, device: torch.device) -> tuple[Results, float]:
    """The results, and the median of the seconds that the slowest process took."""
    results = run()  # also warms up
    seconds = []
    for _ in range(repeats):
        del results
        synchronize(device)
        torch.distributed.barrier()
        begin = time.perf_counter()
        results = run()
        synchronize(device)
        spent = torch.tensor(time.perf_counter() - begin, device=device)
        torch.distributed.all_reduce(spent, torch.distributed.ReduceOp.MAX)
        seconds.append(float(spent))
    return results, statistics.median(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def attend_in_parallel(whole: Results, repeats: int, device: torch.device, ran: KernelsRan) -> tuple[Results, float]:
    """The same over all processes; the results are put together again, which is not timed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import context_parallel_unshard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    parts = [x.detach().clone() for x in whole]
    # The parts take the place of the whole in these tensors, which nobody needs afterwards.
    with context_parallel(mesh, buffers=parts, buffer_seq_dims=[2] * 4, no_restore_buffers=set(parts)):
        found, seconds = timed(lambda: attend(parts, ran), repeats, device)
        return context_parallel_unshard(mesh, found, [2] * 4), seconds


def differences(alone: Results, parallel: Results) -> dict[str, float]:
    """``|parallel - alone| / |alone|`` of each result."""
    norm = torch.linalg.vector_norm
    return {
        name: float(norm(b - a, dtype=torch.float32) / norm(a, dtype=torch.float32))
        for name, a, b in zip(("out", "dq", "dk", "dv"), alone, parallel)
    }


def teraflops(case: Case) -> float:
    """Of both passes under a causal mask: two products forward, five backward, each over half of the pairs."""
    return 7 * case.seqlen**2 * case.heads * case.head_dim / 1e12


def describe_run(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What all records of a run share: devices, versions and the command."""
    versions = {"broadhead": broadhead.__version__, "torch": torch.__version__, "python": platform.python_version()}
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        versions |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    ranks = torch.distributed.get_world_size()
    given = {key.replace("_", "-"): value for key, value in vars(options).items() if key != "out"}
    words = [
        f"--{key}" if value is True else f"--{key}={value}"
        for key, value in given.items()
        if value not in (None, False)
    ]
    return {
        "device": name,
        "processes": ranks,
        "processes_of_a_gpu": ranks if options.share_gpu else 1,
        "versions": versions,
        "command": shlex.join(["torchrun", f"--nproc-per-node={ranks}", "examples/context_parallel.py", *words]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def compare(case: Case, options: argparse.Namespace, device: torch.device) -> tuple[bool, dict[str, Any]]:
    """Run a case both ways and print it; whether it is as it must be, and its record."""
    ranks, repeats = torch.distributed.get_world_size(), SIZES[options.size].repeats
    whole, ran = draw(case, device, options.seed), KernelsRan()
    alone, seconds_alone = timed(lambda: attend(whole, KernelsRan()), repeats, device)
    parallel, seconds = attend_in_parallel(whole, repeats, device, ran)
    worst = differences(alone, parallel)
    speedup, bound = seconds_alone / seconds, TOLERANCES[whole[0].dtype]
    agrees = all(value <= bound for value in worst.values())
    fast = options.size != "real" or speedup >= BAR * ranks
    on_kernels = device.type == "cpu" or all("reference" not in kernel for _, _, kernel in ran.calls)
    if torch.distributed.get_rank() == 0:
        rates = [teraflops(case) / s for s in (seconds_alone, seconds)]
        print(f"{case.seqlen} tokens, {case.heads}/{case.kv_heads} heads, head_dim {case.head_dim}, {whole[0].dtype}")
        print(f"  alone      {seconds_alone * 1e3:10.2f} ms {rates[0]:8.1f} TFLOP/s")
        print(f"  {ranks} parallel {seconds * 1e3:10.2f} ms {rates[1]:8.1f} TFLOP/s, {speedup:.2f} times as fast")
        print("  difference " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()) + f" (up to {bound})")
        for line in ran.report():
            print(f"  {line}")
        if not agrees:
            print("  the results do not agree")
        if not fast:
            print(f"  at least {BAR * ranks:.2f} times as fast was expected")
        if not on_kernels:
            print("  a pass ran on the torch reference")
    verdict = torch.tensor(int(agrees and fast and on_kernels), device=device)
    torch.distributed.all_reduce(verdict, torch.distributed.ReduceOp.MIN)
    passed = bool(verdict)
    return passed, {
        "case": {**case._asdict(), "dtype": str(whole[0].dtype), "causal": True, "passes": "forward and backward"},
        "rotate": options.rotate,
        "repeats": repeats,
        "seconds_alone": seconds_alone,
        "seconds_parallel": seconds,
        "speedup": speedup,
        "speedup_expected": BAR * ranks if options.size == "real" else None,
        "tflops_alone": teraflops(case) / seconds_alone,
        "tflops_parallel": teraflops(case) / seconds,
        "differences": worst,
        "difference_allowed": bound,
        "kernels": ran.report(),
        "passed": passed,
    }


def run(options: argparse.Namespace) -> int:
    device = choose_device(options)
    from broadhead.integrations import torch_attention
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    by_nccl = device.type == "cuda" and not options.share_gpu
    torch.distributed.init_process_group("nccl" if by_nccl else "gloo")
    try:
        set_rotate_method(options.rotate)
        cases = SIZES[options.size].cases
        if options.seqlen:
            cases = tuple(case._replace(seqlen=options.seqlen) for case in cases)
        staged = staged_through_cpu() if options.share_gpu else contextlib.nullcontext()
        with torch_attention.activate(device.type), staged:
            results = [compare(case, options, device) for case in cases]
        if options.out and torch.distributed.get_rank() == 0:
            shared = describe_run(options, device)
            options.out.write_text(json.dumps([record | shared for _, record in results], indent=1) + "\n", "utf-8")
    finally:
        torch.distributed.destroy_process_group()
    return OK if all(passed for passed, _ in results) else FAILED


def main(arguments: list[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    try:
        return run(options)
    except CannotRunError as error:
        print(f"context_parallel.py: {error}", file=sys.stderr)
        return CANNOT_RUN


if __name__ == "__main__":
    sys.exit(main())
