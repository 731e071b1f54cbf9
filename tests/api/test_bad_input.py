"""Bad input: each mistake raises an error that names the function, the argument, what came and what is accepted."""

from __future__ import annotations

import math
from typing import Any

import broadhead
import pytest
import torch
from broadhead import InvalidArgumentError, InvalidTypeError


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense() -> dict[str, Any]:
    return {"q": randn(2, 3, 4, 16), "k": randn(2, 5, 2, 16), "v": randn(2, 5, 2, 16)}


def varlen() -> dict[str, Any]:
    return {
        "q": randn(6, 4, 16),
        "k": randn(9, 2, 16),
        "v": randn(9, 2, 16),
        "cu_seqlens_q": int32(0, 2, 6),
        "cu_seqlens_k": int32(0, 4, 9),
        "max_seqlen_q": 4,
        "max_seqlen_k": 5,
    }


def paged() -> dict[str, Any]:
    return {
        "q": randn(2, 1, 4, 16),
        "k_cache": randn(6, 4, 2, 16),
        "v_cache": randn(6, 4, 2, 16),
        "cache_seqlens": int32(7, 3),
        "page_table": int32(5, 1, 0, 2).view(2, 2),
    }


DENSE = [
    # changes, error, words of the text (argument, what came, what is accepted)
    ({"q": randn(3, 4, 16)}, InvalidArgumentError, ["q", "(3, 4, 16)", "batch"]),
    ({"k": randn(2, 5, 2, 24), "v": randn(2, 5, 2, 24)}, InvalidArgumentError, ["k", "24", "16"]),
    ({"k": randn(3, 5, 2, 16), "v": randn(3, 5, 2, 16)}, InvalidArgumentError, ["k", "3", "2"]),
    ({"k": randn(2, 5, 3, 16), "v": randn(2, 5, 3, 16)}, InvalidArgumentError, ["4", "3", "multiple"]),
    ({"v": randn(2, 6, 2, 16)}, InvalidArgumentError, ["v", "(2, 6, 2, 16)"]),
    ({"q": randn(2, 3, 4, 12), "k": randn(2, 5, 2, 12)}, InvalidArgumentError, ["q", "12", "multiple of 8"]),
    ({"q": randn(2, 3, 4, 0), "k": randn(2, 5, 2, 0)}, InvalidArgumentError, ["q", "0", "multiple of 8"]),
    ({"v": randn(2, 5, 2, 20)}, InvalidArgumentError, ["v", "20", "multiple of 8"]),
    ({"q": torch.ones(2, 3, 4, 16, dtype=torch.int32)}, InvalidTypeError, ["q", "int32", "bf16"]),
    ({"k": randn(2, 5, 2, 16, dtype=torch.bfloat16)}, InvalidTypeError, ["k", "bfloat16", "float32"]),
    ({"q": [[1.0]]}, InvalidTypeError, ["q", "tensor"]),
    ({"k": randn(2, 5, 2, 16).to("meta")}, InvalidArgumentError, ["k", "meta", "device"]),
    ({"softmax_scale": math.nan}, InvalidArgumentError, ["softmax_scale", "nan", "finite"]),
    ({"softmax_scale": torch.tensor([0.1])}, InvalidTypeError, ["softmax_scale", "number"]),
    ({"softmax_scale": "0.1"}, InvalidTypeError, ["softmax_scale", "number"]),
    ({"softcap": -1.0}, InvalidArgumentError, ["softcap", "-1.0"]),
    ({"softcap": math.inf}, InvalidArgumentError, ["softcap", "inf"]),
    ({"window_size": (1, 2, 3)}, InvalidArgumentError, ["window_size", "3"]),
    ({"window_size": "all"}, InvalidTypeError, ["window_size", "str"]),
    ({"attention_chunk": -2}, InvalidArgumentError, ["attention_chunk", "-2"]),
    ({"num_splits": -1}, InvalidArgumentError, ["num_splits", "-1"]),
    ({"num_splits": 100000}, InvalidArgumentError, ["num_splits", "100000"]),
    ({"num_splits": 1.5}, InvalidTypeError, ["num_splits", "1.5"]),
    ({"causal": None}, InvalidTypeError, ["causal", "None"]),
    ({"pack_gqa": "auto"}, InvalidTypeError, ["pack_gqa", "auto"]),
    ({"sinks": randn(2)}, InvalidArgumentError, ["sinks", "(2,)", "4"]),
    ({"sinks": torch.ones(4, dtype=torch.float64)}, InvalidTypeError, ["sinks", "float64"]),
    ({"prefix_lens": int32(1, 2)}, InvalidArgumentError, ["prefix_lens", "causal=True"]),
    ({"prefix_lens": int32(1, 2, 3), "causal": True}, InvalidArgumentError, ["prefix_lens", "(3,)"]),
    ({"prefix_lens": int32(1, -2), "causal": True}, InvalidArgumentError, ["prefix_lens", "-2"]),
    ({"prefix_lens": torch.tensor([1, 2]), "causal": True}, InvalidTypeError, ["prefix_lens", "int64", "int32"]),
    ({"out": randn(2, 3, 4, 24)}, InvalidArgumentError, ["out", "24", "16"]),
    ({"out": randn(2, 3, 4, 16, dtype=torch.float64)}, InvalidTypeError, ["out", "float64", "float32"]),
    ({"out": randn(1, 1, 4, 16).expand(2, 3, 4, 16)}, InvalidArgumentError, ["out", "strides"]),
    ({"backend": "rocm"}, InvalidArgumentError, ["backend", "rocm", "cuda"]),
    ({"q_descale": torch.ones(3, 2)}, InvalidArgumentError, ["q_descale", "(3, 2)"]),
    ({"qv": randn(2, 3, 4, 8)}, InvalidArgumentError, ["qv", "8", "16"]),
]


