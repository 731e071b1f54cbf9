"""A call that is refused has written nothing: caches, out and gradients are as they were."""

from __future__ import annotations

from typing import Any

import broadhead
import pytest
import torch
from broadhead.api import shared_prefix
from entries import Entry, backward_entries, entries
from torch import Tensor

WRITING = {name: entry for name, entry in (entries() | backward_entries()).items() if entry.written}


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def wrong(entry: Entry) -> dict[str, Any]:
    """Arguments, by what is wrong with them: every tensor of another shape and dtype, and values out of range."""
    changes: dict[str, Any] = {}
    for name, x in entry.tensors.items():
        changes[f"{name} of another rank"] = {name: x[None]}
        changes[f"{name} of another dtype"] = {name: x.to(torch.int64)}
        if x.dim() > 1:
            changes[f"{name} of another shape"] = {name: x[..., : x.shape[-1] // 2]}
        if x.is_floating_point():
            changes[f"{name} that requires grad"] = {name: x.clone().requires_grad_()}
    function = entry.function.__name__
    if function in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache", "mha_fwd"):
        for name, value in {
            "causal": "yes", "softcap": float("nan"), "num_splits": 10_000, "window_size": "left",
            "attention_chunk": -1.5, "backend": "cuda",
        }.items():  # fmt: skip
            changes[f"{name}={value!r}"] = {name: value}
    if function in ("flash_attn_with_kvcache", "flash_attn_varlen_func", "mha_fwd"):
        changes["scheduler_metadata of another head_dim"] = {"scheduler_metadata": planned(entry, headdim=128)}
        changes["scheduler_metadata that is too short"] = {"scheduler_metadata": int32(1, 2, 3)}
    return changes


def planned(entry: Entry, headdim: int) -> Tensor:
    queries = entry.values.get("max_seqlen_q", 1)
    table = torch.zeros(2, 3, dtype=torch.int32)
    return broadhead.get_scheduler_metadata(
        2, queries, 48, 4, 2, headdim, int32(20, 33), torch.float32, causal=True, page_size=16, page_table=table
    )


@pytest.mark.parametrize("name", WRITING)
def test_a_refused_call_has_written_nothing(name: str) -> None:
    entry = WRITING[name]
    refused = 0
    for what, change in wrong(entry).items():
        given = entry.clone() | change
        before = {key: x.detach().clone() for key, x in given.items() if isinstance(x, Tensor)}
        try:
            entry.function(**{**entry.values, **given})
        except (broadhead.BroadheadError, RuntimeError):
            refused += 1
        else:
            continue  # right as well: an index of another rank, say
        for key in entry.written:
            assert torch.equal(given[key].detach(), before[key]), f"{what}: {key} was written"
    assert refused >= len(entry.tensors), "the changes were meant to be wrong"


@pytest.mark.parametrize("name", ["append", "append_packed", "mha_fwd"])
def test_metadata_of_another_call_is_refused_before_the_append(name: str) -> None:
    entry = WRITING[name]
    given = entry.clone()
    before = {key: given[key].clone() for key in entry.written}
    with pytest.raises(broadhead.InvalidArgumentError, match="headdim"):
        entry.function(**given, **entry.values, scheduler_metadata=planned(entry, headdim=128))
    for key, x in before.items():
        assert torch.equal(given[key], x), f"{key} was written"
    entry.function(**given, **entry.values)


def test_a_prefix_that_no_kernel_takes_is_refused_before_out_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two passes is refused: the first must not have written ``out``."""
    entry = WRITING["shared_prefix"]
    given = entry.clone()
    before = given["out"].clone()
    calls: list[str] = []

    def refuse(*arguments: Any, **options: Any) -> None:
        calls.append("second")
        raise broadhead.UnsupportedError("no kernel takes the prefix")

    monkeypatch.setattr(shared_prefix, "flash_attn_with_kvcache", refuse)
    with pytest.raises(broadhead.UnsupportedError, match="no kernel takes"):
        entry.function(**given, **entry.values)
    assert calls == ["second"] and torch.equal(given["out"], before)


def test_backward_gradients_are_checked_before_any_is_written() -> None:
    entry = WRITING["mha_bwd_dense"]
    given = entry.clone()
    given["dv"] = given["dv"][..., :8].contiguous()
    with pytest.raises(broadhead.BroadheadError, match="dv"):
        entry.run(given)
    assert not given["dq"].any() and not given["dk"].any()
