"""Runs code over the compiled module and a stub kernel library, each time in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import broadhead
import pytest
from broadhead.call.arguments import AttentionArgs

TESTS = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("broadhead._C") is None, reason="broadhead was installed without _C"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: set CXX or install g++"),
]
# The package without its __init__, which would import torch: half a second in each of these processes.
PROLOGUE = """
import sys, types
sys.path.insert(0, {host!r})
sys.modules["broadhead"] = types.ModuleType("broadhead")
sys.modules["broadhead"].__path__ = {package!r}
from pathlib import Path
from broadhead import _C
from broadhead.errors import KernelError
from stub_tensor import CURRENT_STREAM, SCRATCH, AttributeTensor, ExchangeTensor, freed, last_call, scratch_sizes
library = Path({directory!r}) / "libbroadhead_sm80.so"
NEW = 1 << 24  # where empty_like puts its tensors
INT = "torch.int32"
FP8 = "torch.float8_e4m3fn"
F32 = "torch.float32"
ARGUMENTS = {arguments!r}

# What tensors without the exchange API are read by.
stream = types.SimpleNamespace(cuda_stream=CURRENT_STREAM)
sys.modules["torch"] = types.SimpleNamespace(
    float32=F32, cuda=types.SimpleNamespace(current_stream=lambda device: stream))

class Dtype:
    # As torch.dtype: each is one object for the life of the process.
    pass

class Hooks:
    # What the module needs of Python, noting what was called.
    def __init__(self):
        self.records, self.identities, self.devices, self.grad = {{}}, [], [0], False
        self.last = None
        self.modes, self.forward_ad, self.written = 0, {{"_current_level": -1}}, []
        self.made, self.append, self.dtype, self.remembered = [], None, Dtype, []
    def check_identity(self, function, metadata, *identity):
        self.identities.append((function, metadata, *identity))
        return self.records[metadata.data_ptr()]
    def exchange_device(self, device):
        self.devices.append(device)
        return self.devices[-2]
    def is_grad_enabled(self):
        return self.grad
    def is_plain_type(self, kind):
        return kind in (AttributeTensor, ExchangeTensor)
    def is_negative(self, tensor):
        return getattr(tensor, "is_negative", False)
    def count_modes(self):
        return self.modes
    def empty_like(self, tensor):
        address = NEW + (len(self.made) << 12)
        made = type(tensor)(address, tensor.shape, tensor.dtype, tensor.stride(), tensor.device.index)
        self.made.append(made)
        return made
    def remember_metadata(self, buffer, made_for):
        self.remembered.append((buffer.data_ptr(), made_for))
    def increment_version(self, tensors):
        self.written += [tensor.data_ptr() for tensor in tensors]

def connect(**changes):
    names = ("records", "check_identity", "exchange_device", "is_grad_enabled", "is_plain_type", "is_negative",
             "count_modes", "forward_ad", "increment_version", "empty_like", "dtype", "remember_metadata")
    _C.connect(**(dict(state=hooks, restore_device=hooks.exchange_device) | {{n: getattr(hooks, n) for n in names}}
                  | changes))

hooks = Hooks()
connect()

def error(function, *arguments):
    try:
        function(*arguments)
    except KernelError as exception:
        return str(exception)
    raise AssertionError("no KernelError")
"""
CALL = """
def arguments(T, **changes):
    # 2 sequences, 3 queries, 4 heads over 2 KV heads, head_dim 64, head_dim_v 32, 5 pages of 16 tokens.
    a = dict.fromkeys(ARGUMENTS) | dict(
        q=T(1 << 12, (2, 3, 4, 64)), k=T(2 << 12, (5, 16, 2, 64)),
        v=T(3 << 12, (5, 16, 2, 32), strides=(4096, 128, 64, 1)), out=T(4 << 12, (2, 3, 4, 32)),
        seqused_k=T(8 << 12, (2,), INT), leftpad_k=T(9 << 12, (2,), INT), kv_batch_idx=T(10 << 12, (2,), INT),
        page_table=T(11 << 12, (2, 7), INT, strides=(9, 1)), prefix_lens=T(12 << 12, (2,), INT),
        sinks=T(13 << 12, (4,), F32), scheduler_metadata=T(14 << 12, (17,), INT), causal=True, window_size=(7, 0),
        attention_chunk=9, softcap=30.0, num_splits=6, sm_margin=0, tokens_per_split=0)
    assert not set(changes) - set(a), changes
    a.update(changes)
    assert tuple(a) == ARGUMENTS
    return tuple(a.values())

