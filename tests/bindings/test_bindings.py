"""The compiled module without a GPU: what it packs, by a stub kernel library, and what it refuses."""

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
from broadhead.errors import KernelError

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
INT = "torch.int32"
FP8 = "torch.float8_e4m3fn"
F32 = "torch.float32"
ARGUMENTS = {arguments!r}

# What tensors without the exchange API are read by.
stream = types.SimpleNamespace(cuda_stream=CURRENT_STREAM)
sys.modules["torch"] = types.SimpleNamespace(
    float32=F32, cuda=types.SimpleNamespace(current_stream=lambda device: stream))

class Hooks:
    # What the module needs of Python, noting what was called.
    def __init__(self):
        self.records, self.identities, self.devices, self.grad = {{}}, [], [0], False
        self.last = None
        self.modes, self.forward_ad, self.written = 0, {{"_current_level": -1}}, []
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
    def increment_version(self, tensors):
        self.written += [tensor.data_ptr() for tensor in tensors]

def connect(**changes):
    names = ("records", "check_identity", "exchange_device", "is_grad_enabled", "is_plain_type", "is_negative",
             "count_modes", "forward_ad", "increment_version")
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

def make_launch(T, **changes):
    # Tensors that a call does not bring are those of `out` and `lse`.
    a = dict(
        family="sm80", kernel_id="sm80_fwd_d64_bf16", device=0, out=T(4 << 12, (2, 3, 4, 32)),
        lse=T(5 << 12, (2, 4, 3), F32), identity=("made for", 3), dispatch=("cuda", "row", "why"),
        seqlen_q=3, seqlen_k=112, window_left=7, window_right=0, attention_chunk=9, softmax_scale=0.125, softcap=30.0,
        num_splits=6, pack_gqa=1, metadata_tag=77, heads_per_section=2, max_blocks=5, cell_blocks=0)
    assert not set(changes) - set(a), changes
    a.update(changes)
    out, lse = a["out"], a["lse"]
    a.update(out=(lambda q: out, None, None), lse=(lambda shape, dtype: lse, ((2, 4, 3),), dict(dtype=F32)))
    return _C.Launch(**a)

def call(T, need_lse=True, **changes):
    # The first call of its kind; `num_splits`, `softcap` and `attention_chunk` are those of the launch.
    own = {name: changes.pop(name) for name in list(changes) if name not in ARGUMENTS or name in LAUNCH}
    _C.run_new(make_launch(T, **own), "f", need_lse, arguments(T, **changes))
    return last_call(library)

LAUNCH = ("num_splits", "softcap", "attention_chunk")
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
        host=str(TESTS / "bindings"),
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


@pytest.mark.parametrize("kind", ["AttributeTensor", "ExchangeTensor"])
def test_forward_packs_every_argument(stub: Path, kind: str) -> None:
    run(
        stub,
        f"""
got = call({kind}, cell_blocks=11)
pages = dict(q=1, k=2, v=3, out=4, softmax_lse=5, out_partial=6, seqused_k=8, leftpad_k=9,
             kv_batch_idx=10, page_table=11, prefix_lens=12, sinks=13, scheduler_metadata=14)
expected = {{name: page << 12 for name, page in pages.items()}} | dict(
    index=0, stream=CURRENT_STREAM, struct_size_fits=1, lse_partial=0,
    cu_seqlens_q=0, cu_seqlens_k=0, seqused_q=0,
    lse_batch_stride=12, lse_head_stride=3,
    q_strides="768,256,64", k_strides="2048,128,64", v_strides="4096,128,64", out_strides="384,128,32",
    page_table_batch_stride=9, batch=2, seqlen_q=3, seqlen_k=112, total_q=6, num_heads_q=4, num_heads_kv=2, head_dim=64,
    head_dim_v=32, page_size=16, window_left=7, window_right=0, attention_chunk=9, sinks_are_fp32=1, num_splits=6,
    pack_gqa=1, metadata_tag=77, heads_per_section=2, softmax_scale=0.125, softcap=30, tile_counter=0,
    max_blocks=5, cell_blocks=11, q_dtype=1, workspace_bytes=6 * 4 * 6 * 33 * 4,
    total_k=0, num_pages=5, num_kv_batches=2,
    qv=0, qv_strides="0,0,0", q_descale=0, k_descale=0, v_descale=0, q_descale_strides="0,0", k_descale_strides="0,0",
    v_descale_strides="0,0", shared_page_table=0, shared_seqlen_k=0)
assert got == {{name: str(value) for name, value in expected.items()}}, got
""",
    )


