"""Modes of torch around every public function: derivatives, transforms, fake and meta tensors, inference, threads.

Every call is right, or refused by a text that names the function.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import broadhead
import pytest
import torch
from broadhead import UnsupportedError
from broadhead.run import metadata_records
from entries import Entry, backward_entries, entries
from tensor_kinds import Passing, Subclass, Wrapper
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

ALL = sorted(entries() | backward_entries())
#: Torch ops merge, and these know every derivative and transform.
BY_TORCH_OPS = ("merge", "combine")
NOT_DIFFERENTIABLE = ("metadata",)


def entry_of(name: str) -> Entry:
    return (entries() | backward_entries())[name]


def floats(entry: Entry) -> list[str]:
    """The tensor arguments that a derivative could be of."""
    return [name for name, x in entry.tensors.items() if x.is_floating_point()]


def check_refused(entry: Entry, given: dict[str, Any], words: str) -> None:
    """The call is refused by the name of its function, and what it would have written is as it was."""
    before = {name: given[name].clone() for name in entry.written}
    with pytest.raises(UnsupportedError, match=rf"{entry.function.__name__}: .*{words}"):
        entry.run(given)
    for name, x in before.items():
        assert torch.equal(given[name], x), f"{name} was written by a call that was refused"


def attention(q: Tensor, k: Tensor, v: Tensor, **values: Any) -> Tensor:
    return broadhead.flash_attn_func(q, k, v, **values)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(-2, -3)


def qkv(*lead: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(*lead, 2, 5, 4, 16, dtype=dtype) for _ in range(3)]


# --- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ALL if name not in NOT_DIFFERENTIABLE])
def test_forward_mode_is_right_or_refused(name: str) -> None:
    entry = entry_of(name)
    for argument in floats(entry):
        if argument in entry.written and (name in BY_TORCH_OPS or name.startswith("mha_bwd")):
            continue
        with forward_ad.dual_level():
            given = entry.clone()
            given[argument] = forward_ad.make_dual(given[argument], torch.randn_like(given[argument]))
            if name in BY_TORCH_OPS:
                given.pop("out")
                out = entry.function(**given)[0]
                assert forward_ad.unpack_dual(out).tangent is not None
            else:
                check_refused(entry, given, "forward-mode")
            # Tensors without a tangent are no concern of it.
            entry.run(entry.clone())


def test_forward_mode_of_merges_is_that_of_their_formula() -> None:
    states = (torch.randn(3, 2, 8), torch.randn(2, 3), torch.randn(3, 2, 8), torch.randn(2, 3))
    states = tuple(x.double() for x in states)
    tangents = tuple(torch.randn_like(x) for x in states)

    def merged(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
        weight = torch.sigmoid(lse_a - lse_b).transpose(0, 1).unsqueeze(-1)
        return out_a * weight + out_b * (1 - weight)

    expected = torch.func.jvp(merged, states, tangents)[1]
    got = torch.func.jvp(lambda *x: broadhead.merge_attn_states(*x)[0], states, tangents)[1]
    torch.testing.assert_close(got, expected)

    def combined(*x: Tensor) -> Tensor:
        outs, lses = torch.stack((x[0], x[2])), torch.stack((x[1], x[3])).transpose(-1, -2)
        return broadhead.flash_attn_combine(outs, lses)[0]

    torch.testing.assert_close(torch.func.jvp(combined, states, tangents)[1], expected)


def test_forward_mode_below_an_operator_is_refused() -> None:
    """A subclass may hide the tensor that has a tangent: then the operator itself tells."""
    q, k, v = qkv()
    with forward_ad.dual_level():
        hidden = Wrapper(forward_ad.make_dual(q, torch.ones_like(q)))
        with pytest.raises(UnsupportedError, match="flash_attn_func: forward-mode"):
            attention(hidden, k, v)
        torch.testing.assert_close(attention(Wrapper(q), k, v).inner, attention(q, k, v))


def test_jvp_is_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(UnsupportedError, match="flash_attn_func: forward-mode"):
        torch.func.jvp(lambda x: attention(x, k, v), (q,), (q,))
    with pytest.raises(UnsupportedError, match="flash_attn_func: forward-mode"):
        torch.func.jacfwd(lambda x: attention(x, k[:1], v[:1]))(q[:1, :1])


@pytest.mark.parametrize("transform", ["plain", "grad", "vjp", "jacrev"])
def test_gradients_by_transforms(transform: str) -> None:
    q, k, v = qkv()
    weight = torch.randn(2, 5, 4, 16, dtype=torch.float64)

    def gradients(function: Callable[..., Tensor]) -> Any:
        def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (function(q, k, v) * weight).sum()

        if transform == "grad":
            return torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v)
        if transform == "vjp":
            return torch.func.vjp(function, q, k, v)[1](weight)
        if transform == "jacrev":
            return torch.func.jacrev(lambda x: function(x, k, v)[0, 0])(q)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(loss(*leaves), leaves)

    torch.testing.assert_close(gradients(attention), gradients(sdpa))


@pytest.mark.parametrize("path", ["eager", "operator", "compiled", "transform"])
def test_double_backward_is_refused(path: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    if path == "transform":
        with pytest.raises(UnsupportedError, match="second derivative"):
            torch.func.grad(lambda x: torch.func.grad(lambda y: attention(y, k, v).sum())(x).sum())(q)
        return
    function = torch.compile(attention, backend="eager") if path == "compiled" else attention
    out = function(q, k.as_subclass(Subclass) if path == "operator" else k, v)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivative"):
        torch.autograd.grad(grad.sum(), q)


# --- vmap ------------------------------------------------------------------------------------------------------------


def test_vmap_keeps_values_and_gradients() -> None:
    q, k, v = qkv(3)
    dout = torch.randn(3, 2, 5, 4, 16, dtype=torch.float64)

    def both(function: Callable[..., Tensor]) -> Any:
        leaf = v.clone().requires_grad_()
        out = torch.vmap(lambda x: function(q[0], k[0], x))(leaf)
        assert out.requires_grad
        return out, torch.autograd.grad(out, leaf, dout)[0]

    torch.testing.assert_close(both(attention), both(sdpa))
    mapped = torch.vmap(attention, in_dims=(0, 2, 1))(q, k.movedim(0, 2), v.movedim(0, 1))
    torch.testing.assert_close(mapped, torch.vmap(sdpa)(q, k, v))
    assert not mapped.requires_grad


def test_gradients_of_each_sample() -> None:
    q, k, v = qkv(3)

    def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v: function(q, k, v).square().sum()

    got = torch.vmap(torch.func.grad(loss(attention), argnums=(0, 1, 2)))(q, k, v)
    torch.testing.assert_close(got, torch.vmap(torch.func.grad(loss(sdpa), argnums=(0, 1, 2)))(q, k, v))


@pytest.mark.parametrize("name", ALL)
def test_vmap_of_any_call_is_right_or_refused(name: str) -> None:
    """Over copies of one argument after the other: each result is that of a call on the copy."""
    entry = entry_of(name)
    for argument in entry.tensors:
        copies = torch.stack([entry.tensors[argument]] * 2)

        def call(x: Tensor, argument: str = argument) -> tuple[Tensor, ...]:
            return tuple(entry.run(entry.clone() | {argument: x})[0])

        expected = call(entry.tensors[argument].clone())
        try:
            got = torch.vmap(call)(copies)
        except UnsupportedError as refusal:
            assert str(refusal).startswith(f"{entry.function.__name__}: "), (argument, refusal)
            continue
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, torch.stack([b] * 2), equal_nan=True)


def test_functionalize() -> None:
    q, k, v = qkv(dtype=torch.float32)
    torch.testing.assert_close(torch.func.functionalize(attention)(q, k, v), attention(q, k, v))


# --- fake and meta tensors, modes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_fake_and_meta_tensors_have_the_shapes_of_real_ones(name: str) -> None:
    entry = entry_of(name)
    expected, _ = entry.run(entry.clone())
    with FakeTensorMode() as mode, warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns who looks for the memory of a fake tensor
        fake, _ = entry.run({key: mode.from_tensor(x) for key, x in entry.tensors.items()})
    meta, _ = entry.run({key: x.to("meta") for key, x in entry.tensors.items()})
    for kind, found in (("fake", fake), ("meta", meta)):
        for a, b in zip(found, expected, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), kind
    assert all(x.device.type == "meta" for x in meta)


def test_wrong_meta_tensors_are_refused_by_name() -> None:
    q, k = torch.empty(2, 5, 4, 16, device="meta"), torch.empty(2, 7, 3, 16, device="meta")
    with pytest.raises(broadhead.InvalidArgumentError, match="flash_attn_func: the heads of q"):
        broadhead.flash_attn_func(q, k, k)


@pytest.mark.parametrize("name", ALL)
def test_dispatch_modes_see_the_operator(name: str) -> None:
    entry = entry_of(name)
    expected, written = entry.run(entry.clone())
    with Passing() as outer, Passing() as inner:
        got, got_written = entry.run(entry.clone())
    torch.testing.assert_close(got, expected, equal_nan=True)
    torch.testing.assert_close(got_written, written)
    if name != "combine":
        assert any("broadhead." in seen for seen in inner.seen), inner.seen
        assert any("broadhead." in seen for seen in outer.seen), outer.seen


def test_autocast_changes_nothing() -> None:
    q, k, v = qkv(dtype=torch.float32)
    expected = attention(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(attention(q, k, v), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", ALL)
def test_autocast_changes_no_function(name: str, dtype: torch.dtype) -> None:
    """It knows no fp16 on a CPU: torch ops must not meet it."""
    entry = (entries(dtype=dtype) | backward_entries(dtype=dtype))[name]
    expected, written = entry.run(entry.clone())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, got_written = entry.run(entry.clone())
    torch.testing.assert_close(got, expected, equal_nan=True)
    torch.testing.assert_close(got_written, written)


@pytest.mark.parametrize("name", ALL)
def test_inference_mode(name: str) -> None:
    entry = entry_of(name)
    expected, written = entry.run(entry.clone())
    with torch.inference_mode():
        got, got_written = entry.run(entry.clone())
        torch.testing.assert_close(got, expected, equal_nan=True)
        torch.testing.assert_close(got_written, written)
    # Tensors of before the mode have a version, which must not be in the way.
    given = entry.clone()
    with torch.inference_mode():
        got, got_written = entry.run(given)
        torch.testing.assert_close(got, expected, equal_nan=True)
        torch.testing.assert_close(got_written, written)


def test_metadata_that_was_overwritten_is_not_refused_in_inference_mode() -> None:
    """Its numbers are those of another call since; nobody can tell, and so nobody refuses."""
    entry = entries()["decode"]
    plan = {"max_seqlen_q": 1, "max_seqlen_k": 48, "num_heads_q": 4, "num_heads_kv": 2, "qkv_dtype": torch.float32}
    with torch.inference_mode():
        lengths = entry.tensors["cache_seqlens"].clone()

        def made(headdim: int, out: Tensor | None = None) -> Tensor:
            return broadhead.get_scheduler_metadata(
                2, headdim=headdim, cache_seqlens=lengths, causal=True, page_size=16, out=out, **plan
            )

        for buffer in (made(128), made(128, torch.zeros(17, dtype=torch.int32))):
            buffer.copy_(made(64))
            entry.function(**entry.clone(), **entry.values, scheduler_metadata=buffer)
        with pytest.raises(broadhead.InvalidArgumentError, match="headdim"):
            entry.function(**entry.clone(), **entry.values, scheduler_metadata=made(128))


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ALL if entry_of(name).written])
def test_what_is_written_has_another_version(name: str) -> None:
    """Whoever saved a buffer for its backward pass must learn that it was overwritten."""
    entry = entry_of(name)
    given = entry.clone()
    versions = {key: x._version for key, x in given.items()}
    entry.run(given)
    for key, x in given.items():
        assert (x._version > versions[key]) == (key in entry.written), key


def test_a_given_out_that_requires_grad_is_refused() -> None:
    q, k, v = qkv(dtype=torch.float32)
    out = torch.zeros_like(q).requires_grad_()
    with pytest.raises(UnsupportedError, match="flash_attn_func: out= has no gradient"):
        broadhead.flash_attn_func(q, k, v, out=out)
    with torch.no_grad():
        broadhead.flash_attn_func(q, k, v, out=out)
    with pytest.raises(RuntimeError, match="leaf"):
        broadhead.merge_attn_states(q, torch.zeros(2, 4, 5), k, torch.zeros(2, 4, 5), out=out)


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "decode", "append", "metadata", "merge"])
def test_threads_in_different_modes(name: str) -> None:
    """A mode of one thread is none of another's."""
    entry = entry_of(name)
    expected, written = entry.run(entry.clone())
    failures: list[BaseException] = []
    start = threading.Barrier(3)

    def repeat(mode: Callable[[], Any]) -> None:
        try:
            start.wait()
            with mode():
                for _ in range(5):
                    got, got_written = entry.run(entry.clone())
                    torch.testing.assert_close(got, expected, equal_nan=True)
                    torch.testing.assert_close(got_written, written)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=repeat, args=(mode,)) for mode in (torch.no_grad, Passing, torch.inference_mode)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_a_mode_hides_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata of a fake call is no metadata of a real one."""
    monkeypatch.setattr(metadata_records, "filled", {})
    entry = entries()["metadata"]
    with FakeTensorMode() as mode:
        entry.run({key: mode.from_tensor(x) for key, x in entry.tensors.items()})
    entry.run({key: x.to("meta") for key, x in entry.tensors.items()})
    assert not metadata_records.filled
