"""_validate_head_dims: the answer is about the kernels that this installation has for a device, not the table."""

from __future__ import annotations

import broadhead
import pytest
import torch
from broadhead.costs import Cost
from broadhead.plan import native
from broadhead.plan.device import CPU
from broadhead.plan.native import NO_KERNELS
from broadhead.support import CAPABILITIES, ROWS
from described import ALL_ARCHS, FULL, build_of, h200, hand_in_costs, without_family

validate = broadhead._validate_head_dims


def refused(words: str, *arguments: object, **options: object) -> None:
    with pytest.raises(AssertionError, match=words):
        validate(*arguments, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("capability", [8, 9, 10, 12, (8, 6), (9, 0)])
def test_a_full_build_runs_all_of_the_table(capability: int | tuple[int, int]) -> None:
    validate(512, 512, capability, 8, build=FULL)
    validate(192, 128, capability, build=FULL)
    refused("head_dim 520 exceeds 512", 520, 512, capability, 8, build=FULL)
    refused("head_dim_v 1024 exceeds 512", 64, 1024, capability, 8, build=FULL)


def test_arguments() -> None:
    refused("head_dim must be a positive multiple of 8, got 100", 100, 64, 9, 8, build=FULL)
    refused("head_dim_v must be a positive multiple of 8, got 0", 64, 0, 9, 8, build=FULL)
    refused("head_dim must be a positive multiple of 16, got 72", 72, 72, 9, 16, build=FULL)
    refused("no kernel for compute capability 7$", 64, 64, 7, 8, build=FULL)
    refused("no kernel for compute capability 7.5$", 64, 64, (7, 5), 8, build=FULL)
    refused("no kernel for compute capability 11$", 64, 64, 11, 8, build=FULL)
    refused("compute_capability must be a major version", 64, 64, "9", 8, build=FULL)
    refused("direction must be", 64, 64, 9, direction="sideways", build=FULL)
    refused("dtype must be", 64, 64, 9, dtype="bf16", build=FULL)


def test_a_wheel_without_kernels_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``build`` the question is about what is installed."""
    if not native.build_description().families:
        refused("left out", 64, 64, 9)
    monkeypatch.setattr("broadhead.api.head_dims.build_description", lambda: NO_KERNELS)
    for capability in CAPABILITIES:
        refused("left out of this build, the CPU package", 64, 64, capability)


def test_a_build_for_other_devices_has_none() -> None:
    validate(128, 128, (8, 0), build=build_of("80"))
    refused("left out of this build for compute capability 9.0", 128, 128, 9, build=build_of("80"))
    validate(128, 128, (8, 6), build=build_of("86"))
    refused('was built for "86"', 128, 128, 8, build=build_of("86"))  # a major version: also 8.0


def test_a_later_capability_has_what_ptx_serves() -> None:
    refused("left out of this build for compute capability 11.0", 64, 64, (11, 0), build=FULL)
    validate(512, 512, (11, 0), build=build_of(*ALL_ARCHS, "103-virtual"))
    refused(
        "no kernel written for compute capability 11.0", 64, 64, (11, 0), native=True, build=build_of("103-virtual")
    )


def test_backward_kernels_take_what_the_table_says() -> None:
    validate(64, 64, 9, direction="backward", build=FULL)
    validate(512, 512, (8, 9), direction="backward", build=FULL)
    refused("520 exceeds 512", 520, 520, 9, direction="backward", build=FULL)


@pytest.mark.parametrize(("here", "absent"), [("forward", "backward"), ("backward", "forward")])
def test_a_build_of_one_direction_has_none_of_the_other(here: str, absent: str) -> None:
    """Training needs both: kernels of one must not answer for the other."""
    build = build_of("90a", without=tuple(row.id for row in ROWS if row.direction == absent))
    validate(128, 128, (9, 0), direction=here, build=build)
    refused(f"{absent}, on .*left out of this build", 128, 128, (9, 0), direction=absent, build=build)


def test_native_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Portable kernels run on Hopper and Blackwell, slowly: who asks for a native one must not get them.

    That one of them takes less time for the call that is looked at is no reason to refuse.
    """
    hand_in_costs(monkeypatch, {"sm90_fwd_d512": Cost(9), "sm80_fwd_d512": Cost(1)})
    validate(512, 512, 9, native=True, build=FULL)
    for capability in (8, 12):
        validate(512, 512, capability, native=True, build=FULL)
    validate(512, 512, 10, build=FULL)
    refused("written for compute capability 10.0 .*portable kernel sm80_fwd_d512_bf16", 512, 512, 10, native=True,
            build=FULL)  # fmt: skip
    portable = without_family("sm90")._replace(
        families=tuple(family._replace(archs=("90a",)) for family in without_family("sm90").families)
    )
    validate(128, 128, 9, build=portable)
    refused("portable kernel sm80_fwd_d128_bf16", 128, 128, 9, native=True, build=portable)


def test_dtypes() -> None:
    validate(64, 64, 9, 16, dtype=torch.float8_e4m3fn, build=FULL)
    refused("dtype fp32 has no CUDA kernel", 64, 64, 9, dtype=torch.float32, build=FULL)
    without_fp16 = build_of("90a", without=tuple(row for row in FULL.families[0].kernels if row.endswith("_fp16")))
    validate(64, 64, 9, dtype=torch.bfloat16, build=without_fp16)
    without_bf16 = build_of("80", without=tuple(row for row in FULL.families[0].kernels if row.endswith("_bf16")))
    refused("bf16", 64, 64, (8, 0), build=without_bf16)


def test_the_device_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broadhead.api.head_dims.default_device", lambda: CPU)
    refused("compute_capability must be given", 64, 64, build=FULL)
    small = h200(smem_per_block=48 * 1024)
    monkeypatch.setattr("broadhead.api.head_dims.default_device", lambda: small)
    for capability in (None, 9, (9, 0)):
        refused("shared memory", 64, 64, capability, build=FULL)
    validate(64, 64, 8, build=FULL)  # another one
