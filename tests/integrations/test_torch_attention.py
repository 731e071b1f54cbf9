"""torch's SDPA, varlen_attn and aten's flash operators on broadhead: on a CPU, against the oracle."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import broadhead
import oracle
import pytest
import torch
import torch.nn.functional as F
from sdpa_calls import check, check_packed, make, offsets
from torch import Tensor

if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
    pytest.skip(f"torch {torch.__version__} has no registry of flash attention", allow_module_level=True)

from broadhead.integrations import torch_attention
from torch.nn.attention.varlen import AuxRequest, varlen_attn

aten: Any = torch.ops.aten
FULL, CAUSAL = (-1, -1), (-1, 0)
PAGED = "block_table" in str(aten._flash_attention_forward.default._schema)
needs_pages = pytest.mark.skipif(not PAGED, reason=f"varlen_attn of torch {torch.__version__} takes no block_table")


@pytest.fixture(autouse=True)
def activated() -> Iterator[None]:
    with torch_attention.activate("cpu"):
        yield


def ran() -> str:
    """What ran last in this thread."""
    return broadhead.last_dispatch()[2]


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has run yet: `ran` tells whether the test's own calls reached broadhead."""
    from broadhead.run.fallback import _NOTHING, state

    state.last = _NOTHING


def rule(head_dim: int, window: tuple[int, int] = FULL, scale: float | None = None) -> oracle.Rule:
    return oracle.Rule(scale=head_dim**-0.5 if scale is None else scale, window=window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "heads_kv", "head_dim"), [(3, 3, 64), (8, 2, 128), (4, 1, 512)])
def test_sdpa(
    heads: int, heads_kv: int, head_dim: int, causal: bool, dtype: torch.dtype, rng: random.Random, forgetful: None
) -> None:
    length = rng.randint(8, 70)
    keys = length if causal else rng.randint(8, 70)  # over few keys, weights cancel in the naive gradient alone
    inputs = make((2, heads, length, head_dim), (2, heads_kv, keys, head_dim), dtype=dtype)
    out = F.scaled_dot_product_attention(*inputs, is_causal=causal, enable_gqa=heads != heads_kv)
    assert "cpu device" in ran(), "broadhead did not run"
    check(inputs, out, rule(head_dim, CAUSAL if causal else FULL))


def test_sdpa_takes_views_and_a_scale(rng: random.Random) -> None:
    """As models call it: heads before tokens by a transpose of what a projection gives; scale of Gemma 4."""
    length = rng.randint(2, 40)
    packed = torch.randn(2, length, 3, 4, 32) * 0.4
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in packed.unbind(2))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    check((q, k, v), out, rule(32, CAUSAL, 1.0))


def test_sdpa_under_no_grad_and_in_inference_mode(forgetful: None) -> None:
    inputs = make((1, 4, 9, 32), (1, 2, 9, 32))
    right = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
        assert torch.equal(out, right) and not out.requires_grad


def calls_left_to_torch() -> dict[str, tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]]:
    square, oblong = make((1, 2, 6, 16), (1, 2, 6, 16)), make((1, 2, 5, 16), (1, 2, 8, 16))
    return {
        "a mask": (square, {"attn_mask": torch.rand(6, 6) > 0.3}),
        "causal from the first key on": (oblong, {"is_causal": True}),
        "columns not in eights": (make((1, 2, 6, 20), (1, 2, 6, 20)), {}),
        "broadcast batches": (make((3, 2, 6, 16), (1, 2, 6, 16)), {}),
        "three dimensions": (make((2, 6, 16), (2, 6, 16)), {}),
    }


@pytest.mark.parametrize("name", calls_left_to_torch())
def test_what_is_left_to_torch(name: str, forgetful: None) -> None:
    inputs, options = calls_left_to_torch()[name]
    out = F.scaled_dot_product_attention(*inputs, **options)
    assert "nothing ran" in ran(), "broadhead ran"
    doubles = [x.detach().double() for x in inputs]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        right = F.scaled_dot_product_attention(*doubles, **options)
    torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-5)


