"""The host side of the CUDA backend without a device: the launches it makes, what they allocate, and metadata."""

from __future__ import annotations

import dis
from typing import Any

import broadhead
import pytest
import torch
from broadhead.call.arguments import AttentionArgs
from broadhead.call.check import check_forward
from broadhead.plan import native
from broadhead.plan.device import DeviceDescription
from broadhead.plan.dispatch import MetadataConfig, resolve
from broadhead.plan.native import BuildDescription, FamilyBuild
from broadhead.run import cuda_backend, known, metadata, metadata_records
from broadhead.run import fallback as fallback_notice
from broadhead.support import ROWS
from recorder import Recorder, allocate
from torch import Tensor

pytestmark = pytest.mark.usefixtures("first_rows")

BUILD = BuildDescription(True, (FamilyBuild("sm80", ("80", "90a"), (13, 0), frozenset(r.id for r in ROWS)),), ())
#: With the Hopper kernels, whose launches take a counter.
BUILD_90A = BuildDescription(
    True,
    tuple(
        FamilyBuild(name, archs, (13, 0), frozenset(r.id for r in ROWS if r.family == name))
        for name, archs in (("sm80", ("80", "90")), ("sm90", ("90a",)))
    ),
    (),
)
H200 = DeviceDescription("cuda", "NVIDIA H200", (9, 0), 227 * 1024, 132, 50 << 20, (13, 0))


def numbers_of(fields: dict[str, Any]) -> dict[str, Any]:
    """What the compiled module reads of the records of a decision, by the names of its argument block."""
    call, plan = fields["call"], fields["plan"]
    return {
        "family": plan.row.family, "kernel_id": plan.row.id, "metadata_tag": plan.metadata_tag,
        "softmax_scale": call.softmax_scale, "softcap": call.softcap, "cell_blocks": plan.schedule.cell_blocks,
        **call.problem._asdict(), **plan.schedule._asdict(),
    }  # fmt: skip


