"""FlashAttention-3's functions and operators, called as its users do, forward and backward, against fp64."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import broadhead
import oracle
import pytest
import torch
from broadhead.compat import leniency
from foreign import DEVICE, Sequences, int32, paged
from surface_modules import SOURCES
from torch import Tensor

FA3: Any = SOURCES["flash_attn_interface"]
CAUSAL = oracle.Rule(64**-0.5, (-1, 0))


@pytest.fixture
def operators() -> Iterator[Any]:
    with broadhead.compat.install("flash_attn_interface"):
        yield torch.ops.flash_attn_3


@pytest.mark.attends("forward", "backward")
def test_dense() -> None:
    s = Sequences((20, 20), (33, 33))
    out, lse = FA3["flash_attn_func"](*map(s.dense, (s.q, s.k, s.v)), causal=True, return_attn_probs=True)
    s.check(CAUSAL, out.flatten(0, 1), lse.transpose(0, 1).flatten(1), s.gradients(out))


@pytest.mark.attends("forward", "backward")
def test_varlen_alone_returns_a_tensor() -> None:
    s = Sequences((5, 33, 1), (9, 40, 17))
    out = FA3["flash_attn_varlen_func"](s.q, s.k, s.v, s.cu_q, s.cu_k, s.max_q, s.max_k, causal=True)
    s.check(CAUSAL, out, None, s.gradients(out))


@pytest.mark.attends("forward", "backward")
def test_transformer_engines_context_parallel_calls() -> None:
    """Positional: 20 optional slots of None after q, k, v, then keywords; the backward with is_causal=."""
    s = Sequences((16, 16), (16, 16))
    q, k, v = (s.dense(x.detach()) for x in (s.q, s.k, s.v))
    out, lse, *rest = FA3["_flash_attn_forward"](
        q, k, v, *[None] * 20, 0.125, causal=True, window_size_left=-1, window_size_right=0
    )
    assert len(rest) == 2 and all(x.numel() == 0 for x in rest)
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    FA3["_flash_attn_backward"](
        s.dense(s.grad_out), q, k, v, out, lse, None, None, None, None, 16, 16, dq, dk, dv, softmax_scale=0.125,
        is_causal=True, window_size_left=-1, window_size_right=0, deterministic=False,
    )  # fmt: skip
    gradients = tuple(x.flatten(0, 1) for x in (dq, dk, dv))
    s.check(CAUSAL, out.flatten(0, 1), lse.transpose(0, 1).flatten(1), gradients)


@pytest.mark.attends("forward", "backward")
def test_operators_positional(operators: Any) -> None:
    """As torch's registration of FlashAttention-3 calls them: 34 and 22 positional arguments."""
    s = Sequences((16, 9), (16, 9))
    q, k, v = (x.detach() for x in (s.q, s.k, s.v))
    out, lse, *rest = operators.fwd(
        q, k, v, None, None, None, None, s.cu_q, s.cu_k, None, None, None, 16, 16, None, None, None, None, None, None,
        None, None, None, 0.125, True, -1, -1, 0, 0.0, True, None, 1, None, 0,
    )  # fmt: skip
    assert len(rest) == 2
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    five = operators.bwd(
        s.grad_out, q, k, v, out, lse, dq, dk, dv, s.cu_q, s.cu_k, None, None, 16, 16, 0.125, True, -1, -1, 0.0,
        False, 0,
    )  # fmt: skip
    assert len(five) == 5
    s.check(CAUSAL, out, lse, (dq, dk, dv))


