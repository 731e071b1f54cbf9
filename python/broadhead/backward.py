"""Gradients of attention: mha_bwd recomputes the forward pass on the torch fallback and differentiates it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import reference
from . import validation as check
from .errors import InvalidArgumentError
from .forward import select
from .plain import plain, plain_fields, refuse_tangents, runs_as_operator
from .problem import AttentionArgs, CheckedCall, check_forward, out_dtype, refuse_mixed_gradient


class Gradients(NamedTuple):
    """Gradients of one call; None where the input was not given."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dqv: Tensor | None
    dsinks: Tensor | None


def run_backward_below(function: str, outputs: tuple[Any, Any, Any, Any], args: AttentionArgs) -> Gradients:
    """run_backward of ``(dout, dlse, out, softmax_lse)`` on arguments that no mode or subclass has a say in."""
    refuse_tangents(function, *outputs)
    dout, dlse, _out, _softmax_lse = (
        plain(function, name, value)
        for name, value in zip(("dout", "dlse", "out", "softmax_lse"), outputs, strict=True)
    )
    args = plain_fields(function, args)
    # Operators run below autograd, which the recomputed pass needs.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        return run_backward(function, dout, dlse, args)


def run_backward(
    function: str, dout: Any, dlse: Any, args: AttentionArgs, checked: CheckedCall | None = None
) -> Gradients:
    """Gradients of ``out`` and ``softmax_lse`` with respect to q, k, v, qv and sinks. Rows that nobody owns get 0."""
    backend = check.check_backend(function, args.backend)
    with torch.no_grad():
        call = check_forward(function, args._replace(out=None)) if checked is None else checked
        refuse_mixed_gradient(function, args.q.dtype, args.k.dtype)
        _check_output_gradients(function, dout, dlse, args, call)
    problem = call.problem._replace(direction="backward")
    select(function, problem, args.q.device, backend)

    inputs = {name: getattr(args, name) for name in ("q", "k", "v", "qv", "sinks")}
    leaves = {name: t.detach().requires_grad_(True) for name, t in inputs.items() if t is not None}
    with torch.enable_grad():
        out, lse = reference.attention(
            leaves["q"],
            leaves["k"],
            leaves["v"],
            qv=leaves.get("qv"),
            softmax_scale=call.softmax_scale,
            window_left=problem.window_left,
            window_right=problem.window_right,
            attention_chunk=problem.attention_chunk,
            softcap=call.softcap,
            sinks=leaves.get("sinks"),
            prefix_lens=args.prefix_lens,
            cu_seqlens_q=args.cu_seqlens_q,
            cu_seqlens_k=args.cu_seqlens_k,
            max_seqlen_q=problem.seqlen_q,
            max_seqlen_k=problem.seqlen_k,
            seqused_q=args.seqused_q,
            seqused_k=args.seqused_k,
            leftpad_k=args.leftpad_k,
            kv_batch_idx=args.kv_batch_idx,
            page_table=args.page_table,
            q_descale=args.q_descale,
            k_descale=args.k_descale,
            v_descale=args.v_descale,
        )
        pairs = [(result, grad) for result, grad in ((out, dout), (lse, dlse)) if grad is not None]
        found = torch.autograd.grad(
            [result for result, _ in pairs],
            list(leaves.values()),
            [grad for _, grad in pairs],
            allow_unused=True,
        )
    gradients = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }
    return Gradients(gradients["q"], gradients["k"], gradients["v"], gradients.get("qv"), gradients.get("sinks"))


def _check_output_gradients(function: str, dout: Any, dlse: Any, args: AttentionArgs, call: CheckedCall) -> None:
    q = args.q
    if dout is None and dlse is None:
        raise InvalidArgumentError(f"{function}: dout must be a tensor of the shape of out, got None")
    if dout is not None:
        shape = (*q.shape[:-1], call.problem.head_dim_v)
        tensor = check.check_tensor(function, "dout", dout, f"a tensor of shape {shape}")
        check.check_shape(function, "dout", tensor, shape, "that of out")
        check.check_device(function, "dout", tensor, q.device)
        check.check_same_dtype(function, "dout", tensor, out_dtype(q.dtype))
    if dlse is not None:
        heads = call.problem.num_heads_q
        shape = (heads, q.shape[0]) if args.cu_seqlens_q is not None else (q.shape[0], heads, q.shape[1])
        tensor = check.check_tensor(function, "dlse", dlse, f"a tensor of shape {shape}")
        check.check_shape(function, "dlse", tensor, shape, "that of softmax_lse")
        check.check_device(function, "dlse", tensor, q.device)


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


def store_gradient(
    function: str, name: str, out: Any, grad: Tensor, cu_seqlens: Tensor | None, seqused: Tensor | None
) -> Tensor:
    """``grad``, or ``out`` with the rows that a sequence owns replaced by those of ``grad``."""
    if out is None:
        return grad
    tensor = check.check_tensor(function, name, out, f"a tensor of shape {tuple(grad.shape)}")
    check.check_shape(function, name, tensor, grad.shape, f"that of {name[1:]}")
    check.check_device(function, name, tensor, grad.device)
    check.check_same_dtype(function, name, tensor, grad.dtype)
    live = live_rows(grad, cu_seqlens, seqused)
    with torch.no_grad():
        return tensor.copy_(grad if live is None else torch.where(live, grad, tensor))


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
    causal: bool = False,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of attention: ``(dq, dk, dv, dsinks)``; dsinks is None without ``sinks``.

    Args:
        dout: of the shape and dtype of the output; dlse: fp32, of the shape of softmax_lse, if the loss depends on it.
        q, k, v: as for mha_fwd, dense or varlen. out, softmax_lse: accepted, not needed: the pass is recomputed.
        dq, dk, dv: written if given; their rows past seqused or past ``cu_seqlens[-1]`` keep what they hold.
        The other arguments: as in the forward call. deterministic: accepted; the result always is.

    Raises:
        UnsupportedError: ``backend="cuda"``: this release has no CUDA backward kernel.
        InvalidArgumentError, InvalidTypeError: an argument is wrong; the text names it.
    """
    function = "mha_bwd"
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
    )
    outputs = (dout, dlse, out, softmax_lse)
    if is_dynamo_compiling() or runs_as_operator(*outputs, *args):
        from . import ops

        gradients = Gradients(*ops.call_backward(function, outputs, args))
    else:
        gradients = run_backward_below(function, outputs, args)
    return (
        store_gradient(function, "dq", dq, gradients.dq, cu_seqlens_q, seqused_q),
        store_gradient(function, "dk", dk, gradients.dk, cu_seqlens_k, seqused_k),
        store_gradient(function, "dv", dv, gradients.dv, cu_seqlens_k, seqused_k),
        gradients.dsinks,
    )
