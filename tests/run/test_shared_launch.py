"""Which calls over a shared prefix are one decode launch, on which row, without a GPU."""

from __future__ import annotations

from typing import Any

import broadhead
import pytest
import torch
from broadhead.call import validation as check
from broadhead.call.arguments import AttentionArgs
from broadhead.call.check import check_forward
from broadhead.costs import Cost
from broadhead.plan.dispatch import refusals, resolve
from broadhead.run import cuda_backend
from broadhead.run import shared_prefix as shared_launch
from broadhead.run.shared_prefix import MAX_ELEMENTS, MAX_WORK, Composed, OneLaunch, decide
from described import FULL, h200, hand_in_costs, problem, schedule
from recorder import Recorder


@pytest.fixture
def on_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_launch, "describe", lambda device: h200())
    monkeypatch.setattr(shared_launch, "resolve", lambda problem, device: resolve(problem, device, FULL))


def step(batch: int = 4, seqlen_q: int = 1, heads: tuple[int, int] = (8, 1), dim: int = 64, **options: Any) -> Any:
    q = torch.zeros(batch, seqlen_q, heads[0], dim, dtype=torch.bfloat16)
    cache = torch.zeros(3, 16, heads[1], dim, dtype=torch.bfloat16)
    lengths, table = torch.zeros(batch, dtype=torch.int32), torch.zeros(batch, 5, dtype=torch.int32)
    args = AttentionArgs(q, cache, cache, seqused_k=lengths, page_table=table, causal=True)
    return args._replace(**options)


