"""A backward row in the table, from the build to autograd: it is generated, found, refused by name, and launched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import broadhead
import pytest
import torch
from broadhead import support, tiles
from broadhead.plan import dispatch
from broadhead.plan.native import BuildDescription, FamilyBuild
from broadhead.run import backward
from described import forget_plans, h200, problem
from generator import load_generate
from stub_module import Module, install_module, row_of
from torch import Tensor

pytestmark = pytest.mark.usefixtures("first_rows")

HEADER = "sm90/backward/launch.cuh"


class BackwardTile(NamedTuple):
    """A tile of a kernel that nobody wrote."""

    tile_m: int
    tile_n: int

    @property
    def min_blocks(self) -> int:
        return 1


TEMPLATE = tiles.Template(
    HEADER, "sm90::BackwardTraits", "sm90::launch_backward", "sm90::backward_workspace", True, False
)
FEATURES = (*support.BACKWARD_FEATURES, "deterministic")
ROWS = tuple(
    support.KernelRow(
        "sm90_bwd_d128", "sm90", "backward", "prefill", ((9, 0),), dtype, 128, 128, support.SMEM_227KB,
        BackwardTile(64, 128), FEATURES,  # type: ignore[arg-type]
    )
    for dtype in support.DTYPES
)  # fmt: skip
FORWARD = tuple(row for row in support.ROWS if row.direction == "forward")
BUILD = BuildDescription(
    True,
    tuple(
        FamilyBuild(name, archs, (13, 0), frozenset(row.id for row in (*FORWARD, *ROWS) if row.family == name))
        for name, archs in (("sm80", ("80", "90")), ("sm90", ("90a",)))
    ),
    (),
)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward rows of the table with two backward rows."""
    monkeypatch.setitem(tiles.TEMPLATES, BackwardTile, TEMPLATE)
    monkeypatch.setattr(dispatch, "ROWS", (*FORWARD, *ROWS))
    forget_plans(monkeypatch)


def test_the_build_instantiates_and_registers_it(table: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = load_generate()
    loaded = support
    monkeypatch.setattr(loaded, "ROWS", (*FORWARD, *ROWS))
    monkeypatch.setattr(generate, "load_table", lambda: loaded)
    generate.write_sources(["90a"], "sm90_.*d128_(bf16|fp16)", tmp_path)
    source = (tmp_path / "sm90/sm90_bwd_d128.cu").read_text()
    registry = (tmp_path / "sm90/registry.cpp").read_text()
    assert f'#include "{HEADER}"' in source
    for row, element in zip(ROWS, ("bfloat16_t", "half_t"), strict=True):
        traits = f"Traits_{row.id}"
        assert f"{traits} = sm90::BackwardTraits<cutlass::{element}, 128, 128, 64, 128, {row.smem_limit}>;" in source
        launcher = f"int launch_{row.id}(const AttnBwdParams& params, cudaStream_t stream, char* error, std::size_t"
        assert launcher in source and launcher in registry
        assert f'return sm90::launch_backward<{traits}>("{row.id}", params, stream, error, error_size);' in source
        workspace = f"std::int64_t workspace_{row.id}(const AttnBwdParams& params)"
        assert f"{workspace} {{ return sm90::backward_workspace<{traits}>(params); }}" in source
        assert f"{workspace};" in registry
        assert f'"{row.id}", Direction::kBackward, Phase::kPrefill, ' in registry
        assert f"&shared_memory_{row.id}, nullptr, nullptr, &launch_{row.id}, &workspace_{row.id}}}," in registry
    assert re.search(r"kKernelCount = 4;", registry)
    assert "| `sm90_bwd_d128` | backward | prefill |" in generate.support_matrix()


def test_select_finds_it(table: None) -> None:
    asked = problem(direction="backward", head_dim=96, features=("causal", "gqa", "lse"), window_right=0)
    plan = dispatch.resolve(asked, h200(), BUILD)
    assert plan.row is ROWS[0] and plan.schedule is not None and plan.schedule.max_blocks == 0
    assert dispatch.resolve(asked._replace(sm_margin=4), h200(), BUILD).schedule.max_blocks == 128  # type: ignore
    assert dispatch.resolve(asked._replace(direction="forward"), h200(), BUILD).row.direction == "forward"  # type: ignore
    # A forward call that needs a gradient has a kernel where both directions have one.
    needs = problem(head_dim=96, features=("gqa", "gradients", "lse"))
    found = dispatch.resolve(needs, h200(), BUILD)
    assert found.row is not None and found.row.direction == "forward"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 256}, "no CUDA kernel differentiates: head_dim 256 exceeds 128"),
        ({"features": ("gradients", "lse", "paged")}, "no CUDA kernel combines lse, paged"),
        ({"obstacles": ("the address of q is not a multiple of 16 bytes",)}, "the address of q"),
    ],
)
def test_a_gradient_that_no_row_has_is_told(table: None, changes: dict[str, Any], words: str) -> None:
    asked = problem(**{"features": ("gradients", "lse"), **changes})
    plan = dispatch.resolve(asked, h200(), BUILD)
    assert plan.row is None and "an input requires grad" in plan.reason and words in plan.reason


