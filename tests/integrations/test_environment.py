"""Each text of a wrong environment: what lacks, what was found, what to do."""

from __future__ import annotations

import importlib.metadata

import pytest
from broadhead.integrations.environment import (
    OLDEST_CUDA,
    conflict,
    cuda_obstacle,
    kernel_obstacle,
    package_obstacle,
)
from broadhead.plan.device import CPU, hypothetical
from broadhead.plan.native import NO_KERNELS, BuildDescription, FamilyBuild

HOPPER = hypothetical((9, 0))._replace(name="NVIDIA H200", cuda_version=(13, 0))
SM80 = FamilyBuild("sm80", ("80",), (12, 8), frozenset({"row"}))
SM90 = FamilyBuild("sm90", ("90a",), (12, 8), frozenset({"row"}))


def test_no_gpu() -> None:
    found = kernel_obstacle("sglang", CPU, BuildDescription(True, (SM80,), ()))
    assert found is not None and found.lacks == "gpu"
    assert "sglang: torch sees no CUDA device" in found.text and "nvidia-smi" in found.text


def test_build_without_kernels_does_not_blame_the_gpu() -> None:
    found = kernel_obstacle("lmdeploy", HOPPER, NO_KERNELS)
    assert found is not None and found.lacks == "build"
    assert "the GPU is fine (NVIDIA H200 (compute capability 9.0, CUDA 13.0))" in found.text
    assert 'BROADHEAD_CUDA_ARCHS="90a" pip install .' in found.text


def test_build_for_another_gpu() -> None:
    found = kernel_obstacle("lmdeploy", HOPPER._replace(capability=(8, 0)), BuildDescription(True, (SM90,), ()))
    assert found is not None and found.lacks == "build"
    assert 'built for "90a", not for NVIDIA H200 (compute capability 8.0' in found.text
    assert 'BROADHEAD_CUDA_ARCHS="80"' in found.text


def test_library_that_does_not_load() -> None:
    broken = BuildDescription(True, (), (("sm90", "libcudart.so.13: cannot open"),))
    found = kernel_obstacle("megatron", HOPPER, broken)
    assert found is not None and found.lacks == "build" and "libcudart.so.13" in found.text
    assert "install broadhead anew" in found.text
    found = kernel_obstacle("megatron", HOPPER._replace(cuda_version=(12, 4)), broken)
    assert found is not None and found.lacks == "cuda" and "update the NVIDIA driver" in found.text


def test_a_driver_of_an_older_major_than_the_kernels() -> None:
    """12.9 loads kernels of CUDA 12, but none of CUDA 13."""
    old = HOPPER._replace(cuda_version=(12, 9))
    assert kernel_obstacle("slime", old, BuildDescription(True, (SM90,), ())) is None
    newer = BuildDescription(True, (SM90._replace(cuda_version=(13, 2)),), ())
    found = kernel_obstacle("slime", old, newer)
    assert found is not None and found.lacks == "cuda" and "serves CUDA 12.9, and kernels need CUDA 13.0" in found.text


@pytest.mark.parametrize("capability, name", [((7, 5), "NVIDIA T4")])
def test_old_gpu(capability: tuple[int, int], name: str) -> None:
    found = kernel_obstacle(
        "slime", HOPPER._replace(capability=capability, name=name), BuildDescription(True, (SM80,), ())
    )
    assert found is not None and found.lacks == "gpu"
    assert f"{name} (compute capability 7.5" in found.text and "8.0" in found.text


def test_amd() -> None:
    found = kernel_obstacle("slime", CPU._replace(type="hip", name="MI300"), BuildDescription(True, (SM80,), ()))
    assert found is not None and found.lacks == "gpu" and "MI300" in found.text


def test_right_environment() -> None:
    assert kernel_obstacle("vllm", HOPPER, BuildDescription(True, (SM80, SM90), ())) is None


@pytest.mark.parametrize("found", ["12.10", 12100, (12, 10), "12.10.1"])
def test_cuda_versions_are_numbers(found: str | int | tuple[int, int]) -> None:
    """As text "12.10" is below "12.3"."""
    assert cuda_obstacle("sglang", found, (12, 3)) is None
    assert cuda_obstacle("sglang", found) is None
    old = cuda_obstacle("sglang", "12.3", (12, 10))
    assert old is not None and old.lacks == "cuda"
    assert "serves CUDA 12.3" in old.text and "need CUDA 12.10 or newer" in old.text


def test_unknown_cuda() -> None:
    found = cuda_obstacle("sglang", None)
    assert found is not None and found.lacks == "cuda" and "nvidia-smi" in found.text
    assert ".".join(map(str, OLDEST_CUDA)) in found.text


def test_old_driver_under_kernels() -> None:
    found = kernel_obstacle("vllm", HOPPER._replace(cuda_version=(12, 3)), BuildDescription(True, (SM90,), ()))
    assert found is not None and found.lacks == "cuda" and "serves CUDA 12.3" in found.text


def test_missing_package() -> None:
    found = package_obstacle("slime", "a_package_that_is_not.there", "pip install it")
    assert found is not None and found.lacks == "package"
    assert "a_package_that_is_not.there is not installed: pip install it" in found.text
    assert package_obstacle("slime", "torch.nn", "pip install torch") is None


def test_other_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert conflict("megatron", "flash_attn_3", ["a-distribution-that-is-not-there"]) is None
    found = conflict("megatron", "flash_attn_3", ["a-distribution-that-is-not-there", "torch"])
    assert found is not None and found.lacks == "conflict"
    assert f"torch {importlib.metadata.version('torch')} is installed" in found.text
    assert "pip uninstall torch" in found.text and "override=True" in found.text
