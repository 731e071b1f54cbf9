"""Sends an attention call that is not known to the operators where torch watches it, else decides and runs it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..call.arguments import AttentionArgs
from ..call.plain import runs_as_operator
from ..ops.attention import call_forward
from ..run.forward import run


def run_forward(
    function: str, call: tuple[Any, ...], need_lse: bool = True, deterministic: Any = False
) -> tuple[Tensor, Any]:
    """``(out, softmax_lse)`` of a call; ``function`` names the public function in errors.

    ``call`` holds the fields of AttentionArgs in their order. Public functions build it of two plain tuples, of 30 and
    4: a call with more arguments than 30, or a longer tuple, Python collects in a list first, which takes 0.1 us to 0.3
    us; the sum of two tuples takes 0.05 us. They ask
    ``known.run_known`` first, unless torch.compile traces them: Dynamo knows is_dynamo_compiling for a constant, and
    eagerly it takes a third of the time of is_compiling().
    ``deterministic`` is asked of gradients alone, so that it is no part of a call.
    Without ``need_lse`` softmax_lse may be None: a kernel then neither allocates nor writes it.
    """
    args = AttentionArgs(*call)
    if runs_as_operator(*args):
        return call_forward(function, args, bool(deterministic))
    return run(function, args, need_lse, bool(deterministic))