# --- autograd and mha_bwd, with the reference in place of the two kernels --------------------------------------------


@pytest.fixture
def module(table: None, monkeypatch: pytest.MonkeyPatch) -> Module:
    return install_module(monkeypatch, BUILD)


def bf16(*shape: int, requires_grad: bool = True) -> Tensor:
    return torch.randn(*shape).to(torch.bfloat16).requires_grad_(requires_grad)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return bf16(2, 40, 4, 64), bf16(2, 50, 2, 64), bf16(2, 50, 2, 32), torch.randn(4, requires_grad=True)


def check_launch(launch: dict[str, Any]) -> None:
    call, plan = launch.pop("call"), launch.pop("plan")
    assert launch == {"device": None, "deterministic": True}
    problem, schedule = call.problem, plan.schedule
    assert (plan.row.family, plan.row.id) == ("sm90", "sm90_bwd_d128_bf16")
    assert (problem.seqlen_q, problem.seqlen_k, problem.attention_chunk) == (40, 50, 0)
    assert (problem.window_left, problem.window_right) == (7, 0)
    assert (call.softmax_scale, call.softcap) == (0.5, 3.0)
    assert (schedule.num_splits, schedule.max_blocks) == (0, 130)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autograd_launches_it(module: Module, compiled: bool) -> None:
    torch.compiler.reset()
    q, k, v, sinks = inputs()
    options: dict[str, Any] = {
        "causal": True, "window_size": (7, 7), "softmax_scale": 0.5, "softcap": 3.0, "sm_margin": 2,
    }  # fmt: skip
    function = broadhead.flash_attn_func
    if compiled:
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    out, lse = function(q, k, v, sinks=sinks, deterministic=True, return_attn_probs=True, **options)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out, lse), (q, k, v, sinks), (dout, dlse))
    first, second = module.launches
    assert row_of(first).startswith("sm90_fwd_")
    check_launch(second)
    args, given_dout, given_lse, given_dlse, dq, dk, dv, dsinks = module.given[0]
    assert torch.equal(args.out, out) and torch.equal(given_lse, lse), "the results of the forward kernel"
    assert torch.equal(given_dout, dout) and torch.equal(given_dlse, dlse)
    assert (dq.shape, dk.shape, dv.shape, dsinks.dtype) == (q.shape, k.shape, v.shape, torch.float32)
    assert broadhead.last_dispatch()[:2] == ("cuda", "sm90_bwd_d128_bf16")
    want_out, want_lse = broadhead.flash_attn_func(
        q, k, v, sinks=sinks, backend="torch", return_attn_probs=True, **options
    )
    want = torch.autograd.grad((want_out, want_lse), (q, k, v, sinks), (dout, dlse))
    torch.testing.assert_close((out, *got), (want_out, *want))