@pytest.mark.usefixtures("on_h200")
@pytest.mark.parametrize(
    "args, row",
    [
        (step(1), "d64"),
        (step(2), "d64"),
        (step(3), "d64"),
        (step(4, heads=(16, 2), dim=256), "d256"),
        (step(4, heads=(32, 8), dim=128), "d128"),
        (step(2, heads=(32, 4), dim=512), "d512"),
        (step(3, heads=(32, 4), dim=512), "d512_m32"),
        (step(1, 4), "d64_m32"),
        (step(MAX_ELEMENTS // (8 * 64)), "d64"),
    ],
)
def test_the_tile_follows_from_the_rows(args: AttentionArgs, row: str) -> None:
    """Above head_dim 256 from those of the prefix as well."""
    decision = decide(args, 40)
    assert isinstance(decision, OneLaunch) and decision.plan.row is not None, decision
    assert decision.plan.row.id == f"sm80_fwd_decode_{row}_bf16"
    assert decision.plan.reason.endswith("; the shared prefix in the same launch")
    assert decision.call.problem.shared_tokens == args.q.shape[0] * args.q.shape[1]


@pytest.mark.usefixtures("on_h200")
def test_one_launch_whatever_takes_less_time_for_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another row may be faster behind the prefix, but reads none."""
    hand_in_costs(monkeypatch, {"sm80_fwd_decode_d64": Cost(9), "sm80_fwd_d64_m32": Cost(1)})
    args = step(2)
    own = resolve(check_forward("mha_fwd", args).problem, h200(), FULL)
    assert own.row is not None and own.row.id == "sm80_fwd_d64_m32_bf16"
    assert own.first is not None and own.first.id == "sm80_fwd_decode_d64_bf16"
    decision = decide(args, 40)
    assert isinstance(decision, OneLaunch) and decision.plan.row == own.first, decision


def declared(batch: int, max_seqlen_q: int, kv_dtype: torch.dtype = torch.bfloat16) -> AttentionArgs:
    """One packed query a sequence, of which the call says that there may be more: the workspace is for those."""
    cu = torch.arange(batch + 1, dtype=torch.int32)
    q, cache = torch.zeros(batch, 8, 64, dtype=torch.bfloat16), torch.zeros(3, 16, 1, 64).to(kv_dtype)
    return step(batch, q=q, k=cache, v=cache, cu_seqlens_q=cu, max_seqlen_q=max_seqlen_q)


APART = torch.zeros(4, 2, 2, 8, 64, dtype=torch.bfloat16)[:, 0]


@pytest.mark.usefixtures("on_h200")
@pytest.mark.parametrize(
    "args, length, why",
    [
        (step(), 0, "no prefix"),
        (step(backend="torch"), 40, "no kernel is asked for"),
        (step(num_splits=1), 40, "num_splits=1"),
        (step(MAX_ELEMENTS // (8 * 64) + 1), 40, f"takes up to {MAX_ELEMENTS}"),
        (step(5), MAX_WORK // (5 * 8 * 64) + 1, f"{MAX_WORK} multiplied"),
        (step(4, q=APART), 40, "equal distances"),
        (step(2, 5), 40, "no decode kernel"),
        (step(page_table=torch.zeros(4, 0, dtype=torch.int32)), 40, "page_table is empty"),
        (step(0), 40, "no query"),
        (step(k=torch.zeros(3, 16, 1, 64, dtype=torch.bfloat16).requires_grad_(True)), 40, "no decode kernel"),
        (step(), 1 << 31, "longer than any sequence"),
        (declared(64, 32), 40, f"({64 * 32 * 8 * 64} declared)"),
        (declared(4, 5, torch.float8_e4m3fn), 40, "no decode kernel is for 40 query rows"),
    ],
)
def test_what_is_composed(args: AttentionArgs, length: int, why: str) -> None:
    decision = decide(args, length)
    assert isinstance(decision, Composed) and why in decision.why, decision


@pytest.mark.usefixtures("on_h200")
def test_how_much_one_launch_takes() -> None:
    """As much work as MAX_WORK, or one tile over a prefix of any length."""
    for args, length in ((step(5), MAX_WORK // (5 * 8 * 64)), (step(4), check.MAX_SEQLEN_K)):
        assert isinstance(decide(args, length), OneLaunch)


@pytest.mark.usefixtures("on_h200")
def test_queries_at_one_distance() -> None:
    """One token a sequence at any distance, one sequence, packed ones."""
    wide = torch.zeros(4, 3, 8, 64, dtype=torch.bfloat16)
    cu = torch.tensor([0, 1, 1, 2, 4], dtype=torch.int32)
    packed = {"q": torch.zeros(6, 8, 64, dtype=torch.bfloat16), "cu_seqlens_q": cu, "max_seqlen_q": 2}
    for args in (step(4, q=wide[:, 1:2]), step(1, 2, q=APART[:1]), step(4, **packed)):
        assert isinstance(decide(args, 40), OneLaunch)


@pytest.mark.usefixtures("first_rows")
def test_other_rows_do_not_read_it() -> None:
    asked = problem(seqlen_q=1, shared_tokens=40)
    plan = resolve(asked, h200(), FULL)
    assert plan.row is not None and plan.row.phase == "decode"
    refused = {refusal.row_id for refusal in refusals(asked, h200(), FULL) if "all sequences share" in refusal.reason}
    assert "sm90_fwd_d128_bf16" in refused and not any("decode" in row_id for row_id in refused)
    # More than 32 rows go to a Hopper kernel otherwise.
    assert schedule(seqlen_q=9, head_dim=512)[1].family == "sm90"
    assert schedule(seqlen_q=9, head_dim=512, shared_tokens=10)[1].phase == "decode"


@pytest.mark.usefixtures("on_h200")
def test_one_launch_is_cut_evenly(recorder: Recorder) -> None:
    args = step(4, 3, heads=(8, 2), dim=128)
    decision = decide(args, 40)
    assert isinstance(decision, OneLaunch)
    schedule = cuda_backend.make_launch(args, decision.call, decision.plan)["plan"].schedule
    assert schedule.cell_blocks == 0 and schedule.num_splits == 0


def test_empty_sequences_keep_the_sink() -> None:
    """Composed: sinks join where every query sees keys."""
    torch.manual_seed(0)
    q, cache = torch.randn(2, 1, 4, 32), torch.randn(4, 16, 2, 32)
    tables = torch.tensor([[2], [3]], dtype=torch.int32)
    lengths = torch.tensor([0, 5], dtype=torch.int32)
    prefix = torch.tensor([0, 1], dtype=torch.int32)
    sinks = torch.tensor([9.0, -9.0, 2.0, 3.0])
    out = broadhead.flash_attn_with_shared_prefix(
        q, cache, cache, prefix_len=20, prefix_page_table=prefix, page_table=tables, cache_seqlens=lengths, sinks=sinks
    )
    assert "no kernel is asked for" in broadhead.last_dispatch()[2]
    expected = broadhead.flash_attn_with_kvcache(
        q[:1], cache, cache, page_table=prefix[None], cache_seqlens=20, sinks=sinks
    )
    torch.testing.assert_close(out[:1], expected)
