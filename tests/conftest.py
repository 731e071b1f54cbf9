"""Shared pytest set-up: markers, printed seeds, the strict backend for GPU tests and the `row_ran` assertion."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import zlib
from collections.abc import Callable, Generator, Iterator

import broadhead
import pytest
import torch
from broadhead import support
from broadhead.call.problem import DTYPE_NAMES
from broadhead.plan import dispatch as dispatch_module
from described import hand_in_costs
from on_device import Dispatches

#: One process of many: each takes a GPU of its own among this many, before CUDA is asked for anything.
GPUS = int(os.environ.get("BROADHEAD_TEST_GPUS", "1"))
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if GPUS > 1 and WORKER.startswith("gw"):
    os.environ["CUDA_VISIBLE_DEVICES"] = str(int(WORKER[2:]) % GPUS)

SEED_VARIABLE = "BROADHEAD_TEST_SEED"
#: "3/8" runs the fourth eighth of the tests: for runs side by side where workers are not wanted, as in a sanitizer.
SHARD_VARIABLE = "BROADHEAD_TEST_SHARD"
#: Set to 1 where the packages of the demo extra must be there (CI): without it their tests skip when one is missing.
DEMO_VARIABLE = "BROADHEAD_TEST_REQUIRES_DEMO"
DEMO_PACKAGES = ("transformers", "gguf", "typer")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers and fix the session's seed (worker processes inherit it through the environment)."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped with a reason where there is none")
    config.addinivalue_line(
        "markers",
        "attends(*directions): attention on any device; with a GPU a gpu test, on kernels of these directions",
    )
    config.addinivalue_line("markers", "full: the long GPU set, on top of the curated one")
    config.addinivalue_line("markers", "curated: the few small GPU cases that also run under compute-sanitizer")
    os.environ.setdefault(SEED_VARIABLE, str(random.SystemRandom().randrange(2**31)))
    missing = [name for name in DEMO_PACKAGES if importlib.util.find_spec(name) is None]
    if missing and os.environ.get(DEMO_VARIABLE) == "1":
        raise pytest.UsageError(f"{DEMO_VARIABLE}=1, and not installed: {', '.join(missing)}; pip install '.[demo]'")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Print what is needed to repeat this run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device: gpu tests are skipped"
    return [
        f"broadhead {broadhead.__version__}, torch {torch.__version__}, {device}",
        f"seed: {SEED_VARIABLE}={os.environ[SEED_VARIABLE]} (inputs are fresh in every run; set it to repeat this one)",
    ]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one shard if one is asked for. Skip the GPU tests where no device is visible; a device with no working
    kernels fails them: it never skips. With a device, tests that attend are GPU tests, before -m chooses."""
    shard = os.environ.get(SHARD_VARIABLE)
    if shard:
        index, count = map(int, shard.split("/"))
        assert 0 <= index < count, f"{SHARD_VARIABLE}={shard} must be index/count, index from 0"
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != index])
        items[:] = items[index::count]
    if torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("attends"):
                item.add_marker(pytest.mark.gpu)
        return
    reason = pytest.mark.skip(reason="torch.cuda.is_available() is False: this test needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(reason)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """With a GPU, a test that attends fails unless kernels ran all of its attention."""
    mark = pyfuncitem.get_closest_marker("attends")
    if mark is None or not torch.cuda.is_available():
        return (yield)
    with Dispatches() as ran:
        result = yield
    ran.check(*mark.args)
    return result


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Add the seed of a failed test to its report."""
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        report.sections.append(("seed", f"{SEED_VARIABLE}={os.environ[SEED_VARIABLE]} pytest '{item.nodeid}'"))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """This test's own seed: of the session's seed and the test's name, so that a test repeats alone as in the suite."""
    return zlib.crc32(f"{os.environ[SEED_VARIABLE]} {request.node.nodeid}".encode())


@pytest.fixture(autouse=True)
def _seed_generators(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _strict_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU tests raise instead of falling back: the torch fallback can never look like a pass of a kernel."""
    if request.node.get_closest_marker("gpu"):
        monkeypatch.setenv("BROADHEAD_STRICT", "1")


@pytest.fixture
def first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are chosen by the table alone, whatever was measured: nobody knows what a kernel costs."""
    hand_in_costs(monkeypatch, {})


@pytest.fixture
def rng(seed: int) -> random.Random:
    """A generator for shapes and flags, independent of torch's."""
    return random.Random(seed)


@pytest.fixture
def cpu() -> torch.device:
    return torch.device("cpu")


@pytest.fixture
def cuda() -> torch.device:
    """The device of GPU tests."""
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is False: this test needs a CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def row_ran() -> Callable[..., support.KernelRow]:
    """`row_ran(phase=None, dtype=None, head_dim=None, head_dim_v=None)`: the row of the last call, or failure.

    Asserts that the CUDA backend ran, that the row is in the table and that it fits what was asked. With `head_dim`
    (`head_dim_v` is the same unless given) also that no tighter row of its family could run, and that a kernel written
    for this very device was preferred to a portable one. Where a row takes less time than the first one, phase and
    preference are those of the first; tests that are about kernels of a phase use `first_rows`.
    """

    def check(
        phase: str | None = None,
        dtype: torch.dtype | None = None,
        head_dim: int | None = None,
        head_dim_v: int | None = None,
    ) -> support.KernelRow:
        backend, row_id, reason = broadhead.last_dispatch()
        assert backend == "cuda", f"the {backend} backend ran ({reason}); a kernel was asked for"
        rows = {row.id: row for row in dispatch_module.ROWS}
        assert row_id in rows, f"{row_id!r} ran, which is no row of the table"
        row = rows[row_id]
        slower = re.search(r": takes less time than (\w+), the first ", reason)
        first = rows[slower[1]] if slower else row
        if phase is not None:
            assert first.phase == phase, f"{row_id} ran: phase {first.phase}, expected {phase} ({reason})"
        if dtype is not None:
            assert row.dtype == DTYPE_NAMES[dtype], f"{row_id} ran for {dtype}"
        if head_dim is not None:
            dim_v = head_dim if head_dim_v is None else head_dim_v
            assert row.head_dim >= head_dim and row.head_dim_v >= dim_v, f"{row_id} ran for {head_dim}, {dim_v}"
            check_choice(first, head_dim, dim_v)
        return row

    return check


def check_choice(row: support.KernelRow, head_dim: int, head_dim_v: int) -> None:
    """No other row was the better choice for these head dims on the current device."""
    asked = f"head_dim {head_dim}, head_dim_v {head_dim_v}"
    assert row.head_dim >= head_dim and row.head_dim_v >= head_dim_v, f"{row.id} ran for {asked}"
    capability = torch.cuda.get_device_capability()
    able = [
        other
        for other in dispatch_module.ROWS
        if (other.direction, other.phase) == (row.direction, row.phase)
        and (other.dtype, other.kv_dtype) == (row.dtype, row.kv_dtype)
        and other.head_dim >= head_dim
        and other.head_dim_v >= head_dim_v
        and capability in other.capabilities
        and set(other.features) >= set(row.features)
        and set(other.requires) <= set(row.requires)
    ]
    size = (row.head_dim, row.head_dim_v)
    tighter = [
        other.id
        for other in able
        if other.family == row.family
        and (other.head_dim, other.head_dim_v) != size
        and other.head_dim <= row.head_dim
        and other.head_dim_v <= row.head_dim_v
    ]
    assert not tighter, f"{row.id} ran for {asked}; tighter: {tighter}"
    own = [other.id for other in able if len(other.capabilities) == 1]
    assert row.id in own or not own, f"the portable {row.id} ran for {asked}; written for this device: {own}"
