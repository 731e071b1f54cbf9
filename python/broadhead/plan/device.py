"""Describes a device for dispatch: a hashable record that tests can also write by hand."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..capabilities import smem_of
from .native import build_description, parse_cuda_version


class DeviceDescription(NamedTuple):
    """What the choice of a kernel depends on."""

    type: str  # "cuda", "hip", "cpu", ...
    name: str
    capability: tuple[int, int] | None
    smem_per_block: int  # bytes a block may opt in to
    sm_count: int
    l2_bytes: int
    cuda_version: tuple[int, int] | None  # the newest CUDA that the driver serves

    def label(self) -> str:
        """One phrase for error texts."""
        if self.capability is None:
            return f"{self.type} device"
        cuda = ".".join(map(str, self.cuda_version)) if self.cuda_version else "unknown"
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]}, CUDA {cuda})"


CPU = DeviceDescription("cpu", "CPU", None, 0, 0, 0, None)


def hypothetical(capability: tuple[int, int], sm_count: int = 108, l2_bytes: int = 40 << 20) -> DeviceDescription:
    """A device of a given compute capability, for questions about machines that are not here."""
    return DeviceDescription(
        "cuda",
        "hypothetical GPU",
        capability,
        smem_of(capability),
        sm_count,
        l2_bytes,
        None,
    )


def _driver_cuda_version() -> tuple[int, int] | None:
    # Kernel libraries carry their own CUDA runtime, so the driver decides what loads, not the runtime of torch.
    query = getattr(torch._C, "_cuda_getDriverVersion", None)
    try:
        version = int(query()) if query is not None else 0
    except RuntimeError:
        version = 0
    return parse_cuda_version(version) or parse_cuda_version(torch.version.cuda)


@functools.cache
def _describe_cuda(index: int) -> DeviceDescription:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    if torch.version.hip is not None:
        return DeviceDescription("hip", properties.name, None, 0, properties.multi_processor_count, 0, None)
    smem = getattr(properties, "shared_memory_per_block_optin", 0) or smem_of(capability)
    l2_bytes = getattr(properties, "L2_cache_size", 0)
    return DeviceDescription(
        "cuda",
        properties.name,
        capability,
        smem,
        properties.multi_processor_count,
        l2_bytes,
        _driver_cuda_version(),
    )


def describe(device: torch.device) -> DeviceDescription:
    """The description of a torch device, cached for CUDA devices."""
    if device.type == "cuda":
        return _describe_cuda(torch.cuda.current_device() if device.index is None else device.index)
    return CPU if device.type == "cpu" else CPU._replace(type=device.type, name=device.type)


def default_device() -> DeviceDescription:
    """The current CUDA device where there is one, else the CPU."""
    return _describe_cuda(torch.cuda.current_device()) if torch.cuda.is_available() else CPU


def common_kernel_obstacle(device: torch.device) -> str | None:
    """Why the kernels that every library holds (csrc/kernels) can not run on tensors there; None: they can."""
    description = describe(device)
    if description.type != "cuda":
        return f"the tensors are on {description.type}"
    family = build_description().common_family()
    if family is None:
        return "this installation holds no kernels"
    if description.capability is None or not family.covers(description.capability):
        return f'the kernels were built for "{";".join(family.archs)}", not for {description.label()}'
    return None