def refused(function: str, arguments: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        getattr(broadhead, function)(**arguments)
    text = str(caught.value)
    assert isinstance(caught.value, broadhead.BroadheadError)
    missing = [word for word in [function, *words] if word not in text]
    assert not missing, f"the text lacks {missing}: {text}"


@pytest.mark.parametrize("changes, error, words", DENSE, ids=lambda x: "+".join(x) if isinstance(x, dict) else "")
def test_dense(changes: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    refused("flash_attn_func", {**dense(), **changes}, error, words)


VARLEN = [
    ({"q": randn(1, 6, 4, 16)}, InvalidArgumentError, ["q", "(1, 6, 4, 16)", "cu_seqlens_q"]),
    ({"cu_seqlens_q": torch.tensor([0, 2, 6])}, InvalidTypeError, ["cu_seqlens_q", "int64", "int32"]),
    ({"cu_seqlens_q": int32(0, 2, 6).float()}, InvalidTypeError, ["cu_seqlens_q", "float32", "int32"]),
    ({"cu_seqlens_q": int32(0, 4, 2)}, InvalidArgumentError, ["cu_seqlens_q", "never decrease"]),
    ({"cu_seqlens_q": int32(0, 4, 12)}, InvalidArgumentError, ["cu_seqlens_q", "6"]),
    ({"cu_seqlens_q": int32(-2, 4, 6)}, InvalidArgumentError, ["cu_seqlens_q", ">= 0"]),
    ({"cu_seqlens_k": int32(0, 9)}, InvalidArgumentError, ["cu_seqlens_k", "(2,)"]),
    ({"max_seqlen_q": None}, InvalidArgumentError, ["max_seqlen_q", "None"]),
    ({"max_seqlen_q": -1}, InvalidArgumentError, ["max_seqlen_q", "-1"]),
    ({"max_seqlen_q": torch.tensor(4, device="meta")}, InvalidTypeError, ["max_seqlen_q", "int"]),
    ({"seqused_q": int32(1, -1)}, InvalidArgumentError, ["seqused_q", "-1"]),
    ({"seqused_k": int32(1, -1)}, InvalidArgumentError, ["seqused_k", "-1"]),
    ({"seqused_k": int32(1, 2, 3)}, InvalidArgumentError, ["seqused_k", "(3,)"]),
]


@pytest.mark.parametrize("changes, error, words", VARLEN, ids=lambda x: "+".join(x) if isinstance(x, dict) else "")
def test_varlen(changes: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    refused("flash_attn_varlen_func", {**varlen(), **changes}, error, words)


PAGED = [
    ({"page_table": torch.tensor([[5, 1], [0, 2]])}, InvalidTypeError, ["page_table", "int64", "int32"]),
    ({"page_table": torch.ones(2, 2)}, InvalidTypeError, ["page_table", "float32", "int32"]),
    ({"page_table": int32(5, 1)}, InvalidArgumentError, ["page_table", "(2,)"]),
    ({"page_table": int32(5, 1, 0).view(3, 1)}, InvalidArgumentError, ["page_table", "(3, 1)"]),
    ({"k_cache": randn(6, 0, 2, 16), "v_cache": randn(6, 0, 2, 16)}, InvalidArgumentError, ["page_size", "0", ">= 1"]),
    ({"cache_seqlens": int32(7, -3)}, InvalidArgumentError, ["cache_seqlens", "-3"]),
    ({"cache_seqlens": torch.tensor([7.0, 3.0])}, InvalidTypeError, ["cache_seqlens", "float32"]),
    ({"cache_seqlens": int32(7)}, InvalidArgumentError, ["cache_seqlens", "(1,)"]),
    ({"cache_seqlens": -4}, InvalidArgumentError, ["cache_seqlens", "-4"]),
    ({"cache_leftpad": int32(1)}, InvalidArgumentError, ["cache_leftpad", "(1,)"]),
    ({"cache_batch_idx": torch.tensor([0, 1])}, InvalidTypeError, ["cache_batch_idx", "int64"]),
    ({"scheduler_metadata": torch.zeros(16, dtype=torch.int32)}, InvalidArgumentError, ["scheduler_metadata", "17"]),
    ({"scheduler_metadata": torch.zeros(17)}, InvalidTypeError, ["scheduler_metadata", "float32", "int32"]),
    ({"scheduler_metadata": [0] * 17}, InvalidTypeError, ["scheduler_metadata"]),
    ({"k": randn(2, 1, 2, 16)}, InvalidArgumentError, ["v"]),
    ({"k": randn(2, 1, 3, 16), "v": randn(2, 1, 3, 16)}, InvalidArgumentError, ["k", "3"]),
    ({"k": randn(2, 1, 2, 16).bfloat16(), "v": randn(2, 1, 2, 16).bfloat16()}, InvalidTypeError, ["k", "bfloat16"]),
    ({"rotary_cos": randn(9, 4)}, InvalidArgumentError, ["rotary_sin"]),
]


@pytest.mark.parametrize("changes, error, words", PAGED, ids=lambda x: "+".join(x) if isinstance(x, dict) else "")
def test_paged(changes: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    refused("flash_attn_with_kvcache", {**paged(), **changes}, error, words)


METADATA = [
    ({"batch_size": 3}, InvalidArgumentError, ["cache_seqlens", "(2,)", "3"]),
    ({"batch_size": -1}, InvalidArgumentError, ["batch_size", "-1"]),
    ({"headdim": 12}, InvalidArgumentError, ["headdim", "12", "8"]),
    ({"num_heads_q": 5}, InvalidArgumentError, ["5", "2", "multiple"]),
    ({"num_heads_q": None}, (InvalidArgumentError, InvalidTypeError), ["num_heads_q"]),
    ({"page_size": 0}, InvalidArgumentError, ["page_size", "0", "[1,"]),
    ({"qkv_dtype": torch.int32}, InvalidTypeError, ["qkv_dtype", "int32"]),
    ({"cache_seqlens": torch.ones(2)}, InvalidTypeError, ["cache_seqlens", "float32"]),
    ({"num_splits": -3}, InvalidArgumentError, ["num_splits", "-3"]),
    ({"max_seqlen_k": -3}, InvalidArgumentError, ["max_seqlen_k", "-3"]),
    ({"out": torch.zeros(16, dtype=torch.int32)}, InvalidArgumentError, ["out", "17"]),
    ({"out": torch.zeros(17)}, InvalidTypeError, ["out", "float32", "int32"]),
]


@pytest.mark.parametrize("changes, error, words", METADATA, ids=lambda x: "+".join(x) if isinstance(x, dict) else "")
def test_metadata(changes: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    arguments = {
        "batch_size": 2,
        "max_seqlen_q": 1,
        "max_seqlen_k": 64,
        "num_heads_q": 4,
        "num_heads_kv": 2,
        "headdim": 64,
        "cache_seqlens": int32(7, 3),
    }
    refused("get_scheduler_metadata", {**arguments, **changes}, error, words)


def test_cuda_backend_on_cpu_tensors_says_why() -> None:
    for backend_call in (
        lambda: broadhead.flash_attn_func(**dense(), backend="cuda"),
        lambda: broadhead.flash_attn_varlen_func(**varlen(), backend="cuda"),
    ):
        with pytest.raises(broadhead.UnsupportedError, match="cpu") as caught:
            backend_call()
        assert "flash_attn" in str(caught.value) and isinstance(caught.value, NotImplementedError)


def test_cpu_fallback_is_silent_and_recorded(recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROADHEAD_STRICT", "1")  # strict concerns CUDA devices alone
    broadhead.flash_attn_func(**dense())
    backend, row, reason = broadhead.last_dispatch()
    assert backend == "torch" and row is None and "cpu" in reason.lower()
    assert not [w for w in recwarn if issubclass(w.category, broadhead.FallbackWarning)]


def test_out_with_gradients_is_refused() -> None:
    arguments = dense()
    arguments["q"].requires_grad_()
    with pytest.raises(broadhead.UnsupportedError, match="out"):
        broadhead.flash_attn_func(**arguments, out=randn(2, 3, 4, 16))
    with torch.no_grad():
        broadhead.flash_attn_func(**arguments, out=randn(2, 3, 4, 16))
