"""Arguments that are refused: by the name the caller gave them, on every device, in a text of bearable length."""

from __future__ import annotations

from typing import Any

import broadhead
import numpy as np
import pytest
import torch
from spelled_calls import CALLS, dense, function_of, randn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_q_descale_under_16_bit_q(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in dense().values())
    k, v = (x.to(torch.float8_e4m3fn) for x in (k, v))
    with pytest.raises(
        broadhead.InvalidArgumentError, match=r"flash_attn_func: q_descale must be None.*drop q_descale"
    ):
        broadhead.flash_attn_func(q, k, v, q_descale=torch.ones(2, 2))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("length, fits", [(48, True), (49, False), (5000, False)])
def test_a_length_that_the_host_knows_is_refused_on_every_device(length: int, fits: bool, device: str) -> None:
    """The meta device stands for those whose tensors are not read."""
    q, cache = randn(2, 1, 4, 16).to(device), randn(2, 48, 2, 16).to(device)
    pages = {"page_table": torch.zeros(2, 3, dtype=torch.int32).to(device)}
    for caches in ((cache, cache, {}), (cache.view(6, 16, 2, 16),) * 2 + (pages,)):
        if fits:
            if device == "cpu":
                broadhead.flash_attn_with_kvcache(q, *caches[:2], cache_seqlens=length, **caches[2])
            continue
        with pytest.raises(
            broadhead.InvalidArgumentError, match=f"cache_seqlens must be at most .* = 48, got {length}"
        ):
            broadhead.flash_attn_with_kvcache(q, *caches[:2], cache_seqlens=length, **caches[2])
    new = randn(2, 1, 2, 16).to(device)
    with pytest.raises(broadhead.InvalidArgumentError, match=r"got .* with 1 new keys behind them"):
        broadhead.flash_attn_with_kvcache(q, cache, cache, new, new, cache_seqlens=length)


def test_values_are_not_dumped_into_the_text() -> None:
    _, k, v = dense().values()
    for q in (np.zeros((2, 6, 4, 16)), [[0.0] * 1000], "x" * 1000):
        with pytest.raises(broadhead.InvalidTypeError, match="flash_attn_func: q must be a tensor") as caught:
            broadhead.flash_attn_func(q, k, v)
        assert len(str(caught.value)) < 300
    with pytest.raises(broadhead.InvalidTypeError, match=r"numpy.ndarray of shape \(2, 6, 4, 16\), dtype float64"):
        broadhead.flash_attn_func(np.zeros((2, 6, 4, 16)), k, v)


@pytest.mark.parametrize("name, changes, words", [
    ("qkvpacked", {"qkv": torch.zeros(2, 6, 3, 4, 12)}, r"of qkv must be a positive multiple of 8, got 12"),
    ("qkvpacked", {"qkv": torch.zeros(2, 6, 3, 4, 16, dtype=torch.int32)}, r"qkv must be bf16"),
    ("qkvpacked", {"qkv": torch.zeros(2, 6, 4, 16)}, r"qkv must be \(batch"),
    ("qkvpacked", {"sinks": randn(3)}, r"sinks must have shape"),
    ("qkvpacked", {"sinks": randn(4), "s_aux": randn(4)}, r"sinks and s_aux"),
    ("qkvpacked", {"sinks": randn(4).to("meta")}, r"sinks must be on the device of qkv"),
    ("heads packed", {"num_heads_q": 2}, r"num_heads_q must be a multiple of the key heads .* got 2 and 3"),
    ("kvpacked", {"kv": torch.zeros(2, 9, 2, 2, 24)}, r"kv must have the head_dim of q, 16, got 24"),
    ("kvpacked", {"kv": torch.zeros(3, 9, 2, 2, 16)}, r"kv must have the batch of q, 2, got 3"),
    ("kvpacked", {"kv": torch.zeros(2, 9, 2, 3, 16)}, r"multiple of the heads of kv, got 4 and 3"),
    ("varlen packed", {"cu_seqlens": torch.tensor([0, 3, 7])}, r"cu_seqlens must be an int32 tensor"),
    ("varlen packed", {"cu_seqlens": None}, r"cu_seqlens must be an int32 tensor"),
    ("varlen packed", {"max_seqlen": None}, r"max_seqlen must be given with cu_seqlens"),
    ("varlen packed", {"max_seqlen": 2.5}, r"max_seqlen must be a Python int"),
    ("varlen packed", {"qkv": torch.zeros(7, 3, 4, 12)}, r"of qkv must be a positive multiple of 8"),
])  # fmt: skip
def test_packed_forms_speak_of_their_own_arguments(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(broadhead.BroadheadError, match=f"^{CALLS[name][0]}: .*{words}"):
        function_of(name)(**{**CALLS[name][1](), **changes})
