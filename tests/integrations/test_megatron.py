"""Core attention for Megatron and slime: against the fp64 oracle, in module specs, and in Megatron's own layers."""

from __future__ import annotations

import enum
import importlib.util
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from broadhead.errors import InvalidArgumentError, UnsupportedError
from broadhead.integrations import megatron
from broadhead.integrations.core_attention import BroadheadCoreAttention
from broadhead.integrations.megatron import use_core_attention
from clients import client
from on_device import DEVICE, WIDE
from oracle import Rule, attention
from sglang_batch import assert_near, make_requests
from tolerance import GRADIENT_FACTOR, OUT_FACTOR, assert_close


class Mask(enum.Enum):
    """Megatron's names of masks."""

    causal = 2
    no_mask = 3
    padding = 1
    padding_causal = 5
    arbitrary = 4


def config(**changes: Any) -> SimpleNamespace:
    fields = {
        "num_attention_heads": 4, "kv_channels": 32, "attention_dropout": 0.0, "params_dtype": WIDE,
        "init_method": torch.nn.init.normal_, "softmax_type": "vanilla", "use_cpu_initialization": True,
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


def core(mask: Mask = Mask.causal, layer: int = 1, **changes: Any) -> BroadheadCoreAttention:
    return BroadheadCoreAttention(config(**changes), layer, mask, "self").to(DEVICE)


def inputs(*sizes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(size, device=DEVICE).to(WIDE).requires_grad_() for size in sizes]


def check(got: torch.Tensor, want: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> None:
    """Output and gradients are those of ``want(*leaves)`` by the oracle."""
    seed, results = torch.randn_like(got), []
    for dtype in (torch.float64, WIDE):
        given = [x.detach().to(dtype).requires_grad_() for x in leaves]
        out = want(*given)
        results.append([out.detach(), *torch.autograd.grad(out, given, seed.to(dtype))])
    found = [got.detach(), *torch.autograd.grad(got, leaves, seed)]
    for i, (mine, truth, naive) in enumerate(zip(found, *results)):
        assert_close(f"result {i}", mine, truth, naive, WIDE, GRADIENT_FACTOR if i else OUT_FACTOR, "core attention")


@pytest.mark.attends("forward", "backward")
@pytest.mark.parametrize("mask", [Mask.causal, Mask.no_mask, Mask.padding])
@pytest.mark.parametrize("softmax", ["vanilla", "learnable", "off-by-one"])
def test_dense(mask: Mask, softmax: str) -> None:
    length, batch = 13, 2
    q, k, v = inputs(*((length, batch, heads, 32) for heads in (4, 2, 2)))
    module = core(mask, softmax_type=softmax)
    out = module(q, k, v, None)
    assert out.shape == (length, batch, 4 * 32)
    rule = Rule(32**-0.5, (-1, 0) if mask is Mask.causal else (-1, -1))
    fixed = module.softmax_offset

    def want(*leaves: torch.Tensor) -> torch.Tensor:
        q, k, v, *learnt = leaves
        sinks = learnt[0] if learnt else None if fixed is None else fixed.to(q.dtype)
        return torch.stack(
            [attention(q[:, b], k[:, b], v[:, b], rule, sinks=sinks)[0].flatten(1) for b in range(batch)], dim=1
        )

    leaves = [q, k, v, *module.parameters()]
    assert len(leaves) == (4 if softmax == "learnable" else 3)
    check(out, want, leaves)


@pytest.mark.attends("forward", "backward")
@pytest.mark.parametrize("padded", [False, True])
def test_packed(padded: bool) -> None:
    """Sequences in places that are longer than they are: what lies between is not read, and takes no gradient."""
    lengths, places = [5, 0, 17, 3], [8, 4, 17, 6] if padded else [5, 0, 17, 3]
    starts = torch.tensor([0, *places], device=DEVICE).cumsum(0).int()
    cu = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    q, k, v = inputs((sum(places), 4, 32), (sum(places), 4, 32), (sum(places), 4, 16))
    packed = SimpleNamespace(
        qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=17, max_seqlen_kv=17,
        cu_seqlens_q_padded=starts if padded else None, cu_seqlens_kv_padded=starts if padded else None,
    )  # fmt: skip
    out = core(Mask.padding_causal)(q, k, v, None, packed_seq_params=packed)
    assert out.shape == (sum(places), 4 * 16)
    rule = Rule(32**-0.5, (-1, 0))
    rows = [slice(int(start), int(start) + length) for start, length in zip(starts, lengths)]

    def want(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cat([attention(q[row], k[row], v[row], rule)[0].flatten(1) for row in rows])

    check(torch.cat([out[row] for row in rows]), want, [q, k, v])


@pytest.mark.attends("forward", "backward")
@pytest.mark.parametrize("skip, windowed", [(None, [1, 2]), (2, [1, 3]), ([1, 0, 1], [1, 3])])
def test_window_of_a_layer(skip: Any, windowed: list[int]) -> None:
    leaves = inputs(*[(24, 1, 4, 32)] * 3)
    for layer in (1, 2, 3):
        got = core(layer=layer, window_size=(5, 0), window_attn_skip_freq=skip)(*leaves, None)
        rule = Rule(32**-0.5, (5, 0) if layer in windowed or skip is None else (-1, 0))
        check(got[:, 0], lambda *given: attention(*(x[:, 0] for x in given), rule)[0].flatten(1), leaves)  # noqa: B023


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


@pytest.mark.attends("forward", "backward")
def test_megatron_layer() -> None:
    """A layer of Megatron's local spec gives the outputs and gradients of its own unfused attention."""
    client("megatron")
    from megatron_model import make_layer, run_layer

    ours, theirs = make_layer(replaced=True, dtype=WIDE), make_layer(replaced=False, dtype=WIDE)
    exact = make_layer(replaced=False, dtype=torch.float32)
    assert type(ours.self_attention.core_attention) is BroadheadCoreAttention
    assert type(theirs.self_attention.core_attention) is not BroadheadCoreAttention
    for layer in (ours, exact):
        layer.load_state_dict(theirs.state_dict())
    x = torch.randn(19, 2, theirs.config.hidden_size, device=DEVICE).to(WIDE)
    results = (run_layer(layer, x.to(dtype)) for layer, dtype in ((ours, WIDE), (exact, torch.float32), (theirs, WIDE)))
    for i, (mine, truth, naive) in enumerate(zip(*results)):
        noise = 2e-4 * float(truth.abs().max()) if WIDE.itemsize == 4 else 0.0
        assert_close(f"result {i}", mine, truth, naive, WIDE, GRADIENT_FACTOR, "layer", noise)


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


@pytest.mark.attends("forward")
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
