"""What a type checker knows of the results of the attention functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, ParamSpec, Protocol, cast, overload

from torch import Tensor

_P = ParamSpec("_P")


class _MayReturnLse(Protocol[_P]):
    """A function that returns out, or ``(out, softmax_lse)`` where one of two arguments asks for it."""

    @property
    def __name__(self) -> str: ...

    # The first one is also what a type checker takes for a call with a dict of unknown keywords.
    @overload
    def __call__(
        self,
        *args: Any,
        return_attn_probs: Literal[False],
        return_softmax_lse: Literal[False] = False,
        **kwargs: Any,
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        *args: Any,
        return_softmax_lse: Literal[False],
        return_attn_probs: Literal[False] = False,
        **kwargs: Any,
    ) -> Tensor: ...

    # The others overlap with the last one only for calls that name neither argument.
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, *args: Any, return_attn_probs: Literal[True], **kwargs: Any
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, *args: Any, return_softmax_lse: Literal[True], **kwargs: Any
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, *args: Any, return_attn_probs: bool, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, *args: Any, return_softmax_lse: bool, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    @overload
    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> Tensor: ...


def may_return_lse(function: Callable[_P, Tensor | tuple[Tensor, Tensor]]) -> _MayReturnLse[_P]:
    """``function`` itself; a type checker tells its result from the values of return_attn_probs, return_softmax_lse.

    It sees them where they are passed by keyword.
    """
    return cast("_MayReturnLse[_P]", function)
