"""slime's own attention with learnable softmax runs on ours, and our layer in its place gives the same."""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from broadhead.errors import InvalidArgumentError
from broadhead.integrations import slime as integration
from clients import client
from on_device import DEVICE, WIDE
from oracle import Rule, attention
from tolerance import GRADIENT_FACTOR, OUT_FACTOR, assert_close

LENGTHS = [7, 1, 24, 3]


class Mask(enum.Enum):
    """The name of Megatron's mask that slime hands on."""

    padding_causal = 5


@pytest.fixture
def installed() -> Any:
    surface = client("compat").install("flash_attn")
    yield surface
    surface.uninstall()


def judge(out: torch.Tensor, gradients: Any, leaves: list[torch.Tensor], rule: Rule, dout: torch.Tensor) -> None:
    """Output and gradients of q, k, v and the offsets against the oracle."""
    results = []
    for dtype in (torch.float64, WIDE):
        given = [x.detach().to(dtype).requires_grad_() for x in leaves]
        parts = zip(*(x.split(LENGTHS) for x in given[:3]))
        made = torch.cat([attention(*each, rule, sinks=given[3])[0] for each in parts])
        results.append([made.detach(), *torch.autograd.grad(made, given, dout.to(dtype))])
    for name, got, truth, naive in zip(("out", "dq", "dk", "dv", "doffset"), (out.detach(), *gradients), *results):
        assert_close(name, got, truth, naive, WIDE, OUT_FACTOR if name == "out" else GRADIENT_FACTOR, "slime")


@pytest.mark.attends("forward", "backward")
@pytest.mark.parametrize("window", [(-1, -1), (5, 0)])
@pytest.mark.parametrize("head_dim", [32, 256])
def test_learnable_softmax(installed: Any, window: tuple[int, int], head_dim: int) -> None:
    """Output, gradients and the gradient of the offset: slime's function over ours, and our layer in its place."""
    theirs = client("slime", "slime_plugins.models.learnable_softmax_attention")
    assert theirs.flash_attn_varlen_func.__module__.startswith("broadhead.")
    total = sum(LENGTHS)
    offsets = torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0).int()
    q, k, v = (torch.randn(total, heads, head_dim, device=DEVICE).to(WIDE).requires_grad_() for heads in (4, 2, 2))
    offset = torch.randn(4, device=DEVICE).requires_grad_()
    leaves = [q, k, v, offset]
    out = theirs.learnable_softmax_flash_attn_varlen(
        q, k, v, offsets, offsets, max(LENGTHS), max(LENGTHS), offset, causal=True, window_size=window
    )
    seed = torch.randn_like(out)
    judge(out, torch.autograd.grad(out, leaves, seed), leaves, Rule(head_dim**-0.5, (window[0], 0)), seed)

    config = SimpleNamespace(
        num_attention_heads=4, kv_channels=head_dim, attention_dropout=0.0, params_dtype=WIDE,
        init_method=torch.nn.init.zeros_, softmax_type="learnable", use_cpu_initialization=True, window_size=window,
        window_attn_skip_freq=None,
    )  # fmt: skip
    ours = integration.BroadheadCoreAttention(config, 1, Mask.padding_causal, "self").to(DEVICE)
    ours.load_state_dict({"softmax_offset": offset.detach()})
    leaves = [q, k, v, ours.softmax_offset]
    packed = SimpleNamespace(
        qkv_format="thd", cu_seqlens_q=offsets, cu_seqlens_kv=offsets, max_seqlen_q=24, max_seqlen_kv=24
    )
    mine = ours(q, k, v, None, packed_seq_params=packed)
    gradients = torch.autograd.grad(mine, leaves, seed.flatten(1))
    judge(mine.view_as(seed), gradients, leaves, Rule(head_dim**-0.5, (window[0], 0)), seed)


def test_enable_leaves_another_package_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "_FLASH_ATTN_2", ("torch",))
    with pytest.raises(InvalidArgumentError, match=r"slime: torch \S+ is installed .*override=True"):
        integration.enable()


def test_enable() -> None:
    client("compat")
    installation = integration.enable(override=True)
    try:
        from flash_attn.flash_attn_interface import _wrapped_flash_attn_varlen_backward, flash_attn_varlen_func

        assert callable(_wrapped_flash_attn_varlen_backward) and callable(flash_attn_varlen_func)
    finally:
        installation.uninstall()
