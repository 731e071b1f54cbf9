"""mha_bwd: gradients of attention from out and softmax_lse as they are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..call import validation as check
from ..call.arguments import AttentionArgs
from ..call.layout import refuse_strided
from ..call.masking import split_causal
from ..call.plain import refuse_transformed, resolved, runs_as_operator
from ..ops.attention import call_backward
from ..run.backward import Gradients, run_backward_below


def live_rows(x: Tensor, cu_seqlens: Tensor | None, seqused: Tensor | None) -> Tensor | None:
    """Which rows of ``x`` ``(B, S, H, D)`` or ``(T, H, D)`` a sequence owns, broadcastable to x; None: all."""
    if cu_seqlens is None:
        if seqused is None:
            return None
        return (torch.arange(x.shape[1], device=x.device) < seqused[:, None])[:, :, None, None]
    row = torch.arange(x.shape[0], device=x.device, dtype=cu_seqlens.dtype)
    live = (row >= cu_seqlens[0]) & (row < cu_seqlens[-1])
    if seqused is not None and seqused.shape[0] > 0:
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True).clamp(max=seqused.shape[0] - 1)
        live = live & (row - cu_seqlens[sequence] < seqused[sequence])
    return live[:, None, None]


def check_stored(function: str, name: str, out: Any, like: Any) -> None:
    """A tensor that takes the gradient of ``like``, before any is written."""
    if out is None or not isinstance(like, Tensor):
        return
    tensor = check.check_tensor(function, name, out, f"a tensor of shape {tuple(like.shape)}")
    check.check_shape(function, name, tensor, like.shape, f"that of {name[1:]}")
    check.check_device(function, name, tensor, like.device)
    check.check_same_dtype(function, name, tensor, like.dtype)
    refuse_strided(function, name, tensor)
    if not is_dynamo_compiling():
        resolved(function, name, tensor, written=True)


def store_gradient(out: Tensor | None, grad: Tensor, cu_seqlens: Tensor | None, seqused: Tensor | None) -> Tensor:
    """``grad``, or ``out`` with the rows that a sequence owns replaced by those of ``grad``."""
    if out is None:
        return grad
    live = live_rows(grad, cu_seqlens, seqused)
    with torch.no_grad():
        return out.copy_(grad if live is None else torch.where(live, grad, out))


def mha_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None = None,
    softmax_lse: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool | Tensor = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
    *,
    window_size: Any = None,
    attention_chunk: int = 0,
    sinks: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    dlse: Tensor | None = None,
    backend: str | None = None,
    query_ranges: Tensor | None = None,
    ranges_in_window: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of attention.

    Args:
        dout: gradient of the output, of its shape and dtype.
        q: as for mha_fwd, dense or varlen.
        k: as for mha_fwd, dense or varlen.
        v: as for mha_fwd, dense or varlen.
        out: the output of the forward call, used as it is given; None: computed.
        softmax_lse: the softmax_lse of the forward call, likewise. Those of a whole whose keys q attends to in parts
            give each part its gradient of the whole. A row whose softmax_lse is -inf has no gradient.
        dq: of the shape and dtype of q, the last dimension contiguous: written and returned if given. Rows past
            seqused_q, or past ``cu_seqlens_q[-1]``, keep what they hold.
        dk: likewise for k.
        dv: likewise for v.
        deterministic: every sum in an order that is the same in every run, so that the results are, bit for bit;
            ``torch.use_deterministic_algorithms`` asks for it as well. Else the fastest kernel may add dq in no order.
        dlse: gradient of softmax_lse, fp32, of its shape; None: the loss does not depend on it.
        query_ranges: int32 ``(B, Sq, 2)`` or ``(T, 2)``, that of the forward call. A tree_mask has no gradient.
        cu_seqlens_q, softmax_scale, ...: the other arguments are those of the forward call.

    Returns:
        ``(dq, dk, dv, dsinks)``; dsinks is None without ``sinks``.

    Raises:
        InvalidArgumentError: an argument has a wrong value, shape or device; the text names it.
        InvalidTypeError: an argument has a wrong type or dtype; the text names it.
        UnsupportedError: ``backend="cuda"``, and no CUDA backward kernel takes the call; the text says why.
    """
    function = "mha_bwd"
    causal, by_sequence = split_causal(causal)
    args = AttentionArgs(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=(window_size_left, window_size_right) if window_size is None else window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        sm_margin=sm_margin,
        sinks=sinks,
        prefix_lens=prefix_lens,
        backend=backend,
        query_ranges=query_ranges,
        ranges_in_window=ranges_in_window,
        causal_by_sequence=by_sequence,
    )
    for name, tensor, like in (("dq", dq, q), ("dk", dk, k), ("dv", dv, v)):
        check_stored(function, name, tensor, like)
    outputs = (dout, dlse, out, softmax_lse)
    if is_dynamo_compiling() or runs_as_operator(*outputs, *args):
        if not is_dynamo_compiling() and any(x is not None for x in (dq, dk, dv)):
            refuse_transformed(function, "dq=, dk= and dv=", *outputs, *args, dq, dk, dv)
        gradients = Gradients(*call_backward(function, outputs, args, bool(deterministic)))
    else:
        gradients = run_backward_below(function, outputs, args, bool(deterministic))
    return (
        store_gradient(dq, gradients.dq, cu_seqlens_q, seqused_q),
        store_gradient(dk, gradients.dk, cu_seqlens_k, seqused_k),
        store_gradient(dv, gradients.dv, cu_seqlens_k, seqused_k),
        gradients.dsinks,
    )
