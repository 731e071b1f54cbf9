"""Every argument of every public function, down to the parameters that the launcher of a kernel gets.

The tensors are torch's own, on a CPU that passes for an H200 (support/stub_cuda.py tells by what). The kernel library
has the portable rows of the table, and keeps what it is launched with. A call thus goes all the way that it goes on a
GPU. Each argument has a value that no other has: an address, or a number.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from typing import Any

import broadhead
import pytest
import torch
from broadhead.call.arguments import AttentionArgs
from operation_cases import NO_NUMBER, OPERATION_CASES
from route_runner import WAYS, ways_of
from routes import NOT_NULL, OF_KERNELS, differences
from sentinels import CASES
from stub_cuda import compile_table
from stub_process import TESTS
from stub_process import pytestmark as needs_stub

pytestmark = [
    *needs_stub,
    pytest.mark.skipif(
        not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
        reason="this torch tells no device through DLPack's C API",
    ),
]
Observed = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    directory = tmp_path_factory.mktemp("routes")
    compile_table(directory)
    result = subprocess.run(
        [sys.executable, str(TESTS / "support/route_runner.py"), str(directory)],
        capture_output=True,
        text=True,
        env={**os.environ, "BROADHEAD_KERNEL_LIB_DIR": str(directory)},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


ALL_CASES = (*CASES, *OPERATION_CASES)
RUNS = [pytest.param(case, way, id=f"{case}-{way}") for case in ALL_CASES for way in ways_of(case)]
#: Public functions that launch nothing.
LAUNCHES_NOTHING = {
    "_validate_head_dims", "explain", "is_supported", "last_dispatch", "make_query_ranges", "maybe_contiguous",
    "support_matrix",
}  # fmt: skip
FUNCTIONS = sorted(
    name for name in broadhead.__all__ if inspect.isfunction(getattr(broadhead, name)) and name not in LAUNCHES_NOTHING
)


@pytest.mark.parametrize(("case", "way"), RUNS)
def test_every_argument_arrives(observed: Observed, case: Any, way: str) -> None:
    seen = observed[str(case)][way]
    assert "error" not in seen, seen["error"]
    wrong = differences(seen["launches"], seen["routes"])
    assert not wrong, "\n".join([f"{case.function}, {way}:", *wrong])
    on_kernels = {launch["backend"] for launch in seen["launches"] if launch["entry"] != "result"}
    assert on_kernels == {"torch" if way == "reference" else "cuda"}


@pytest.mark.parametrize(("case", "way"), RUNS)
def test_no_argument_arrives_that_is_not_given(observed: Observed, case: Any, way: str) -> None:
    seen = observed[str(case)][way]
    assert "error" not in seen, seen["error"]
    wrong = differences(seen["launches"], seen["absent"])
    assert not wrong, "\n".join([f"{case.function}, {way}:", *wrong])


@pytest.mark.parametrize("way", WAYS)
def test_no_argument_of_the_list_is_left_out(observed: Observed, way: str) -> None:
    """An argument that is new in call/arguments.py needs a case, and a route."""
    routed = set()
    for case in CASES:
        routes = observed[str(case)].get(way, {}).get("routes", {})
        routed |= {name for shown, names in case.make().meant.items() if routes.get(shown) for name in names}
    wanted = set(AttentionArgs._fields) - (OF_KERNELS if way == "reference" else set())
    assert wanted <= routed, wanted - routed


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_argument_of_a_function_is_left_out(observed: Observed, function: str) -> None:
    """A parameter that is new in a public function needs a case, in which it has another value than by default."""
    routed: set[str] = set()
    for case in ALL_CASES:
        if case.function == function:
            given = case.make().given
            routes = observed[str(case)]["eager"]["routes"]
            routed |= {name for name, value in given.items() if routes[name] and not is_default(function, name, value)}
    parameters = set(inspect.signature(getattr(broadhead, function)).parameters)
    assert parameters - routed == NO_NUMBER.get(function, set())


def is_default(function: str, name: str, value: Any) -> bool:
    default = inspect.signature(getattr(broadhead, function)).parameters[name].default
    return not isinstance(value, torch.Tensor) and type(value) is type(default) and value == default


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_no_two_arguments_have_one_value(observed: Observed, case: Any) -> None:
    """Else one of them could stand in the place of the other, and nobody would see it. Flags have but two values."""
    owners: dict[str, set[tuple[str, str]]] = {}
    for argument, routes in observed[str(case)]["eager"]["routes"].items():
        for launch, field, value in routes:
            if value not in ("0", "1", "-1", NOT_NULL):
                owners.setdefault(value, set()).add((argument, f"{launch}.{field}"))
    for value, places in owners.items():
        fields = {place.partition(".")[2] for _, place in places}
        assert len({argument for argument, _ in places}) == 1 or len(fields) == 1, (value, places)
