"""The one gate of all public functions: which tensors a kernel or the torch fallback may read as they are.

A tensor is plain memory when its type is torch.Tensor, torch.nn.Parameter or a type that overrides nothing of what
torch does, when nothing is pending on it (negation, conjugation), and when no transform or mode watches the call. The
compiled module asks the same of calls that it knows (csrc/bindings/call_table.h). What is not plain goes to the
operators (ops/), which every mode and subclass of torch understands, or is resolved first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from ..errors import InvalidTypeError, UnsupportedError
from .names import shown_name

_Fields = TypeVar("_Fields", bound=tuple[Any, ...])

#: How many modes watch the calls of the dispatcher: FakeTensorMode and others.
count_dispatch_modes = torch._C._len_torch_dispatch_stack


def is_plain_type(kind: type) -> bool:
    """Whether tensors of a type hold their values in their own memory, and nothing is overridden for them."""
    if kind is Tensor or kind is torch.nn.Parameter:
        return True
    return (
        issubclass(kind, Tensor)
        and kind.__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl
        and kind.__torch_function__ is torch._C._disabled_torch_function_impl
    )


def is_transformed(*values: Any) -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...) hides another tensor behind one of these."""
    if not torch._C._are_functorch_transforms_active():
        return False
    return any(isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value) for value in values)


def runs_as_operator(*values: Any) -> bool:
    """Whether a call on these arguments goes through the operators.

    So it is when the call is traced, or watched by a mode or a transform of torch.func, when a subclass overrides what
    torch does, and when a tensor is on the meta device. Values that are no tensors do not matter.
    """
    if is_compiling() or count_dispatch_modes() > 0:
        return True
    for value in values:
        if isinstance(value, Tensor) and (not is_plain_type(type(value)) or value.device.type == "meta"):
            return True
    return torch._C._are_functorch_transforms_active()


def has_tangent(*values: Any) -> bool:
    """Whether forward-mode AD (torch.autograd.forward_ad) follows one of these tensors.

    What a transform of torch.func hides is asked when the transform has unwrapped it.
    """
    if forward_ad._current_level < 0 or torch.is_inference_mode_enabled():
        return False
    # Operators run below autograd, which knows the tangents.
    keys = torch._C.DispatchKey
    with (
        torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, False),
    ):
        return any(
            isinstance(value, Tensor)
            and value.is_floating_point()
            and not torch._C._functorch.is_functorch_wrapped_tensor(value)
            and not value.is_inference()
            and forward_ad.unpack_dual(value).tangent is not None
            for value in values
        )


def refuse_tangents(function: str, *values: Any) -> None:
    """Raise where forward-mode AD follows an argument: no pass of attention propagates a tangent."""
    if has_tangent(*values):
        refuse_forward_mode(function)


def refuse_forward_mode(function: str) -> NoReturn:
    raise UnsupportedError(
        f"{function}: forward-mode differentiation (torch.autograd.forward_ad, torch.func.jvp) is not supported, and an"
        " argument has a tangent; differentiate in reverse mode (backward, torch.func.grad), or pass"
        " forward_ad.unpack_dual(x).primal"
    )


def refuse_second_derivative(*_: Any) -> tuple[None, ...]:
    raise UnsupportedError(
        "broadhead: attention has no second derivative (double backward); differentiate it once, or compute the second"
        " derivative through torch.nn.functional.scaled_dot_product_attention with its math backend"
    )


def refuse_transformed(function: str, what: str, *values: Any) -> None:
    """Raise where a transform of torch.func hides a tensor of a call that writes into tensors it was given."""
    if is_transformed(*values):
        raise UnsupportedError(
            f"{function}: {what} inside a transform of torch.func (vmap, grad, jvp, ...) is not supported, as it writes"
            " into tensors that are given; call it outside of the transform"
        )


def plain(function: str, name: str, value: Any, *, written: bool = False) -> Any:
    """``value`` as plain memory, without copies but for negated and conjugated views; values that are no tensors pass.

    Args:
        written: the call writes this tensor, so that a copy would not do: a negated or conjugated view is refused.
    """
    if not isinstance(value, Tensor):
        return value
    if not is_plain_type(type(value)):
        # Below the operators a subclass has had its say.
        with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():
            value = _unwrapped(function, name, value)
    if value.layout != torch.strided:
        raise UnsupportedError(
            f"{function}: {name} must be a strided tensor, got layout {value.layout}; pass {name}.to_dense(), or the"
            " values of a nested tensor with cu_seqlens_q and cu_seqlens_k"
        )
    return resolved(function, name, value, written=written)


def resolved(function: str, name: str, value: Any, *, written: bool = False) -> Any:
    """``value`` without pending negation or conjugation, which operators that write do not take; see plain."""
    if not isinstance(value, Tensor) or not (value.is_neg() or value.is_conj()):
        return value
    if written:
        raise UnsupportedError(
            f"{function}: {name} is written and must hold its values as they are, got a lazily"
            f" {'negated' if value.is_neg() else 'conjugated'} view; pass the tensor that it is a view of"
        )
    return value.resolve_conj().resolve_neg()


def _unwrapped(function: str, name: str, value: Tensor) -> Tensor:
    """A tensor of a subclass as a torch.Tensor of the same memory."""
    memory = value.as_subclass(Tensor)
    if value.numel() > 0 and value.device.type != "meta" and memory.data_ptr() == 0:
        raise InvalidTypeError(
            f"{function}: {name} is a {type(value).__name__} without memory of its own, and its __torch_dispatch__ has"
            " passed it on as it is; pass the tensor inside it"
        )
    return memory


def plain_fields(function: str, fields: _Fields, written: tuple[str, ...] = ()) -> _Fields:
    """A named tuple of arguments with its tensors as plain memory; the same object where all are."""
    refuse_tangents(function, *fields)
    return _map_fields(plain, function, fields, written)


def resolved_fields(function: str, fields: _Fields, written: tuple[str, ...] = ()) -> _Fields:
    """A named tuple of arguments with its tensors as resolved makes them, likewise."""
    return _map_fields(resolved, function, fields, written)


def _map_fields(change: Callable[..., Any], function: str, fields: _Fields, written: tuple[str, ...]) -> _Fields:
    names: tuple[str, ...] = fields._fields  # type: ignore[attr-defined]
    found = [
        change(function, shown_name(function, name), value, written=name in written)
        if isinstance(value, Tensor)
        else value
        for name, value in zip(names, fields, strict=True)
    ]
    if all(a is b for a, b in zip(found, fields, strict=True)):
        return fields
    return type(fields)(*found)


def is_autocast(x: Tensor) -> bool:
    """Whether torch.autocast changes the dtypes of torch ops on ``x``."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def mark_written(*tensors: Tensor | None) -> None:
    """Tell autograd that a kernel wrote these tensors, which the caller gave: what saved them before is out of date."""
    torch._C._increment_version([tensor for tensor in tensors if tensor is not None])
