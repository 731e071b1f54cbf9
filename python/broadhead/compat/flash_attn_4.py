"""FlashAttention-4's functions: module flash_attn.cute and flash_attn.cute.interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..api import attention, combine
from ..api.backward import mha_bwd
from ..api.head_dims import _validate_head_dims as _validate
from ..errors import UnsupportedError
from .advice import tell_if_faster_elsewhere
from .declare import declare
from .leniency import scale_of, tell_once
from .windows import Window, resolve, shortened

#: The release whose signatures these are.
__version__ = "4.0.0b36"
_SURFACE = "flash_attn.cute"
_MODULE = __name__
#: head_dim_v from which k and v that are one tensor are FlashAttention-4's absorbed MLA.
_ABSORBED = 512


def _run(
    function: str,
    *,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    qv: Tensor | None,
    causal: bool,
    window: tuple[int | None, int | None],
    learnable_sink: Tensor | None,
    softcap: float | None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqlen_k_per_split: int | None = None,
    scheduler_metadata: Any = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, lse with the heads last where FlashAttention-4 has them there: in absorbed MLA."""
    tell_if_faster_elsewhere(_SURFACE, v if q is None else q)
    if scheduler_metadata is not None:
        tell_once(f"{function}: scheduler_metadata of FlashAttention-4 describes its own tiles")
    absorbed = qv is not None
    if q is None or k is None or (k is v and v.shape[-1] == _ABSORBED):
        # The scores are those of qv and v alone.
        absorbed, q, k, qv = True, q if qv is None else qv, v, None
    assert q is not None
    cut = resolve(function, bool(causal), *window)
    if cut.cut:
        others["seqused_k"] = shortened(
            k, others.get("cu_seqlens_k"), others.get("seqused_k"), others.get("page_table"), cut.cut
        )
    if others.get("cu_seqlens_q") is not None and max_seqlen_q is None:
        max_seqlen_q = q.shape[0]
    if others.get("cu_seqlens_k") is not None and max_seqlen_k is None:
        max_seqlen_k = k.shape[0]
    out, lse = attention.mha_fwd(
        q,
        k,
        v,
        qv=qv,
        causal=cut.causal,
        window_size=cut.sides,
        sinks=learnable_sink,
        softcap=softcap or 0.0,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        tokens_per_split=seqlen_k_per_split or 0,
        **others,
    )
    return out, lse.transpose(-1, -2) if absorbed else lse


def _asked(lse: Tensor, return_lse: bool, *inputs: Any) -> Tensor | None:
    """The lse where FlashAttention-4 returns one; it has a gradient only where it was asked for."""
    if return_lse:
        return lse
    return lse.detach() if any(isinstance(x, Tensor) and x.requires_grad for x in inputs) else None


def _public(function: str) -> Any:
    def run(*, window_size: Any, return_lse: bool, **others: Any) -> tuple[Tensor, Tensor | None]:
        left, right = (None, None) if window_size is None else window_size
        out, lse = _run(function, window=(left, right), **others)
        inputs = [others[name] for name in ("q", "k", "v", "qv", "learnable_sink")]
        return out, _asked(lse, return_lse, *inputs)

    return run


def _fwd(
    *, window_size_left: Any, window_size_right: Any, return_lse: bool, lse: Tensor | None, **others: Any
) -> tuple[Tensor, Tensor | None, None, None]:
    for name, tensor in (("q_descale", others["q"]), ("k_descale", others["k"]), ("v_descale", others["v"])):
        others[name] = scale_of(others[name], tensor)
    inputs = [others[name] for name in ("q", "k", "v", "qv", "learnable_sink")]
    with torch.no_grad():
        out, found = _run("_flash_attn_fwd", window=(window_size_left, window_size_right), **others)
        if lse is not None:
            return out, lse.copy_(found), None, None
    return out, _asked(found, return_lse, *inputs), None, None


def _bwd(
    *,
    k: Tensor,
    lse: Tensor,
    causal: bool,
    window_size_left: Any,
    window_size_right: Any,
    learnable_sink: Any,
    cu_seqlens_k: Any,
    seqused_k: Any,
    dk: Any,
    dv: Any,
    pack_gqa: bool,
    **others: Any,
) -> tuple[Tensor, ...]:
    """The gradients; pack_gqa is a matter of FlashAttention-4's tiles."""
    window: Window = resolve("_flash_attn_bwd", bool(causal), window_size_left, window_size_right)
    given = (dk, dv)
    if window.cut:
        seqused_k = shortened(k, cu_seqlens_k, seqused_k, None, window.cut)
        dk = dv = None  # rows that are cut off get 0
    dq, dk, dv, dsink = mha_bwd(
        k=k,
        softmax_lse=lse,
        causal=window.causal,
        window_size=window.sides,
        sinks=learnable_sink,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        dk=dk,
        dv=dv,
        **others,
    )
    if window.cut:
        dk, dv = (found if out is None else out.copy_(found) for out, found in zip(given, (dk, dv)))
    return (dq, dk, dv) if dsink is None else (dq, dk, dv, dsink)


