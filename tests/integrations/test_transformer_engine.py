"""Transformer Engine: its context-parallel functions run on ours; the head dims that we take; what it is told."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from broadhead.integrations import transformer_engine as integration
from broadhead.plan.native import NO_KERNELS
from clients import client
from on_device import DEVICE, WIDE
from oracle import Rule, attention
from te_context_parallel import load
from tolerance import GRADIENT_FACTOR, OUT_FACTOR, assert_close


@pytest.fixture
def surface() -> Any:
    compat = client("compat")
    with compat.install("flash_attn_interface", override=True):
        yield sys.modules["flash_attn_interface"]


def sections(rank: int, ranks: int) -> list[tuple[int, str]]:
    """The keys' rank of every step of the ring, and what Transformer Engine calls the part of the mask."""
    steps = [(rank - step) % ranks for step in range(ranks)]
    return [
        (keys, "diagonal" if keys == rank else "lower-triangle" if keys < rank else "upper-triangle") for keys in steps
    ]


def chunks(x: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """The two chunks of a sequence ``(B, S, H, D)`` that a rank holds: ``(B, 2, S / 2 ranks, H, D)``."""
    parts = x.chunk(2 * ranks, dim=1)
    return torch.stack((parts[rank], parts[2 * ranks - 1 - rank]), dim=1)


def part(section: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    if section == "lower-triangle":
        k, v = k[:, :1], v[:, :1]
    elif section == "upper-triangle":
        q = q[:, 1:]
    return [x.flatten(1, 2).contiguous() for x in (q, k, v)]


def judge(
    found: dict[str, torch.Tensor], inputs: list[torch.Tensor], dout: torch.Tensor, rules: list[Rule], parts: int
) -> None:
    """out, dq, dk and dv of sequences against the oracle; each of ``parts`` of a sum may be rounded once."""
    results = []
    for dtype in (torch.float64, WIDE):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = torch.stack([attention(*(x[b] for x in leaves), rule)[0] for b, rule in enumerate(rules)])
        results.append([out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))])
    for name, truth, naive in zip(("out", "dq", "dk", "dv"), *results):
        noise = parts * torch.finfo(WIDE).eps * float(truth.abs().max())
        factor = OUT_FACTOR if name == "out" else GRADIENT_FACTOR
        assert_close(name, found[name], truth, naive, WIDE, factor, "context parallelism", noise)


@pytest.mark.attends("forward", "backward")
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("head_dim", [64, 512])
def test_ring(surface: Any, ranks: int, head_dim: int) -> None:
    """Every tile of a causal ring, merged by Transformer Engine; its backward from the merged out and softmax_lse."""
    te = load()
    length = 2 * ranks * 6
    q, k, v, dout = (torch.randn(2, length, heads, head_dim, device=DEVICE).to(WIDE) for heads in (4, 2, 2, 4))
    scale = head_dim**-0.5
    lengths = [None] * ranks
    got: dict[str, list[torch.Tensor]] = {name: [torch.empty(0)] * (2 * ranks) for name in ("out", "dq")}
    grads = [[torch.zeros_like(chunks(x.float(), rank, ranks)) for x in (k, v)] for rank in range(ranks)]
    for rank in range(ranks):
        mine = chunks(q, rank, ranks)
        tiles = []
        for keys, section in sections(rank, ranks):
            each = part(section, mine, chunks(k, keys, ranks), chunks(v, keys, ranks))
            options = {"softmax_scale": scale, "window_size_left": -1, "window_size_right": -1, "num_splits": 1}
            sizes = length // ranks
            out, lse, _ = te.cp_p2p_fwd_flash_attn(
                True, "bshd", options, surface._flash_attn_forward, sizes, sizes, False, None, None, *each, None, None,
                section,
            )  # fmt: skip
            tiles.append((section, out, lse))
        merged = tiles[0][2].clone()
        halves = merged.view(*merged.shape[:-1], 2, -1)
        for section, _, lse in tiles[1:]:
            if section == "upper-triangle":
                te.flash_attn_fwd_second_half_softmax_lse_correction(halves, lse)
            else:
                te.flash_attn_fwd_softmax_lse_correction(merged, lse)
        total = te.flash_attn_fwd_out_correction_init(tiles[0][1], merged, tiles[0][2], 1).view_as(mine)
        for section, out, lse in tiles[1:]:
            if section == "upper-triangle":
                te.flash_attn_fwd_second_half_out_correction(total, out, merged, lse, 1)
            else:
                te.flash_attn_fwd_out_correction(total.flatten(1, 2), out, merged, lse, 1)
        given = chunks(dout, rank, ranks)
        dq = torch.zeros_like(mine, dtype=torch.float32)
        for keys, section in sections(rank, ranks):
            each = part(section, mine, chunks(k, keys, ranks), chunks(v, keys, ranks))
            rows = slice(1, None) if section == "upper-triangle" else slice(None)
            out_part, dout_part = (x[:, rows].flatten(1, 2).contiguous() for x in (total, given))
            found = te.cp_p2p_bwd_flash_attn(
                True, "bshd", length // ranks, length // ranks, lengths, lengths, 0, ranks,
                {"softmax_scale": scale, "deterministic": False}, surface._flash_attn_backward, None, merged,
                halves[..., 1, :].contiguous(), False, None, None, *each, out_part, dout_part, section,
            )  # fmt: skip
            dq[:, rows] += found[0].unflatten(1, (-1, mine.shape[2]))
            cut = slice(0, 1) if section == "lower-triangle" else slice(None)
            for grad, new in zip(grads[keys], found[1:]):
                grad[:, cut] += new.unflatten(1, (-1, mine.shape[2]))
        for name, value in (("out", total), ("dq", dq)):
            got[name][rank], got[name][2 * ranks - 1 - rank] = value.unbind(1)
    found = {name: torch.cat(parts, dim=1) for name, parts in got.items()}
    for index, name in enumerate(("dk", "dv")):
        whole = [torch.empty(0)] * (2 * ranks)
        for rank in range(ranks):
            whole[rank], whole[2 * ranks - 1 - rank] = grads[rank][index].unbind(1)
        found[name] = torch.cat(whole, dim=1)
    judge(found, [q, k, v], dout, [Rule(scale, (-1, 0))] * 2, ranks)


