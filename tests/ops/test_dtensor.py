"""Attention on DTensors and under FSDP2: two processes give what one gives, and nobody else pays for it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from broadhead.ops import sharding
from ranks import run_program, run_ranks
from sharded_calls import check_calls, check_compiled, check_fully_sharded

ROOT = Path(__file__).resolve().parents[2]
#: What a process without DTensors does not wait for.
LAZY = """
import sys, torch, broadhead
assert "torch.distributed.tensor" not in sys.modules, "importing broadhead imports DTensor"
q = torch.randn(1, 4, 2, 16, device="meta")
broadhead.flash_attn_func(q, q, q)
import torch.distributed.tensor
broadhead.flash_attn_func(q, q, q)
assert not broadhead.ops.sharding._registered, "a call without DTensors registers rules"
"""
FSDP2_ON_A_CPU = hasattr(torch.cpu.Stream, "record_event")


def test_calls() -> None:
    run_ranks(check_calls)


def test_compiled() -> None:
    run_ranks(check_compiled)


@pytest.mark.skipif(not FSDP2_ON_A_CPU, reason=f"FSDP2 of torch {torch.__version__} does not run on a CPU")
def test_fully_sharded() -> None:
    run_ranks(check_fully_sharded)


def test_the_program_of_the_page_runs() -> None:
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"^## Tensor parallelism$.*?^```python no-test\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    run_program(source)


def test_nobody_else_pays() -> None:
    result = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# --- the rules alone -------------------------------------------------------------------------------------------------


def mesh_of(*sizes: int) -> Any:
    return SimpleNamespace(ndim=len(sizes), size=lambda dim: sizes[dim])


def cuts(mesh: Any, heads: int, heads_kv: int, **others: tuple[int, ...]) -> list[dict[str, int]]:
    """The cuts of a dense call of 4 sequences."""
    shapes = {"q": (4, 5, heads, 16), "k": (4, 7, heads_kv, 16), "v": (4, 7, heads_kv, 16), **others}
    return list(sharding.attention_cuts(shapes, mesh))


@pytest.mark.parametrize(
    ("sizes", "heads_kv", "offered"),
    [
        ((2,), 4, True),
        ((4,), 4, True),
        ((3,), 4, False),
        ((8,), 4, True),  # torch cuts nothing into more parts than it has
        ((2, 2), 4, True),
        ((2, 4), 8, True),
        ((2, 4), 12, False),  # over both: 2, 2, 2 and 0 of each half
        ((2, 3), 4, False),
        ((2, 2), 1, True),  # each rank has the one KV head
        ((3,), 1, False),  # 4 query heads: 2, 2 and 0
    ],
)
def test_heads_are_cut_where_they_divide(sizes: tuple[int, ...], heads_kv: int, offered: bool) -> None:
    found = [cut for cut in cuts(mesh_of(*sizes), 4 * heads_kv, heads_kv) if cut["q"] == 2]
    assert len(found) == offered
    for cut in found:
        assert cut["dq"] == cut["out"] == 2 and cut["softmax_lse"] == 1
        assert cut.get("k") == cut.get("dv") == (None if heads_kv == 1 else 2)


def test_what_belongs_to_a_head_or_a_sequence_is_cut_with_it() -> None:
    heads, batch = cuts(
        mesh_of(2),
        4,
        2,
        sinks=(4,),
        q_descale=(4, 2),
        k_descale=(4, 2),
        seqused_k=(4,),
        prefix_lens=(4,),
        query_ranges=(4, 5, 2),
        causal_by_sequence=(4,),
        tree_mask=(4, 5),
        dlse=(4, 4, 5),
    )
    assert (heads["sinks"], heads["q_descale"], heads["k_descale"], heads["dlse"]) == (0, 1, 1, 1)
    masks = ("prefix_lens", "query_ranges", "causal_by_sequence", "tree_mask")
    assert "seqused_k" not in heads and not set(masks) & set(heads)
    assert {batch[name] for name in ("q_descale", "k_descale", "seqused_k", *masks, "dlse", "dk")} == {0}
    assert "sinks" not in batch and "dsinks" not in batch


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k", "scheduler_metadata"])
def test_no_batch_is_cut_where_sequences_belong_together(name: str) -> None:
    assert [cut["q"] for cut in cuts(mesh_of(2), 4, 2, **{name: (4,)})] == [2]


def test_pages_and_rows_of_a_cache_are_shared() -> None:
    by_page = cuts(mesh_of(2), 4, 2, k=(9, 8, 2, 16), v=(9, 8, 2, 16), page_table=(4, 3), seqused_k=(4,))[1]
    assert "k" not in by_page and by_page["page_table"] == 0
    by_row = cuts(mesh_of(2), 4, 2, k=(9, 8, 2, 16), v=(9, 8, 2, 16), page_table=(7, 3), kv_batch_idx=(4,))[1]
    assert "page_table" not in by_row and by_row["kv_batch_idx"] == 0
    (append,) = sharding.append_cuts({"k_cache": (9, 8, 2, 16), "page_table": (4, 3)}, mesh_of(2))
    assert append == {"k_cache": 2}


def test_a_wrong_call_is_not_cut() -> None:
    """The parts of a wrong call can be right ones: uncut it fails, and on every rank."""
    assert [cut["q"] for cut in cuts(mesh_of(2), 5, 2)] == [0]
    assert [cut["q"] for cut in cuts(mesh_of(2), 4, 2, v=(4, 7, 4, 16))] == [0]
    assert [cut["q"] for cut in cuts(mesh_of(2), 4, 2, k=(3, 7, 2, 16))] == [2]