def test_mha_bwd_launches_it(module: Module) -> None:
    q, k, v, sinks = (x.detach() for x in inputs())
    options: dict[str, Any] = {"causal": True, "window_size": (7, 7), "softmax_scale": 0.5, "softcap": 3.0}
    out, lse = broadhead.mha_fwd(q, k, v, sinks=sinks, backend="torch", **options)
    # Strides that a kernel does not take are copied; those of softmax_lse, too.
    dout = torch.randn(2, 40, 4, 33).to(torch.bfloat16)[..., :32]
    strided = lse.transpose(1, 2).contiguous().transpose(1, 2)
    want = broadhead.mha_bwd(dout, q, k, v, out, lse, sinks=sinks, backend="torch", **options)
    dq = torch.empty_like(q)
    got = broadhead.mha_bwd(
        dout, q, k, v, out, strided, dq=dq, sinks=sinks, deterministic=True, sm_margin=2, backend="cuda", **options
    )
    check_launch(dict(module.launches[0]))
    torch.testing.assert_close(got, want)
    assert got[0] is dq and module.given[0][1].is_contiguous() and module.given[0][2].stride(-1) == 1
    # Results that are not given are those of the forward kernel.
    again = broadhead.mha_bwd(dout, q, k, v, sinks=sinks, **options)
    assert [row_of(launch)[:8] for launch in module.launches] == ["sm90_bwd", "sm90_fwd", "sm90_bwd"]
    torch.testing.assert_close(again, want)


def test_rows_that_nobody_owns_are_cleared_before(module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that writes nothing leaves zeros in packed gradients, whose rows may belong to no sequence."""
    monkeypatch.setattr(Module, "run_backward", lambda *_: None)
    q, k, v = (bf16(9, 2, 64, requires_grad=False) for _ in range(3))
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    out, lse = broadhead.mha_fwd(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=4, max_seqlen_k=4, backend="torch"
    )
    found = broadhead.mha_bwd(out, q, k, v, out, lse, cu, cu, max_seqlen_q=4, max_seqlen_k=4)
    assert all((gradient == 0).all() for gradient in found[:3])
    assert row_of(module.launches[-1]) == "sm90_bwd_d128_bf16"


def test_without_a_row_torch_computes_both_directions(module: Module) -> None:
    """A problem that no backward row has: as before there were such rows, and a fallback that says so."""
    q = bf16(1, 3, 2, 256)
    with pytest.warns(broadhead.FallbackWarning, match="no CUDA kernel differentiates"):
        out = broadhead.flash_attn_func(q, q, q)
    out.float().sum().backward()
    assert q.grad is not None and module.launches == []
    with pytest.raises(broadhead.UnsupportedError, match="head_dim 256 exceeds 128"):
        broadhead.mha_bwd(out.detach(), *(q.detach(),) * 3, backend="cuda")


def test_a_second_derivative_is_refused(module: Module) -> None:
    q, k, v, _ = inputs()
    out = broadhead.flash_attn_func(q, k, v)
    (dq,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
    with pytest.raises(broadhead.UnsupportedError, match="second derivative"):
        dq.float().square().sum().backward()


def test_nothing_to_launch(module: Module) -> None:
    q, k = bf16(2, 3, 2, 64, requires_grad=False), bf16(2, 0, 2, 64, requires_grad=False)
    found = broadhead.mha_bwd(q, q, k, k, q, torch.zeros(2, 2, 3))
    assert (found[0] == 0).all() and found[1].shape == k.shape and module.launches == []
    assert broadhead.last_dispatch() == ("cuda", "sm90_bwd_d128_bf16", "no query or no key: nothing was launched")


@pytest.mark.parametrize(
    ("shape", "ordered"), [((9, 14, 2, 32), True), ((1, 300, 2, 32), False), ((2, 64, 2, 32), False)]
)
def test_short_sequences_take_no_sums_of_dq(
    shape: tuple[int, ...], ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of fused kernels have up to 128 rows more for each sequence; kernels whose sums have an order need none."""
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(backward, "select", lambda function, problem, *_: asked.append(problem.features))
    q, k, v, dout = (torch.randn(shape) for _ in range(4))
    broadhead.mha_bwd(dout, q, k, v)
    assert ["short_sequences" in features for features in asked] == [ordered]
    assert all("deterministic" not in features for features in asked)
