"""The host side of an append: what is validated and when, who runs it, and the order in which the binding gets it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import broadhead
import pytest
import torch
from broadhead.api import append as append_call
from broadhead.api.append import NewKeys, run_appending
from broadhead.call.arguments import AttentionArgs
from broadhead.errors import FallbackWarning, InvalidArgumentError, InvalidTypeError, UnsupportedError
from broadhead.plan import device, native
from broadhead.plan.native import BuildDescription, FamilyBuild
from broadhead.run import append as append_launch
from broadhead.run import fallback as fallback_notice
from broadhead.run import known
from broadhead.run.append import Append
from recorder import Recorder
from torch import Tensor

FP8 = torch.float8_e4m3fn


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def described(**changes: Any) -> Append:
    """Two sequences of one new key; caches of 9 rows."""
    call = Append(
        k_cache=randn(2, 9, 2, 16), v_cache=randn(2, 9, 2, 24), k_new=randn(2, 1, 2, 16), v_new=randn(2, 1, 2, 24),
        cache_seqlens=int32(3, 4), q=randn(2, 1, 4, 16), rotary_cos=torch.randn(20, 4), rotary_sin=torch.randn(20, 4),
        rotary_seqlens=None, cu_seqlens_q=None, cu_seqlens_k_new=None, page_table=None, cache_batch_idx=None,
        k_descale=None, v_descale=None, rotary_interleaved=True, causal_or_local=False,
    )  # fmt: skip
    return call._replace(**changes)


# --- who runs it -----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_kernel(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """CPU tensors pass for those of a device, and the compiled module keeps what it is given."""
    module = Recorder()
    monkeypatch.setattr(append_launch, "common_kernel_obstacle", lambda device: None)
    monkeypatch.setattr(native, "extension", lambda: module)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # get_device() of a CPU tensor
    return module


def test_arguments_of_the_binding(on_kernel: Recorder) -> None:
    call = described(
        rotary_seqlens=int32(1, 2), page_table=int32(1, 0).view(2, 1), cache_batch_idx=int32(1, 0),
        k_descale=torch.ones(2, 2), v_descale=torch.ones(2, 2), cu_seqlens_q=int32(0, 1, 2),
        cu_seqlens_k_new=int32(0, 1, 2), causal_or_local=True, rotary_interleaved=False,
    )  # fmt: skip
    q, lengths = append_launch.run_append(call)
    (got,) = on_kernel.calls
    for name, value in call._asdict().items():
        assert got.pop(name) is value or name in ("causal_or_local", "rotary_interleaved"), name
    assert got.pop("q_out") is q and got.pop("seqlens_out") is lengths and got == {"stream": -1}
    assert q is not call.q and q.shape == call.q.shape and q.is_contiguous()
    assert lengths.dtype == torch.int32 and lengths.shape == (2,)
    assert fallback_notice.state.append == append_launch.BY_KERNEL


def test_flags_of_the_binding(on_kernel: Recorder) -> None:
    append_launch.run_append(described(causal_or_local=True, rotary_interleaved=False))
    append_launch.run_append(described(causal_or_local=False, rotary_interleaved=True))
    flags = [(got["causal_or_local"], got["rotary_interleaved"]) for got in on_kernel.calls]
    assert flags == [(1, 0), (0, 1)] and all(type(x) is int for pair in flags for x in pair)


def test_without_rotary_no_query_is_given(on_kernel: Recorder) -> None:
    call = described(q=None, rotary_cos=None, rotary_sin=None, cu_seqlens_q=int32(0, 1, 2))
    assert append_launch.run_append(call)[0] is None
    (got,) = on_kernel.calls
    assert all(got[name] is None for name in ("q", "q_out", "rotary_cos", "cu_seqlens_q"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"k_cache": randn(2, 9, 2, 16, dtype=torch.float16)}, "no kernel stores torch.bfloat16 keys in a cache of"),
        ({"k_cache": randn(2, 9, 2, 16, dtype=FP8)}, None),
        ({"k_cache": randn(2, 9, 2, 16, dtype=FP8), "k_new": randn(2, 1, 2, 16, dtype=torch.float32)}, "no kernel"),
        ({"rotary_cos": randn(20, 4), "rotary_sin": randn(20, 4)}, None),
        ({"rotary_cos": randn(20, 4)}, "rotary_sin is torch.float32"),
        ({"rotary_cos": torch.randn(20, 4).double()}, "rotary_cos is torch.float64"),
        ({"rotary_sin": torch.randn(4, 20).T}, "rotary_sin has strides (1, 20)"),
    ],
)
def test_obstacles(on_kernel: Recorder, changes: dict[str, Any], words: str | None) -> None:
    obstacle = append_launch.kernel_obstacle(described(**changes))
    assert obstacle is None if words is None else words in str(obstacle)


def test_obstacles_of_devices_and_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    assert device.common_kernel_obstacle(torch.device("cpu")) == "the tensors are on cpu"
    monkeypatch.setattr(device, "describe", lambda _: device.hypothetical((9, 0)))
    families = {
        "": "this installation holds no kernels",
        "sm90:90a": None,
        "sm80:80 sm90:90a": 'the kernels were built for "80", not for hypothetical GPU (compute capability 9.0',
        "sm80:80;90 sm90:90a": None,
    }
    for text, words in families.items():
        built = tuple(
            FamilyBuild(name, tuple(archs.split(";")), (13, 0), frozenset())
            for name, archs in (pair.split(":") for pair in text.split())
        )
        monkeypatch.setattr(device, "build_description", lambda built=built: BuildDescription(True, built, ()))
        obstacle = device.common_kernel_obstacle(cuda)
        assert obstacle is None if words is None else str(obstacle).startswith(words), text


def test_backend_torch_is_torch(on_kernel: Recorder) -> None:
    call = described()
    before = call.k_cache.clone()
    q, lengths = append_launch.run_append(call, "torch")
    assert not on_kernel.calls and fallback_notice.state.append[0] == "torch"
    assert lengths.tolist() == [4, 5] and not torch.equal(q, call.q) and not torch.equal(call.k_cache, before)


# --- what is validated, and when -------------------------------------------------------------------------------------


@dataclasses.dataclass
class DeviceTensor:
    """What the look-up reads of a CUDA tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    address: int = 4096
    is_cuda: bool = True
    requires_grad: bool = False

    def stride(self) -> tuple[int, ...]:
        return self.shape

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.address


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names what is done with a call; the kernel takes every call, and none is known."""
    calls: list[str] = []

    def validate(function: str, args: AttentionArgs, new: NewKeys) -> bool:
        calls.append("validate")
        return True

    def append(call: Append, backend: str | None) -> tuple[None, str]:
        calls.append(f"append {call.causal_or_local}")
        return None, "lengths"

    def attend(function: str, args: AttentionArgs, need_lse: bool) -> tuple[str, str]:
        assert args.seqused_k == "lengths"
        calls.append("attention")
        return "out", "lse"

    monkeypatch.setattr(known, "run_known_append", lambda *call: None)
    monkeypatch.setattr(append_call, "_validate", validate)
    monkeypatch.setattr(append_call, "kernel_obstacle", lambda call: None)
    monkeypatch.setattr(append_call, "run_append", append)
    monkeypatch.setattr(append_call, "run_forward", attend)
    monkeypatch.setattr(append_call, "remember_append", lambda *call: calls.append("remember"))
    return calls


def on_device(**changes: Any) -> tuple[AttentionArgs, NewKeys]:
    args = AttentionArgs(
        DeviceTensor((2, 1, 4, 16)), DeviceTensor((2, 9, 2, 16)), DeviceTensor((2, 9, 2, 16)),
        seqused_k=DeviceTensor((2,), torch.int32), causal=True, num_splits=3,
    )  # fmt: skip
    new = NewKeys(DeviceTensor((2, 1, 2, 16)), DeviceTensor((2, 1, 2, 16)), None, None, None, None, True)
    mine = {name: value for name, value in changes.items() if name in NewKeys._fields and name not in ("k", "v")}
    return args._replace(**{n: x for n, x in changes.items() if n not in mine}), new._replace(**mine)


@pytest.mark.parametrize("causal", [True, False])
def test_a_call_is_validated_before_it_writes_and_remembered_behind(validated: list[str], causal: bool) -> None:
    assert run_appending("f", *on_device(causal=causal)) == ("out", "lse")
    assert validated == ["validate", f"append {causal}", "attention", "remember"]


def test_a_known_call_is_not_validated(validated: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    args, new = on_device()
    seen: list[Any] = []
    monkeypatch.setattr(known, "run_known_append", lambda *call: seen.append(call) or ("known", "lse"))
    assert run_appending("f", args, new, False) == ("known", "lse")
    assert validated == [] and seen == [("f", False, args, new)]


def test_a_copy_is_looked_up_again(validated: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A call whose tensors are copied first is known by the copies, and returns the out that was given."""
    args, new = on_device(out="given")
    ready = args._replace(num_splits=4)
    monkeypatch.setattr(append_call, "_readable", lambda function, args, new: (ready, new))
    monkeypatch.setattr(known, "run_known_append", lambda name, lse, call, new: ("k", "lse") if call is ready else None)
    assert run_appending("f", args, new) == ("given", "lse") and validated == []


