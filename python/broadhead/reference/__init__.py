"""The torch fallback: exact attention of every layout on torch ops, on any device, with gradients.

Pads the rows of each sequence (rows.py), runs core.py, and puts the rows back. No loop over heads.
Where the lengths may be read, which is on a CPU in eager mode, like sequences are computed together and the time
follows the tokens. Elsewhere no tensor is read: the call can be captured in a CUDA graph and traced by
torch.compile(fullgraph=True).

Values that are out of range (lengths, offsets, page ids, batch indices) are clamped here, as kernels do; what a CPU in
eager mode refuses by name is refused before (call/values.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call.arguments import DIFFERENTIABLE
from ..call.plain import refuse_second_derivative
from ..call.validation import may_read
from .padded import Call, compute_dtype
from .run import backward, forward

__all__ = ["Call", "attention", "describe", "gradients", "run"]


def attention(q: Tensor, k: Tensor, v: Tensor, *, out: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """``run`` of the call that ``describe`` makes of the other arguments."""
    return run(describe(q, k, v, **options), out)


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    qv: Tensor | None = None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    query_ranges: Tensor | None = None,
    ranges_in_window: bool = False,
    causal_by_sequence: Tensor | None = None,
    tree_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    page_table: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    read_lengths: bool | None = None,
) -> Call:
    """A call; its arguments are normalised and validated by the caller, but for the values of tensors.

    q: ``(B, Sq, Hq, D)``, or ``(T, Hq, D)`` with cu_seqlens_q; qv as q with Dv. k, v: ``(B, Sk, Hkv, D | Dv)``,
    ``(Tk, Hkv, D | Dv)`` with cu_seqlens_k, or ``(pages, page_size, Hkv, D | Dv)`` with page_table ``(B, max_pages)``.
    fp16, bf16, fp32, fp64 or float8_e4m3fn; any strides. Index tensors are int32; a window of -1 is unbounded.
    query_ranges: int32 as q without heads, with a last dimension of 2; tree_mask: int64 as q without heads;
    causal_by_sequence: bool or int32 ``(B,)``, where true the right window is 0.
    read_lengths: whether index tensors may be read to save time; None: where they are on a CPU and nothing is traced.
    """
    masks = (prefix_lens, query_ranges, causal_by_sequence, tree_mask)
    index = (*masks, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, kv_batch_idx, page_table)
    if read_lengths is None:
        read_lengths = q.device.type == "cpu" and may_read(*index)
    return Call(
        q, k, v, qv, sinks, *index, q_descale, k_descale, v_descale, softmax_scale, window_left, window_right,
        attention_chunk, ranges_in_window, softcap, max_seqlen_q, max_seqlen_k, read_lengths,
    )  # fmt: skip


def run(call: Call, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(out, softmax_lse)``: ``out`` of q's dtype (bf16 for fp8 q), ``(B, Sq, Hq, Dv)`` or ``(T, Hq, Dv)``.

    softmax_lse: fp32, natural log, ``(B, Hq, Sq)`` or ``(Hq, T)``. The arithmetic is fp32 (fp64 for fp64 q). Rows that
    no sequence owns are 0 with LSE -inf; a given ``out`` keeps what it holds there. Differentiable in q, k, v, qv and
    sinks unless ``out`` is given.
    """
    differentiable = (call.q, call.k, call.v, call.qv, call.sinks)
    if out is None and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable):
        results = _Attention.apply(*call)
        return results[0], results[1]
    with torch.no_grad():
        result, lse = forward(call, out)
        return result, lse.float()


def gradients(
    call: Call, grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor | None, lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, qv and sinks in their dtypes, from out and softmax_lse as they are given.

    grad_out, out: of the shape of the output; grad_lse, lse: of the shape of softmax_lse, fp32 or fp64. A grad of None
    is 0; out or lse of None is computed. Every sum is fp32 (fp64 for fp64 q), in an order that is the same in every
    run, and rounded once.
    """
    with torch.no_grad():
        return backward(call, grad_out, grad_lse, out, lse)


# --- autograd --------------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """``(out, softmax_lse)`` of the fields of Call, and for fp64 q the softmax_lse in fp64."""

    @staticmethod
    def forward(*fields: Any) -> tuple[Tensor, ...]:
        call = Call(*fields)
        out, lse = forward(call, None)
        return (out, lse.float(), lse) if compute_dtype(call) == torch.float64 else (out, lse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        if len(output) == 3:
            ctx.mark_non_differentiable(output[2])
        _save(ctx, (output[0], output[-1], *inputs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        fields = (grads[0], grads[1], *_saved(ctx))
        if grads[0] is None and grads[1] is None:
            return (None,) * len(Call._fields)
        found = _Gradients.apply(*fields) if torch.is_grad_enabled() else _Gradients.forward(*fields)
        wanted = [grad if needed else None for grad, needed in zip(found, ctx.needs_input_grad)]
        return (*wanted, *([None] * (len(Call._fields) - len(DIFFERENTIABLE))))


class _Gradients(torch.autograd.Function):
    """The backward pass as a function of its own, which says that it has no derivative."""

    @staticmethod
    def forward(*fields: Any) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse, out, lse = fields[:4]
        return gradients(Call(*fields[4:]), grad_out, grad_lse, out, lse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept: its derivative is refused."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, ...]:
        return refuse_second_derivative()


def _save(ctx: Any, fields: tuple[Any, ...]) -> None:
    ctx.is_tensor = [isinstance(field, Tensor) for field in fields]
    ctx.constants = [None if isinstance(field, Tensor) else field for field in fields]
    ctx.save_for_backward(*[field for field in fields if isinstance(field, Tensor)])


def _saved(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if is_tensor else field for is_tensor, field in zip(ctx.is_tensor, ctx.constants)]
