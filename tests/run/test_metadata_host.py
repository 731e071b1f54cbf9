"""Scheduler metadata on the host: shape, length rule, identity of buffers and agreement of the two sides' plans."""

from __future__ import annotations

import gc
from typing import Any

import broadhead
import pytest
import torch
from broadhead.call.arguments import AttentionArgs
from broadhead.call.check import check_forward
from broadhead.plan.device import DeviceDescription
from broadhead.plan.dispatch import resolve
from broadhead.plan.native import BuildDescription, FamilyBuild
from broadhead.run import metadata_records
from broadhead.run.metadata import describe_request, metadata_size
from broadhead.support import ROWS
from torch import Tensor

pytestmark = pytest.mark.usefixtures("first_rows")

IDS = frozenset(row.id for row in ROWS)
BUILD = BuildDescription(True, tuple(FamilyBuild(f, ("80", "90a"), (13, 0), IDS) for f in ("sm80", "sm90")), ())
H200 = DeviceDescription("cuda", "NVIDIA H200", (9, 0), 227 * 1024, 132, 50 << 20, (13, 0))
BF16 = torch.bfloat16


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def paged_call(**changes: Any) -> AttentionArgs:
    values: dict[str, Any] = {
        "q": torch.randn(2, 1, 8, 64, dtype=BF16),
        "k": torch.randn(32, 16, 2, 64, dtype=BF16),
        "v": torch.randn(32, 16, 2, 64, dtype=BF16),
        "page_table": torch.randperm(32).to(torch.int32).view(2, 16),
        "seqused_k": int32(200, 17),
        "causal": True,
    }
    return AttentionArgs(**{**values, **changes})


def run(args: AttentionArgs, scheduler_metadata: Tensor, **options: Any) -> Tensor:
    return broadhead.mha_fwd(
        args.q, args.k, args.v, seqused_k=args.seqused_k, page_table=args.page_table, causal=args.causal,
        scheduler_metadata=scheduler_metadata, **options,
    )[0]  # fmt: skip


def plan_of(lengths: Tensor | None = None, **changes: Any) -> Tensor:
    values: dict[str, Any] = {"qkv_dtype": BF16, "page_size": 16, "causal": True, **changes}
    return broadhead.get_scheduler_metadata(
        2, 1, 256, 8, 2, 64, int32(200, 17) if lengths is None else lengths, **values
    )


def request(**changes: Any):
    values: dict[str, Any] = {
        "batch_size": 2, "max_seqlen_q": 1, "max_seqlen_k": 256, "num_heads_q": 8, "num_heads_kv": 2, "headdim": 64,
        "headdim_v": None, "qkv_dtype": BF16, "page_size": 16, "max_seqlen_k_new": 0, "causal": True,
        "window_size": (-1, -1), "attention_chunk": 0, "num_splits": 0, "pack_gqa": None, "sm_margin": 0,
        "page_table": None, "has_qv": None,
    }  # fmt: skip
    assert changes.keys() <= values.keys()
    return describe_request(**{**values, **changes})