def test_torch_attention_is_not_remembered(validated: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """BROADHEAD_STRICT may be set between two calls: the second must be refused before it writes."""
    monkeypatch.setattr(append_call, "_validate", lambda *arguments: validated.append("torch") or False)
    run_appending("f", *on_device())
    assert validated == ["torch", "append True", "attention"]


@pytest.fixture
def obstructed(validated: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention runs on a kernel, the append before it can not."""
    monkeypatch.setattr(append_call, "kernel_obstacle", lambda call: "rotary_cos is torch.float64")
    monkeypatch.setattr(append_call, "describe", lambda device: device_description)
    monkeypatch.setattr(DeviceTensor, "device", torch.device("cuda", 0), raising=False)
    monkeypatch.setattr(fallback_notice, "_warned", set())


device_description = device.hypothetical((9, 0))


def test_an_append_on_torch_ops_is_no_secret(obstructed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(
        FallbackWarning, match="f: .*the append kernel does not take this call: rotary_cos is torch.float64"
    ):
        run_appending("f", *on_device())
    with pytest.raises(UnsupportedError, match=r"^f: the append kernel does not take this call: rotary_cos is"):
        run_appending("f", *on_device(backend="cuda"))
    monkeypatch.setenv("BROADHEAD_STRICT", "1")
    with pytest.raises(UnsupportedError, match="BROADHEAD_STRICT=1: f: the append kernel"):
        run_appending("f", *on_device())


# --- refusals through the public functions ---------------------------------------------------------------------------


def refuse(error: type[Exception], words: str, call: Callable[..., Any], cache: Tensor, **options: Any) -> None:
    before = cache.clone()
    with pytest.raises(error, match=words):
        call(**options)
    assert torch.equal(cache.view(torch.uint8), before.view(torch.uint8)), "a refused call wrote into the cache"


def test_mha_fwd_refuses_before_it_writes() -> None:
    q, cache, new = torch.randn(2, 1, 4, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 1, 2, 16)
    good = {"q": q, "k": cache, "v": cache, "k_new": new, "v_new": new, "seqused_k": int32(3, 4)}
    for changes, words in (({"softmax_scale": float("nan")}, "softmax_scale"), ({"out": randn(2, 1, 4, 8)}, "out")):
        refuse(broadhead.BroadheadError, f"mha_fwd: .*{words}", broadhead.mha_fwd, cache, **good, **changes)


def test_append_refuses_mixed_dtypes() -> None:
    q, cache = torch.randn(2, 1, 4, 16), torch.randn(2, 9, 2, 16)
    new, angles = torch.randn(2, 1, 2, 16), torch.randn(20, 4)
    function = broadhead.flash_attn_with_kvcache
    good = {"q": q, "k_cache": cache, "v_cache": cache.clone(), "k": new, "v": new, "cache_seqlens": int32(3, 4)}
    fp8 = {"k_cache": cache.to(FP8), "v_cache": cache.to(FP8), "q": q.to(FP8)}
    rotary = {"rotary_cos": angles, "rotary_sin": angles}
    for changes, error, words in (
        ({"k": new.half(), "v": new.half()}, InvalidTypeError, "k must have the dtype of k_cache, torch.float32, got"),
        ({"v": new.half()}, InvalidTypeError, "v must have the dtype of v_cache"),
        ({**fp8, "v": new.to(FP8)}, InvalidTypeError, "v must have the dtype of k, torch.float32"),
        ({**fp8, "k": new.int(), "v": new.int()}, InvalidTypeError, "k must be bf16, fp16"),
        ({**fp8, **rotary}, UnsupportedError, "rotary_cos and rotary_sin turn q and k of one dtype, got q of"),
        ({"k": torch.randn(2, 1, 3, 16)}, InvalidArgumentError, "k must have the heads"),
    ):
        call = {**good, **changes}
        refuse(error, f"flash_attn_with_kvcache: .*{words}", function, call["k_cache"], **call)


def test_wider_keys_reach_an_fp8_cache() -> None:
    """With q of the cache's dtype, as attention takes it; the factors are those of attention."""
    q, cache, new = torch.randn(2, 1, 4, 16).to(FP8), torch.zeros(2, 9, 2, 16).to(FP8), torch.randn(2, 1, 2, 16)
    k_cache, v_cache = cache.clone(), cache.clone()
    factors = {"k_descale": torch.full((2, 2), 0.5), "v_descale": torch.full((2, 2), 0.25)}
    broadhead.flash_attn_with_kvcache(
        q, k_cache, v_cache, new.bfloat16(), new.bfloat16(), cache_seqlens=int32(3, 8), causal=True, **factors
    )
    assert fallback_notice.state.append == ("torch", None, "the tensors are on cpu")
    for b, row in ((0, 3), (1, 8)):
        for stored, factor in ((k_cache, 0.5), (v_cache, 0.25)):
            expected = (new[b, 0].bfloat16().float() / factor).to(FP8)
            assert torch.equal(stored[b, row].view(torch.uint8), expected.view(torch.uint8))