def test_forward_packs_packed_sequences(stub: Path) -> None:
    run(
        stub,
        """
T = ExchangeTensor
F16 = "torch.float16"
got = call(T, kernel_id="counting", q=T(4096, (9, 4, 64), F16), k=T(8192, (11, 2, 64), F16),
           v=T(12288, (11, 2, 64), F16), out=T(16384, (9, 4, 64), F16),
           lse=T(20480, (4, 9), F32), cu_seqlens_q=T(24576, (3,), INT), cu_seqlens_k=T(28672, (3,), INT),
           page_table=None, kv_batch_idx=None, leftpad_k=None, num_splits=1,
           sinks=T(32768, (4,), F16))
wanted = dict(index=1, q_dtype=2, workspace_bytes=4, tile_counter=0,
              batch=2, total_q=9, page_size=0, q_strides="0,256,64", k_strides="0,128,64", lse_head_stride=9,
              lse_batch_stride=0, cu_seqlens_q=24576, cu_seqlens_k=28672, sinks_are_fp32=0,
              out_partial=SCRATCH, page_table=0, total_k=11, num_pages=0, num_kv_batches=0)
assert {name: got[name] for name in wanted} == {name: str(value) for name, value in wanted.items()}, got
# A dense cache of more rows than the call has sequences.
got = call(T, page_table=None, k=T(8192, (5, 112, 2, 64)), v=T(12288, (5, 112, 2, 32)))
assert (got["total_k"], got["num_pages"], got["num_kv_batches"], got["page_size"]) == ("0", "0", "5", "0"), got
""",
    )


@pytest.mark.parametrize("kind", ["AttributeTensor", "ExchangeTensor"])
def test_forward_packs_8_bit_tensors_and_qv(stub: Path, kind: str) -> None:
    run(
        stub,
        f"""
T = {kind}
fp8 = dict(kernel_id="prefill_8_bit", q=T(1 << 12, (2, 3, 4, 64), FP8), k=T(2 << 12, (5, 16, 2, 64), FP8),
           v=T(3 << 12, (5, 16, 2, 32), FP8), qv=T(4 << 12, (2, 3, 4, 32), FP8, strides=(1024, 256, 64, 1)),
           q_descale=T(5 << 12, (2, 2), F32), k_descale=T(6 << 12, (2, 2), F32, strides=(0, 0)),
           v_descale=T(7 << 12, (2, 2), F32, strides=(1, 2)))
got = call(T, **fp8)
wanted = dict(index=2, q_dtype=3, q=1 << 12, k=2 << 12, v=3 << 12, out=4 << 12, qv=4 << 12, qv_strides="1024,256,64",
              q_descale=5 << 12, k_descale=6 << 12, v_descale=7 << 12, q_descale_strides="2,1",
              k_descale_strides="0,0", v_descale_strides="1,2")
assert {{name: got[name] for name in wanted}} == {{name: str(value) for name, value in wanted.items()}}, got
text = error(lambda: call(T, **fp8 | dict(out=T(4 << 12, (2, 3, 4, 32), FP8))))
assert "out must be bf16 tensor" in text and "got float8_e4m3fn (2, 3, 4, 32)" in text, text
text = error(lambda: call(T, **fp8 | dict(q=T(1 << 12, (2, 3, 4, 64)))))
assert "q must be float8_e4m3fn tensor" in text, text
assert call(T, **fp8 | dict(sinks=T(32768, (4,))))["sinks_are_fp32"] == "0"
assert call(T, **fp8 | dict(sinks=T(32768, (4,), F32)))["sinks_are_fp32"] == "1"
text = error(lambda: call(T, **fp8 | dict(sinks=T(32768, (4,), FP8))))
assert "sinks must be one logit for each head of q, fp32 or the dtype of out" in text, text
""",
    )