# --- both sides agree -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"causal": False},
        {"window_size": (64, 0)},
        {"window_size": [64, 64]},
        {"attention_chunk": 64},
        {"num_splits": 3},
        {"num_splits": 1},
        {"pack_gqa": False},
        {"sm_margin": 16},
    ],
)
@pytest.mark.parametrize("seqlen_q", [1, 4, 64])
def test_forward_and_metadata_have_one_plan(seqlen_q: int, changes: dict[str, Any]) -> None:
    """The same arguments give the same row, schedule and tag on both sides, computed on a described H200."""
    buffer = torch.zeros(17, dtype=torch.int32)
    args = paged_call(q=torch.randn(2, seqlen_q, 8, 64, dtype=BF16), scheduler_metadata=buffer)._replace(**changes)
    forward = resolve(check_forward("mha_fwd", args).problem, H200, BUILD)
    planned = resolve(request(max_seqlen_q=seqlen_q, **changes).problem, H200, BUILD)
    assert forward.row is not None
    for field in ("row", "schedule", "metadata_tag", "metadata_config"):
        assert getattr(forward, field) == getattr(planned, field), field


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    "dtype, head_dims, extras, row",
    [
        (FP8, (64, 64), ("descale",), "sm80_fwd_decode_d64_e4m3"),
        (FP8, (192, 128), (), "sm80_fwd_decode_d256_e4m3"),
        (FP8, (256, 256), ("descale",), "sm80_fwd_decode_d256_e4m3"),
        (FP8, (64, 64), ("descale", "prefill"), "sm90_fwd_d64_e4m3"),
        (FP8, (192, 128), ("prefill",), "sm90_fwd_d192_v128_e4m3"),
        (FP8, (256, 256), ("descale", "prefill"), "sm90_fwd_d256_e4m3"),
        (BF16, (64, 512), ("qv",), "sm80_fwd_decode_d64_v512_qv_bf16"),
        (BF16, (64, 64), ("qv",), "sm80_fwd_decode_d64_v512_qv_bf16"),
        (BF16, (64, 512), ("qv", "prefill"), "sm90_fwd_d64_v512_qv_bf16"),
        (BF16, (64, 512), (), "sm80_fwd_decode_d512_bf16"),
    ],
)
def test_e4m3_and_qv_have_one_plan(
    dtype: torch.dtype, head_dims: tuple[int, int], extras: tuple[str, ...], row: str
) -> None:
    """A plan depends on dtype and qv, not on factors. FlashAttention-3's arguments name no qv: it may go unsaid."""
    head_dim, head_dim_v = head_dims
    seqlen_q = 64 if "prefill" in extras else 1
    q = torch.zeros(2, seqlen_q, 8, head_dim).to(dtype)
    k, v = torch.zeros(32, 16, 2, head_dim).to(dtype), torch.zeros(32, 16, 2, head_dim_v).to(dtype)
    args = paged_call(q=q, k=k, v=v, scheduler_metadata=torch.zeros(17, dtype=torch.int32))
    if "qv" in extras:
        args = args._replace(qv=torch.zeros(2, seqlen_q, 8, head_dim_v, dtype=dtype))
    if "descale" in extras:
        args = args._replace(q_descale=torch.ones(2, 2), v_descale=torch.ones(1, 1).expand(2, 2))
    forward = resolve(check_forward("mha_fwd", args).problem, H200, BUILD)
    assert forward.row is not None and forward.row.id == row
    asked = {"max_seqlen_q": seqlen_q, "headdim": head_dim, "headdim_v": head_dim_v, "qkv_dtype": dtype}
    said = resolve(request(**asked, has_qv="qv" in extras).problem, H200, BUILD)
    for field in ("row", "schedule", "metadata_tag", "metadata_config"):
        assert getattr(forward, field) == getattr(said, field), field
    unsaid = resolve(request(**asked).problem, H200, BUILD)
    assert (unsaid.metadata_tag == forward.metadata_tag) == (("qv" in extras) == (head_dims == (64, 512)))


def test_a_wrong_guess_about_qv_is_no_error_and_a_wrong_word_is() -> None:
    q, qv = torch.randn(2, 1, 8, 64, dtype=BF16), torch.randn(2, 1, 8, 512, dtype=BF16)
    k, v = torch.randn(32, 16, 2, 64, dtype=BF16), torch.randn(32, 16, 2, 512, dtype=BF16)
    args = paged_call(q=q, k=k, v=v)
    run(args, plan_of(headdim_v=512))
    run(args, plan_of(headdim_v=512), qv=qv)
    run(args, plan_of(headdim_v=512, has_qv=True), qv=qv)
    run(paged_call(), plan_of(), qv=q)
    with pytest.raises(broadhead.InvalidArgumentError, match="was made for has_qv=True"):
        run(args, plan_of(headdim_v=512, has_qv=True))
    with pytest.raises(broadhead.InvalidArgumentError, match="was made for has_qv=False"):
        run(args, plan_of(headdim_v=512, has_qv=False), qv=qv)
    with pytest.raises(broadhead.InvalidTypeError, match="has_qv must be True or False"):
        plan_of(has_qv=1.0)
    with pytest.raises(broadhead.InvalidArgumentError, match="was made for headdim_v=512"):
        run(paged_call(), plan_of(headdim_v=512), qv=q)


def test_length_rule_of_the_request() -> None:
    table = torch.zeros(2, 40, dtype=torch.int32)
    with_table = request(max_seqlen_k=1, page_table=table)
    assert with_table.problem.seqlen_k == 640 and with_table.explicit_length
    assert request(max_seqlen_k=300).problem.seqlen_k == 300
    with pytest.raises(broadhead.InvalidArgumentError, match="page_size"):
        request(page_table=table, page_size=None)


