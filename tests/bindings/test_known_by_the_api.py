"""Which calls of the public functions are decided once, on a CPU that passes for an H200 (support/stub_cuda.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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
PROLOGUE = f"""
import sys
sys.path.insert(0, {str(TESTS / "support")!r})
from pathlib import Path
import broadhead, stub_cuda, torch
from broadhead.call.validation import clamped
stub_cuda.install()
directory = Path(sys.argv[1])

def decisions(call):
    stub_cuda.decided.clear()
    with stub_cuda.on_device(), clamped(), torch.no_grad():
        for _ in range(3):
            call()
    return stub_cuda.decided

def refused(call, words):
    stub_cuda.take_launches(directory)
    with stub_cuda.on_device(), clamped(), torch.no_grad():
        try:
            call()
        except broadhead.BroadheadError as error:
            assert words in str(error), error
            return stub_cuda.take_launches(directory)
    raise AssertionError("it ran")

def bf16(*shape):
    return torch.randn(*shape).to(torch.bfloat16)

def int32(*values):
    return torch.tensor(values, dtype=torch.int32)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("table")
    compile_table(directory)
    return directory


def run(library: Path, code: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROLOGUE + code, str(library)],
        capture_output=True,
        text=True,
        env={**os.environ, "BROADHEAD_KERNEL_LIB_DIR": str(library)},
    )
    assert result.returncode == 0, result.stderr


APPEND = """
from broadhead.run.cuda_backend import forget_calls
k_cache, v_cache, table = bf16(8, 16, 2, 64), bf16(8, 16, 2, 64), torch.zeros(2, 4, dtype=torch.int32)
q, new, lengths = bf16(2, 1, 4, 64), bf16(2, 1, 2, 64), int32(30, 50)
def append(**changes):
    return broadhead.mha_fwd(q, k_cache, v_cache, k_new=new, v_new=new, page_table=table, seqused_k=lengths,
                             **changes)
"""
#: Of the other entries of the kernel libraries a call each.
ENTRIES = (
    APPEND
    + """
states = [bf16(5, 4, 32), torch.randn(4, 5), bf16(5, 4, 32), torch.randn(4, 5)]
def merge(**changes):
    return broadhead.merge_attn_states(*states, **changes)
def metadata(**changes):
    return broadhead.get_scheduler_metadata(2, 1, 64, 8, 2, 64, lengths, page_size=16, **changes)
"""
)


def test_an_append_is_decided_once(library: Path) -> None:
    """Also where cu_seqlens_k says the lengths over pages, which no kernel reads."""
    run(
        library,
        APPEND
        + """
for changes in ({}, {"cu_seqlens_k": int32(0, 3, 8)}):
    forget_calls()
    assert decisions(lambda: append(**changes)) == ["run_new", "remember_append"], (changes, stub_cuda.decided)
""",
    )


def test_a_refused_append_launches_nothing(library: Path) -> None:
    run(
        library,
        APPEND
        + """
for wrong, words in ((torch.arange(3.0), "cu_seqlens_k"), (torch.zeros(2, 3, dtype=torch.int32), "cu_seqlens_k")):
    version = k_cache._version
    assert refused(lambda: append(cu_seqlens_k=wrong), words) == []
    assert k_cache._version == version
""",
    )


def test_a_merge_is_decided_once(library: Path) -> None:
    """By the public function and by the operator; a wrong backend is refused also when the merge is known."""
    run(
        library,
        """
states = bf16(5, 4, 32), torch.randn(4, 5), bf16(5, 4, 32), torch.randn(4, 5)
assert decisions(lambda: torch.ops.broadhead.merge_states(*states, None)) == ["run_new_merge"]
assert decisions(lambda: broadhead.merge_attn_states(*states)) == []
for wrong in ("foo", torch.tensor(1), torch.ones(2)):
    assert refused(lambda: broadhead.merge_attn_states(*states, backend=wrong), "backend") == []
""",
    )


