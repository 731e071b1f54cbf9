"""`broadhead info`: what is installed here, which devices it runs on, what is missing and how to get it."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

import broadhead

from .capabilities import execution_note
from .integrations.environment import kernel_obstacle
from .plan.device import DeviceDescription, describe
from .plan.native import BuildDescription, build_description, build_help
from .plan.refusal import row_refusals
from .support import ROWS

#: Where the kernel module of the NVIDIA driver says its version.
DRIVER_FILE = Path("/proc/driver/nvidia/version")
#: Packages whose versions matter where something is wrong: clients of this one, and others with the same kernels.
PACKAGES = (
    "transformers", "vllm", "sglang", "lmdeploy", "megatron-core", "transformer-engine", "slime", "flash-attn",
    "flash-attn-3", "flash-attn-4", "flashinfer-python", "triton", "numpy",
)  # fmt: skip

_BACKWARD = frozenset(row.id for row in ROWS if row.direction == "backward")


class Torch(NamedTuple):
    """What torch says of itself and of the GPUs."""

    version: str
    cuda: str | None  # the CUDA that it was built with
    hip: str | None
    warnings: tuple[str, ...]  # what it said when it was asked for GPUs


class Device(NamedTuple):
    """One GPU and the kernels that run on it."""

    number: int
    description: DeviceDescription
    memory_bytes: int
    kernels: dict[str, tuple[str, ...]]  # by library: the rows of the table that run here
    left_out: dict[str, tuple[str, ...]]  # reason -> rows that are for this GPU, but that this installation can not run


class Information(NamedTuple):
    """All that `broadhead info` tells."""

    version: str
    location: str
    python: str
    system: str
    torch: Torch
    driver: str | None  # the version of the NVIDIA driver
    build: BuildDescription
    devices: tuple[Device, ...]
    settings: dict[str, str]  # environment variables that change where calls run
    packages: dict[str, str]
    problems: tuple[str, ...]  # what keeps kernels from running, and what to do

    @property
    def label(self) -> str | None:
        """The CUDA version of the kernel libraries as wheels are labelled by it, such as "cu130"."""
        versions = {family.cuda_version for family in self.build.families if family.cuda_version}
        return ",".join(f"cu{''.join(map(str, version[:2]))}" for version in sorted(versions)) or None

    def headline(self) -> str:
        """What to know first: whether kernels run here."""
        running = sum(any(device.kernels.values()) for device in self.devices)
        if running:
            where = f"kernels run on {running} of {len(self.devices)} CUDA devices"
            return where + (", but something is missing" if self.problems else "")
        return "no kernels run here: calls run on the torch reference, which is right, and slow"

    def summary(self) -> str:
        """The headline and what is missing."""
        lines = [f"broadhead {self.version}: {self.headline()}"]
        return "\n".join(lines + [f"  missing: {problem}" for problem in self.problems])

    def text(self) -> str:
        """For people: what is wrong comes first."""
        label = f", libraries of {self.label}" if self.label else ""
        lines = [self.summary(), "", f"broadhead    {self.version}, {self.location}{label}"]
        lines += [f"libraries    {line}" for line in self._library_lines()]
        lines.append(f"torch        {self.torch.version}, built with {_made_for(self.torch)}")
        cuda = next((d.description.cuda_version for d in self.devices if d.description.cuda_version), None)
        serves = f", serves CUDA {'.'.join(map(str, cuda))}" if cuda else ""
        lines.append(f"driver       {self.driver or 'none found'}{serves}")
        lines.append(f"python       {self.python}, {self.system}")
        for device in self.devices:
            lines += _device_lines(device)
        if not self.devices:
            lines.append("devices      no CUDA device")
        lines += [f"settings     {name}={value}" for name, value in self.settings.items()]
        if self.packages:
            lines.append("packages     " + ", ".join(f"{name} {found}" for name, found in self.packages.items()))
        return "\n".join(lines)

    def _library_lines(self) -> list[str]:
        lines = [
            f"{family.name}: {len(family.kernels)} kernels for {';'.join(family.archs)},"
            f" CUDA {'.'.join(map(str, family.cuda_version))}"
            for family in self.build.families
        ]
        lines += [f"{name}: does not load: {error}" for name, error in self.build.errors]
        return lines or ["none" if self.build.has_module else "none, nor the compiled module"]

    def as_json(self) -> dict[str, Any]:
        """The same as values that JSON has."""
        return {
            "ok": not self.problems,
            "problems": list(self.problems),
            "broadhead": {"version": self.version, "location": self.location, "cuda_label": self.label},
            "libraries": [
                {
                    "name": family.name,
                    "archs": list(family.archs),
                    "cuda": ".".join(map(str, family.cuda_version)) or None,
                    "kernels": sorted(family.kernels),
                }
                for family in self.build.families
            ],
            "library_errors": dict(self.build.errors),
            "compiled_module": self.build.has_module,
            "torch": {**self.torch._asdict(), "warnings": list(self.torch.warnings)},
            "driver": self.driver,
            "python": self.python,
            "system": self.system,
            "devices": [_device_values(device) for device in self.devices],
            "settings": self.settings,
            "packages": self.packages,
        }


def look() -> Information:
    """What is found on this machine."""
    asked = ask_torch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the first use of the kernels says of them is among the problems
        build = build_description()
    devices = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        memory = torch.cuda.get_device_properties(number).total_memory
        devices.append(examine(number, describe(torch.device("cuda", number)), build, memory))
    driver = driver_version()
    return Information(
        version=broadhead.__version__,
        location=str(Path(broadhead.__file__).parent),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        torch=asked,
        driver=driver,
        build=build,
        devices=tuple(devices),
        settings={
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("BROADHEAD_") or name == "CUDA_VISIBLE_DEVICES"
        },
        packages=_versions(PACKAGES),
        problems=tuple(problems_of(asked, driver, build, tuple(devices), module_error(build))),
    )


def report(as_json: bool = False) -> str:
    """The text of `broadhead info`, or its JSON."""
    found = look()
    return json.dumps(found.as_json(), indent=2) if as_json else found.text()


def ask_torch() -> Torch:
    """torch, and what it says when it is asked for GPUs: it warns there of drivers that are too old."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.is_available()
    said = tuple(dict.fromkeys(str(warning.message).partition("\n")[0] for warning in caught))
    return Torch(torch.__version__, torch.version.cuda, torch.version.hip, said)


