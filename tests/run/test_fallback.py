"""A fallback on a CUDA device is told once a kind of reason, or refused, by every operation; plans keep no texts."""

from __future__ import annotations

import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import broadhead
import pytest
import torch
from broadhead.api import combine
from broadhead.plan import device, dispatch
from broadhead.plan.dispatch import resolve
from broadhead.plan.native import NO_KERNELS
from broadhead.reference.merge import merge_parts
from broadhead.run import append as append_launch
from broadhead.run import choice, merge
from broadhead.run import combine as run_combine
from broadhead.run import fallback as fallback_notice
from described import FULL, build_of, forget_plans, h200, problem

Call = Callable[[], Any]


def states(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [
        torch.randn(5, 4, 16, dtype=dtype),
        torch.randn(4, 5),
        torch.randn(5, 4, 16, dtype=dtype),
        torch.randn(4, 5),
    ]


def combine_two(**options: Any) -> Any:
    return broadhead.flash_attn_combine(torch.randn(2, 5, 4, 16), torch.randn(2, 5, 4), **options)


def merge_two(**options: Any) -> Any:
    return broadhead.merge_attn_states(*states(), **options)


#: Operations beside attention, by the name of the public function.
OPERATIONS = {"flash_attn_combine": combine_two, "merge_attn_states": merge_two}


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors of the CPU count as those of an H200 for which this build has no kernels: what runs is torch ops."""
    monkeypatch.delenv("BROADHEAD_STRICT", raising=False)
    monkeypatch.setattr(fallback_notice, "_warned", set())
    for module in (device, combine, merge, append_launch, choice):
        monkeypatch.setattr(module, "describe", lambda _: h200(), raising=False)
    for module in (device, dispatch):
        monkeypatch.setattr(module, "build_description", lambda: build_of("80"))
    yield


# --- operations beside attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_the_build_does_not_cover_says_so_once(name: str, on_cuda: None) -> None:
    operation = OPERATIONS[name]
    with pytest.warns(broadhead.FallbackWarning, match=rf'^{name}: .*built for "80", not for NVIDIA H200') as caught:
        for _ in range(3):
            operation()
    assert len(caught) == 1
    assert caught[0].filename == __file__, "the warning points at the caller, whatever called it inside the package"


@pytest.mark.parametrize("name", OPERATIONS)
def test_backend_and_strict_hold_for_every_operation(name: str, on_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = OPERATIONS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operation(backend="torch")
        with pytest.raises(broadhead.UnsupportedError, match=f"^{name}: the .* kernel does not take this call"):
            operation(backend="cuda")
        monkeypatch.setenv("BROADHEAD_STRICT", "1")
        with pytest.raises(broadhead.UnsupportedError, match=f"BROADHEAD_STRICT=1: {name}: "):
            operation()
        operation(backend="torch")
    for wrong in ("tpu", 3):
        with pytest.raises(broadhead.BroadheadError, match=f"{name}: backend must be"):
            operation(backend=wrong)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_cpu_is_silent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROADHEAD_STRICT", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OPERATIONS[name]()
    with pytest.raises(broadhead.UnsupportedError, match="the tensors are on cpu"):
        OPERATIONS[name](backend="cuda")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"out_partial": torch.randn(2, 5, 4, 16).double()}, "it combines fp32 into"),
        ({"out_dtype": torch.float64}, "it combines fp32 into"),
        ({"out_partial": torch.randn(2, 5, 4, 18)}, "whole fours"),
        ({"out_partial": torch.randn(2, 5, 4, 18)[..., :16]}, "whole fours"),
        ({"out": torch.empty(4, 5, 16).transpose(0, 1)}, "out must be contiguous"),
        ({"out_partial": torch.randn(2, 5, 4, 16, requires_grad=True)}, "an input requires grad"),
    ],
)
def test_what_the_combine_kernel_does_not_take(
    changes: dict[str, Any], words: str, on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "build_description", lambda: FULL)
    arguments = {"out_partial": torch.randn(2, 5, 4, 16), "lse_partial": torch.randn(2, 5, 4), **changes}
    with pytest.warns(broadhead.FallbackWarning, match=f"the combine kernel does not take this call: .*{words}"):
        broadhead.flash_attn_combine(**arguments)


def test_nothing_to_combine_is_no_fallback(on_cuda: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, lse = broadhead.flash_attn_combine(torch.empty(2, 0, 4, 16), torch.empty(2, 0, 4))
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)


def test_more_parts_than_the_kernel_takes_are_combined_in_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches of a kernel that takes 128 parts, each computed by torch ops here."""
    launches = []

    class Module:
        @staticmethod
        def combine(out: torch.Tensor, lse: torch.Tensor, result: torch.Tensor, merged: torch.Tensor, _: int) -> None:
            launches.append(out.shape[0])
            assert out.shape[0] <= 128
            for to, value in zip((result, merged), merge_parts(out, lse), strict=True):
                to.copy_(value)

    class NoDevice:
        def __init__(self, _: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: Any) -> None: ...

    monkeypatch.setattr(run_combine, "common_kernel_obstacle", lambda _: None)
    monkeypatch.setattr(run_combine.native, "extension", lambda: Module)
    monkeypatch.setattr(torch.cuda, "device", NoDevice)
    outs, lses = torch.randn(256, 2, 5, 3, 16), torch.randn(256, 2, 5, 3)
    lses[7] = float("-inf")
    lses[:, 1, 2] = float("-inf")
    expected, expected_lse = merge_parts(outs, lses)
    out, lse = broadhead.flash_attn_combine(outs, lses)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert launches == [128, 128, 2]
    given = torch.empty(2, 5, 3, 16, dtype=torch.bfloat16)
    assert broadhead.flash_attn_combine(outs[:129], lses[:129], given)[0] is given
    torch.testing.assert_close(given, merge_parts(outs[:129], lses[:129])[0].bfloat16())


def test_an_append_operator_says_so(on_cuda: None) -> None:
    """Through the operator nothing has looked at the append before."""
    cache, new, lengths = torch.zeros(2, 8, 2, 16), torch.randn(2, 1, 2, 16), torch.zeros(2, dtype=torch.int32)
    arguments = (cache, cache.clone(), new, new, lengths, None, None, None, None, None, None, False)
    with pytest.warns(broadhead.FallbackWarning, match="append_kv: .*the append kernel does not take this call"):
        torch.ops.broadhead.append_kv(*arguments)


# --- BROADHEAD_STRICT ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "0", "false", "off", "no", "False", "OFF", " no "])
def test_values_that_are_not_strict(value: str, on_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROADHEAD_STRICT", value)
    assert not fallback_notice.is_strict()
    with pytest.warns(broadhead.FallbackWarning):
        merge_two()


@pytest.mark.parametrize("value", ["1", "true", "on", "yes", "TRUE", "Yes"])
def test_values_that_are_strict(value: str, on_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROADHEAD_STRICT", value)
    with pytest.raises(broadhead.UnsupportedError):
        merge_two()


@pytest.mark.parametrize("value", ["2", "ture", "strict", "-1"])
def test_other_values_are_refused_by_name(value: str, on_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROADHEAD_STRICT", value)
    with pytest.raises(broadhead.InvalidArgumentError, match=f"BROADHEAD_STRICT must be 1, true.*got '{value}'"):
        merge_two()


# --- many shapes -----------------------------------------------------------------------------------------------------


def shape(index: int) -> Any:
    return problem(seqlen_q=1 + index % 977, seqlen_k=100 + index, batch=1 + index % 7)


def test_plans_of_many_shapes_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held after more shapes than are kept: so much at most after any number of them."""
    forget_plans(monkeypatch)
    here, build, most = h200(), FULL, 5000
    first = resolve(shape(0), here, build)
    assert resolve(shape(0), here, build) is first
    tracemalloc.start()
    try:
        for i in range(most):
            resolve(shape(i), here, build)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert resolve(shape(0), here, build) is not first, "older plans are dropped"
    assert peak < 16 << 20, f"{peak >> 20} MiB for {most} shapes"


def test_a_new_shape_is_decided_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    here, build = h200(), FULL
    times = []
    for turn in range(5):
        forget_plans(monkeypatch)
        shapes = [shape(i + 1000 * turn) for i in range(500)]
        start = time.process_time()
        for each in shapes:
            resolve(each, here, build)
        times.append((time.process_time() - start) / len(shapes))
    assert min(times) < 0.4e-3, f"{1e3 * min(times):.2f} ms a new shape"


def test_reasons_of_one_kind_are_told_once(on_cuda: None) -> None:
    """Strides, sizes and head dims differ from call to call; the kind of reason does not."""
    cuda = torch.device("cuda", 0)
    kinds = {
        "strides": lambda i: {"obstacles": (f"the strides of q, ({i}, {i + 1}, 1), are not multiples of 8 elements",)},
        "head_dim": lambda i: {"head_dim": 520 + 8 * i},
        "head_dim_v": lambda i: {"head_dim_v": 520 + 8 * i},
        "dtype": lambda i: {"dtype": "fp32", "seqlen_k": i},
        "build": lambda i: {"seqlen_k": i},
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(1, 400):
            for changes in kinds.values():
                choice.select("mha_fwd", problem(**changes(i)), cuda, None)
    told = [str(warning.message) for warning in caught]
    assert len(told) == len(kinds), told


def test_kinds_keep_names_apart() -> None:
    kind = fallback_notice.kind_of
    assert kind("head_dim 520 exceeds 512") == kind("head_dim 1024 exceeds 512")
    assert kind("it has strides (64, 8, 1)") == kind("it has strides (1,)")
    assert kind("driver serves 12.4") == kind("driver serves 11.8")
    for a, b in (("takes bf16", "takes fp16"), ("kernel sm80_fwd_d64", "kernel sm80_fwd_d128"), ("fp32", "fp64")):
        assert kind(a) != kind(b)


def test_the_kinds_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback_notice, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(2000):
            for _ in range(2):
                fallback_notice.warn_fallback("f", "a device", f"library_{i}x did not load")
        assert len(caught) == 2000, "each is told once while it is remembered"
        fallback_notice.warn_fallback("f", "a device", "library_0x did not load")
    assert len(caught) == 2001, "the oldest was forgotten"


def test_a_plan_keeps_no_text_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_plans(monkeypatch)
    first, second = (resolve(problem(seqlen_k=size), h200(), FULL) for size in (777, 778))
    assert first.reason is second.reason
    texts = [field for field in first if isinstance(field, (str, tuple)) and not hasattr(field, "_fields")]
    assert texts == [first.reason]
    assert len(dispatch.refusals(problem(), h200(), NO_KERNELS)) == len(dispatch.ROWS), "made when they are asked for"
