"""Result records: what identifies a run, and one result of it."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
from typing import Any, NamedTuple

import broadhead
import torch

from broadhead_bench.cases import AREAS

#: broadhead, and it with other arguments or kernels.
OWN = ("broadhead", "broadhead-det", "broadhead-sm80", "broadhead-sm80-fwd", "broadhead-best")
IMPLEMENTATIONS = (*OWN, "baseline", "fa2", "fa3", "fa4", "ffpa", "cudnn", "memeff", "sdpa", "flex", "flashinfer")
UNITS = (
    dict.fromkeys(AREAS, "TFLOP/s")
    | {area: "GB/s" for area in AREAS if area.startswith("decode")}
    | dict.fromkeys(("cascade", "append", "latency", "host", "prefix-lm", "masks", "landscape"), "us")
    | dict.fromkeys(("training", "model"), "tokens/s")
)


class RunInfo(NamedTuple):
    """What all records of a run share."""

    device: str
    versions: dict[str, str]
    command: str
    date: str


def describe_run(device: torch.device, arguments: list[str]) -> RunInfo:
    """Device, versions, command and date of this process.

    Args:
        device: what is measured.
        arguments: the command line after ``python benchmarks/run.py``; paths are cut to file names.
    """
    versions = {
        "broadhead": broadhead.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        versions["cuda"] = str(torch.version.cuda)
        versions["cudnn"] = str(torch.backends.cudnn.version())
        versions["driver"] = _driver_version()
    words = [os.path.basename(word) if os.sep in word else word for word in arguments]
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return RunInfo(name, versions, shlex.join(["python", "benchmarks/run.py", *words]), date)


def _driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.splitlines()[0].strip()
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return "unknown"


def make_record(
    run: RunInfo,
    area: str,
    case: str,
    impl: str,
    value: float,
    seconds: float,
    rel_error: float,
    kernel: str | None = None,
    versions: dict[str, str] | None = None,
    peak_bytes: int | None = None,
    details: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One result.

    Args:
        value: in UNITS[area].
        seconds: of one call.
        kernel: the table row that ran, for broadhead; "(composed)" behind it: over a prefix, with a call for the rest.
        versions: of the peer, and notes on how it was called.
        peak_bytes: memory of one call beyond its inputs and outputs, where that is measured.
        details: what else the area keeps of a case.
    """
    return {
        "area": area,
        "case": case,
        "impl": impl,
        "kernel": kernel,
        "value": float(f"{value:.5g}"),
        "unit": UNITS[area],
        "seconds": float(f"{seconds:.5g}"),
        "rel_error": float(f"{rel_error:.3g}"),
        "peak_bytes": peak_bytes,
        "device": run.device,
        "versions": {**run.versions, **(versions or {})},
        "command": run.command,
        "date": run.date,
        **(details or {}),
    }