def test_a_user_who_disables_flash_gets_none(forgetful: None) -> None:
    inputs = make((1, 2, 6, 16), (1, 2, 6, 16))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        F.scaled_dot_product_attention(*inputs)
    assert "nothing ran" in ran()


def test_dropout_of_sdpa_is_left_to_torch(forgetful: None) -> None:
    inputs = make((1, 2, 64, 16), (1, 2, 64, 16))
    out = F.scaled_dot_product_attention(*inputs, dropout_p=0.5)
    assert "nothing ran" in ran()
    assert not torch.allclose(out, F.scaled_dot_product_attention(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [FULL, CAUSAL, (3, 0), (4, 2)])
def test_varlen_attn(window: tuple[int, int], dtype: torch.dtype, rng: random.Random, forgetful: None) -> None:
    lengths = [rng.randint(1, 30) for _ in range(4)]
    cu = offsets(lengths)
    heads_kv = 2 if PAGED else 6  # enable_gqa came with block_table
    inputs = make((sum(lengths), 6, 40), (sum(lengths), heads_kv, 40), dtype=dtype)
    gqa = {"enable_gqa": True} if PAGED else {}
    out, lse = varlen_attn(
        *inputs, cu, cu, max(lengths), max(lengths), window_size=window, return_aux=AuxRequest(lse=True), **gqa
    )
    assert "cpu device" in ran(), "broadhead did not run"
    check_packed(inputs, cu, cu, out, rule(40, window), lse)


def test_varlen_attn_of_more_keys_than_queries(rng: random.Random) -> None:
    """Offsets of their own, a sequence without queries, and a scale: the causal mask ends at the last key."""
    queries, keys = [5, 0, 1, 8], [9, 4, 17, 8]
    cu_q, cu_k = offsets(queries), offsets(keys)
    inputs = make((sum(queries), 2, 256), (sum(keys), 2, 256))
    out = varlen_attn(*inputs, cu_q, cu_k, max(queries), max(keys), window_size=CAUSAL, scale=0.05)
    check_packed(inputs, cu_q, cu_k, out, rule(256, CAUSAL, 0.05))


@needs_pages
@pytest.mark.parametrize("written", [False, True])
def test_varlen_attn_over_pages(written: bool, rng: random.Random) -> None:
    from torch.nn.attention.varlen import varlen_attn_out

    queries, keys, page_size = [1, 4, 2], [7, 18, 2], 8
    cu_q, used = offsets(queries), torch.tensor(keys, dtype=torch.int32)
    pages = torch.randperm(9).view(3, 3).to(torch.int32)
    q, (k, v) = torch.randn(sum(queries), 4, 64), torch.randn(2, 9, page_size, 2, 64)
    options = {"window_size": CAUSAL, "enable_gqa": True, "seqused_k": used, "block_table": pages}
    with torch.no_grad():
        if written:
            out = torch.full_like(q, float("nan"))
            got = varlen_attn_out(out, q, k, v, cu_q, None, max(queries), 24, **options)
            assert isinstance(got, Tensor) and got.data_ptr() == out.data_ptr()
        else:
            out = varlen_attn(q, k, v, cu_q, None, max(queries), 24, **options)
    for b in range(3):
        mine, theirs = (x[pages[b].long()].flatten(0, 1)[: keys[b]] for x in (k, v))
        right, _ = oracle.attention(q[cu_q[b] : cu_q[b + 1]].double(), mine.double(), theirs.double(), rule(64, CAUSAL))
        torch.testing.assert_close(out[cu_q[b] : cu_q[b + 1]].double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_aten_operators_have_the_results_of_their_contract(causal: bool) -> None:
    """What ring attention reads: strides of query, an LSE (B, H, S), no lengths, and the state of no dropout."""
    q, k, v = (x.detach() for x in make((2, 4, 7, 16), (2, 2, 11, 16)))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    out, lse, cu_q, cu_k, max_q, max_k, state, unused, mask = aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, scale=0.25
    )
    assert out.stride() == q.stride() and lse.shape == (2, 4, 7) and lse.is_contiguous()
    assert (cu_q, cu_k, max_q, max_k) == (None, None, 7, 11)
    assert state.dtype == unused.dtype == torch.uint64 and state.shape == (2,) and unused.shape == ()
    assert mask.numel() == 0
    dout = torch.randn_like(out)
    grads = aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, None, None, 7, 11, 0.0, causal, state, unused, scale=0.25
    )
    assert [g.stride() for g in grads] == [x.stride() for x in (q, k, v)]
    # A causal mask of these operators ends at the last key.
    check((q, k, v), out, rule(16, CAUSAL if causal else FULL, 0.25), lse=lse, grads=grads, dout=dout)