def test_the_kernel_is_asked_for_its_workspace(stub: Path) -> None:
    """Once a kind of call, with all that was packed; the launcher lays it out."""
    run(
        stub,
        """
T = ExchangeTensor
room = 6 * 4 * 6 * (32 + 1)
got = call(T)
assert got["out_partial"] == str(SCRATCH) and got["workspace_bytes"] == str(4 * room), got
assert got["lse_partial"] == got["tile_counter"] == "0", got
got = call(T, num_splits=1)
assert got["out_partial"] == got["workspace_bytes"] == "0", got
assert scratch_sizes == freed == [room]
# Where the exchange API fails, torch is asked, which raises its own exception if it must.
got = call(T, kernel_id="decode_bf16", max_blocks=9999)
assert got["out_partial"] == str(SCRATCH) and got["workspace_bytes"] == "39996", got
assert scratch_sizes[1:] == [9999] and len(freed) == 1
""",
    )


def test_an_lse_that_is_not_wanted_and_a_long_bound(stub: Path) -> None:
    run(
        stub,
        """
T = ExchangeTensor
assert call(T, need_lse=False)["softmax_lse"] == "0"
# A packed call is no longer than all its rows, whatever bound it gives.
got = call(T, need_lse=False, q=T(4096, (9, 4, 64)), out=T(16384, (9, 4, 32)), cu_seqlens_q=T(24576, (3,), INT),
           num_splits=1, seqlen_q=(1 << 31) - 1)
assert got["seqlen_q"] == "9", got
""",
    )


def test_arguments_come_in_the_order_of_attention_args(stub: Path) -> None:
    run(
        stub,
        """
values = ("max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal", "window_size", "attention_chunk", "softcap",
          "num_splits", "pack_gqa", "sm_margin", "backend", "tokens_per_split")
for name in ARGUMENTS:
    changed = arguments(ExchangeTensor, **{name: "no tensor"})
    if name in values:
        _C.run_new(make_launch(ExchangeTensor), "f", True, changed)
    else:
        text = error(lambda: _C.run_new(make_launch(ExchangeTensor), "f", True, changed))
        assert text == f"_C.forward: {name} must be a tensor or None, got str", text
""",
    )


def test_signature_tells_calls_apart(stub: Path) -> None:
    run(
        stub,
        """
T = ExchangeTensor
base = [T(4096, (2, 3)), None, T(4096, (5,), INT)]
others = [
    [T(4104, (2, 3)), None, T(4096, (5,), INT)],  # alignment
    [T(4096, (3, 2)), None, T(4096, (5,), INT)],
    [T(4096, (2, 3), strides=(4, 1)), None, T(4096, (5,), INT)],
    [T(4096, (2, 3), "torch.float16"), None, T(4096, (5,), INT)],
    [T(4096, (2, 3), device=1), None, T(4096, (5,), INT)],
    [T(4096, (2, 3)), T(4096, (5,), INT), None],
]
seen = [_C.signature(*x) for x in (base, *others)]
assert all(isinstance(x, bytes) for x in seen) and len(set(seen)) == len(seen), seen
assert _C.signature(T(8192, (2, 3)), None, T(8192, (5,), INT)) == seen[0]
assert _C.signature(AttributeTensor(8192, (2, 3)), None, AttributeTensor(8192, (5,), INT)) == seen[0]
assert _C.signature(T(4096, (2, 3), "torch.int64")) is None, "not told from other dtypes"
assert _C.signature(7) is None and _C.signature(T(4096, (1,) * 7)) is None
""",
    )


