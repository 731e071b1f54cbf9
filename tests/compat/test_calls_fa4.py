"""FlashAttention-4's functions, called as its users do, forward and backward, against fp64."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from foreign import DEVICE, Sequences, int32, paged, raises_by_name
from surface_modules import SOURCES
from torch import Tensor

FA4: Any = SOURCES["flash_attn.cute.interface"]
CAUSAL = oracle.Rule(64**-0.5, (-1, 0))


@pytest.mark.attends("forward", "backward")
def test_dense_returns_out_and_lse() -> None:
    s = Sequences((20, 20), (33, 33))
    out, lse = FA4["flash_attn_func"](*map(s.dense, (s.q, s.k, s.v)), causal=True, return_lse=True)
    s.check(CAUSAL, out.flatten(0, 1), lse.transpose(0, 1).flatten(1), s.gradients(out))


@pytest.mark.attends("forward")
def test_lse_is_none_where_nobody_needs_it() -> None:
    s = Sequences((8, 8), (8, 8))
    q, k, v = map(s.dense, (s.q, s.k, s.v))
    out, lse = FA4["flash_attn_func"](q.detach(), k.detach(), v.detach())
    assert lse is None
    s.check(oracle.Rule(64**-0.5), out.flatten(0, 1))
    out, lse = FA4["flash_attn_func"](q, k, v)
    assert lse is not None and not lse.requires_grad and out.requires_grad


@pytest.mark.attends("forward", "backward")
def test_varlen_positional_with_sink() -> None:
    """qv is the fourth argument, cu_seqlens_q the fifth; the sink has a gradient."""
    s = Sequences((5, 33, 1), (9, 40, 17))
    sink = torch.randn(4, device=DEVICE).to(s.dtype).requires_grad_()
    out, lse = FA4["flash_attn_varlen_func"](
        s.q, s.k, s.v, None, s.cu_q, s.cu_k, s.max_q, s.max_k, causal=True, learnable_sink=sink, return_lse=True
    )
    s.check(CAUSAL, out, lse, s.gradients(out, sink), sink)


@pytest.mark.attends("forward", "backward")
def test_varlen_without_bounds() -> None:
    s = Sequences((5, 33, 1), (9, 40, 17))
    out, _ = FA4["flash_attn_varlen_func"](s.q, s.k, s.v, cu_seqlens_q=s.cu_q, cu_seqlens_k=s.cu_k, causal=True)
    s.check(CAUSAL, out, None, s.gradients(out))


@pytest.mark.attends("forward", "backward")
def test_padded_batch_with_seqused() -> None:
    """No cu_seqlens_q: q is (B, S, H, D)."""
    s = Sequences((8, 8), (21, 21))
    q, k, v = map(s.dense, (s.q, s.k, s.v))
    poisoned = [torch.cat((x, torch.full_like(x[:, :3], torch.nan)), dim=1) for x in (k, v)]
    out, _ = FA4["flash_attn_varlen_func"](q, *poisoned, seqused_k=int32(21, 21), causal=True)
    s.check(CAUSAL, out.flatten(0, 1), None, s.gradients(out))


@pytest.mark.attends("forward")
def test_pages() -> None:
    s = Sequences((5, 12), (37, 12))
    together, table = paged(torch.cat((s.k, s.v), dim=-1), s.seqlens_k, 16)
    k, v = together.split([64, 64], dim=-1)
    out, _ = FA4["flash_attn_varlen_func"](
        s.q.detach(), k, v, cu_seqlens_q=s.cu_q, max_seqlen_q=12, seqused_k=int32(37, 12), page_table=table, causal=True
    )
    s.check(CAUSAL, out)


@pytest.mark.attends("forward", "backward")
@pytest.mark.parametrize(
    ("window", "causal", "rule"),
    [
        ((None, None), False, (-1, -1)),
        ((-1, -1), False, (-1, -1)),
        ((-1, -1), True, (-1, 0)),
        ((None, 3), False, (-1, 3)),
        ((5, None), True, (5, 0)),
        ((5, 2), False, (5, 2)),
        ((None, 0), False, (-1, 0)),
    ],
)
def test_windows(window: Any, causal: bool, rule: tuple[int, int]) -> None:
    s = Sequences((9, 30), (20, 30))
    out, lse = FA4["flash_attn_varlen_func"](
        s.q, s.k, s.v, cu_seqlens_q=s.cu_q, cu_seqlens_k=s.cu_k, causal=causal, window_size=window, return_lse=True
    )
    s.check(oracle.Rule(64**-0.5, rule), out, lse, s.gradients(out))


def masked(s: Sequences, left: int | None, right: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(out, lse, dq, dk, dv)`` in fp64 where a query sees the keys from ``left`` before to ``right`` behind it."""
    leaves = [x.detach().double().requires_grad_() for x in (s.q, s.k, s.v)]
    outs, lses = [], []
    parts = zip(*(x.split(n) for x, n in zip(leaves, (s.seqlens_q, s.seqlens_k, s.seqlens_k))))
    for q, k, v in parts:
        distance = torch.arange(len(k), device=DEVICE)[None] - torch.arange(len(q), device=DEVICE)[:, None]
        distance = distance - (len(k) - len(q))
        mask = distance <= right
        if left is not None:
            mask &= distance >= -left
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * 64**-0.5
        scores = scores.masked_fill(~mask, -torch.inf)
        empty = ~mask.any(1)
        weights = torch.softmax(scores, dim=-1).masked_fill(empty[None, :, None], 0.0)
        outs.append(torch.einsum("hqk,khd->qhd", weights, v))
        lses.append(torch.logsumexp(scores, dim=-1))
    out, lse = torch.cat(outs), torch.cat(lses, dim=1)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, s.grad_out.double())  # type: ignore[return-value]


