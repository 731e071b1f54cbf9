"""The functions of vLLM's fork and of sgl_kernel, called as vLLM and SGLang do, against fp64."""

from __future__ import annotations

import warnings
from typing import Any

import broadhead
import oracle
import pytest
import torch
from broadhead.compat import leniency
from foreign import DEVICE, Sequences, int32, offsets, paged, raises_by_name
from surface_modules import SOURCES
from torch import Tensor

VLLM: Any = SOURCES["vllm_flash_attn"]
OWN: Any = SOURCES["vllm.vllm_flash_attn"]
SGL: Any = SOURCES["sgl_kernel.flash_attn"]
CAUSAL = oracle.Rule(64**-0.5, (-1, 0))


def cache_of(s: Sequences, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    together, table = paged(torch.cat((s.k, s.v), dim=-1), s.seqlens_k, page_size)
    return (*together.split([64, 64], dim=-1), table)


@pytest.mark.attends("forward")
@pytest.mark.parametrize("version", [2, 3])
def test_vllm_mixed_batch(version: int) -> None:
    """Keywords of vLLM's backend: prefill and decode in one call, expanded descales that 16-bit tensors do not need."""
    s = Sequences((1, 7, 1), (33, 70, 9))
    k, v, table = cache_of(s, 16)
    metadata = VLLM["get_scheduler_metadata"](
        batch_size=3, max_seqlen_q=7, max_seqlen_k=70, num_heads_q=4, num_heads_kv=2, headdim=64,
        cache_seqlens=int32(*s.seqlens_k), qkv_dtype=s.dtype, cu_seqlens_q=s.cu_q, page_size=16, causal=True,
        window_size=(-1, -1), num_splits=0,
    )  # fmt: skip
    out = torch.full_like(s.grad_out, torch.nan)
    descale = torch.ones(1, device=DEVICE).expand(3, 2)
    returned, lse = VLLM["flash_attn_varlen_func"](
        q=s.q.detach(), k=k, v=v, out=out, cu_seqlens_q=s.cu_q, max_seqlen_q=7, seqused_k=int32(*s.seqlens_k),
        max_seqlen_k=70, softmax_scale=0.125, causal=True, alibi_slopes=None, window_size=[-1, -1], block_table=table,
        softcap=0.0, scheduler_metadata=metadata, fa_version=version, q_descale=descale, k_descale=descale,
        v_descale=descale, num_splits=0, s_aux=None, return_softmax_lse=True,
    )  # fmt: skip
    assert returned is out
    s.check(CAUSAL, out, lse)


@pytest.mark.attends("forward")
def test_vllm_positional_without_pages() -> None:
    """max_seqlen_q stands before cu_seqlens_q; window_size=None is no window."""
    s = Sequences((5, 33), (9, 40))
    sinks = torch.randn(4, device=DEVICE).to(s.dtype)
    out = VLLM["flash_attn_varlen_func"](
        s.q, s.k, s.v, s.max_q, s.cu_q, s.max_k, s.cu_k, causal=True, fa_version=3, s_aux=sinks
    )
    s.check(CAUSAL, out.detach(), sinks=sinks)


@pytest.mark.attends("forward")
def test_vllm_takes_metadata_of_another_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leniency, "_told", set())
    s = Sequences((1, 1), (33, 70))
    k, v, table = cache_of(s, 16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = VLLM["flash_attn_varlen_func"](
            s.q.detach(), k, v, 1, s.cu_q, 70, seqused_k=int32(*s.seqlens_k), block_table=table, causal=True,
            scheduler_metadata=torch.zeros(3, dtype=torch.int32, device=DEVICE),
        )  # fmt: skip
    assert [each.category for each in caught] == [broadhead.CompatWarning]
    s.check(CAUSAL, out)


@pytest.mark.attends("forward")
def test_vllm_causality_by_sequence() -> None:
    """vLLM's own module: dynamic_causal, int32, one number a sequence."""
    s = Sequences((5, 12, 3), (37, 12, 20))
    k, v, table = cache_of(s, 16)
    out = OWN["flash_attn_varlen_func"](
        q=s.q.detach(), k=k, v=v, max_seqlen_q=12, cu_seqlens_q=s.cu_q, max_seqlen_k=37, seqused_k=int32(*s.seqlens_k),
        causal=True, window_size=None, block_table=table, fa_version=4, dynamic_causal=int32(1, 0, 1), mask_mod=None,
        aux_tensors=None, output_scale=None, num_splits=0,
    )  # fmt: skip
    s.check([CAUSAL, oracle.Rule(64**-0.5), CAUSAL], out)
    assert OWN["compile_flash_attn_varlen_func_from_specs"](
        q_shape=(1, 2, 64), k_shape=(1, 2, 64), v_shape=(1, 2, 64), q_dtype=torch.bfloat16, fa_version=4
    ) is None  # fmt: skip
    x, cu = torch.randn(4, 2, 64, device=DEVICE).bfloat16(), int32(0, 4)
    raises_by_name(lambda: OWN["flash_attn_varlen_func"](x, x, x, 4, cu, 4, cu, output_scale=x), "output_scale must be")


def test_vllm_refuses_by_name() -> None:
    x, cu = torch.randn(4, 2, 64, device=DEVICE).bfloat16(), int32(0, 4)

    def call(**others: Any) -> Any:
        return VLLM["flash_attn_varlen_func"](x, x, x, 4, cu, 4, cu, **others)

    call(fa_version=2, dropout_p=0.0, cp_world_size=1, cp_rank=0)
    raises_by_name(lambda: call(cp_world_size=2), "flash_attn_varlen_func", "cp_world_size must be 1", "2")
    raises_by_name(lambda: call(fa_version=5), "flash_attn_varlen_func", "fa_version must be 2 or 3 or 4")
    raises_by_name(lambda: VLLM["sparse_attn_func"](x, x, x, 0, 0, 0, 0), "sparse")


def test_availability_is_what_runs_here() -> None:
    reason = VLLM["fa_version_unsupported_reason"](3)
    assert VLLM["is_fa_version_supported"](3) == (reason is None) == SGL["is_fa3_supported"]()
    if not torch.cuda.is_available():
        assert reason == "torch finds no CUDA device"
    with pytest.raises(AssertionError, match="fa_version"):
        VLLM["is_fa_version_supported"](1)


@pytest.mark.attends("forward")
@pytest.mark.parametrize("page_size", [1, 16])
def test_sglang_extend_and_decode(page_size: int) -> None:
    """Ragged q over a paged cache; cu_seqlens_k_new without new keys; attention_chunk=None."""
    s = Sequences((1, 5, 2), (33, 7, 64))
    k, v, table = cache_of(s, page_size)
    metadata = SGL["get_scheduler_metadata"](
        batch_size=3, max_seqlen_q=5, max_seqlen_k=table.shape[1] * page_size, num_heads=4, num_heads_k=2, headdim=64,
        cache_seqlens=int32(*s.seqlens_k), qkv_dtype=s.dtype, headdim_v=64, cu_seqlens_q=s.cu_q, page_size=page_size,
        causal=True,
    )  # fmt: skip
    out, lse, *rest = SGL["flash_attn_with_kvcache"](
        q=s.q.detach(), k_cache=k, v_cache=v, page_table=table, cache_seqlens=int32(*s.seqlens_k), cu_seqlens_q=s.cu_q,
        cu_seqlens_k_new=offsets(s.seqlens_k), max_seqlen_q=5, softmax_scale=0.125, causal=True, window_size=(-1, -1),
        attention_chunk=None, softcap=0.0, k_descale=None, v_descale=None, return_softmax_lse=True, num_splits=0,
        scheduler_metadata=metadata, sinks=None, score_mod=None, ver=3, only_qv=False,
    )  # fmt: skip
    assert len(rest) == 2
    s.check(CAUSAL, out, lse)


@pytest.mark.attends("forward")
def test_sglang_chunked_prefix_and_padded_batch() -> None:
    s = Sequences((5, 33), (9, 40))
    out, lse, *_ = SGL["flash_attn_varlen_func"](
        q=s.q, k=s.k, v=s.v, cu_seqlens_q=s.cu_q, cu_seqlens_k=s.cu_k, max_seqlen_q=33, max_seqlen_k=40, causal=False,
        return_softmax_lse=True,
    )  # fmt: skip
    s.check(oracle.Rule(64**-0.5), out.detach(), lse.detach())
    s = Sequences((5, 5), (9, 9))
    out = SGL["flash_attn_varlen_func"](*map(s.dense, (s.q, s.k, s.v)), None, None, causal=True)
    s.check(CAUSAL, out.detach().flatten(0, 1))


def test_sglang_refuses_by_name() -> None:
    x, cu = torch.randn(4, 2, 64, device=DEVICE).bfloat16(), int32(0, 4)
    func = SGL["flash_attn_varlen_func"]
    raises_by_name(lambda: func(x, x, x, cu, cu, 4, 4, only_qv=True), "flash_attn_varlen_func", "only_qv must be False")
    raises_by_name(lambda: func(None, x, x, cu, cu, 4, 4), "flash_attn_varlen_func", "q must be a tensor")