def test_current_stream_of_the_tensors_device(stub: Path) -> None:
    run(
        stub,
        """
T = lambda *a, **k: ExchangeTensor(*a, device=3, **k)
assert call(T, device=3)["stream"] == str(CURRENT_STREAM + 3)
""",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ('q=T(4096, (2, 3, 4, 64), "torch.float16")', ["q must be", "bf16", "got fp16 (2, 3, 4, 64) on cuda:0"]),
        ("k=T(4096, (5, 16, 2, 64), is_cuda=False)", ["k must be", "CUDA device"]),
        ("v=T(4096, (5, 16, 2, 32), strides=(2048, 64, 1, 32))", ["v must be", "contiguous"]),
        ("out=T(4096, (2, 3, 4, 32), device=1)", ["out must be", "device of q", "cuda:1"]),
        ('seqused_k=T(4096, (2,), "torch.int64")', ["seqused_k must be", "int32"]),
        ("seqused_k=T(4096, (1,), INT)", ["seqused_k must", "at least 2"]),
        ("page_table=None, k=T(4096, (9, 2, 64))", ["k must be [batch, tokens, heads, head_dim] without cu_seqlens_k"]),
        ("cu_seqlens_q=T(4096, (3,), INT)", ["cu_seqlens_q must be given exactly when q has 3"]),
        ("scheduler_metadata=T(4096, (16,), INT)", ["scheduler_metadata must be", "(16)"]),
        ("lse=T(4096, (2, 4, 3))", ["softmax_lse must be fp32 tensor"]),
        ("k=T(4096, (5, 16, 3, 64))", ["k must be", "divides"]),
        ("sinks=T(4096, (3,), F32)", ["sinks must be"]),
        ("qv=T(4096, (2, 3, 4, 64))", ["qv must be of the shape of q with head_dim_v", "(2, 3, 4, 64)"]),
        ("qv=T(4096, (2, 3, 4, 32), device=1)", ["qv must be", "on its device", "cuda:1"]),
        ("qv=T(4096, (2, 3, 4, 32), F32)", ["qv must be bf16 tensor", "got fp32"]),
        ("q_descale=T(4096, (2, 4), F32)", ["q_descale must be [batch, heads of k]", "(2, 4)"]),
        ("k_descale=T(4096, (2,), F32)", ["k_descale must be fp32 tensor of 2 dimensions"]),
        ("v_descale=T(4096, (2, 2))", ["v_descale must be fp32 tensor", "got bf16"]),
        ("q=None", ["q must be a tensor, got None"]),
        ("q=7", ["q must be a tensor", "int"]),
        ("q=T(4096, (1,) * 7)", ["a tensor has 7 dimensions"]),
        ("softcap=-1.0", ["sm80_fwd_d64_bf16: launch: the stub was asked to fail"]),
        ('kernel_id="sm80_fwd_d128_bf16"', ["sm80_fwd_d128_bf16", "built without this kernel", "80;90"]),
        ('kernel_id="backward_bf16"', ["backward_bf16: a forward call was given a kernel of the other direction"]),
        (
            'family="sm90", kernel_id="sm90_fwd_d128_bf16"',
            ["sm90_fwd_d128_bf16", "libbroadhead_sm90.so", "BROADHEAD_CUDA_ARCHS"],
        ),
    ],
)
@pytest.mark.parametrize("kind", ["AttributeTensor", "ExchangeTensor"])
def test_forward_refuses(stub: Path, kind: str, changes: str, words: list[str]) -> None:
    text = run(stub, f"T = {kind}\nprint(error(lambda: call(T, {changes})))")
    if "sm90" not in changes and "CUDA device" not in words:
        assert all(word in text for word in words), text
    else:
        assert all(word.lower() in text.lower() for word in words), text