def test_one_query_does_not_tell_causal_from_full() -> None:
    """At seqlen_q 1 both masks are the same: metadata of either serves the other. At 2 they differ."""
    args = paged_call()
    run(args, plan_of(causal=False))
    run(args._replace(causal=False), plan_of(causal=True))
    two = paged_call(q=torch.randn(2, 2, 8, 64, dtype=BF16))
    made = broadhead.get_scheduler_metadata(2, 2, 256, 8, 2, 64, int32(200, 17), page_size=16, causal=False)
    with pytest.raises(broadhead.InvalidArgumentError, match="scheduler_metadata was made for window_right=-1"):
        run(two, made)


# --- the buffer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, 1, 4, 5, 12])
def test_size_and_contents(batch: int) -> None:
    lengths = torch.full((batch,), 100, dtype=torch.int32)
    result = broadhead.get_scheduler_metadata(batch, 1, 128, 8, 2, 64, lengths)
    slots = -(-batch // 4) * 4
    assert result.shape == (metadata_size(batch),) == (1 + 4 * slots,) and result.dtype == torch.int32
    assert (result[:batch] == 1).all() and (result[slots : slots + batch] > 0).all()
    rest = torch.ones_like(result, dtype=torch.bool)
    rest[:batch] = rest[slots : slots + batch] = False
    assert (result[rest] == 0).all(), "padding, reserved fields and the semaphore are zero"


def test_out_is_written_and_returned() -> None:
    buffer = torch.full((40,), 9, dtype=torch.int32)
    assert plan_of(out=buffer) is buffer
    assert (buffer[17:] == 9).all() and (buffer[8:16] == 0).all()
    view = torch.full((40,), 9, dtype=torch.int32)
    assert plan_of(out=view[:17]).data_ptr() == view.data_ptr()
    torch.testing.assert_close(view[:17], buffer[:17])


# --- identity ---------------------------------------------------------------------------------------------------------


def test_refusals_name_the_field() -> None:
    args = paged_call()
    cases = {
        "batch_size=3": broadhead.get_scheduler_metadata(3, 1, 256, 8, 2, 64, int32(9, 9, 9), page_size=16),
        "max_seqlen_q=2": broadhead.get_scheduler_metadata(2, 2, 256, 8, 2, 64, int32(9, 9), page_size=16),
        "num_heads_q=4": broadhead.get_scheduler_metadata(2, 1, 256, 4, 2, 64, int32(9, 9), page_size=16),
        "num_heads_kv=1": broadhead.get_scheduler_metadata(2, 1, 256, 8, 1, 64, int32(9, 9), page_size=16),
        "headdim=128": broadhead.get_scheduler_metadata(2, 1, 256, 8, 2, 128, int32(9, 9), page_size=16),
        "headdim_v=128": plan_of(headdim_v=128),
        "qkv_dtype='fp16'": plan_of(qkv_dtype=torch.float16),
        "window_left=32": plan_of(window_size=(32, 0)),
        "attention_chunk=64": plan_of(attention_chunk=64),
        "page_size=32": plan_of(page_size=32),
        "page_size=640": plan_of(page_table=torch.zeros(2, 40, dtype=torch.int32)),  # page_table.size(1) * page_size
    }
    for words, made in cases.items():
        with pytest.raises(broadhead.InvalidArgumentError, match=f"mha_fwd: scheduler_metadata was made for.*{words}"):
            run(args, made)


def test_lengths_that_clients_do_not_know_are_accepted() -> None:
    """max_seqlen_k without a page table is a bound of the client's own; page_size may be left out."""
    args = paged_call()
    for made in (
        plan_of(),
        plan_of(page_size=None),
        broadhead.get_scheduler_metadata(2, 1, 999, 8, 2, 64, int32(200, 17), page_size=16),
        plan_of(page_table=torch.zeros(2, 16, dtype=torch.int32)),
        plan_of(has_softcap=True),
    ):
        run(args, made)


def test_split_counts() -> None:
    """min(metadata, launch) is used; a launch that asks for more splits than were planned is refused."""
    args = paged_call()
    for planned, launched in ((0, 0), (0, 8), (8, 0), (8, 8), (8, 4), (8, 1), (1, 1)):
        run(args, plan_of(num_splits=planned), num_splits=launched)
    with pytest.raises(broadhead.InvalidArgumentError, match="num_splits=4, but this call has num_splits=8"):
        run(args, plan_of(num_splits=4), num_splits=8)


def test_views_of_a_filled_buffer_are_known() -> None:
    buffer = torch.zeros(100, dtype=torch.int32)
    plan_of(out=buffer[:17], headdim_v=128)
    for view in (buffer, buffer[:17], buffer[:64]):
        with pytest.raises(broadhead.InvalidArgumentError, match="headdim_v"):
            run(paged_call(), view)


def test_rewritten_copied_and_freed_buffers_are_unknown() -> None:
    """What the host can not know it does not refuse: the device checks the tag."""
    wrong = plan_of(headdim_v=128)
    run(paged_call(), wrong.clone())
    wrong.copy_(plan_of())
    run(paged_call(), wrong)
    run(paged_call(), torch.zeros(17, dtype=torch.int32))
    gone = plan_of(headdim_v=128)
    pointer = gone.data_ptr()
    assert pointer in metadata_records.filled
    del gone
    gc.collect()
    assert metadata_records.filled[pointer].buffer() is None


def test_the_registry_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata_records, "_MAX_FILLED", 8)
    kept = [plan_of() for _ in range(30)]
    assert len(metadata_records.filled) <= 8
    run(paged_call(), kept[0])