def launch(
    recorder: Recorder, args: AttentionArgs, build: BuildDescription = BUILD
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The launch of a call, with what it allocates."""
    call = check_forward("mha_fwd", args)
    plan = resolve(call.problem, H200, build)
    fields: Any = cuda_backend.make_launch(args, call, plan)
    made = {**fields, **numbers_of(fields)}
    return made, allocate(made["out"], args.q), allocate(made["lse"], args.q)


def test_launch_of_a_call(recorder: Recorder) -> None:
    q, k, v = (torch.randn(s, dtype=torch.bfloat16) for s in ((2, 1, 8, 64), (512, 16, 2, 64), (512, 16, 2, 72)))
    tensors = {
        "seqused_k": torch.tensor([9, 3], dtype=torch.int32),
        "page_table": torch.zeros(2, 256, dtype=torch.int32),
        "leftpad_k": torch.tensor([1, 0], dtype=torch.int32),
        "prefix_lens": torch.tensor([2, 0], dtype=torch.int32),
        "sinks": torch.randn(8),
        "scheduler_metadata": torch.zeros(17, dtype=torch.int32),
    }
    args = AttentionArgs(
        q, k, v, causal=True, window_size=(7, 7), softcap=3.0, softmax_scale=0.5, num_splits=3, **tensors
    )
    got, out, lse = launch(recorder, args)
    expected = {
        "kernel_id": "sm80_fwd_decode_d128_bf16", "seqlen_q": 1, "seqlen_k": 4096, "window_left": 7, "window_right": 0,
        "attention_chunk": 0, "softmax_scale": 0.5, "softcap": 3.0, "num_splits": 3, "pack_gqa": 1,
        "family": "sm80", "heads_per_section": 0, "max_blocks": 0, "cell_blocks": 0,
    }  # fmt: skip
    assert {name: got[name] for name in expected} == expected
    assert got["dispatch"][:2] == ("cuda", "sm80_fwd_decode_d128_bf16")
    assert out.shape == (2, 1, 8, 72) and out.dtype == q.dtype and lse.shape == (2, 8, 1) and lse.dtype == torch.float32
    # What check_identity takes behind function and metadata.
    config, *lengths = got["identity"]
    assert isinstance(config, MetadataConfig) and lengths == [16, 4096, 3]


def test_outputs_have_the_strides_of_new_tensors(recorder: Recorder) -> None:
    """Also where q has others, or odd ones along dimensions of size 1."""
    plain = torch.randn(2, 1, 4, 64, dtype=torch.float16)
    k = torch.randn(2, 9, 4, 64, dtype=torch.float16)
    wide = torch.randn(2, 1, 4, 128, dtype=torch.float16)
    for q in (plain, plain.as_strided(plain.shape, (256, 7, 64, 1)), wide[..., 64:]):
        made, out, lse = launch(recorder, AttentionArgs(q, k, k))
        assert out.stride() == (256, 256, 64, 1) and out.dtype == q.dtype and lse.stride() == (4, 1, 1)
        assert (made["out"][0] is torch.empty_like) == (q is plain)


@pytest.mark.parametrize(
    "seqlen_q, num_splits, tokens_per_split",
    [(1, 0, 0), (1, 7, 0), (5, 0, 0), (1, 1, 0), (1, 1, 128), (1, 0, 128), (5, 0, 128), (1, 0, 1024)],
)
def test_cells_and_splits_of_decode(recorder: Recorder, seqlen_q: int, num_splits: int, tokens_per_split: int) -> None:
    """With cells a tile is not split otherwise; with one split asked for there are none."""
    q, k = torch.randn(3, seqlen_q, 8, 64, dtype=torch.float16), torch.randn(3, 1000, 2, 64, dtype=torch.float16)
    options = {"num_splits": num_splits, "tokens_per_split": tokens_per_split}
    got, _, _ = launch(recorder, AttentionArgs(q, k, k, causal=True, **options))
    tile = "_m32" if seqlen_q > 4 else ""
    assert got["kernel_id"] == f"sm80_fwd_decode_d64{tile}_fp16"
    cells = tokens_per_split // 64 if num_splits != 1 else 0
    assert got["cell_blocks"] == cells and got["num_splits"] == (1 if tokens_per_split else num_splits)


@pytest.mark.parametrize("heads, tokens_per_split", [(16, 0), (16, 128), (20, 0), (128, 0), (128, 128)])
def test_cells_of_absorbed_decode(recorder: Recorder, heads: int, tokens_per_split: int) -> None:
    """More than 32 heads are no decode: on decode rows too, they are not cut."""
    q, qv = torch.randn(3, 1, heads, 64, dtype=torch.float16), torch.randn(3, 1, heads, 512, dtype=torch.float16)
    k, v = torch.randn(3, 1000, 1, 64, dtype=torch.float16), torch.randn(3, 1000, 1, 512, dtype=torch.float16)
    got, _, _ = launch(recorder, AttentionArgs(q, k, v, qv=qv, tokens_per_split=tokens_per_split))
    assert got["kernel_id"] == "sm80_fwd_decode_d64_v512_qv_fp16"
    assert got["cell_blocks"] == (tokens_per_split // 64 if heads <= 32 else 0)


def test_sm_margin_bounds_the_blocks_of_decode(recorder: Recorder) -> None:
    q, k = torch.randn(3, 1, 8, 64, dtype=torch.float16), torch.randn(3, 1000, 2, 64, dtype=torch.float16)
    got, _, _ = launch(recorder, AttentionArgs(q, k, k, sm_margin=32))
    assert got["max_blocks"] == 100


def test_launch_of_packed_sequences(recorder: Recorder) -> None:
    cu = torch.tensor([0, 3, 300], dtype=torch.int32)
    q, k = torch.randn(310, 4, 64, dtype=torch.float16), torch.randn(300, 4, 64, dtype=torch.float16)
    args = AttentionArgs(q, k, k, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=297, max_seqlen_k=297, num_splits=1)
    got, out, lse = launch(recorder, args)
    assert out.shape == q.shape and lse.shape == (4, 310)
    assert got["num_splits"] == 1 and got["kernel_id"] == "sm80_fwd_d64_fp16"


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("build, family", [(BUILD, "sm80"), (BUILD_90A, "sm90")])
def test_the_library_of_the_row_is_named(recorder: Recorder, splits: int, build: BuildDescription, family: str) -> None:
    q, k = (torch.randn(2, s, 4, 64, dtype=torch.bfloat16) for s in (100, 1000))
    got, _, _ = launch(recorder, AttentionArgs(q, k, k, num_splits=splits), build=build)
    assert (got["family"], got["kernel_id"], got["num_splits"]) == (family, f"{family}_fwd_d64_bf16", splits)


@pytest.mark.parametrize("seqlen_q, tokens_per_split", [(8, 0), (4, 0), (8, 128), (8, 64)])
def test_few_rows_on_either_kernel(recorder: Recorder, seqlen_q: int, tokens_per_split: int) -> None:
    """32 rows of a KV head: splits and a counter of the Hopper kernel, or the cells of a decode kernel."""
    q, qv = (torch.randn(3, seqlen_q, 8, size, dtype=torch.bfloat16) for size in (64, 512))
    k, v = (torch.randn(3, 1000, 2, size, dtype=torch.bfloat16) for size in (64, 512))
    args = AttentionArgs(q, k, v, qv=qv, tokens_per_split=tokens_per_split)
    got, _, _ = launch(recorder, args, build=BUILD_90A)
    hopper = seqlen_q == 8 and not tokens_per_split
    assert got["kernel_id"] == ("sm90_fwd_d64_v512_qv_m64_bf16" if hopper else "sm80_fwd_decode_d64_v512_qv_bf16")
    assert got["cell_blocks"] == tokens_per_split // 64 and got["pack_gqa"] == 1
    assert got["num_splits"] == (1 if tokens_per_split else 4 if seqlen_q == 8 else 0)


def test_rows_that_seqused_q_leaves_out_are_cleared_when_allocated_here(recorder: Recorder) -> None:
    q = torch.randn(2, 5, 4, 64, dtype=torch.float16)
    used = torch.tensor([3, 0], dtype=torch.int32)
    _, out, lse = launch(recorder, AttentionArgs(q, q, q, seqused_q=used))
    assert (out == 0).all() and (lse == float("-inf")).all() and out.dtype == q.dtype


def test_metadata_of_whole_token_tiles() -> None:
    """Six heads a token: a tile of 192 rows holds 32 tokens, one of 128 rows 21 of them, 126 rows."""
    for headdim, tile_m in ((64, 192), (128, 126)):
        request = metadata.describe_request(
            2, 100, 4096, 12, 2, headdim, None, torch.bfloat16, 16, 0, True, None, 0, 0, None, 0, None
        )
        plan = resolve(request.problem, H200, BUILD_90A)
        assert plan.row is not None and plan.row.id == f"sm90_fwd_d{headdim}_bf16"
        got = metadata.schedule_numbers(request, plan)
        assert got is not None and (got.tile_m, got.tile_n, got.rows_per_token) == (tile_m, plan.row.tile.tile_n, 6)


def test_metadata_arguments(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, starts = torch.tensor([9, 3, 1], dtype=torch.int32), torch.arange(4, dtype=torch.int32)
    numbers = (3, 1, 4096, 8, 2, 64, None, torch.bfloat16, 16, 2, True, None, 0, 32, None, 0, None, None, 0)
    request = metadata.describe_request(*numbers[:16], None, *numbers[16:])
    plan = resolve(request.problem, H200, BUILD)
    assert plan.row is not None and plan.schedule is not None
    monkeypatch.setattr(metadata, "resolve", lambda problem, device: plan)
    metadata.run_new((lengths, starts, None, None, None), numbers)
    (got,) = recorder.calls
    assert got.pop("schedule")._asdict() == {
        "batch": 3, "seqlen_q": 1, "seqlen_k": 4096, "seqlen_k_new": 2, "window_left": -1, "window_right": 0,
        "attention_chunk": 0, "rows_per_token": 4, "heads_in_grid": 2, "tile_m": plan.row.tile.tile_m,
        "tile_n": plan.row.tile.tile_n, "num_splits": 32, "target_ctas": plan.schedule.target_ctas,
        "metadata_tag": plan.metadata_tag,
    }  # fmt: skip
    assert got.pop("new_metadata")(lengths).shape == (17,)
    assert got.pop("made_for") == metadata.made_for_request(request, plan)
    expected = {
        "device": -1, "cache_seqlens": lengths, "cu_seqlens_q": starts, "cache_leftpad": None, "out": None,
        "page_table": None, "numbers": numbers,
    }  # fmt: skip
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] is value or got[name] == value, name


@pytest.mark.parametrize("asked, bound", [(0, 1), (1, 1), (9, 9)])
def test_metadata_of_decode_kernels_plans_nothing(asked: int, bound: int) -> None:
    """They plan for themselves: without a bound of the caller's the device writes one split for each sequence."""
    request = metadata.describe_request(
        2, 1, 65536, 8, 2, 64, None, torch.bfloat16, 16, 0, True, None, 0, asked, None, 0, None
    )
    plan = resolve(request.problem, H200, BUILD)
    assert plan.row is not None and plan.row.phase == "decode"
    got = metadata.schedule_numbers(request, plan)
    assert got is not None and got.num_splits == bound


def test_a_call_is_built_at_once() -> None:
    """Tuples of more than 30, and calls with more arguments, go through a list in CPython: up to 0.3 us a call."""
    for function in (broadhead.flash_attn_with_kvcache, broadhead.flash_attn_varlen_func, broadhead.flash_attn_func):
        assert not any(step.opname == "LIST_APPEND" for step in dis.get_instructions(function)), function.__name__


def test_without_the_module_no_call_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "extension", lambda: None)
    assert known.bind("run_known")("f", True, ()) is None
    cuda_backend.forget_calls()
    with pytest.raises(broadhead.KernelError, match="not installed"):
        cuda_backend.run_new(None, "f", True, AttentionArgs(1, 2, 3))


def test_the_module_gets_its_hooks_once(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(recorder, "connect", lambda **hooks: seen.append(hooks), raising=False)
    for _ in range(2):
        assert callable(known.bind("run_known"))
    (hooks,) = seen
    assert hooks["records"] is metadata_records.filled and hooks["state"] is fallback_notice.state
    assert hooks["check_identity"] is metadata_records.check_identity