def decision(a):
    # What a CheckedCall and a Plan say, of fields by their names.
    record = lambda *names: types.SimpleNamespace(**{name: a.pop(name) for name in names if name in a})
    problem = record("seqlen_q", "seqlen_k", "window_left", "window_right", "attention_chunk")
    schedule = record("num_splits", "pack_gqa", "heads_per_section", "max_blocks", "cell_blocks")
    row = types.SimpleNamespace(family=a.pop("family"), id=a.pop("kernel_id"))
    plan = types.SimpleNamespace(row=row, schedule=schedule, metadata_tag=a.pop("metadata_tag", None))
    call = types.SimpleNamespace(problem=problem, softmax_scale=a.pop("softmax_scale"), softcap=a.pop("softcap"))
    return dict(call=call, plan=plan)

def make_launch(T, **changes):
    # Tensors that a call does not bring are those of `out` and `lse`.
    a = dict(
        family="sm80", kernel_id="sm80_fwd_d64_bf16", device=0, out=T(4 << 12, (2, 3, 4, 32)),
        lse=T(5 << 12, (2, 4, 3), F32), identity=("made for", 3), dispatch=("cuda", "row", "why"),
        seqlen_q=3, seqlen_k=112, window_left=7, window_right=0, attention_chunk=9, softmax_scale=0.125, softcap=30.0,
        num_splits=6, pack_gqa=True, metadata_tag=77, heads_per_section=2, max_blocks=5, cell_blocks=0)
    assert not set(changes) - set(a), changes
    a.update(changes)
    out, lse = a["out"], a["lse"]
    a.update(out=(lambda q: out, None, None), lse=(lambda shape, dtype: lse, ((2, 4, 3),), dict(dtype=F32)))
    return _C.Launch(**decision(a), **a)

def call(T, need_lse=True, **changes):
    # The first call of its kind; `num_splits`, `softcap` and `attention_chunk` are those of the launch.
    own = {name: changes.pop(name) for name in list(changes) if name not in ARGUMENTS or name in LAUNCH}
    _C.run_new(make_launch(T, **own), "f", need_lse, arguments(T, **changes))
    return last_call(library)

LAUNCH = ("num_splits", "softcap", "attention_chunk")
"""
#: Put in front of code that asks which calls are known.
KNOWN = """
def known(T, need_lse=True, **changes):
    return _C.run_known("known", need_lse, arguments(T, **changes))

def remember(T, launch={}, **changes):
    return _C.run_new(make_launch(T, **launch), "new", True, arguments(T, **changes))
"""


def compile_stub(directory: Path, *options: str, family: str = "sm80") -> None:
    command = [str(COMPILER), "-std=c++17", "-shared", "-fPIC", f"-I{TESTS.parent / 'csrc'}", *options]
    target = directory / f"libbroadhead_{family}.so"
    subprocess.run([*command, str(TESTS / "bindings/stub_library.cpp"), "-o", str(target)], check=True)


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stub")
    compile_stub(directory)
    return directory


def run(directory: Path, code: str) -> str:
    """Runs `code` in a process of its own, as the module keeps the libraries that it opened."""
    prologue = PROLOGUE.format(
        host=str(TESTS / "support"),
        package=list(broadhead.__path__),
        directory=str(directory),
        arguments=AttentionArgs._fields,
    )
    result = subprocess.run(
        [sys.executable, "-c", prologue + CALL + code],
        capture_output=True,
        text=True,
        env={**os.environ, "BROADHEAD_KERNEL_LIB_DIR": str(directory)},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