def test_gradients_of_a_part_of_the_keys() -> None:
    """Ring attention: out and LSE of the whole give each part of the keys its gradient of the whole."""
    inputs = make((1, 4, 6, 32), (1, 2, 10, 32))
    q, k, v = (x.detach() for x in inputs)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
    dout, state = torch.randn_like(out), torch.zeros(2, dtype=torch.uint64)
    parts = [
        aten._scaled_dot_product_flash_attention_backward(
            dout, q, a, b, out, lse, None, None, 6, a.shape[2], 0.0, False, state, state[0]
        )
        for a, b in zip(k.split([7, 3], 2), v.split([7, 3], 2))
    ]
    grads = (parts[0][0] + parts[1][0], *(torch.cat(pair, 2) for pair in zip(parts[0][1:], parts[1][1:])))
    check(inputs, out, rule(32), lse=lse, grads=grads, dout=dout)


def test_deterministic_algorithms_are_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    from broadhead.integrations.torch_attention import kernels

    asked: list[int] = []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["num_splits"])
        return broadhead.mha_fwd(*args, **kwargs)

    monkeypatch.setattr(kernels, "mha_fwd", recorded)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: len(asked) == 1)
    inputs = make((1, 2, 6, 16), (1, 2, 6, 16))
    for _ in range(2):
        F.scaled_dot_product_attention(*inputs)
    assert asked == [0, 1]


def refusals() -> dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]]:
    x = torch.randn(1, 4, 2, 16)
    dense = (x, x, x, None, None, 4, 4)
    e4m3 = x.to(torch.float8_e4m3fn)
    return {
        "dropout": ("dropout_p must be 0, got 0.25", (*dense, 0.25, False, False), {}),
        "mask": ("return_debug_mask must be False", (*dense, 0.0, False, True), {}),
        "alibi": ("alibi_slopes must be None", (*dense, 0.0, False, False), {"alibi_slopes": torch.ones(2)}),
        "float8": ("query must be bf16 or fp16", (e4m3, e4m3, e4m3, *dense[3:], 0.0, False, False), {}),
    }


@pytest.mark.parametrize("name", refusals())
def test_refused_by_name(name: str) -> None:
    text, args, kwargs = refusals()[name]
    with pytest.raises(broadhead.UnsupportedError, match=text) as caught:
        aten._flash_attention_forward(*args, **kwargs)
    assert "_flash_attention_forward on broadhead" in str(caught.value)
    assert "restore_flash_attention_impl" in str(caught.value)


@pytest.mark.parametrize("transposed", [False, True])
def test_compiled_code_runs_it(transposed: bool, forgetful: None) -> None:
    """The strides that aten's fake implementations promise are those that come."""
    inputs = make((2, 4, 12, 16), (2, 2, 12, 16))
    if transposed:
        inputs = tuple(x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs)  # type: ignore[assignment]
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    out = attend(*inputs)
    assert "cpu device" in ran(), "broadhead did not run"
    check(inputs, out, rule(16, CAUSAL))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x.detach()) for x in inputs]
        promised = aten._scaled_dot_product_flash_attention(*fakes)[0]
    assert promised.stride() == out.stride()