def test_scheduler_metadata(stub: Path) -> None:
    run(
        stub,
        """
T = ExchangeTensor
_C.scheduler_metadata(T(4096, (33,), INT), T(8192, (5,), INT), None, T(12288, (5,), INT), T(16384, (6,), INT), None,
                      5, 1, 64, 2, 3, 0, 4, 8, 6, 16, 128, 7, 132, 99, -1)
got = last_call(library)
wanted = dict(metadata=4096, seqused_k=8192, cu_seqlens_k=0, leftpad_k=12288, cu_seqlens_q=16384, seqused_q=0, batch=5,
              seqlen_q=1, seqlen_k=64, seqlen_k_new=2, window_left=3, window_right=0, attention_chunk=4,
              rows_per_token=8, heads_in_grid=6, tile_m=16, tile_n=128, num_splits=7, target_ctas=132, metadata_tag=99,
              stream=CURRENT_STREAM, struct_size_fits=1)
assert got == {name: str(value) for name, value in wanted.items()}, got
rest = (1, 64, 2, 3, 0, 4, 8, 6, 16, 128, 7, 132, 99, -1)
none = (None,) * 4
assert "metadata must be" in error(_C.scheduler_metadata, T(4096, (32,), INT), None, *none, 5, *rest)
assert "seqused_k must" in error(_C.scheduler_metadata, T(4096, (33,), INT), T(1, (4,), INT), *none, 5, *rest)
""",
    )


def test_combine(stub: Path) -> None:
    run(
        stub,
        """
T = ExchangeTensor
partial, lse = T(4096, (3, 7, 4, 32), F32), T(8192, (3, 7, 4), F32, strides=(28, 1, 7))
_C.combine(partial, lse, T(12288, (7, 4, 32), "torch.float16"), T(16384, (7, 4), F32, strides=(1, 7)), 5)
got = last_call(library)
wanted = dict(out_partial=4096, lse_partial=8192, out=12288, softmax_lse=16384, out_partial_split_stride=896,
              out_partial_row_stride=128, out_partial_head_stride=32, lse_partial_split_stride=28,
              lse_partial_row_stride=1, lse_partial_head_stride=7, out_row_stride=128, out_head_stride=32,
              lse_row_stride=1, lse_head_stride=7,
              rows=7, heads=4, head_dim_v=32, num_splits=3, out_dtype=2, stream=5, struct_size_fits=1)
assert got == {name: str(value) for name, value in wanted.items()}, got
assert "out must be" in error(_C.combine, partial, lse, T(12288, (7, 5, 32)), None, 5)
assert "out must be" in error(_C.combine, partial, lse, T(12288, (7, 4, 32), INT), None, 5)
""",
    )


def test_argument_count_and_types(stub: Path) -> None:
    run(
        stub,
        """
for function, given, words in ((_C.run_known, (), "takes 3 positional"), (_C.combine, (1,), "takes 5 positional"),
                               (_C.run_known, ("f", True, (1,)), "a tuple of 30"), (_C.combine, (1,) * 5, "")):
    try:
        function(*given)
    except (TypeError, KernelError) as exception:
        assert words in str(exception), exception
    else:
        raise AssertionError(given)
try:
    make_launch(ExchangeTensor, window_left=1 << 40)
except TypeError as exception:
    assert "window_left" in str(exception), exception
""",
    )


def test_a_torch_tensor_is_read() -> None:
    """Also one that requires grad, and a non-contiguous one: only the device is refused."""
    import torch
    from broadhead import _C

    partial = torch.zeros(2, 3, 4, 8, requires_grad=True)
    with pytest.raises(KernelError, match=r"out_partial .* got fp32 \(2, 3, 4, 8\) on a device that is not CUDA"):
        _C.combine(partial, partial[..., 0], partial[0], None, 0)
    with pytest.raises(KernelError, match=r"got float8_e4m3fn \(2, 8\)"):
        _C.combine(torch.zeros(2, 8).to(torch.float8_e4m3fn), partial, partial, None, 0)
    with pytest.raises(KernelError, match=r"got fp32 \(3, 2, 4, 8\)"):
        _C.combine(torch.nn.Parameter(partial.detach().transpose(0, 1)), partial, partial, None, 0)
