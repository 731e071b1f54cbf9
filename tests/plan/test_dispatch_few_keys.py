"""Few keys a sequence: the tile of fewest keys goes first, on Hopper and for few query rows as well."""

from __future__ import annotations

from typing import Any

import pytest
from broadhead.plan.device import hypothetical
from broadhead.plan.dispatch import resolve
from broadhead.support import FEW_KEYS, ROWS
from described import ALL_ARCHS, build_of, h200, problem


def chosen(device: Any = None, **changes: Any) -> str:
    plan = resolve(problem(**{"head_dim": 128, "seqlen_q": 300, "seqlen_k": FEW_KEYS} | changes), device or h200(),
                   build_of(*ALL_ARCHS))  # fmt: skip
    assert plan.row is not None
    return plan.row.stem


@pytest.mark.parametrize("head_dim", [72, 96, 128])
@pytest.mark.parametrize("seqlen_q", [1, 7, 300, 9000])
@pytest.mark.parametrize("seqlen_k", [1, FEW_KEYS])
def test_the_smallest_tile_goes_first(head_dim: int, seqlen_q: int, seqlen_k: int) -> None:
    assert chosen(head_dim=head_dim, head_dim_v=head_dim, seqlen_q=seqlen_q, seqlen_k=seqlen_k) == "sm80_fwd_d128_n32"


def test_only_where_it_is_the_fastest() -> None:
    assert chosen(seqlen_k=FEW_KEYS + 1) == "sm90_fwd_d128"
    assert chosen(head_dim=64, head_dim_v=64) == "sm90_fwd_d64", "more than half of its columns would be empty"
    assert chosen(head_dim=256, head_dim_v=256).startswith("sm90_fwd_d256")
    assert chosen(features=("paged", "seqused")) != "sm80_fwd_d128_n32", "a page table may be wider than its sequences"
    assert chosen(hypothetical((8, 0))) == "sm80_fwd_d128_n32", "on every device"


@pytest.mark.parametrize("head_dim", [64, 256, 512])
def test_decode_tiles_of_which_two_fit_go_first(head_dim: int) -> None:
    few: dict[str, Any] = {"head_dim": head_dim, "head_dim_v": head_dim, "seqlen_q": 2, "seqlen_k": FEW_KEYS}
    assert chosen(**few) == f"sm80_fwd_decode_d{head_dim}_smem99"
    assert chosen(**few | {"seqlen_k": FEW_KEYS + 1}) == f"sm80_fwd_decode_d{head_dim}"
    assert chosen(**few, features=("paged", "seqused")) == f"sm80_fwd_decode_d{head_dim}"


def test_the_table_says_so_of_one_tile() -> None:
    assert {row.stem for row in ROWS if row.few_keys} == {"sm80_fwd_d128_n32"}
