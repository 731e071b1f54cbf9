"""merge_attn_states on the host: who runs it, what is remembered, gradients, and the order the binding gets."""

from __future__ import annotations

from typing import Any

import broadhead
import pytest
import torch
from broadhead.api import merge as api_merge
from broadhead.run import fallback as fallback_notice
from broadhead.run import known
from broadhead.run import merge as run_merge
from recorder import Recorder, allocate
from torch import Tensor


def states(dtype: torch.dtype = torch.float32, batch: int | None = None) -> list[Tensor]:
    lead = () if batch is None else (batch,)
    outs = [torch.randn(*lead, 5, 4, 16).to(dtype) for _ in range(2)]
    lses = [torch.randn(*lead, 4, 5) * 3 for _ in range(2)]
    return [outs[0], lses[0], outs[1], lses[1]]


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("given", ["new", "out", "out_a", "out_b"])
def test_merge(batch: int | None, given: str) -> None:
    """Softmax weights of the LSEs, in fp64; an empty part counts for nothing and may hold NaN."""
    out_a, lse_a, out_b, lse_b = states(batch=batch)
    for lse, out in ((lse_a, out_a), (lse_b, out_b)):
        empty = torch.rand_like(lse) < 0.3
        lse[empty], out[empty.transpose(-1, -2)] = float("-inf"), float("nan")
    lses = torch.stack((lse_a, lse_b)).double()
    weights = torch.softmax(lses, 0).nan_to_num(0.0).transpose(-1, -2).unsqueeze(-1)
    expected = (weights * torch.stack((out_a, out_b)).double().nan_to_num(0.0)).sum(0)
    given_out = {"new": None, "out": torch.empty_like(out_a), "out_a": out_a, "out_b": out_b}[given]
    out, lse = broadhead.merge_attn_states(out_a, lse_a, out_b, lse_b, given_out)
    assert given_out is None or out is given_out
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), torch.logsumexp(lses, 0), atol=1e-6, rtol=1e-5)


@pytest.fixture
def on_kernel(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """CPU tensors pass for those of a device, and the compiled module keeps what it is given; no call is known."""
    module = Recorder()
    monkeypatch.setattr(run_merge, "common_kernel_obstacle", lambda device: None)
    monkeypatch.setattr(run_merge, "connected_module", lambda: module)
    monkeypatch.setattr(known, "run_known_merge", lambda *call: None)
    return module


def test_arguments_of_the_binding(on_kernel: Recorder) -> None:
    tensors = dict(zip(("out_a", "lse_a", "out_b", "lse_b"), states(torch.bfloat16, 2)))
    given = torch.empty_like(tensors["out_a"])
    for out in (None, given):
        broadhead.merge_attn_states(**tensors, out=out)
        got = on_kernel.calls.pop()
        assert all(got.pop(name) is value for name, value in tensors.items())
        new_out, new_lse = allocate(got.pop("new_out"), given), allocate(got.pop("new_lse"), tensors["lse_a"])
        assert got == {"device": -1, "out": out}
        assert (new_out.shape, new_out.dtype) == (given.shape, given.dtype)
        assert (new_lse.shape, new_lse.dtype) == (tensors["lse_a"].shape, torch.float32)
    assert fallback_notice.state.merge == run_merge.BY_KERNEL


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"lse_a": torch.randn(5, 4).T, "out_a": torch.randn(4, 5, 16).transpose(0, 1)}, None),
        ({"out_a": torch.randn(5, 4, 16).double(), "out_b": torch.randn(5, 4, 16).double()}, "merges torch.float64"),
        ({"lse_b": torch.randn(4, 5).half()}, "and torch.float16"),
        ({"out_b": torch.randn(5, 16, 4).transpose(1, 2)}, "out_b has strides"),
        ({"out": torch.empty(5, 1, 16).expand(5, 4, 16)}, "out holds elements more than once"),
    ],
)
def test_obstacles(on_kernel: Recorder, changes: dict[str, Any], words: str | None) -> None:
    tensors = dict(zip(("out_a", "lse_a", "out_b", "lse_b"), states()), out=None)
    obstacle = run_merge.kernel_obstacle(**{**tensors, **changes})
    assert obstacle is None if words is None else words in str(obstacle)


def test_gradients_take_torch_ops(on_kernel: Recorder) -> None:
    tensors = [t.requires_grad_(True) for t in states(torch.float64)]
    tensors[1], tensors[3] = (t.detach().double().requires_grad_(True) for t in (tensors[1], tensors[3]))
    assert torch.autograd.gradcheck(broadhead.merge_attn_states, tensors)
    assert fallback_notice.state.merge == ("torch", None, "an input requires grad, and it has no backward")
    with torch.no_grad():
        broadhead.merge_attn_states(*(t.float() for t in tensors))
    assert len(on_kernel.calls) == 1


def test_a_known_merge_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor looked up where torch ops are asked for."""
    tensors = states()
    seen: list[Any] = []
    monkeypatch.setattr(known, "run_known_merge", lambda *call: seen.append(call) or ("out", "lse"))
    monkeypatch.setattr(api_merge, "_check", lambda *tensors: pytest.fail("checked"))
    assert broadhead.merge_attn_states(*tensors) == ("out", "lse")
    assert fallback_notice.state.merge == run_merge.BY_KERNEL
    assert len(seen) == 1 and all(a is b for a, b in zip(seen[0], (*tensors, None), strict=True))
    monkeypatch.undo()
    broadhead.merge_attn_states(*tensors, backend="torch")
    assert fallback_notice.state.merge[0] == "torch"
