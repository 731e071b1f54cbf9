"""Kinds of tensors that are no plain memory, as model code, autograd and distributed torch have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import broadhead
import torch
from entries import FP8, Entry
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Wrapper(torch.Tensor):
    """A tensor around another, without memory of its own: as DTensor, AsyncCollectiveTensor and quantised tensors."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(x: Any) -> Any:
            return x.inner if isinstance(x, Wrapper) else x

        return torch.utils._pytree.tree_map(
            lambda x: Wrapper(x) if type(x) is torch.Tensor else x,
            function(*torch.utils._pytree.tree_map(unwrap, args), **torch.utils._pytree.tree_map(unwrap, kwargs or {})),
        )


class Subclass(torch.Tensor):
    """A subclass that overrides nothing."""


class Quiet(torch.nn.Parameter):
    """A kind of parameter, as of model code."""


class Watching(torch.Tensor):
    """A subclass with memory of its own that sees every operator, and passes it on as it is."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(function))
        with torch._C._DisableTorchDispatch():  # type: ignore[no-untyped-call]
            return function(*args, **(kwargs or {}))


class Passing(TorchDispatchMode):
    """A mode that sees every operator, and passes it on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "wrapper": Wrapper,
    "subclass": lambda x: x.as_subclass(Subclass),
    "quiet": lambda x: torch.Tensor._make_subclass(Quiet, x),
    "watching": lambda x: torch.Tensor._make_subclass(Watching, x),
    # Nothing negates 8 bits, lazily or not, nor truth values.
    "negated": lambda x: x if x.dtype in (FP8, torch.bool) else torch._neg_view(negative(x)),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
}


def negative(x: Tensor) -> Tensor:
    return (-x.float()).to(x.dtype)


def memory_of(x: Tensor) -> Tensor:
    """The numbers of a tensor of any kind, as a torch.Tensor."""
    if isinstance(x, Wrapper):
        return memory_of(x.inner)
    with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():  # type: ignore[no-untyped-call]
        return x.as_subclass(torch.Tensor).resolve_neg()


def check_kind(entry: Entry, arguments: list[str], kind: str) -> None:
    """``arguments`` as tensors of ``kind`` give what plain tensors give, or are refused before anything is written."""
    expected, written = entry.run(entry.clone())
    given = entry.clone()
    given |= {argument: KINDS[kind](given[argument]) for argument in arguments}
    before = {name: memory_of(x).clone() for name, x in given.items()}
    try:
        got, got_written = entry.run(given)
    except broadhead.UnsupportedError as refusal:
        assert kind == "negated", f"{arguments} as {kind}: {refusal}"
        assert "is written" in str(refusal) and any(str(refusal).split()[1] == name for name in arguments), refusal
        for name, x in given.items():
            assert torch.equal(memory_of(x), before[name]), f"{name} was written by a call that was refused"
        return
    tolerance = {"atol": 1e-2, "rtol": 1e-2} if expected[0].dtype.itemsize == 2 else {}
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(
            memory_of(a), b, equal_nan=True, **tolerance, msg=lambda text: f"{arguments} as {kind}: {text}"
        )
    for name, x in got_written.items():
        torch.testing.assert_close(
            memory_of(x).float(), written[name].float(), **tolerance, msg=f"{name} is wrong with {arguments} as {kind}"
        )