@pytest.mark.attends("forward", "backward")
@pytest.mark.parametrize("window", [(None, -3), (6, -3), (3, -3)])
@pytest.mark.parametrize("form", ["dense", "varlen", "low"])
def test_a_negative_right_side_is_an_offset(window: tuple[int | None, int], form: str) -> None:
    lengths = ((9, 9), (20, 20)) if form == "dense" else ((9, 30, 4), (20, 30, 2))
    s = Sequences(*lengths, dtype=torch.float32 if DEVICE.type == "cpu" else torch.bfloat16)
    if form == "dense":
        out, lse = FA4["flash_attn_func"](*map(s.dense, (s.q, s.k, s.v)), window_size=window, return_lse=True)
        gradients = s.gradients(out)
        out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    elif form == "varlen":
        out, lse = FA4["flash_attn_varlen_func"](
            s.q, s.k, s.v, cu_seqlens_q=s.cu_q, cu_seqlens_k=s.cu_k, window_size=window, return_lse=True
        )
        gradients = s.gradients(out)
    else:
        q, k, v = (x.detach() for x in (s.q, s.k, s.v))
        left, right = window
        given = {"cu_seqlens_q": s.cu_q, "cu_seqlens_k": s.cu_k, "max_seqlen_q": s.max_q, "max_seqlen_k": s.max_k}
        sides = {"window_size_left": left, "window_size_right": right}
        out, lse, *rest = FA4["_flash_attn_fwd"](q, k, v, **given, **sides, return_lse=True)
        assert rest == [None, None]
        into = [torch.full_like(x, torch.nan) for x in (q, k, v)]
        gradients = FA4["_flash_attn_bwd"](
            q, k, v, out, s.grad_out, lse, **given, **sides, dq=into[0], dk=into[1], dv=into[2]
        )
        assert all(a is b for a, b in zip(gradients, into, strict=True))
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if s.dtype == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
    for found, expected in zip((out, lse, *gradients), masked(s, *window), strict=True):
        torch.testing.assert_close(found.double(), expected.double(), **tolerance)


@pytest.mark.attends("forward")
def test_absorbed_mla_has_the_heads_last_in_its_lse() -> None:
    q, qv, k, v = (torch.randn(6, h, d, device=DEVICE).bfloat16() for h, d in ((4, 64), (4, 512), (1, 64), (1, 512)))
    cu = int32(0, 2, 6)
    out, lse = FA4["flash_attn_varlen_func"](q, k, v, qv, cu, cu, 4, 4, causal=True, return_lse=True)
    assert lse.shape == (6, 4)
    rows = slice(2, 6)
    rule = oracle.Rule((64 + 512) ** -0.5, (-1, 0))
    expected, expected_lse = oracle.attention(*(x[rows].double() for x in (q, k, v)), rule, qv=qv[rows].double())
    torch.testing.assert_close(out[rows].double(), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse[rows].double().T, expected_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.attends("forward")
def test_one_tensor_for_k_and_v_of_512() -> None:
    q, kv = torch.randn(1, 5, 4, 512, device=DEVICE).bfloat16(), torch.randn(1, 9, 1, 512, device=DEVICE).bfloat16()
    out, lse = FA4["flash_attn_func"](q, kv, kv, causal=True, return_lse=True)
    assert lse.shape == (1, 5, 4)
    expected, _ = oracle.attention(q[0].double(), kv[0].double(), kv[0].double(), oracle.Rule(512**-0.5, (-1, 0)))
    torch.testing.assert_close(out[0].double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.attends()
def test_combine() -> None:
    parts, lses = torch.randn(3, 5, 2, 8, device=DEVICE), torch.randn(3, 5, 2, device=DEVICE)
    out, lse = FA4["flash_attn_combine"](parts, lses)
    torch.testing.assert_close(lse.double(), torch.logsumexp(lses.double(), dim=0), atol=1e-4, rtol=1e-4)
    assert out.shape == (5, 2, 8)
    assert FA4["flash_attn_combine"](parts, lses, return_lse=False)[1] is None


def test_what_is_not_available_is_refused_by_name() -> None:
    x = torch.randn(1, 4, 2, 64, device=DEVICE).bfloat16()
    func = FA4["flash_attn_func"]
    raises_by_name(lambda: func(x, x, x, mask_mod=lambda *_: True), "flash_attn_func", "mask_mod must be None")
    raises_by_name(lambda: func(x, x, x, gather_kv_indices=int32(1)), "flash_attn_func", "gather_kv_indices")
    raises_by_name(lambda: func(x, x, x, window_size=(-2, 5)), "flash_attn_func", "window_size", "-2")
    raises_by_name(lambda: FA4["get_scheduler_metadata"](1, 1, 1, 1, 64, 1), "get_scheduler_metadata")


def test_validate_head_dims_asks_what_runs_here() -> None:
    if DEVICE.type == "cuda":
        FA4["_validate_head_dims"](64, 64, torch.cuda.get_device_capability()[0], 8)
    with pytest.raises(AssertionError, match="multiple of 8"):
        FA4["_validate_head_dims"](65, 64, 9, 8)
    with pytest.raises(AssertionError, match="head_dim 4096"):
        FA4["_validate_head_dims"](4096, 4096, 9, 8)