def _combine(*, return_lse: bool, **others: Any) -> tuple[Tensor, Tensor | None]:
    out, lse = combine.flash_attn_combine(**others)
    return out, lse if return_lse else None


def _check_head_dims(head_dim: int, head_dim_v: int, compute_capability: int, alignment: int) -> None:
    """Assert what this installation runs forward and backward, on the current device if it has the capability."""
    for direction in ("forward", "backward"):
        _validate(head_dim, head_dim_v, compute_capability, alignment, direction=direction)


def _refuse_metadata(**_: Any) -> None:
    raise UnsupportedError(
        "get_scheduler_metadata: FlashAttention-4's metadata describes the tiles of its own kernels; pass"
        " scheduler_metadata=None, or plan with broadhead.get_scheduler_metadata for broadhead's functions"
    )


_MODIFIERS = "score_mod=None, score_mod_bwd=None, mask_mod=None"
_GATHER = "gather_bwd_recompute_p=False, gather_bwd_token_chunk=None"
_SHARED = (
    "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,"
    " pack_gqa=None, deterministic=False"
)
_LENGTHS = "cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None"

flash_attn_func = declare(
    _MODULE,
    "flash_attn_func",
    f"q, k, v, qv=None, gather_kv_indices=None, {_SHARED}, {_MODIFIERS}, aux_tensors=None, aux_scalars=None,"
    f" block_sparse_tensors=None, block_sparse_tensors_bwd=None, return_lse=False, {_GATHER}",
    _public("flash_attn_func"),
    doc="FlashAttention-4's dense attention: ``(out, lse)``, lse None where nobody needs it.",
)
flash_attn_varlen_func = declare(
    _MODULE,
    "flash_attn_varlen_func",
    "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,"
    f" seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, {_SHARED}, {_MODIFIERS},"
    " block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None,"
    f" seqlen_k_per_split=None, disable_scheduler_metadata=False, {_GATHER}",
    _public("flash_attn_varlen_func"),
    doc="FlashAttention-4's attention of packed or padded sequences: ``(out, lse)``, lse None where nobody needs it.",
)
flash_attn_combine = declare(
    _MODULE,
    "flash_attn_combine",
    "out_partial, lse_partial, out=None, out_dtype=None, cu_seqlens=None, seqused=None, virtual_batch_idx=None,"
    " return_lse=True",
    _combine,
    doc="``(out, lse)`` of splits of the keys, lse None if it is not asked for.",
)
get_scheduler_metadata = declare(
    _MODULE,
    "get_scheduler_metadata",
    "max_seqlen_q, max_seqlen_k, nheads, nheads_kv, headdim, num_splits, headdim_v=None, pack_gqa=None, causal=False,"
    " window_size_left=None, window_size_right=None, seqlen_k_new=0, cu_seqlens_q=None, cu_seqlens_k=None,"
    " cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, leftpad_k=None, seqlen_k_per_split=None, _arch=None",
    _refuse_metadata,
    doc="Raises UnsupportedError: FlashAttention-4's metadata has no use here.",
)
_validate_head_dims = declare(
    _MODULE,
    "_validate_head_dims",
    "head_dim, head_dim_v, compute_capability, alignment",
    _check_head_dims,
    doc="Raises AssertionError unless kernels of this installation run the head dims, forward and backward.",
)
_flash_attn_fwd = declare(
    _MODULE,
    "_flash_attn_fwd",
    "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,"
    " max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,"
    " window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,"
    " intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,"
    " block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None,"
    " q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None,"
    " seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False",
    _fwd,
    doc="``(out, lse or None, None, None)`` without gradients.",
)
_flash_attn_bwd = declare(
    _MODULE,
    "_flash_attn_bwd",
    "q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,"
    " window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,"
    " num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,"
    f" AtomLayoutMdQ=2, V_in_regs=False, {_LENGTHS}, deterministic=False, dq=None, dk=None, dv=None, {_MODIFIERS},"
    " aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None, learnable_sink=None",
    _bwd,
    doc="``(dq, dk, dv)``, with learnable_sink ``(dq, dk, dv, dsink)``.",
)

#: What the package flash_attn.cute exports, and what its module interface holds.
PACKAGE_NAMES = ("flash_attn_func", "flash_attn_varlen_func")
INTERFACE_NAMES = PACKAGE_NAMES + (
    "_flash_attn_bwd", "_flash_attn_fwd", "_validate_head_dims", "flash_attn_combine", "get_scheduler_metadata",
)  # fmt: skip