def test_metadata_is_decided_once(library: Path) -> None:
    run(
        library,
        ENTRIES
        + """
assert decisions(metadata) == ["run_new_metadata"]
assert decisions(lambda: metadata(out=torch.empty(64, dtype=torch.int32))) == ["run_new_metadata"]
assert decisions(lambda: metadata(window_size=(torch.tensor(3), 0))) == ["run_new_metadata"] * 3
""",
    )


def test_tensors_that_a_transform_does_not_wrap(library: Path) -> None:
    """A frozen branch inside torch.func: what torch makes there has no memory, so the call goes to the operators."""
    run(
        library,
        ENTRIES
        + """
calls = {
    "forward": lambda: broadhead.flash_attn_func(q, q, q, causal=True),
    "append_kv": append,
    "merge_states": merge,
    "scheduler_metadata": metadata,
}
def differentiated(call):
    def loss(x):
        call()
        return x.sum()
    return lambda: torch.func.grad(loss)(torch.ones(3))
for entry, call in calls.items():
    for known in (False, True):
        if known:
            decisions(call)
        stub_cuda.take_launches(directory)
        with stub_cuda.on_device(), clamped():
            assert differentiated(call)().tolist() == [1, 1, 1]
        launches = [launch["entry"] for launch in stub_cuda.take_launches(directory)]
        assert launches.count(entry) == 1, (entry, known, launches)
""",
    )


def test_views_whose_negation_is_pending_reach_no_kernel(library: Path) -> None:
    """Kernels read bytes: they get a copy with the numbers, of a call's first of its kind and of known ones alike."""
    run(
        library,
        ENTRIES
        + """
dense, sinks = [bf16(2, 5, 4, 64) for _ in range(3)], torch.randn(4)
calls = {
    "forward": ([*dense, sinks], lambda q, k, v, sinks: broadhead.flash_attn_func(q, k, v, sinks=sinks)),
    "append": ([q, new], lambda q, new: broadhead.mha_fwd(
        q, k_cache, v_cache, k_new=new, v_new=new, page_table=table, seqused_k=lengths)),
    "merge": (states, broadhead.merge_attn_states),
}
def addresses(call, tensors):
    stub_cuda.take_launches(directory)
    with stub_cuda.on_device(), clamped(), torch.no_grad():
        call(*tensors)
    return {value for launch in stub_cuda.take_launches(directory) for value in launch.values()}
for name, (tensors, call) in calls.items():
    for i, x in enumerate(tensors):
        address = str(x.data_ptr())
        for known in (False, True):
            forget_calls()
            if known:
                assert address in addresses(call, tensors), (name, i)
            given = [*tensors[:i], torch._neg_view(x), *tensors[i + 1:]]
            assert address not in addresses(call, given), (name, i, known)
""",
    )


def test_what_a_kernel_writes_has_another_version(library: Path) -> None:
    """Of every function that writes into a tensor that it was given: the first call of a kind and known ones."""
    run(
        library,
        ENTRIES
        + """
parts, lses, x = torch.randn(3, 2, 5, 4, 32), torch.randn(3, 2, 5, 4), bf16(2, 5, 4, 64)
out, merged, combined = torch.empty_like(x), torch.empty_like(states[0]), bf16(2, 5, 4, 32)
plan = torch.empty(64, dtype=torch.int32)
calls = {
    "forward": ((out,), lambda: broadhead.flash_attn_func(x, x, x, out=out)),
    "append": ((k_cache, v_cache), append),
    "merge": ((merged,), lambda: merge(out=merged)),
    "combine": ((combined,), lambda: broadhead.flash_attn_combine(parts, lses, out=combined)),
    "metadata": ((plan,), lambda: metadata(out=plan)),
}
forget_calls()
for name, (written, call) in calls.items():
    for turn in range(3):
        stub_cuda.take_launches(directory)
        versions = [tensor._version for tensor in written]
        with stub_cuda.on_device(), clamped(), torch.no_grad():
            call()
        assert stub_cuda.take_launches(directory), f"{name}: no kernel ran"
        assert all(a._version > b for a, b in zip(written, versions)), (name, turn)
""",
    )
