"""Sends an attention call to the operators where torch watches it, else runs it at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..call.arguments import AttentionArgs
from ..call.plain import runs_as_operator
from ..ops.attention import call_forward
from ..run.cuda_backend import find_known
from ..run.forward import run_plain


def _find_run_known(*call: Any) -> Any:
    """Bound on first use: _C.run_known, which runs a call that is like one before; None: there was none."""
    global _run_known
    _run_known = find_known("run_known")
    return _run_known(*call)


_run_known: Any = _find_run_known


def run_forward(
    function: str, call: tuple[Any, ...], need_lse: bool = True, deterministic: Any = False
) -> tuple[Tensor, Any]:
    """``(out, softmax_lse)`` of a call; ``function`` names the public function in errors.

    ``call`` holds the fields of AttentionArgs in their order. Public functions build it as a plain tuple of 30: a call
    with more arguments than that, or a longer tuple, Python collects in a list first, which takes 0.3 us.
    ``deterministic`` is asked of gradients alone, so that it is no part of a call.
    Without ``need_lse`` softmax_lse may be None: a kernel then neither allocates nor writes it.
    """
    # Dynamo knows this function for a constant. Eagerly it takes a third of the time of is_compiling(), and what else
    # traces calls shows in their tensors.
    if is_dynamo_compiling():
        return call_forward(function, AttentionArgs(*call), bool(deterministic))
    result = _run_known(function, need_lse, call)
    if result is not None:
        return result
    args = AttentionArgs(*call)
    if runs_as_operator(*args):
        return call_forward(function, args, bool(deterministic))
    return run_plain(function, args, need_lse, bool(deterministic))
