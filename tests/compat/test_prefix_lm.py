"""HRM-Text's prefix-LM layer on torch.ops.flash_attn_3: two passes into one output, inside operators of its own.

The first pass lets the queries of a prefix see all of it, the second the others all keys up to their own: the rows of
the two do not overlap, and their gradients of k and v are added. The calls are spelt as HRM-Text spells them; the
operators around them are this file's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import broadhead
import oracle
import pytest
import torch
from foreign import DEVICE, Sequences, int32
from torch import Tensor

TAIL = 6
PREFIX, RESPONSE = (7, 1, 20), (5, 30, 3)


@pytest.fixture(autouse=True)
def surface() -> Iterator[None]:
    with broadhead.compat.install("flash_attn_interface"):
        yield


def forward_pass(q: Tensor, k: Tensor, v: Tensor, out: Tensor, causal: bool, **lengths: Any) -> Tensor:
    """Every argument by keyword."""
    _, softmax_lse, *_ = torch.ops.flash_attn_3.fwd(
        q=q, k=k, v=v, k_new=None, v_new=None, q_v=None, out=out, cu_seqlens_k_new=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, is_causal=causal, window_size_left=-1,
        window_size_right=-1, attention_chunk=0, softcap=0.0, is_rotary_interleaved=True, scheduler_metadata=None,
        num_splits=1, pack_gqa=None, sm_margin=0, **lengths,
    )  # fmt: skip
    assert isinstance(softmax_lse, Tensor)
    return softmax_lse


def passes(prefix: Tensor, response: Tensor, cu: Tensor, prefix_word: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The lengths of the two passes; ``prefix_word`` is how the function spells seqused."""
    shifted = cu.clone()
    shifted[:-1] += prefix
    first = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, f"{prefix_word}_q": prefix, f"{prefix_word}_k": prefix}
    second = {"cu_seqlens_q": shifted, "cu_seqlens_k": cu, f"{prefix_word}_q": response}
    longest = max(PREFIX), max(RESPONSE), max(a + b for a, b in zip(PREFIX, RESPONSE))
    first |= {"max_seqlen_q": longest[0], "max_seqlen_k": longest[0]}
    second |= {"max_seqlen_q": longest[1], "max_seqlen_k": longest[2]}
    return first, second


@torch.library.custom_op(
    "broadhead_tests::prefix_lm",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor prefix, Tensor response, Tensor cu) -> Tensor[]",  # list[Tensor]: 2.7
)
def prefix_lm(q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, response: Tensor, cu: Tensor) -> list[Tensor]:
    """``[out, lse of the prefixes, lse of the others]``."""
    out = torch.empty_like(q)
    first, second = passes(prefix, response, cu, "seqused")
    second["seqused_k"] = None
    lses = [forward_pass(q, k, v, out, False, **first), forward_pass(q, k, v, out, True, **second)]
    out[sum(PREFIX) + sum(RESPONSE) :] = 0
    return [out, *lses]


@prefix_lm.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, response: Tensor, cu: Tensor) -> list[Tensor]:
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return [torch.empty_like(q), lse, torch.empty_like(lse)]


@torch.library.custom_op(
    "broadhead_tests::prefix_lm_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse_1, Tensor lse_2, Tensor prefix, "
    "Tensor response, Tensor cu) -> Tensor[]",
)
def prefix_lm_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_1: Tensor, lse_2: Tensor, prefix: Tensor,
    response: Tensor, cu: Tensor,
) -> list[Tensor]:  # fmt: skip
    from flash_attn_interface import _flash_attn_backward

    dq, dk, dv, dk_2, dv_2 = (
        torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.empty_like(k), torch.empty_like(v)
    )  # fmt: skip
    first, second = passes(prefix, response, cu, "sequed")
    given = {"dout": dout, "q": q, "k": k, "v": v, "out": out}
    _flash_attn_backward(**given, softmax_lse=lse_1, **first, dq=dq, dk=dk, dv=dv, is_causal=False)
    _flash_attn_backward(**given, softmax_lse=lse_2, **second, dq=dq, dk=dk_2, dv=dv_2, is_causal=True)
    for gradient in (dq, dk_2, dv_2):
        gradient[sum(PREFIX) + sum(RESPONSE) :] = 0
    return [dq, dk.add_(dk_2), dv.add_(dv_2)]


@prefix_lm_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> list[Tensor]:
    return [torch.empty_like(x) for x in (q, k, v)]