def test_inference_tensors() -> None:
    with torch.inference_mode():
        made = plan_of()
        run(paged_call(), made)
        with pytest.raises(broadhead.InvalidArgumentError, match="headdim_v"):
            run(paged_call(), plan_of(headdim_v=128))


# --- bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"batch_size": -1}, "batch_size"),
        ({"max_seqlen_q": -1}, "max_seqlen_q"),
        ({"max_seqlen_k": 2.0}, "max_seqlen_k"),
        ({"max_seqlen_k": torch.tensor(3.0)}, "max_seqlen_k"),
        ({"num_heads_q": 3}, "num_heads_q"),
        ({"num_heads_kv": 0}, "num_heads_kv"),
        ({"num_heads_q": None}, "num_heads_q"),
        ({"headdim": 60}, "headdim"),
        ({"headdim_v": 12}, "headdim_v"),
        ({"cache_seqlens": None}, "cache_seqlens"),
        ({"cache_seqlens": [3, 4]}, "cache_seqlens"),
        ({"cache_seqlens": int32(3)}, "cache_seqlens"),
        ({"cache_seqlens": torch.tensor([3, 4])}, "int32"),
        ({"cache_seqlens": int32(3, -4)}, "cache_seqlens"),
        ({"qkv_dtype": torch.int32}, "qkv_dtype"),
        ({"qkv_dtype": "bf16"}, "qkv_dtype"),
        ({"page_size": 0}, "page_size"),
        ({"max_seqlen_k_new": -1}, "max_seqlen_k_new"),
        ({"causal": 1.0}, "causal"),
        ({"window_size": (1, 2, 3)}, "window_size"),
        ({"window_size": "3"}, "window_size"),
        ({"window_size": (1.0, 2)}, "window_size"),
        ({"attention_chunk": -1}, "attention_chunk"),
        ({"num_splits": 257}, "num_splits"),
        ({"num_splits": -1}, "num_splits"),
        ({"pack_gqa": 1.0}, "pack_gqa"),
        ({"sm_margin": -1}, "sm_margin"),
        ({"page_table": torch.zeros(2, 3)}, "page_table"),
        ({"page_table": torch.zeros(2, 3, dtype=torch.int64)}, "page_table"),
        ({"cu_seqlens_q": int32(0, 1)}, "cu_seqlens_q"),
        ({"cache_leftpad": int32(0)}, "cache_leftpad"),
        ({"out": torch.zeros(16, dtype=torch.int32)}, "out"),
        ({"out": torch.zeros(17)}, "out"),
        ({"out": torch.zeros(34, dtype=torch.int32)[::2]}, "out"),
        ({"num_heads": 16}, "num_heads"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], name: str) -> None:
    arguments: dict[str, Any] = {
        "batch_size": 2, "max_seqlen_q": 1, "max_seqlen_k": 64, "num_heads_q": 8, "num_heads_kv": 2, "headdim": 64,
        "cache_seqlens": int32(3, 4), "page_size": 16,
    }  # fmt: skip
    with pytest.raises(broadhead.BroadheadError, match=rf"get_scheduler_metadata: .*{name}"):
        broadhead.get_scheduler_metadata(**{**arguments, **changes})