def examine(number: int, description: DeviceDescription, build: BuildDescription, memory_bytes: int) -> Device:
    """Which rows of the table run on a device, and which of those that are for it do not."""
    kernels: dict[str, list[str]] = {}
    left_out: dict[str, list[str]] = {}
    if description.type == "cuda" and description.capability is not None:
        for row in ROWS:
            refused = row_refusals(row, description, build)
            if not refused:
                kernels.setdefault(row.family, []).append(row.id)
            elif refused[0].by == "build":
                left_out.setdefault(refused[0].reason, []).append(row.id)
    tuples = [{name: tuple(rows) for name, rows in groups.items()} for groups in (kernels, left_out)]
    return Device(number, description, memory_bytes, *tuples)


def problems_of(
    asked: Torch, driver: str | None, build: BuildDescription, devices: tuple[Device, ...], module: str | None = None
) -> list[str]:
    """What keeps kernels from running, each with what to do.

    Args:
        module: why the compiled module did not load; None: it did.
    """
    found = []
    if not devices:
        found.append(_no_device(asked, driver))
    if module is not None:
        found.append(
            f"the compiled module, which does not load ({module}): install broadhead with the Python that runs it, in a"
            " source tree by pip install ."
        )
    found += [
        f"the library of {name} kernels, which does not load ({error}): install broadhead anew in the environment of"
        " this torch"
        for name, error in build.errors
    ]
    for device in devices:
        where = f"cuda:{device.number}"
        if not any(device.kernels.values()):
            obstacle = kernel_obstacle(where, device.description, build)
            if obstacle is not None:
                found.append(obstacle.text)
                continue
        found += [f"on {where} {_count(rows)}: {reason}" for reason, rows in device.left_out.items()]
    if not devices and not build.families and not build.errors:
        found.append(f"kernels, of which this installation holds none; for Hopper {build_help('90a')}")
    return list(dict.fromkeys(found))


