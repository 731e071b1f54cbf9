"""Attention under the transforms of torch.func: gradients by the operators, vmap one entry after the other.

Operators of torch.library know neither transform, autograd functions that name their context apart know both.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..call.arguments import DIFFERENTIABLE
from ..call.plain import is_autocast, refuse_forward_mode, refuse_second_derivative
from ..errors import UnsupportedError


def _map_entries(function: Any, batch_size: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> Any:
    """``function`` of each entry along the mapped dimensions, the results stacked along dimension 0."""
    if batch_size == 0:
        raise UnsupportedError("broadhead: attention inside torch.vmap over a dimension of size 0 is not supported")
    results = [
        function(*(x if dim is None else x.select(dim, entry) for x, dim in zip(inputs, in_dims, strict=True)))
        for entry in range(batch_size)
    ]
    with torch.autocast(results[0][0].device.type, enabled=False) if is_autocast(results[0][0]) else nullcontext():
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def differentiate(backward: Any, ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    """The gradients of the arguments of broadhead::mha_fwd that ``ctx`` keeps, by ``backward``."""
    tensors = iter(ctx.saved_tensors)
    saved = [next(tensors) if tensor else other for tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)]
    inputs = saved[2:]
    nothing: list[Tensor | None] = [None] * len(inputs)
    if dout is None and dlse is None:
        return tuple(nothing)
    dout, dlse = (None if grad is None else grad.contiguous() for grad in (dout, dlse))
    found = backward(dout, dlse, *saved)
    wanted = [
        gradient if value is not None and needed else None
        for gradient, value, needed in zip(found, inputs, ctx.needs_input_grad, strict=False)
    ]
    return (*wanted, *nothing[len(DIFFERENTIABLE) :])


class Forward(torch.autograd.Function):
    """broadhead::mha_fwd, of its arguments."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.broadhead.mha_fwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.function = inputs[-1]
        # The LSE is fp32. Gradients of fp64 are to be exact: there, both results are computed again.
        results = (None, None) if inputs[0].dtype == torch.float64 else output
        saved = (*results, *inputs)
        ctx.is_tensor = [isinstance(value, Tensor) for value in saved]
        ctx.others = [None if isinstance(value, Tensor) else value for value in saved]
        ctx.save_for_backward(*[value for value in saved if isinstance(value, Tensor)])

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        return differentiate(Backward.apply, ctx, dout, dlse)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _map_entries(Forward.apply, info.batch_size, in_dims, inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        refuse_forward_mode(ctx.function)


class Backward(torch.autograd.Function):
    """broadhead::mha_bwd, of its arguments."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.broadhead.mha_bwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, ...]:
        return refuse_second_derivative()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _map_entries(Backward.apply, info.batch_size, in_dims, inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        refuse_forward_mode(ctx.function)