class PrefixLM(torch.autograd.Function):
    """The layer's attention."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, response: Tensor, cu: Tensor) -> Tensor:
        out, lse_1, lse_2 = prefix_lm(q, k, v, prefix, response, cu)
        ctx.save_for_backward(q, k, v, out, lse_1, lse_2, prefix, response, cu)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*prefix_lm_backward(dout, *ctx.saved_tensors), None, None, None)


def layer(x: Tensor, weight: Tensor, prefix: Tensor, response: Tensor, cu: Tensor) -> Tensor:
    """Gated attention of one projection, 4 query and 2 KV heads, as in HRM-Text."""
    gate, q, k, v = (x @ weight).unflatten(-1, (12, 64)).split((4, 4, 2, 2), dim=-2)
    out: Tensor = torch.sigmoid(gate) * PrefixLM.apply(q, k, v, prefix, response, cu)
    return out.flatten(1)


def rules(head_dim: int = 64) -> list[oracle.Rule]:
    return [oracle.Rule(head_dim**-0.5, (-1, 0), prefix=each) for each in PREFIX]


@pytest.mark.attends("forward", "backward")
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_attention(heads: tuple[int, int], compiled: bool) -> None:
    lengths = tuple(a + b for a, b in zip(PREFIX, RESPONSE))
    s = Sequences(lengths, lengths, heads=heads, head_dims=(128, 128))
    padding = [torch.full((TAIL, *x.shape[1:]), torch.nan, dtype=x.dtype, device=DEVICE) for x in (s.q, s.k, s.v)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        padded = [torch.cat(pair) for pair in zip((q, k, v), padding)]
        result: Tensor = PrefixLM.apply(*padded, int32(*PREFIX), int32(*RESPONSE), s.cu_q)
        return result

    run = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    out = run(s.q, s.k, s.v)
    assert not out[-TAIL:].any()
    s.check(rules(128), out[:-TAIL], None, s.gradients(out[:-TAIL]))


@pytest.mark.attends("forward", "backward")
def test_layer_against_fp64() -> None:
    """The whole layer, its weight's gradient included, against one pass of fp64 with the prefix mask."""
    total = sum(PREFIX) + sum(RESPONSE)
    lengths = [a + b for a, b in zip(PREFIX, RESPONSE)]
    x = torch.randn(total + TAIL, 96, device=DEVICE)
    weight = torch.randn(96, 12 * 64, device=DEVICE) * 96**-0.5
    cu = int32(0, *torch.tensor(lengths).cumsum(0).tolist())
    grad = torch.randn(total + TAIL, 256, device=DEVICE)
    grad[total:] = 0

    def reference(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = weight.bfloat16().to(dtype).requires_grad_()
        gate, q, k, v = (x[:total].bfloat16().to(dtype) @ leaf).unflatten(-1, (12, 64)).split((4, 4, 2, 2), dim=-2)
        parts = zip(*(each.split(lengths) for each in (q, k, v)))
        out = torch.cat([oracle.attention(*each, rule)[0] for each, rule in zip(parts, rules())])
        out = (torch.sigmoid(gate) * out).flatten(1)
        return out.detach(), torch.autograd.grad(out, leaf, grad[:total].bfloat16().to(dtype))[0]

    leaf = weight.bfloat16().requires_grad_()
    out = layer(x.bfloat16(), leaf, int32(*PREFIX), int32(*RESPONSE), cu)
    (gradient,) = torch.autograd.grad(out, leaf, grad.bfloat16())
    truth, naive = reference(torch.float64), reference(torch.bfloat16)
    for found, exact, plain in zip((out[:total].detach(), gradient), truth, naive):
        error, allowed = ((each.double() - exact).abs().max() for each in (found, plain))
        assert error <= 3 * allowed + 1e-2 * exact.abs().max(), f"off by {error}, torch in bf16 by {allowed}"


@pytest.mark.attends("forward", "backward")
def test_one_pass_says_the_same() -> None:
    """broadhead's prefix_lens in one call against the two passes."""
    lengths = tuple(a + b for a, b in zip(PREFIX, RESPONSE))
    s = Sequences(lengths, lengths)
    out = broadhead.flash_attn_varlen_func(
        s.q, s.k, s.v, s.cu_q, s.cu_k, s.max_q, s.max_k, causal=True, prefix_lens=int32(*PREFIX)
    )
    two = PrefixLM.apply(s.q, s.k, s.v, int32(*PREFIX), int32(*RESPONSE), s.cu_q)
    torch.testing.assert_close(out, two, atol=2e-2, rtol=2e-2)
    s.check(rules(), out, None, s.gradients(out))


@pytest.mark.attends("forward")
def test_generation_appends_to_a_contiguous_cache() -> None:
    from flash_attn_interface import flash_attn_with_kvcache

    s = Sequences((4, 4), (4, 4))
    q, k, v = (s.dense(x.detach()) for x in (s.q, s.k, s.v))
    caches = [torch.zeros(2, 16, 2, 64, dtype=s.dtype, device=DEVICE) for _ in range(2)]
    outs: list[Tensor] = []
    for start, lengths in ((0, 0), (3, int32(3, 3))):
        rows = slice(start, 3 if start == 0 else 4)
        out = flash_attn_with_kvcache(
            q=q[:, rows], k=k[:, rows], v=v[:, rows], k_cache=caches[0], v_cache=caches[1], cache_seqlens=lengths,
            num_splits=1, causal=True,
        )  # fmt: skip
        outs.append(out)
    s.check(oracle.Rule(64**-0.5, (-1, 0)), torch.cat(outs, dim=1).flatten(0, 1))