def _count(rows: tuple[str, ...]) -> str:
    more = f" and {len(rows) - 1} more kernels" if len(rows) > 1 else ""
    return f"{rows[0]}{more}"


def _no_device(asked: Torch, driver: str | None) -> str:
    """Why torch sees no CUDA device."""
    if asked.hip is not None:
        return "a CUDA device: this torch is for AMD GPUs, and the kernels are for NVIDIA GPUs"
    if driver is None:
        return (
            "a CUDA device: no NVIDIA driver is found: install it (nvidia-smi then lists the GPU), or start the"
            " container with the GPUs (docker run --gpus all)"
        )
    if asked.cuda is None:
        return (
            f"a CUDA device: the driver {driver} is here, but this torch ({asked.version}) was built without CUDA:"
            " install a CUDA build of torch, as https://pytorch.org/get-started/locally says"
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return "a CUDA device: CUDA_VISIBLE_DEVICES hides all of them: unset it"
    said = f" (torch says: {'; '.join(asked.warnings)})" if asked.warnings else ""
    return (
        f"a CUDA device: the driver {driver} is here, but torch {asked.version} for CUDA {asked.cuda} sees no GPU"
        f"{said}: update the driver, or install a torch for an older CUDA"
    )


def module_error(build: BuildDescription) -> str | None:
    """Why the compiled module does not load; None: it does."""
    if build.has_module:
        return None
    try:
        importlib.import_module("broadhead._C")
    except ImportError as error:
        return str(error)
    return None


def driver_version() -> str | None:
    """The version of the NVIDIA driver; None where there is none."""
    try:
        words = DRIVER_FILE.read_text(encoding="utf-8").split("\n")[0].split()
    except OSError:
        words = []
    numbers = [word for word in words if word[0].isdigit() and "." in word]
    if numbers:
        return numbers[0]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.partition("\n")[0].strip() or None


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _made_for(asked: Torch) -> str:
    if asked.hip is not None:
        return f"HIP {asked.hip}"
    return "no CUDA" if asked.cuda is None else f"CUDA {asked.cuda}"


def _device_lines(device: Device) -> list[str]:
    found = device.description
    capability = "none" if found.capability is None else f"{found.capability[0]}.{found.capability[1]}"
    lines = [
        f"cuda:{device.number:<8}{found.name}, compute capability {capability}, {found.sm_count} multiprocessors,"
        f" {device.memory_bytes / 2**30:.0f} GiB, {found.smem_per_block // 1024} KB of shared memory a block"
    ]
    for family, rows in device.kernels.items():
        backward = len(_BACKWARD.intersection(rows))
        lines.append(f"{'':13}{family}: {len(rows)} kernels run ({len(rows) - backward} forward, {backward} backward)")
    note = _note(device)
    if note:
        lines.append(f"{'':13}{note}")
    left_out = sum(map(len, device.left_out.values()))
    if left_out:
        lines.append(f"{'':13}{left_out} kernels for this device do not run, see above")
    return lines


def _note(device: Device) -> str:
    """What must be known of kernels that run on a device of which nobody has tried one."""
    capability = device.description.capability
    return execution_note(capability) if capability is not None and any(device.kernels.values()) else ""


def _device_values(device: Device) -> dict[str, Any]:
    found = device.description
    return {
        "index": device.number,
        "name": found.name,
        "type": found.type,
        "capability": None if found.capability is None else list(found.capability),
        "driver_cuda": None if found.cuda_version is None else ".".join(map(str, found.cuda_version)),
        "memory_bytes": device.memory_bytes,
        "multiprocessors": found.sm_count,
        "smem_per_block": found.smem_per_block,
        "note": _note(device) or None,
        "kernels": {family: list(rows) for family, rows in device.kernels.items()},
        "left_out": {reason: list(rows) for reason, rows in device.left_out.items()},
    }
