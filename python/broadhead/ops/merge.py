"""The operators broadhead::merge_states and merge_states_out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..run.merge import plain_states, run_merge
from .canonical import canonical

_STATES = "Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b"
_BACKEND = "str? backend=None"


@torch.library.custom_op(
    "broadhead::merge_states", mutates_args=(), schema=f"({_STATES}, {_BACKEND}) -> (Tensor, Tensor)"
)
def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    out, lse = run_merge(*plain_states(out_a, lse_a, out_b, lse_b, None), backend)
    return canonical(out), canonical(lse)


@merge_states.register_fake
def _(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


@torch.library.custom_op(
    "broadhead::merge_states_out", mutates_args=("out",), schema=f"({_STATES}, Tensor(a!) out, {_BACKEND}) -> Tensor"
)
def merge_states_out(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, backend: str | None = None
) -> Tensor:
    return canonical(run_merge(*plain_states(out_a, lse_a, out_b, lse_b, out), backend)[1])


@merge_states_out.register_fake
def _(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, backend: str | None = None) -> Tensor:
    return lse_a.new_empty(lse_a.shape)
