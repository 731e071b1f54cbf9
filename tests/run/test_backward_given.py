"""mha_bwd and autograd use out and softmax_lse as given, add in fp32, and give the same bits in every run."""

from __future__ import annotations

import random
from typing import Any

import broadhead
import oracle
import pytest
import torch
from oracle import Rule
from torch import Tensor

F64 = torch.float64


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def drawn(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = F64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=F64).to(dtype) for shape in shapes]


def textbook(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, softcap: float = 0.0, **options: Any) -> Any:
    """Dense attention ``(B, S, H, D)`` by autograd's own operators."""
    return oracle.dense(q, k, v, Rule(q.shape[-1] ** -0.5, (-1, 0 if causal else -1), softcap=softcap), **options)


OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "softcap": {"softcap": 1.5}, "sinks": {"sinks": True}}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_parts_of_the_keys_get_their_share(dtype: torch.dtype, option: str, causal: bool, seed: int) -> None:
    """The gradients of halves of the keys, by out and LSE of the whole, are those of the whole."""
    exact = drawn(seed, (2, 20, 4, 16), (2, 40, 2, 16), (2, 40, 2, 16), (2, 20, 4, 16), (4,))
    q, k, v, dout, sinks = (x.to(dtype).to(F64).requires_grad_(i != 3) for i, x in enumerate(exact))
    softcap = OPTIONS[option].get("softcap", 0.0)
    given_sinks = sinks if "sinks" in OPTIONS[option] else None
    out, lse = textbook(q, k, v, causal=causal, softcap=softcap, sinks=given_sinks)
    leaves = (q, k, v) if given_sinks is None else (q, k, v, sinks)
    truth = torch.autograd.grad(out, leaves, dout.detach())

    q_, k_, v_, dout_, out_ = (x.detach().to(dtype) for x in (q, k, v, dout, out))
    lse_ = lse.detach().to(F64 if dtype == F64 else torch.float32)
    # Of the causal mask, the first half of the keys is seen by all, the second by its own queries.
    parts = [
        broadhead.mha_bwd(
            dout_, q_, k_[:, begin : begin + 20], v_[:, begin : begin + 20], out_, lse_, softcap=softcap,
            causal=causal and begin > 0,
        )
        for begin in (0, 20)
    ]  # fmt: skip
    found = (parts[0][0] + parts[1][0], *(torch.cat([part[i] for part in parts], dim=1) for i in (1, 2)))
    tolerance = {F64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for name, got, want in zip(("dq", "dk", "dv"), found, truth):
        torch.testing.assert_close(got.to(F64), want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    if given_sinks is not None:
        whole = broadhead.mha_bwd(dout_, q_, k_, v_, out_, lse_, causal=causal, sinks=sinks.detach().to(lse_.dtype)
                                  if dtype == F64 else sinks.detach().float())  # fmt: skip
        assert whole[3] is not None
        torch.testing.assert_close(whole[3].to(F64), truth[3], rtol=tolerance, atol=tolerance)


def test_merged_halves(seed: int) -> None:
    """Context parallelism: two calls, merged, differentiated by mha_bwd."""
    q, k, v, dout = drawn(seed, *[(2, 64, 4, 32)] * 4, dtype=torch.float32)
    halves = [(k[:, :32], v[:, :32]), (k[:, 32:], v[:, 32:])]
    results = [broadhead.mha_fwd(q, *half) for half in halves]
    out, lse = broadhead.merge_attn_states(*results[0], *results[1])
    got = sum(broadhead.mha_bwd(dout, q, *half, out, lse)[0] for half in halves)
    exact = [x.to(F64).requires_grad_() for x in (q, k, v)]
    (want,) = torch.autograd.grad(textbook(*exact)[0], exact[:1], dout.to(F64))
    torch.testing.assert_close(got.to(F64), want, rtol=1e-5, atol=1e-5)


def test_a_rescaled_output(seed: int) -> None:
    """A loss through a factor on out: D is rowsum(dout o out), of the out that is given."""
    q, k, v, dout = drawn(seed, *[(1, 9, 2, 8)] * 4)
    out, lse = textbook(q, k, v)
    got = broadhead.mha_bwd(dout, q, k, v, 3.0 * out, lse)[0]
    # dS = P o (dP - 3 D)
    p = torch.exp(torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5 - lse.unsqueeze(3))
    dp = torch.einsum("bihd,bjhd->bhij", dout, v)
    delta = 3.0 * (dout * out).sum(-1).transpose(1, 2).unsqueeze(3)
    want = torch.einsum("bhij,bjhd->bihd", p * (dp - delta), k) * 8**-0.5
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_rows_without_keys_have_no_gradient(softcap: float, seed: int) -> None:
    """Rows whose LSE is -inf, with anything in q, dout and out: zeros, and none of it in dk and dv."""
    q, k, v, dout = drawn(seed, (1, 6, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8), (1, 6, 2, 8), dtype=torch.float32)
    out, lse = broadhead.mha_fwd(q, k, v, causal=True, softcap=softcap)
    assert (lse[:, :, :2] == float("-inf")).all()
    want = broadhead.mha_bwd(dout, q, k, v, out, lse, causal=True, softcap=softcap)
    for x in (q, dout, out):
        x[:, :2] = float("nan")
    got = broadhead.mha_bwd(dout, q, k, v, out, lse, causal=True, softcap=softcap)
    assert (got[0][:, :2] == 0).all()
    torch.testing.assert_close(got[:3], want[:3], rtol=1e-6, atol=1e-6)
    lse[:, :, 3] = float("-inf")
    got = broadhead.mha_bwd(dout, q, k, v, out, lse, causal=True, softcap=softcap)
    assert (got[0][:, 3] == 0).all() and got[1].isfinite().all() and (got[0][:, 4] != 0).any()


SHARED = {
    "pages": {"page_table": torch.zeros(1024, 1, dtype=torch.int32)},
    "batch_index": {"kv_batch_idx": torch.zeros(1024, dtype=torch.int32)},
}


@pytest.mark.parametrize("sharing", SHARED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_that_sequences_share(dtype: torch.dtype, sharing: str, seed: int) -> None:
    """1024 sequences over the same keys: their gradients are added before they are rounded, in one order."""
    q, k = drawn(seed, (1024, 1, 1, 32), (1, 8, 1, 32), dtype=dtype)

    def gradients(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        k_, v_ = k.clone().requires_grad_(), k.clone().requires_grad_()
        out, _ = broadhead.mha_fwd(q, k_, v_, **SHARED[sharing])
        return torch.autograd.grad(out, (k_, v_), torch.ones_like(out))

    exact = (q.double(), k.double().expand(1024, -1, -1, -1))
    leaves = [k.double().requires_grad_() for _ in range(2)]
    out, _ = textbook(exact[0], *(leaf.expand(1024, -1, -1, -1) for leaf in leaves))
    truth = torch.autograd.grad(out, leaves, torch.ones_like(out))
    found = gradients(q, k)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[1].double(), truth[1], rtol=2 * eps, atol=1e-3)
    # dk also has the rounding of out: D moves by as much as a row of 32 ones adds up of it.
    torch.testing.assert_close(found[0].double(), truth[0], rtol=2 * eps, atol=1e-3 + 1024**0.5 * 8 * eps)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(gradients(q, k), found))


def test_shared_rows_of_bf16_are_summed_in_fp32() -> None:
    """v.grad of shared rows in bf16: within one rounding of the sum."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1024, 1, 1, 32, generator=generator).bfloat16()
    k = torch.randn(1, 8, 1, 32, generator=generator).bfloat16()
    v = k.clone().requires_grad_()
    out, _ = broadhead.mha_fwd(q, k, v, page_table=torch.zeros(1024, 1, dtype=torch.int32))
    out.backward(torch.ones_like(out))
    weights = torch.softmax(q[:, 0, 0].double() @ k[0, :, 0].double().T * 32**-0.5, dim=1).sum(dim=0)
    assert v.grad is not None
    torch.testing.assert_close(v.grad[0, :, 0, 0].double(), weights, rtol=2**-8, atol=0)


LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "varlen": {"cu_seqlens_q": int32(0, 3, 3, 7), "cu_seqlens_k": int32(0, 5, 6, 11)},
    "varlen_used": {
        "cu_seqlens_q": int32(0, 3, 4, 7), "cu_seqlens_k": int32(0, 5, 6, 11), "seqused_q": int32(2, 1, 3),
        "seqused_k": int32(4, 1, 5),
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_gradcheck(layout: str, causal: bool, seed: int) -> None:
    """Against finite differences in fp64, through the public function and through mha_bwd without out and LSE."""
    options = LAYOUTS[layout]
    packed = bool(options)
    lead_q, lead_k = ((7,), (11,)) if packed else ((2, 3), (2, 5))
    q, k, v = drawn(seed, (*lead_q, 4, 8), (*lead_k, 2, 8), (*lead_k, 2, 8))
    lengths = {"max_seqlen_q": 4, "max_seqlen_k": 5} if packed else {}

    def function(*leaves: Tensor) -> Tensor:
        return broadhead.mha_fwd(*leaves, causal=causal, **options, **lengths)[0]

    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)  # every element takes minutes
    out = function(*leaves)
    dout = torch.randn_like(out)
    want = torch.autograd.grad(out, leaves, dout)
    for results in (
        (None, None),
        tuple(x.detach() for x in broadhead.mha_fwd(*leaves, causal=causal, **options, **lengths)),
    ):
        got = broadhead.mha_bwd(dout, *(x.detach() for x in leaves), *results, causal=causal, **options, **lengths)
        torch.testing.assert_close(got[:3], want, rtol=1e-5, atol=1e-6)


def test_gradients_below_autograd(seed: int) -> None:
    """Inside of an operator of torch.library, where nothing requires grad."""
    q, k, v, dout = drawn(seed, *[(10, 2, 16)] * 4, dtype=torch.float32)
    cu = int32(0, 4, 10)
    want = broadhead.mha_bwd(dout, q, k, v, None, None, cu, cu, None, None, 6, 6)
    with torch._C._AutoDispatchBelowAutograd():
        got = broadhead.mha_bwd(dout, q, k, v, None, None, cu, cu, None, None, 6, 6)
    torch.testing.assert_close(got[:3], want[:3], rtol=0, atol=0)


def test_a_second_derivative_is_refused_by_name(seed: int) -> None:
    q, k, v = (x.requires_grad_() for x in drawn(seed, *[(1, 4, 2, 8)] * 3))
    out = broadhead.flash_attn_func(q, k, v)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(broadhead.UnsupportedError, match=r"second derivative .*scaled_dot_product_attention"):
        dq.sum().backward()


def test_what_is_given_is_checked() -> None:
    x = torch.randn(2, 3, 2, 8)
    out, lse = broadhead.mha_fwd(x, x, x)
    for given, words in (
        ((out[:1], lse), r"mha_bwd: out must have shape .*\(2, 3, 2, 8\), got \(1, 3, 2, 8\)"),
        ((out.half(), lse), r"mha_bwd: out must have the dtype"),
        ((out, lse.transpose(1, 2)), r"mha_bwd: softmax_lse must have shape"),
        ((out, lse.half()), r"mha_bwd: softmax_lse must be fp32"),
        ((out, 1.0), r"mha_bwd: softmax_lse must be a tensor"),
    ):
        with pytest.raises(broadhead.BroadheadError, match=words):
            broadhead.mha_bwd(x, x, x, x, *given)


FLOAT8_LAYOUTS = {
    "dense": lambda x: broadhead.flash_attn_func(*x),
    "varlen": lambda x: broadhead.flash_attn_varlen_func(
        *(t.flatten(0, 1) for t in x), int32(0, 16, 32), int32(0, 16, 32), 16, 16
    ),
    "kvcache": lambda x: broadhead.flash_attn_with_kvcache(*x),
    "mha_fwd": lambda x: broadhead.mha_fwd(*x),
    "paged": lambda x: broadhead.mha_fwd(*x, page_table=int32(0, 1).view(2, 1)),
}


@pytest.mark.parametrize("which", range(3), ids=["q", "k", "v"])
@pytest.mark.parametrize("layout", FLOAT8_LAYOUTS)
def test_float8_inputs_that_require_grad(layout: str, which: int) -> None:
    """Refused by name in every layout alike; without gradients they run."""
    x = [torch.randn(2, 16, 4, 64).to(torch.float8_e4m3fn) for _ in range(3)]
    x[which].requires_grad_()
    with pytest.raises(broadhead.UnsupportedError, match=r": attention of torch.float8_e4m3fn inputs has no gradient"):
        FLOAT8_LAYOUTS[layout](x)
    with torch.no_grad():
        FLOAT8_LAYOUTS[layout](x)


def test_float8_gradients_by_mha_bwd() -> None:
    x = torch.randn(2, 16, 4, 64).to(torch.float8_e4m3fn)
    with pytest.raises(broadhead.UnsupportedError, match=r"mha_bwd: attention of torch.float8_e4m3fn inputs has no"):
        broadhead.mha_bwd(torch.randn(2, 16, 4, 64).bfloat16(), x, x, x)


def test_anything_merges_and_differentiates(seed: int) -> None:
    """Rows that no part has keys for: merging them has gradients of 0, not NaN."""
    rng = random.Random(seed)
    outs = [x.requires_grad_() for x in drawn(seed, *[(1, 5, 2, 8)] * 2)]
    lses = [x.requires_grad_() for x in drawn(seed + 1, *[(1, 2, 5)] * 2)]
    empty = rng.randrange(5)
    with torch.no_grad():
        for lse in lses:
            lse[:, :, empty] = float("-inf")
        lses[0][:, :, (empty + 1) % 5] = float("-inf")
    out, lse = broadhead.merge_attn_states(outs[0], lses[0], outs[1], lses[1])
    (out.sum() + lse.masked_fill(lse == float("-inf"), 0.0).sum()).backward()
    for leaf in (*outs, *lses):
        assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert (outs[0].grad[:, empty] == 0).all() and (lses[1].grad[:, :, empty] == 0).all()
