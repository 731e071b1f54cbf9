"""The parts of the vLLM integration that need no vLLM: the policy, image ranges and `broadhead vllm-check`."""

from __future__ import annotations

import random
from typing import Any

import broadhead
import pytest
import torch
from broadhead.integrations.vllm.check import Machine, look, report
from broadhead.integrations.vllm.policy import Layer, Mode, decide, missing, parse_mode, where_ahead
from broadhead.integrations.vllm.ranges import query_ranges
from broadhead.plan.native import NO_KERNELS
from described import FULL, build_of

HOPPER, AMPERE, ADA, BLACKWELL = (9, 0), (8, 0), (8, 9), (10, 0)
GOOD = Machine("0.24.0", True, None, "13.0", "NVIDIA H200", HOPPER, FULL, True, "auto")


@pytest.mark.parametrize(
    ("layer", "capability", "ahead"),
    [
        (Layer(512), HOPPER, True),
        (Layer(264), HOPPER, True),
        (Layer(256), HOPPER, False),
        (Layer(256, use_mm_prefix=True), HOPPER, True),
        (Layer(192, use_mm_prefix=True), HOPPER, False),
        (Layer(256, use_mm_prefix=True), BLACKWELL, False),
        (Layer(256), AMPERE, True),
        (Layer(256), ADA, True),
        (Layer(192), AMPERE, False),
        (Layer(512), BLACKWELL, False),
        (Layer(128, kv_cache_dtype="fp8", use_mm_prefix=True), HOPPER, True),
        (Layer(128, kv_cache_dtype="auto", use_mm_prefix=True), HOPPER, False),
        (Layer(128, kv_cache_dtype="fp8"), HOPPER, False),
    ],
)
def test_where_the_kernels_are_ahead(layer: Layer, capability: tuple[int, int], ahead: bool) -> None:
    assert where_ahead(layer, capability)[0] is ahead
    assert decide(Mode.AUTO, layer, capability, FULL)[0] is ahead
    assert decide(Mode.ON, layer, capability, FULL)[0]
    assert not decide(Mode.FLAG, layer, capability, FULL)[0]


def test_no_layer_is_taken_that_the_build_can_not_run() -> None:
    for build in (NO_KERNELS, build_of("80"), build_of("120")):
        taken, why = decide(Mode.ON, Layer(512), HOPPER, build)
        assert not taken and "broadhead has no kernel for the prefill of head size 512 here" in why


def test_portable_kernels_are_not_ahead_on_hopper() -> None:
    assert decide(Mode.ON, Layer(512), HOPPER, build_of("90"))[0]
    taken, why = decide(Mode.AUTO, Layer(512), HOPPER, build_of("90"))
    assert not taken and "no kernels made for Hopper" in why


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (Layer(100), "multiples of 8 up to 512, got 100"),
        (Layer(520), "got 520"),
        (Layer(64, torch.float32), "got torch.float32"),
        (Layer(64, kv_cache_dtype="fp8_e5m2"), "got fp8_e5m2"),
    ],
)
def test_what_is_missing_names_the_value(layer: Layer, text: str) -> None:
    assert text in str(missing(layer, HOPPER, FULL))


def test_modes() -> None:
    assert [parse_mode(x) for x in (None, "", "auto", " ON ")] == [Mode.FLAG, Mode.FLAG, Mode.AUTO, Mode.ON]
    with pytest.raises(broadhead.InvalidArgumentError, match=r"BROADHEAD_VLLM must be auto .* got '1'"):
        parse_mode("1")


def test_ranges_are_those_of_the_queries_of_each_image() -> None:
    """By a loop over tokens: inclusive ends become exclusive ones, and queries outside of images have none."""
    for _ in range(20):
        batch = random.randint(1, 4)
        seqlens_k = [random.randint(1, 40) for _ in range(batch)]
        seqlens_q = [random.randint(1, n) for n in seqlens_k]
        images: dict[int, list[tuple[int, int]]] = {}
        for b in range(batch):
            cuts = sorted(random.sample(range(60), 6))
            images[b] = [(cuts[i], cuts[i + 1] - 1) for i in (0, 2, 4)]  # some of one token, some not there yet
        start = torch.tensor([0, *seqlens_q]).cumsum(0).to(torch.int32)
        total = int(start[-1]) + random.randint(0, 3)
        expected = torch.zeros(total, 2, dtype=torch.int32)
        row = 0
        for b in range(batch):
            for position in range(seqlens_k[b] - seqlens_q[b], seqlens_k[b]):
                for first, last in images[b]:
                    if first <= position <= last and first < last:
                        expected[row] = torch.tensor([first, last + 1])
                row += 1
        found = query_ranges(images, start, torch.tensor(seqlens_k, dtype=torch.int32), total)
        if found is None:
            assert not expected.any()
        else:
            assert torch.equal(found, expected)


def test_no_ranges_for_text_and_for_images_that_lie_behind() -> None:
    start, lengths = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([50, 9], dtype=torch.int32)
    assert query_ranges({0: [(3, 20)], 1: []}, start, lengths, 2) is None
    # A request of a batch of two, which decodes: vLLM counts its drafts, so that its length may be too large.
    assert query_ranges({1: [(2, 5)]}, start, lengths + 3, 2) is None


def test_check_on_a_machine_where_all_is_well() -> None:
    usable, text = report(GOOD)
    assert usable and "NVIDIA H200, compute capability 9.0" in text
    lines = text.splitlines()
    assert any(line.startswith("  head size 512, cache auto: taken: head size 512 on") for line in lines)
    assert any(line.startswith("  head size 128, cache auto: head size 128 on") for line in lines)
    assert any(line.startswith("  head size 64, cache fp8, images: taken: image ranges") for line in lines)


@pytest.mark.parametrize(
    ("changes", "text", "fault"),
    [
        ({"vllm_version": None}, "not installed; pip install 'vllm>=0.24'", "vLLM"),
        ({"vllm_version": "0.9.2"}, "0.9.2 is too old; the backend needs 0.24 to 0.33", "vLLM"),
        ({"plugin_found": False}, "install broadhead with pip", "plugin"),
        ({"allowed_plugins": "lora"}, "VLLM_PLUGINS='lora' leaves broadhead out", "plugin"),
        ({"capability": None, "gpu": None}, "torch has CUDA 13.0 but finds no GPU", "GPU"),
        ({"capability": None, "gpu": None, "torch_cuda": None}, "torch was built without CUDA", "GPU"),
        ({"capability": (7, 5)}, "the kernels need 8.0 or newer", "GPU"),
        ({"build": NO_KERNELS}, "this is the CPU package, without kernels", "build"),
        ({"has_module": False}, "no compiled module", "build"),
        (
            {"build": FULL._replace(errors=(("sm90", "libcudart.so.13: cannot open"),))},
            "library sm90 did not load: libcudart.so.13",
            "build",
        ),
        ({"setting": "yes"}, "BROADHEAD_VLLM must be auto", "setting"),
    ],
)
def test_check_says_what_is_missing(changes: dict[str, Any], text: str, fault: str) -> None:
    usable, found = report(GOOD._replace(**changes))
    assert not usable and text in found and found.endswith(f"Not usable: see {fault}.")


def test_versions_are_compared_as_numbers() -> None:
    usable, text = report(GOOD._replace(vllm_version="0.100.0"))
    assert usable and "0.100.0, newer than 0.33" in text


def test_check_looks_at_this_machine() -> None:
    machine = look()
    assert (machine.capability is None) == (not torch.cuda.is_available())
    assert machine.torch_cuda == torch.version.cuda
    assert report(machine)[1].startswith("vLLM:")
