"""Kernels and tensors that are no plain memory, derivatives, transforms, version counters and waiting launches."""

from __future__ import annotations

import random
import threading
import time
from itertools import pairwise
from typing import Any

import broadhead
import pytest
import torch
from broadhead.run import cuda_backend
from entries import Entry, backward_entries, entries
from fuzz_modes import check_random_call
from tensor_kinds import KINDS, check_kind
from torch import Tensor
from torch.autograd import forward_ad

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::broadhead.FallbackWarning")]

NAMES = sorted({*entries(dtype=torch.bfloat16), *backward_entries()})


@pytest.fixture(autouse=True)
def _gradients_have_no_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All else is strict: the torch fallback does not pass for a kernel."""
    if "mha_bwd" in request.node.name or "gradients" in request.node.name:
        monkeypatch.setenv("BROADHEAD_STRICT", "0")


def entry_on(device: torch.device, name: str) -> Entry:
    return (entries(device, torch.bfloat16) | backward_entries(device, torch.bfloat16))[name]


def qkv(device: torch.device, *lead: int) -> list[Tensor]:
    return [torch.randn(*lead, 2, 5, 4, 64, device=device, dtype=torch.bfloat16) for _ in range(3)]


@pytest.mark.parametrize("known", [False, True], ids=["first", "known"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_argument(cuda: torch.device, name: str, kind: str, known: bool) -> None:
    """On kernels, whether or not a plain call like it ran before."""
    entry = entry_on(cuda, name)
    for argument, x in entry.tensors.items():
        # No public function of torch negates integers lazily; known calls, which the plain one makes of all like it, do
        # not ask them.
        if kind == "negated" and not x.is_floating_point():
            continue
        if known:
            entry.run(entry.clone()), entry.run(entry.clone())
        else:
            cuda_backend.forget_calls()
        check_kind(entry, [argument], kind)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("metadata", "merge", "combine")])
def test_forward_mode_is_refused(cuda: torch.device, name: str) -> None:
    """A call like it is known: the tangent is not dropped without a word."""
    entry = entry_on(cuda, name)
    entry.run(entry.clone()), entry.run(entry.clone())
    for argument, x in entry.tensors.items():
        if not x.is_floating_point() or x.dtype.itemsize == 1 or (name.startswith("mha_bwd") and argument[1:] in "qkv"):
            continue
        with forward_ad.dual_level():
            given = entry.clone()
            given[argument] = forward_ad.make_dual(given[argument], torch.ones_like(given[argument]))
            before = {key: given[key].clone() for key in entry.written}
            with pytest.raises(broadhead.UnsupportedError, match="forward-mode"):
                entry.run(given)
            for key, value in before.items():
                assert torch.equal(given[key], value), f"{key} was written"


def test_vmap_keeps_values_and_gradients(cuda: torch.device) -> None:
    q, k, v = qkv(cuda, 3)
    leaf = v.clone().requires_grad_()
    out = torch.vmap(lambda x: broadhead.flash_attn_func(q[0], k[0], x))(leaf)
    expected = torch.stack([broadhead.flash_attn_func(q[0], k[0], x) for x in v])
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    (grad,) = torch.autograd.grad(out.float().square().sum(), leaf)
    each = [x.clone().requires_grad_() for x in v]
    loss = sum(broadhead.flash_attn_func(q[0], k[0], x).float().square().sum() for x in each)
    wanted = torch.stack(torch.autograd.grad(loss, each))
    torch.testing.assert_close(grad, wanted, atol=5e-2, rtol=5e-2)


def test_gradients_by_transforms(cuda: torch.device) -> None:
    q, k, v = qkv(cuda)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return broadhead.flash_attn_func(q, k, v, causal=True).float().square().sum()

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v), expected, atol=5e-2, rtol=5e-2)


def test_random_calls_in_random_modes(cuda: torch.device, seed: int) -> None:
    """Calls of one kind come again and again, so that most are known."""
    calls = entries(cuda, torch.bfloat16)
    for count in range(300):
        rng = random.Random(seed + count)
        name = rng.choice(sorted(calls))
        try:
            check_random_call(calls[name], rng)
        except Exception as error:
            raise AssertionError(f"case {count} (seed {seed + count}): {name}") from error


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if entry_on(torch.device("cpu"), name).written])
def test_what_a_kernel_writes_has_another_version(cuda: torch.device, name: str) -> None:
    entry = entry_on(cuda, name)
    for call in range(3):  # the first of its kind, and known ones
        given = entry.clone()
        versions = {key: x._version for key, x in given.items()}
        entry.run(given)
        for key, x in given.items():
            assert (x._version > versions[key]) == (key in entry.written), f"{key} in call {call}"


def test_a_buffer_that_was_saved_and_overwritten_is_found_out(cuda: torch.device) -> None:
    q, k, v = qkv(cuda)
    out = torch.empty_like(q)
    weight = torch.randn_like(q).requires_grad_()
    for _ in range(2):
        with torch.no_grad():
            broadhead.flash_attn_func(q, k, v, out=out)
        product = weight * out
        with torch.no_grad():
            broadhead.flash_attn_func(k, q, v, out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


def test_metadata_of_another_call_is_refused_before_a_known_append(cuda: torch.device) -> None:
    entry = entry_on(cuda, "append")

    def plan(headdim: int) -> Tensor:
        return broadhead.get_scheduler_metadata(
            2, 1, 48, 4, 2, headdim, entry.tensors["cache_seqlens"], max_seqlen_k_new=1, causal=True, page_size=16
        )

    for _ in range(3):
        entry.function(**entry.clone(), **entry.values, scheduler_metadata=plan(64))
    given = entry.clone()
    with pytest.raises(broadhead.InvalidArgumentError, match="headdim"):
        entry.function(**given, **entry.values, scheduler_metadata=plan(128))
    for key in entry.written:
        assert torch.equal(given[key], entry.tensors[key]), f"{key} was written"


def test_metadata_that_was_overwritten_is_not_refused_in_inference_mode(cuda: torch.device) -> None:
    entry = entry_on(cuda, "decode")
    with torch.inference_mode():
        lengths = entry.tensors["cache_seqlens"].clone()

        def plan(headdim: int, out: Tensor | None = None) -> Tensor:
            return broadhead.get_scheduler_metadata(
                2, 1, 48, 4, 2, headdim, lengths, causal=True, page_size=16, out=out
            )

        for buffer in (plan(128), plan(128, torch.zeros(17, dtype=torch.int32, device=cuda))):
            buffer.copy_(plan(64))
            entry.function(**entry.clone(), **entry.values, scheduler_metadata=buffer)


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "decode", "append", "metadata", "merge", "combine"])
def test_another_thread_runs_while_launches_wait(cuda: torch.device, name: str) -> None:
    """The queue of a device is full after a thousand launches or so; who waits for it must not hold the GIL."""
    entry = entry_on(cuda, name)
    given: dict[str, Any] = entry.clone()
    entry.run(given), entry.run(given)
    torch.cuda.synchronize()
    stamps, done = [time.perf_counter()], threading.Event()

    def tick() -> None:
        while not done.is_set():
            stamps.append(time.perf_counter())
            time.sleep(0.005)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        torch.cuda._sleep(4_000_000_000)  # some two seconds
        begin = time.perf_counter()
        for _ in range(3000):
            entry.run(given)
        waited = time.perf_counter() - begin
        torch.cuda.synchronize()
    finally:
        done.set()
        thread.join()
    longest = max(b - a for a, b in pairwise(stamps))
    assert waited > 0.8, "no launch waited: the test shows nothing"
    assert longest < 0.5, f"the other thread stood still for {longest:.2f} s of {waited:.2f} s"
