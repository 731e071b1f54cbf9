"""Says what keeps a client from running on kernels here: no GPU, no kernels, an old driver, another package."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from ..capabilities import arch_for
from ..plan.device import DeviceDescription, default_device
from ..plan.native import BuildDescription, build_description, build_help, parse_cuda_version

#: The oldest driver that loads kernels of CUDA 12.8, the oldest CUDA that builds them.
OLDEST_CUDA = (12, 8)


class Obstacle(NamedTuple):
    """One thing that keeps kernels from running: what lacks, in one word, and the text for the user."""

    lacks: str  # "gpu", "build", "cuda", "package" or "conflict"
    text: str


def _numbers(version_: tuple[int, ...]) -> str:
    return ".".join(map(str, version_))


def cuda_obstacle(
    client: str, found: str | int | tuple[int, int] | None, needed: tuple[int, int] = OLDEST_CUDA
) -> Obstacle | None:
    """Why a CUDA version is too old; None: it is not. Versions compare as numbers, so 12.10 is newer than 12.3.

    Args:
        client: the name of the integration, for the text.
        found: "12.10", CUDA's 12100, (12, 10), or None where it is not known.
        needed: the oldest (major, minor) that is accepted.
    """
    numbers = found if isinstance(found, tuple) else parse_cuda_version(found)
    if numbers is None:
        return Obstacle(
            "cuda",
            f"{client}: the CUDA version of the driver is not known, and kernels need CUDA {_numbers(needed)} or newer:"
            " run nvidia-smi, which prints the version, and update the driver if it is older",
        )
    if numbers >= needed:
        return None
    return Obstacle(
        "cuda",
        f"{client}: the driver serves CUDA {_numbers(numbers)}, and kernels need CUDA {_numbers(needed)} or newer:"
        " update the NVIDIA driver",
    )


def kernel_obstacle(
    client: str, device: DeviceDescription | None = None, build: BuildDescription | None = None
) -> Obstacle | None:
    """Why no kernel of this installation runs on a device; None: kernels do.

    The GPU is never blamed where the installation lacks its kernels. Whether a kernel takes a call of given head dims
    is a question for ``broadhead.is_supported``.

    Args:
        client: the name of the integration, for the text.
        device: the device to ask about; None: the current one.
        build: the kernels to look at; None: those of this installation.
    """
    device = default_device() if device is None else device
    build = build_description() if build is None else build
    if device.type == "hip":
        return Obstacle(
            "gpu", f"{client}: {device.name} is an AMD GPU, and the kernels are for NVIDIA GPUs: calls run on torch"
        )
    if device.type != "cuda" or device.capability is None:
        return Obstacle(
            "gpu",
            f"{client}: torch sees no CUDA device, so calls run on the torch reference, which is slow: check nvidia-smi"
            " and CUDA_VISIBLE_DEVICES, and that torch.version.cuda is not None",
        )
    if device.capability < (8, 0):
        return Obstacle(
            "gpu",
            f"{client}: {device.label()} is older than compute capability 8.0, the oldest that has kernels:"
            " calls run on the torch reference",
        )
    if not build.families:
        errors = "; ".join(f"{name}: {error}" for name, error in build.errors)
        if errors:
            # A library that does not load is most often newer than the driver.
            old = cuda_obstacle(client, device.cuda_version)
            return old or Obstacle(
                "build",
                f"{client}: the kernel libraries of this installation do not load: {errors}; install broadhead anew in"
                " the environment of this torch, which has the CUDA runtime that they want",
            )
        return Obstacle(
            "build",
            f"{client}: the GPU is fine ({device.label()}), but this installation of broadhead holds no kernels:"
            f" {build_help(arch_for(device.capability))}",
        )
    if not any(family.covers(device.capability) for family in build.families):
        archs = ";".join(arch for family in build.families for arch in family.archs)
        return Obstacle(
            "build",
            f'{client}: this installation of broadhead was built for "{archs}", not for {device.label()}:'
            f" {build_help(arch_for(device.capability))}",
        )
    majors = [(family.cuda_version[0], 0) for family in build.families if family.cuda_version]
    return cuda_obstacle(client, device.cuda_version, max([OLDEST_CUDA, *majors]))


def package_obstacle(client: str, module: str, install: str) -> Obstacle | None:
    """That a module which the integration needs is not installed; None: it is there.

    Args:
        client: the name of the integration, for the text.
        module: the import name, with dots where it lies in a package.
        install: the command that installs it.
    """
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    if found:
        return None
    return Obstacle("package", f"{client}: the module {module} is not installed: {install}")


def conflict(client: str, module: str, distributions: Iterable[str]) -> Obstacle | None:
    """That another distribution already gives a module which the integration would put in place; None: none does.

    Args:
        client: the name of the integration, for the text.
        module: the import name.
        distributions: the names of distributions that hold such a module.
    """
    for name in distributions:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        return Obstacle(
            "conflict",
            f"{client}: {name} {found} is installed and already gives the module {module}, which is left as it is:"
            f" pip uninstall {name}, or say override=True to run on broadhead beside it",
        )
    return None
