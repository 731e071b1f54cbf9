"""Core attention for Megatron and slime: against the fp64 oracle, in module specs, and in Megatron's own layers."""

from __future__ import annotations

import enum
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from broadhead.errors import InvalidArgumentError, UnsupportedError
from broadhead.integrations import megatron
from broadhead.integrations.core_attention import BroadheadCoreAttention
from broadhead.integrations.megatron import use_core_attention
from clients import client
from oracle import Rule, attention
from sglang_batch import assert_near, make_requests


class Mask(enum.Enum):
    """Megatron's names of masks."""

    causal = 2
    no_mask = 3
    padding = 1
    padding_causal = 5
    arbitrary = 4


def config(**changes: Any) -> SimpleNamespace:
    fields = {
        "num_attention_heads": 4, "kv_channels": 32, "attention_dropout": 0.0, "params_dtype": torch.float64,
        "init_method": torch.nn.init.normal_, "softmax_type": "vanilla", "use_cpu_initialization": True,
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


def core(mask: Mask = Mask.causal, layer: int = 1, **changes: Any) -> BroadheadCoreAttention:
    return BroadheadCoreAttention(config(**changes), layer, mask, "self")


def inputs(*sizes: tuple[int, int, int]) -> list[torch.Tensor]:
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


def check(got: torch.Tensor, want: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    """The same output and gradients, of inputs in fp64."""
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    seed = torch.randn_like(want)
    for mine, other in zip(torch.autograd.grad(got, leaves, seed), torch.autograd.grad(want, leaves, seed)):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("mask", [Mask.causal, Mask.no_mask, Mask.padding])
@pytest.mark.parametrize("softmax", ["vanilla", "learnable", "off-by-one"])
def test_dense(mask: Mask, softmax: str) -> None:
    length, batch = 13, 2
    q, k, v = (torch.randn(length, batch, heads, 32, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    module = core(mask, softmax_type=softmax)
    out = module(q, k, v, None)
    assert out.shape == (length, batch, 4 * 32)
    rule = Rule(32**-0.5, (-1, 0) if mask is Mask.causal else (-1, -1))
    sinks = module.softmax_offset
    want = [attention(q[:, b], k[:, b], v[:, b], rule, sinks=sinks)[0].flatten(1) for b in range(batch)]
    leaves = [q, k, v, *module.parameters()]
    assert len(leaves) == (4 if softmax == "learnable" else 3)
    check(out, torch.stack(want, dim=1), leaves)


@pytest.mark.parametrize("padded", [False, True])
def test_packed(padded: bool) -> None:
    """Sequences in places that are longer than they are: what lies between is not read, and takes no gradient."""
    lengths, places = [5, 0, 17, 3], [8, 4, 17, 6] if padded else [5, 0, 17, 3]
    starts = torch.tensor([0, *places]).cumsum(0).int()
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = inputs((sum(places), 4, 32), (sum(places), 4, 32), (sum(places), 4, 16))
    packed = SimpleNamespace(
        qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=17, max_seqlen_kv=17,
        cu_seqlens_q_padded=starts if padded else None, cu_seqlens_kv_padded=starts if padded else None,
    )  # fmt: skip
    out = core(Mask.padding_causal)(q, k, v, None, packed_seq_params=packed)
    assert out.shape == (sum(places), 4 * 16)
    rule = Rule(32**-0.5, (-1, 0))
    rows = [slice(int(start), int(start) + length) for start, length in zip(starts, lengths)]
    want = torch.cat([attention(q[row], k[row], v[row], rule)[0].flatten(1) for row in rows])
    check(torch.cat([out[row] for row in rows]), want, [q, k, v])


@pytest.mark.parametrize("skip, windowed", [(None, [1, 2]), (2, [1, 3]), ([1, 0, 1], [1, 3])])
def test_window_of_a_layer(skip: Any, windowed: list[int]) -> None:
    q, k, v = (torch.randn(24, 1, 4, 32, dtype=torch.float64) for _ in range(3))
    for layer in (1, 2, 3):
        got = core(layer=layer, window_size=(5, 0), window_attn_skip_freq=skip)(q, k, v, None)
        window = (5, 0) if layer in windowed or skip is None else (-1, 0)
        want = attention(q[:, 0], k[:, 0], v[:, 0], Rule(32**-0.5, window))[0]
        torch.testing.assert_close(got[:, 0], want.flatten(1))


def test_scale() -> None:
    assert core().softmax_scale == pytest.approx(32**-0.5)
    assert core(layer=4, apply_query_key_layer_scaling=True).softmax_scale == pytest.approx(32**-0.5 / 4)
    module = BroadheadCoreAttention(config(), 1, Mask.causal, "self", softmax_scale=1.0, k_channels=64)
    assert module.softmax_scale == 1.0
    assert BroadheadCoreAttention(config(), 1, Mask.causal, "self", k_channels=64).softmax_scale == pytest.approx(0.125)


@pytest.mark.parametrize(
    "changes, words", [({"attention_dropout": 0.1}, "attention_dropout"), ({"context_parallel_size": 2}, "Transformer")]
)
def test_what_has_no_kernel_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        core(**changes)


def test_masks_that_have_no_kernel_are_refused() -> None:
    q = torch.randn(3, 1, 4, 32)
    with pytest.raises(UnsupportedError, match="arbitrary"):
        core(Mask.arbitrary)(q, q, q, torch.ones(1, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(UnsupportedError, match="padding"):
        core(Mask.padding)(q, q, q, torch.ones(1, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(UnsupportedError, match="attention_bias"):
        core()(q, q, q, None, attention_bias=q)
    with pytest.raises(InvalidArgumentError, match="softmax_type"):
        core(softmax_type="other")


def test_spec_without_attention() -> None:
    with pytest.raises(InvalidArgumentError, match="core_attention"):
        use_core_attention(SimpleNamespace(submodules=SimpleNamespace(mlp=object)))


def test_megatron_layer() -> None:
    """A layer of Megatron's local spec gives the outputs and gradients of its own unfused attention."""
    client("megatron")
    from megatron_model import make_layer, run_layer

    theirs, ours = make_layer(replaced=False), make_layer(replaced=True)
    assert type(ours.self_attention.core_attention) is BroadheadCoreAttention
    assert type(theirs.self_attention.core_attention) is not BroadheadCoreAttention
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(19, 2, theirs.config.hidden_size)
    for mine, other in zip(run_layer(ours, x), run_layer(theirs, x)):
        torch.testing.assert_close(mine, other, rtol=2e-4, atol=2e-5)


@pytest.fixture
def inference() -> Any:
    """Megatron's module of attention, imported anew while broadhead gives flash_attn_3."""

    source = client("megatron", "megatron.core.transformer.attention").__file__
    client("compat")
    installation = broadhead_surface()
    spec = importlib.util.spec_from_file_location("megatron.core.transformer.attention_again", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]
        installation.uninstall()


def broadhead_surface() -> Any:
    from broadhead.integrations.surfaces import install_surface

    return install_surface("megatron", "flash_attn_interface", override=True)


@pytest.mark.parametrize("head_dim", [64, 512])
def test_megatron_inference(inference: Any, head_dim: int) -> None:
    """Its wrapper, which builds the call of paged prefill from our signature, and its paged decode call."""
    assert inference.HAVE_FA3
    requests = make_requests(64, [7, 1, 30], head_dims=(head_dim, head_dim))
    pages = requests.paged(requests.k_pool), requests.paged(requests.v_pool)
    options = (30, 200, requests.cu_seqlens_q, requests.cache_seqlens, requests.page_table, head_dim**-0.5)
    out = inference.Attention._flash_attention_3_forward_wrapper(
        SimpleNamespace(batch_invariant_mode=False), requests.q, *pages, *options
    )
    assert_near(out, requests, Rule(head_dim**-0.5, (-1, 0)))
    requests = make_requests(64, [1] * 4, head_dims=(head_dim, head_dim))
    out = inference.flash_attn3_with_kvcache(
        q=requests.q[:, None], k_cache=requests.paged(requests.k_pool), v_cache=requests.paged(requests.v_pool),
        cache_seqlens=requests.cache_seqlens, softmax_scale=head_dim**-0.5, causal=True, page_table=requests.page_table,
        num_splits=0,
    )  # fmt: skip
    assert_near(out, requests, Rule(head_dim**-0.5, (-1, 0)))


def test_enable_comes_before_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, megatron._ATTENTION, SimpleNamespace(HAVE_FA3=False))  # type: ignore[arg-type]
    monkeypatch.setattr(megatron, "_FLASH_ATTN_3", ())
    with pytest.raises(InvalidArgumentError, match=r"already imported.*before the first import"):
        megatron.enable()
    monkeypatch.setattr(megatron, "_FLASH_ATTN_3", ("torch",))
    with pytest.raises(InvalidArgumentError, match=r"megatron: torch \S+ is installed"):
        megatron.enable()
