"""FlashAttention-2's functions, called as its users do, forward and backward, against fp64."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from foreign import DEVICE, Sequences, int32, paged, raises_by_name
from surface_modules import SOURCES
from torch import Tensor

FA2: Any = SOURCES["flash_attn.flash_attn_interface"]
CAUSAL = oracle.Rule(64**-0.5, (-1, 0))


@pytest.mark.attends("forward", "backward")
def test_dense_positional() -> None:
    """(q, k, v, dropout_p, softmax_scale, causal), as many a model has it."""
    s = Sequences((37, 37), (51, 51))
    q, k, v = map(s.dense, (s.q, s.k, s.v))
    out, lse, mask = FA2["flash_attn_func"](q, k, v, 0.0, 0.2, True, return_attn_probs=True)
    assert lse.shape == (2, 4, 37) and mask.numel() == 0 and mask.dtype == q.dtype
    gradients = s.gradients(out)
    s.check(oracle.Rule(0.2, (-1, 0)), out.flatten(0, 1), lse.transpose(0, 1).flatten(1), gradients)


@pytest.mark.attends("forward", "backward")
def test_varlen_with_window_and_softcap() -> None:
    s = Sequences((5, 33, 1), (9, 40, 17))
    out = FA2["flash_attn_varlen_func"](
        s.q, s.k, s.v, s.cu_q, s.cu_k, s.max_q, s.max_k, dropout_p=0.0, softmax_scale=None, causal=True,
        window_size=(7, 7), softcap=5.0, alibi_slopes=None, deterministic=True,
    )  # fmt: skip
    s.check(oracle.Rule(64**-0.5, (7, 0), softcap=5.0), out, None, s.gradients(out))


@pytest.mark.attends("forward", "backward")
def test_head_dims_that_are_no_multiples_of_8_are_padded() -> None:
    s = Sequences((13, 13), (13, 13), head_dims=(36, 20))
    out, lse, _ = FA2["flash_attn_func"](*map(s.dense, (s.q, s.k, s.v)), causal=True, return_attn_probs=True)
    s.check(oracle.Rule(36**-0.5, (-1, 0)), out.flatten(0, 1), lse.transpose(0, 1).flatten(1), s.gradients(out))


@pytest.mark.attends("forward", "backward")
@pytest.mark.parametrize("head_dim", [64, 36])
@pytest.mark.parametrize("form", ["qkv", "kv", "varlen_qkv", "varlen_kv"])
def test_packed_forms(form: str, head_dim: int) -> None:
    lengths = (21, 8) if "varlen" in form else (21, 21)
    s = Sequences(lengths, lengths, heads=(4, 4), head_dims=(head_dim, head_dim))
    stacked = torch.stack((s.q, s.k, s.v) if "qkv" in form else (s.k, s.v), dim=1)
    lead: tuple[Any, ...] = () if "qkv" in form else (s.q,)
    if "varlen" in form:
        where = (s.cu_q, s.max_q) if "qkv" in form else (s.cu_q, s.cu_k, s.max_q, s.max_k)
        function = FA2[f"flash_attn_{form}packed_func"]
        out, lse, _ = function(*lead, stacked, *where, 0.0, None, True, return_attn_probs=True)
    else:
        function = FA2[f"flash_attn_{form}packed_func"]
        out, lse, _ = function(*map(s.dense, (*lead, stacked)), 0.0, None, True, return_attn_probs=True)
        lse = lse.transpose(0, 1).flatten(1)
    s.check(oracle.Rule(head_dim**-0.5, (-1, 0)), out.reshape(s.grad_out.shape), lse, s.gradients(out))


@pytest.mark.attends("forward")
def test_paged_prefill_by_offsets() -> None:
    """block_table with cu_seqlens_k, whose differences are the lengths."""
    s = Sequences((5, 12), (37, 12))
    (k, table), (v, _) = paged_pair(s, 16)
    with torch.no_grad():  # no kernel differentiates pages
        out = FA2["flash_attn_varlen_func"](
            s.q, k, v, s.cu_q, s.cu_k, s.max_q, s.max_k, causal=True, block_table=table
        )  # fmt: skip
    s.check(CAUSAL, out)


def paged_pair(s: Sequences, page_size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """k and v in pages by one table."""
    together, table = paged(torch.cat((s.k, s.v), dim=-1), s.seqlens_k, page_size)
    k, v = together.split([s.k.shape[-1], s.v.shape[-1]], dim=-1)
    return (k, table), (v, table)


@pytest.mark.attends("forward")
def test_cache_with_append() -> None:
    """(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens): positions of FA2, no qv among them."""
    s = Sequences((1, 1), (23, 8))
    caches = [torch.full((2, 32, 2, 64), torch.nan, dtype=s.dtype, device=DEVICE) for _ in range(2)]
    new = []
    for cache, x in zip(caches, (s.k, s.v)):
        rows = x.detach().split(s.seqlens_k)
        for b, (row, length) in enumerate(zip(rows, s.seqlens_k)):
            cache[b, : length - 1] = row[:-1]
        new.append(torch.stack([row[-1:] for row in rows]))
    out, lse = FA2["flash_attn_with_kvcache"](
        s.q.detach()[:, None], *caches, *new, None, None, int32(22, 7), causal=True, return_softmax_lse=True
    )
    assert lse.shape == (2, 4, 1)
    s.check(CAUSAL, out[:, 0], lse[:, :, 0].T)
    assert torch.equal(caches[0][0, 22], new[0][0, 0])


@pytest.mark.attends("forward", "backward")
def test_low_level_dense() -> None:
    s = Sequences((30, 30), (30, 30))
    q, k, v = (s.dense(x.detach()) for x in (s.q, s.k, s.v))
    out, lse, _, rng_state = FA2["_flash_attn_forward"](q, k, v, 0.0, 0.125, True, -1, -1, 0.0, None, False)
    assert rng_state.dtype == torch.int64
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    FA2["_flash_attn_backward"](
        s.dense(s.grad_out), q, k, v, out, lse, dq, dk, dv, 0.0, 0.125, True, -1, -1, 0.0, None, False, rng_state
    )  # fmt: skip
    gradients = tuple(x.flatten(0, 1) for x in (dq, dk, dv))
    s.check(CAUSAL, out.flatten(0, 1), lse.transpose(0, 1).flatten(1), gradients)


@pytest.mark.attends("forward", "backward")
def test_low_level_varlen_as_slime_calls_it() -> None:
    """By keywords, with the wrapped backward function."""
    s = Sequences((11, 30), (11, 30))
    q, k, v = (x.detach() for x in (s.q, s.k, s.v))
    lengths = {"cu_seqlens_q": s.cu_q, "cu_seqlens_k": s.cu_k, "max_seqlen_q": s.max_q, "max_seqlen_k": s.max_k}
    shared = {"dropout_p": 0.0, "softmax_scale": 0.125, "causal": True, "window_size_left": -1, "softcap": 0.0}
    out, lse, *_ = FA2["_wrapped_flash_attn_varlen_forward"](q=q, k=k, v=v, **lengths, **shared, window_size_right=0)
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    nothing = FA2["_wrapped_flash_attn_varlen_backward"](
        s.grad_out, q, k, v, out, lse, dq, dk, dv, **lengths, **shared, window_size_right=0, alibi_slopes=None,
        deterministic=False, rng_state=None, zero_tensors=False,
    )  # fmt: skip
    assert nothing.numel() == 0 and nothing.dtype == torch.float32
    s.check(CAUSAL, out, lse, (dq, dk, dv))


def test_what_is_not_available_is_refused_by_name() -> None:
    x = torch.randn(1, 4, 2, 64, device=DEVICE).bfloat16()
    func = FA2["flash_attn_func"]
    raises_by_name(lambda: func(x, x, x, 0.1), "flash_attn_func", "dropout_p must be 0.0", "0.1")
    raises_by_name(lambda: func(x, x, x, alibi_slopes=torch.ones(2)), "flash_attn_func", "alibi_slopes", "None")
    cu = int32(0, 4)
    raises_by_name(
        lambda: FA2["_flash_attn_varlen_forward"](x[0], x[0], x[0], cu, cu, 4, 4, 0.0, 1.0, True, zero_tensors=True),
        "_flash_attn_varlen_forward", "zero_tensors must be False",
    )  # fmt: skip


@pytest.mark.attends("forward", "backward")
def test_compiles_in_one_graph() -> None:
    s = Sequences((8, 8), (8, 8))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = FA2["flash_attn_func"](q, k, v, dropout_p=0.0, causal=True)
        return result

    out = torch.compile(loss, fullgraph=True, backend="aot_eager")(*map(s.dense, (s.q, s.k, s.v)))
    s.check(CAUSAL, out.flatten(0, 1), None, s.gradients(out))
