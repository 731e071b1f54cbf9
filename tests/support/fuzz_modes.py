"""Random calls in random modes, with arguments of random kinds: each is right, or refused by name."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import broadhead
import torch
from entries import Entry
from tensor_kinds import KINDS, Passing, memory_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """Another stream of the device, behind the current one and in front of what follows."""
    if not torch.cuda.is_available():
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def autocast() -> Any:
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16)


#: Modes that change no result.
MODES: dict[str, Callable[[], Any]] = {
    "none": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "passing": Passing,
    "autocast": autocast,
    "stream": side_stream,
    "dual_level": forward_ad.dual_level,
    "function_mode": lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"),
}


def in_a_thread(call: Callable[[], Any]) -> Any:
    """What ``call`` gives in a thread of its own, on the streams of that thread."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append((call(), None))
        except BaseException as error:
            results.append((None, error))

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    result, error = results[0]
    if error is not None:
        raise error
    return result


def check_random_call(entry: Entry, rng: random.Random) -> str:
    """One call of ``entry``; returns what was done, for messages."""
    # Torch itself does not mix subclasses that override different things.
    kinds = ("plain", "plain", "parameter", "negated", rng.choice(sorted(KINDS)))
    chosen = {name: rng.choice(kinds) for name in entry.tensors}
    for name, x in entry.tensors.items():
        if chosen[name] == "negated" and not x.is_floating_point():
            chosen[name] = "plain"  # see test_every_tensor_argument of the kernels
    modes = rng.sample(sorted(MODES), rng.choice((0, 1, 1, 2, 3)))
    if "wrapper" in chosen.values() and "inference" in modes:
        modes.remove("inference")  # torch makes no views of wrappers of before the mode
    threaded, odd = rng.random() < 0.2, rng.choice((None, None, None, "fake", "meta", "tangent", "vmap"))
    done = f"{chosen} in {modes}{', in a thread' if threaded else ''}{', ' + odd if odd else ''}"
    expected, written = entry.run(entry.clone())
    if odd in ("fake", "meta"):
        check_shapes(entry, odd, expected)
        return done
    given = entry.clone()
    given = {name: x if chosen[name] == "plain" else KINDS[chosen[name]](x) for name, x in given.items()}
    before = {name: memory_of(given[name]).clone() for name in entry.written}

    def call() -> tuple[list[Tensor], dict[str, Any]]:
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(MODES[mode]())
            if odd == "tangent":
                return call_with_tangent(entry, given, rng)
            if odd == "vmap":
                return call_mapped(entry, given, rng)
            got, got_written = entry.run(given)
            # Clones are made in the mode: an inference tensor is none outside of it.
            return [memory_of(x).clone() for x in got], got_written

    try:
        got, got_written = in_a_thread(call) if threaded else call()
    except broadhead.UnsupportedError as refusal:
        assert odd in ("tangent", "vmap") or "is written" in str(refusal), f"{done}: {refusal}"
        text = str(refusal).removeprefix("BROADHEAD_STRICT=1: ")
        assert ": " in text and text.split(":")[0].isidentifier(), refusal
        for name, x in before.items():
            assert torch.equal(memory_of(given[name]), x), f"{done}: {name} was written by a call that was refused"
        return done
    tolerance = {"atol": 1e-2, "rtol": 1e-2} if any(x.dtype.itemsize == 2 for x in expected) else {}
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **tolerance, msg=lambda text: f"{done}: {text}")
    for name, x in got_written.items():
        torch.testing.assert_close(memory_of(x).float(), written[name].float(), **tolerance, msg=f"{done}: {name}")
    return done


def check_shapes(entry: Entry, odd: str, expected: list[Tensor]) -> None:
    if odd == "meta":
        got, _ = entry.run({name: x.to("meta") for name, x in entry.tensors.items()})
    else:
        with FakeTensorMode() as mode:
            got, _ = entry.run({name: mode.from_tensor(x) for name, x in entry.tensors.items()})
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in expected], odd


def call_with_tangent(entry: Entry, given: dict[str, Any], rng: random.Random) -> tuple[list[Tensor], dict[str, Any]]:
    """Of an argument that is not written; where no derivative exists of it, the call is as without."""
    names = [name for name, x in given.items() if x.is_floating_point() and x.dtype.itemsize > 1]
    names = [name for name in names if name not in entry.written and type(given[name]) is Tensor]
    if not names or torch.is_inference_mode_enabled():
        got, written = entry.run(given)
        return [memory_of(x).clone() for x in got], written
    name = rng.choice(names)
    with contextlib.ExitStack() as stack:
        if forward_ad._current_level < 0:
            stack.enter_context(forward_ad.dual_level())
        dual = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        got, written = entry.run(given | {name: dual})
        return [forward_ad.unpack_dual(memory_of(x)).primal.clone() for x in got], written


def call_mapped(entry: Entry, given: dict[str, Any], rng: random.Random) -> tuple[list[Tensor], dict[str, Any]]:
    """torch.vmap over two copies of one argument: both results are that of the call."""
    name = rng.choice([name for name, x in given.items() if type(x) is Tensor] or [""])
    if not name or name in entry.written:
        got, written = entry.run(given)
        return [memory_of(x).clone() for x in got], written
    copies = given[name].expand(2, *given[name].shape)
    got = torch.vmap(lambda x: tuple(entry.run(given | {name: x})[0]))(copies)
    return [memory_of(x[rng.randrange(2)]).clone() for x in got], {key: given[key] for key in entry.written}
