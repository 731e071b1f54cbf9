"""`broadhead vllm-check`: whether vLLM on this machine would take broadhead, and what is missing if not."""

from __future__ import annotations

import importlib.metadata
import os
from typing import NamedTuple

import torch

from broadhead.errors import InvalidArgumentError
from broadhead.plan.native import BuildDescription, build_description, extension

from .policy import VARIABLE, Layer, Mode, decide, missing, parse_mode, where_ahead

#: The versions of vLLM whose interface the backend knows: from the first to before the second.
VERSIONS = ((0, 24), (0, 34))
_HEAD_SIZES = (64, 128, 256, 512)
_PLUGINS = "vllm.general_plugins"


class Machine(NamedTuple):
    """What is found on a machine."""

    vllm_version: str | None  # None: not installed
    plugin_found: bool  # whether vLLM finds the entry point
    allowed_plugins: str | None  # VLLM_PLUGINS
    torch_cuda: str | None  # the CUDA that torch was built with
    gpu: str | None  # its name
    capability: tuple[int, int] | None
    build: BuildDescription
    has_module: bool
    setting: str | None  # BROADHEAD_VLLM


def look() -> Machine:
    """What is found on this machine. vLLM is not imported."""
    try:
        version: str | None = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = None
    found = any(point.name == "broadhead" for point in importlib.metadata.entry_points(group=_PLUGINS))
    has_gpu = torch.cuda.is_available()
    return Machine(
        version,
        found,
        os.environ.get("VLLM_PLUGINS"),
        torch.version.cuda,
        torch.cuda.get_device_name() if has_gpu else None,
        torch.cuda.get_device_capability() if has_gpu else None,
        build_description(),
        extension() is not None,
        os.environ.get(VARIABLE),
    )


def report(machine: Machine) -> tuple[bool, str]:
    """``(usable, text)``: whether vLLM can take the backend at all, and what was found, line by line."""
    lines, faults = [], []
    for name, (fine, text) in {
        "vLLM": _vllm(machine),
        "plugin": _plugin(machine),
        "GPU": _gpu(machine),
        "build": _build(machine),
    }.items():
        lines.append(f"{name + ':':8} {text}")
        if not fine:
            faults.append(name)
    try:
        mode = parse_mode(machine.setting)
    except InvalidArgumentError as error:
        lines.append(f"{'setting:':8} {error}")
        return False, "\n".join([*lines, "Not usable: see setting."])
    lines.append(f"{'setting:':8} {_setting(mode)}")
    lines += _layers(machine, mode)
    if faults:
        lines.append(f"Not usable: see {' and '.join(faults)}.")
    else:
        lines.append("Usable: vllm serve ... --attention-backend CUSTOM takes it.")
    return not faults, "\n".join(lines)


def _vllm(machine: Machine) -> tuple[bool, str]:
    first, last = (".".join(map(str, version)) for version in (VERSIONS[0], (0, VERSIONS[1][1] - 1)))
    if machine.vllm_version is None:
        return False, f"not installed; pip install 'vllm>={first}' (versions {first} to {last} are known to work)"
    numbers = tuple(int(part) for part in machine.vllm_version.split(".")[:2] if part.isdigit())
    if len(numbers) == 2 and numbers < VERSIONS[0]:
        return False, f"{machine.vllm_version} is too old; the backend needs {first} to {last}"
    if numbers >= VERSIONS[1]:
        return True, f"{machine.vllm_version}, newer than {last}, the newest that was tried"
    return True, machine.vllm_version


def _plugin(machine: Machine) -> tuple[bool, str]:
    if not machine.plugin_found:
        return False, (
            f"vLLM does not find broadhead in the entry points {_PLUGINS}; install broadhead with pip in the Python of"
            " vLLM (a source tree on PYTHONPATH is not enough)"
        )
    allowed = machine.allowed_plugins
    if allowed is not None and "broadhead" not in allowed.split(","):
        return False, f"VLLM_PLUGINS={allowed!r} leaves broadhead out; add broadhead to it"
    return True, "found by vLLM"


def _gpu(machine: Machine) -> tuple[bool, str]:
    if machine.capability is None:
        if machine.torch_cuda is None:
            return False, "torch was built without CUDA; install a torch with CUDA, as vLLM brings it"
        return False, f"torch has CUDA {machine.torch_cuda} but finds no GPU; see nvidia-smi and CUDA_VISIBLE_DEVICES"
    major, minor = machine.capability
    text = f"{machine.gpu}, compute capability {major}.{minor}"
    return (True, text) if major >= 8 else (False, f"{text}; the kernels need 8.0 or newer")


def _build(machine: Machine) -> tuple[bool, str]:
    build = machine.build
    if not machine.has_module:
        return False, "this installation has no compiled module; build broadhead where its source is: pip install ."
    broken = "; ".join(f"library {name} did not load: {why}" for name, why in build.errors)
    if not build.families:
        return False, broken or (
            "this is the CPU package, without kernels; build broadhead with nvcc:"
            ' BROADHEAD_CUDA_ARCHS="80;90a" pip install .'
        )
    parts = [
        f"{family.name} for {';'.join(family.archs)} (CUDA {'.'.join(map(str, family.cuda_version))})"
        for family in build.families
    ]
    return not broken, "; ".join(parts + ([broken] if broken else []))


def _setting(mode: Mode) -> str:
    return {
        Mode.FLAG: f"{VARIABLE} is not set: only --attention-backend CUSTOM takes broadhead",
        Mode.AUTO: f"{VARIABLE}=auto: layers where the kernels are ahead, without a flag",
        Mode.ON: f"{VARIABLE}=on: all layers that have kernels, without a flag",
    }[mode]


def _layers(machine: Machine, mode: Mode) -> list[str]:
    """What happens to each kind of layer on the GPU."""
    if machine.capability is None:
        return []
    lines = []
    for size in _HEAD_SIZES:
        for images in (False, True):
            for cache in ("auto", "fp8"):
                layer = Layer(size, kv_cache_dtype=cache, use_mm_prefix=images)
                what = f"head size {size}, cache {cache}{', images' if images else ''}"
                lacking = missing(layer, machine.capability, machine.build)
                taken, why = decide(mode, layer, machine.capability, machine.build)
                if mode is Mode.FLAG:
                    ahead = where_ahead(layer, machine.capability)[0]
                    why = lacking or f"can be taken; {VARIABLE}=auto would {'' if ahead else 'not '}take it"
                lines.append(f"  {what}: {'taken: ' if taken else ''}{why}")
    return lines