@pytest.mark.attends("forward", "backward")
def test_packed_with_padding(surface: Any) -> None:
    """Transformer Engine's seqused under padded offsets, forward and backward; padding gives no gradient."""
    te = load()
    lengths, places = [5, 9, 2], [8, 12, 4]
    offsets, starts = (torch.tensor([0, *each], device=DEVICE).cumsum(0).int() for each in (lengths, places))
    q, k, v, dout = (torch.randn(24, heads, 64, device=DEVICE).to(WIDE) for heads in (4, 2, 2, 4))
    options = {"softmax_scale": 0.1, "window_size_left": -1, "window_size_right": -1}
    out, lse, _ = te.cp_p2p_fwd_flash_attn(
        True, "thd", options, surface._flash_attn_forward, 12, 12, True, starts, starts, q, k, v, offsets, offsets,
        "diagonal",
    )  # fmt: skip
    assert lse.shape == (4, 24)
    found = te.cp_p2p_bwd_flash_attn(
        True, "thd", 12, 12, [offsets], [offsets], 0, 1, {"softmax_scale": 0.1, "deterministic": True},
        surface._flash_attn_backward, None, lse, None, True, starts, starts, q, k, v, out, dout, "diagonal",
    )  # fmt: skip
    dead = torch.ones(24, dtype=torch.bool, device=DEVICE)
    for start, length in zip(starts.tolist(), lengths):
        rows = slice(start, start + length)
        dead[rows] = False
        results = {name: x[None, rows] for name, x in zip(("out", "dq", "dk", "dv"), (out, *found))}
        judge(results, [x[None, rows] for x in (q, k, v)], dout[None, rows], [Rule(0.1, (-1, 0))], 1)
    assert not any(got[dead].any() for got in found)


def test_head_dims_are_those_of_this_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason says what lacks: of any build, and of one without kernels."""
    with pytest.raises(AssertionError, match=r"head_dim 520.*forward"):
        integration._validate_head_dims(520, 520, 9, 8)
    monkeypatch.setattr("broadhead.api.head_dims.build_description", lambda: NO_KERNELS)
    with pytest.raises(AssertionError, match=r"head_dim 128.*forward.*left out of this build"):
        integration._validate_head_dims(128, 128, 9, 8)


def test_training_asks_for_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        integration.head_dims, "_validate_head_dims", lambda *sizes, direction, dtype: asked.append((sizes, direction))
    )
    integration._validate_head_dims(512, 512, 9, 8)
    integration._validate_head_dims(64, 512, 10, 8, is_training=False)
    assert asked == [((512, 512, 9, 8), "forward"), ((512, 512, 9, 8), "backward"), ((64, 512, 10, 8), "forward")]


def fake_engine(monkeypatch: pytest.MonkeyPatch, v3: bool) -> tuple[Any, Any]:
    """The two modules of Transformer Engine that hold what it found."""

    class Utils:
        version = "0"  # its version class takes a string, as str does
        v3_is_installed, v4_is_installed = v3, False
        v4_validate_head_dims = None
        set_flash_attention_3_params = staticmethod(lambda: setattr(Utils, "v3_is_installed", True))
        set_flash_attention_4_params = staticmethod(lambda: setattr(Utils, "v4_is_installed", True))

    backends = ModuleType("backends")
    utils = SimpleNamespace(FlashAttentionUtils=Utils)
    real = importlib.import_module
    known = {f"{integration._DOT_PRODUCT}.backends": backends, f"{integration._DOT_PRODUCT}.utils": utils}
    monkeypatch.setattr(
        integration, "importlib", SimpleNamespace(import_module=lambda name: known.get(name) or real(name))
    )
    monkeypatch.setattr(integration, "package_obstacle", lambda *names: None)
    return backends, Utils


@pytest.mark.parametrize("v3", [False, True])
def test_enable(monkeypatch: pytest.MonkeyPatch, v3: bool) -> None:
    """Both paths are filled, and a FlashAttention-3 that was found keeps its own."""
    compat = client("compat")
    backends, utils = fake_engine(monkeypatch, v3)
    found = integration.enable()
    try:
        assert (found is None) == torch.cuda.is_available()
        assert hasattr(backends, "_flash_attn_bwd_v3") is not v3
        assert callable(backends.flash_attn_func_v4) and callable(backends.flash_attn_varlen_func_v4)
        assert utils.v3_is_installed and utils.v4_is_installed
        assert utils.v4_validate_head_dims is integration._validate_head_dims
    finally:
        for name in ("flash_attn.cute",) + (() if v3 else ("flash_attn_interface",)):
            compat.uninstall(name)


def test_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "_DOT_PRODUCT", "a_package_that_is_not.there")
    found = integration.enable()
    assert found is not None and found.lacks == "package" and "pip install transformer_engine" in found.text