@pytest.mark.attends()
def test_operators_combine_and_metadata(operators: Any) -> None:
    parts, lses = torch.randn(3, 5, 2, 8, device=DEVICE), torch.randn(3, 5, 2, device=DEVICE)
    out, lse = operators.fwd_combine(parts, lses, None, torch.bfloat16)
    weights = torch.softmax(lses.double(), dim=0)[..., None]
    torch.testing.assert_close(out.double(), (weights * parts.double()).sum(0), atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(lse.double(), torch.logsumexp(lses.double(), dim=0), atol=1e-4, rtol=1e-4)
    planned = operators.get_scheduler_metadata(
        3, 1, 128, 8, 2, 64, 64, torch.bfloat16, int32(5, 100, 7), None, None, None, None, None, 16, 0, True
    )
    again = FA3["get_scheduler_metadata"](
        3, 1, 128, 8, 2, 64, int32(5, 100, 7), torch.bfloat16, page_size=16, causal=True
    )
    assert planned.dtype == torch.int32 and torch.equal(planned, again)


@pytest.mark.attends("forward")
def test_cache_returns_four_results() -> None:
    s = Sequences((1, 1, 1), (23, 8, 40))
    together, table = paged(torch.cat((s.k, s.v), dim=-1), s.seqlens_k, 16)
    k, v = together.split([64, 64], dim=-1)
    out, lse, *rest = FA3["flash_attn_with_kvcache"](
        s.q.detach()[:, None], k, v, cache_seqlens=int32(*s.seqlens_k), page_table=table, causal=True,
        return_softmax_lse=True,
    )  # fmt: skip
    assert len(rest) == 2
    s.check(CAUSAL, out[:, 0], lse[:, :, 0].T)


def _metadata(s: Sequences, **others: Any) -> Tensor:
    shape = {"batch_size": 3, "max_seqlen_q": 1, "max_seqlen_k": 48, "num_heads_q": 4, "num_heads_kv": 2, "headdim": 64}
    given: dict[str, Any] = {**shape, "causal": True, "page_size": 16, **others}
    return broadhead.get_scheduler_metadata(**given, cache_seqlens=int32(*s.seqlens_k))


@pytest.mark.attends("forward")
@pytest.mark.parametrize("kind", ["short", "dtype", "window", "another", "unknown"])
def test_metadata_of_any_origin(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What FlashAttention-3 would not refuse: ignored with one warning, or used as far as it can be."""
    monkeypatch.setattr(leniency, "_told", set())
    s = Sequences((1, 1, 1), (23, 8, 40))
    together, table = paged(torch.cat((s.k, s.v), dim=-1), s.seqlens_k, 16)
    k, v = together.split([64, 64], dim=-1)
    good = _metadata(s)
    metadata = {
        "short": good[:5].clone(),
        "dtype": good.long(),
        "window": _metadata(s, window_size=(3, 0)),
        "another": _metadata(s, num_heads_q=8),
        "unknown": torch.randint(-(2**31), 2**31 - 1, good.shape, device=DEVICE).int(),
    }[kind]

    def call(**others: Any) -> Tensor:
        result: Tensor = FA3["flash_attn_with_kvcache"](
            s.q.detach()[:, None], k, v, cache_seqlens=int32(*s.seqlens_k), page_table=table, causal=True, **others
        )
        return result

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        s.check(CAUSAL, call(scheduler_metadata=metadata)[:, 0])
        call(scheduler_metadata=metadata)
    told = [each for each in caught if issubclass(each.category, broadhead.CompatWarning)]
    assert len(told) == (kind != "unknown")
    if told:
        assert "scheduler_metadata is ignored" in str(told[0].message) and told[0].filename == __file__
    if kind != "unknown":  # the native function refuses it
        with pytest.raises(broadhead.BroadheadError, match="scheduler_metadata"):
            broadhead.flash_attn_with_kvcache(
                s.q.detach()[:, None], k, v, cache_seqlens=int32(*s.seqlens_k), page_table=table, causal=True,
                scheduler_metadata=metadata,
            )  # fmt: skip


def test_other_errors_are_not_swallowed() -> None:
    s = Sequences((1, 1, 1), (8, 8, 8))
    k, v = (s.dense(x.detach()) for x in (s.k, s.v))
    with pytest.raises(broadhead.InvalidTypeError, match="cache_seqlens"):
        FA3["flash_attn_with_kvcache"](
            s.q.detach()[:, None], k, v, cache_seqlens=int32(8, 8, 8).long(), scheduler_metadata=_metadata(s)[:2]
        )


@pytest.mark.attends("forward")
def test_descales_of_16_bit_tensors_are_not_read() -> None:
    s = Sequences((8, 8), (8, 8))
    scale = torch.full((2, 2), 7.0, device=DEVICE)
    out = FA3["flash_attn_func"](
        *map(s.dense, (s.q, s.k, s.v)), q_descale=scale, k_descale=scale, v_descale=scale, causal=True
    )
    s.check(CAUSAL, out.flatten(0, 1))


@pytest.mark.attends("forward", "backward")
def test_compiled_backward_writes_what_it_is_given() -> None:
    s = Sequences((16, 9), (16, 9))
    q, k, v = (x.detach() for x in (s.q, s.k, s.v))
    out, lse, *_ = FA3["_flash_attn_forward"](
        q, k, v, cu_seqlens_q=s.cu_q, cu_seqlens_k=s.cu_k, max_seqlen_q=16, max_seqlen_k=16, causal=True
    )

    def backward(dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        FA3["_flash_attn_backward"](
            s.grad_out, q, k, v, out, lse, s.cu_q, s.cu_k, None, None, 16, 16, dq, dk, dv, is_causal=True
        )

    gradients = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    torch.compile(backward, fullgraph=True, backend="aot_eager")(*gradients)
    s.check(CAUSAL, out, lse, tuple(gradients))
