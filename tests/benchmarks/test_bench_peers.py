"""The adapters of the decode peers, on stand-ins that have their call surface and broadhead's mathematics."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import broadhead
import pytest
import torch
from broadhead_bench import accuracy, cases, measure
from broadhead_bench.peers import base, flash_attention, flashinfer_wrappers
from torch import Tensor

CPU = torch.device("cpu")
STEP = cases.DecodeCase(3, 70, 4, 2, 16, 16)
STEPS = {
    "decode": STEP,
    "decode-pages": STEP._replace(page_size=1),
    "decode-mixed": STEP._replace(lengths=(70, 5, 33)),
    "decode-mtp": STEP._replace(seqlen_q=4),
    "decode-fp8": STEP._replace(cache="e4m3"),
    "decode-mla": STEP._replace(num_heads_kv=1, head_dim=24, head_dim_v=16),
    "append": STEP,
    "cascade": cases.CascadeCase(3, 48, 20, 4, 2, 16, 16),
}


class Ragged:
    """What FlashInfer's wrappers share: sequences found by indptr, indices and tokens in the last page."""

    causal = True

    def __init__(self, workspace: Tensor, layout: str, **options: Any) -> None:
        assert workspace.dtype == torch.uint8
        assert layout == "NHD"
        self.options = options

    def sequences(self, q: Tensor, caches: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Queries, keys and values of each sequence."""
        queries, (indptr, indices, last_page_len) = self.queries.tolist(), self.pages
        assert indptr[-1] == len(indices)
        assert queries[-1] == len(q)
        for row in range(len(last_page_len)):
            pages = indices[indptr[row] : indptr[row + 1]].long()
            tokens = (len(pages) - 1) * caches[0].shape[1] + last_page_len[row].item()
            keys, values = (cache.float()[pages].flatten(0, 1)[:tokens].to(q.dtype) for cache in caches)
            yield q[queries[row] : queries[row + 1]], keys, values

    def attend(self, q: Tensor, caches: tuple[Tensor, Tensor], k_scale: float, v_scale: float) -> tuple[Tensor, Tensor]:
        parts = [
            broadhead.flash_attn_func(
                *(t[None] for t in sequence),
                causal=self.causal,
                softmax_scale=k_scale * q.shape[-1] ** -0.5,
                return_attn_probs=True,
            )
            for sequence in self.sequences(q, caches)
        ]
        out, lse = torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0].T for _, lse in parts])
        return out * v_scale, lse


class Decode(Ragged):
    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, *shape: int, q_len_per_req: int = 1, **dtypes: Any
    ) -> None:
        assert self.options["paged_kv_indices_buffer"].shape == indices.shape
        assert q_len_per_req == 1 or self.options["use_tensor_cores"]
        assert all(t.dtype == torch.int32 for t in (indptr, indices, last_page_len))
        self.queries = torch.arange(len(indptr)) * q_len_per_req
        self.pages, self.shape, self.dtypes = (indptr, indices, last_page_len), shape, dtypes

    def run(self, q: Tensor, caches: tuple[Tensor, Tensor], k_scale: float = 1.0, v_scale: float = 1.0) -> Tensor:
        assert self.dtypes == {"q_data_type": q.dtype, "kv_data_type": caches[0].dtype}
        assert self.shape == (q.shape[1], caches[0].shape[2], q.shape[2], caches[0].shape[1])
        return self.attend(q, caches, k_scale, v_scale)[0]


class LatentDecode:
    """FlashInfer's wrapper of absorbed MLA."""

    def __init__(self, workspace: Tensor, use_cuda_graph: bool, **buffers: Tensor) -> None:
        assert workspace.dtype == torch.uint8
        assert use_cuda_graph
        self.buffers = buffers

    def plan(self, metadata: dict[str, Tensor], **options: Any) -> None:
        assert {name: t.shape for name, t in metadata.items()} == {name: t.shape for name, t in self.buffers.items()}
        assert all(t.dtype == torch.int32 for t in metadata.values())
        self.metadata, self.options = metadata, options

    def run(self, query: tuple[Tensor, Tensor], kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        (q_latent, q_rope), (latent, rope) = query, kv_cache
        options, metadata = self.options, self.metadata
        assert q_latent.shape[1:] == (options["num_heads"], options["head_dim_ckv"])
        assert q_rope.shape[1:] == (options["num_heads"], options["head_dim_kpe"])
        assert latent.shape[1] == options["page_size"]
        lengths, indptr = metadata["kv_len_arr"].tolist(), metadata["kv_indptr"].tolist()
        queries = metadata["qo_indptr"].tolist()
        outs = []
        for row, length in enumerate(lengths):
            pages = metadata["kv_indices"][indptr[row] : indptr[row + 1]].long()
            keys, values = (cache[pages].flatten(0, 1)[None, :length, None] for cache in (rope, latent))
            own = slice(queries[row], queries[row + 1])
            outs.append(
                broadhead.flash_attn_func(
                    q_rope[None, own], keys, values, qv=q_latent[None, own], causal=options["causal"],
                    softmax_scale=options["sm_scale"],
                )[0]
            )  # fmt: skip
        return torch.cat(outs)


class Prefill(Ragged):
    def plan(self, queries: Tensor, *pages: Any, causal: bool, **dtypes: Any) -> None:
        self.queries, self.pages, self.causal = queries, pages[:3], causal

    def run(self, q: Tensor, caches: tuple[Tensor, Tensor], return_lse: bool) -> tuple[Tensor, Tensor]:
        assert return_lse
        return self.attend(q, caches, 1.0, 1.0)


def _merge_state_in_place(v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor) -> None:
    v.copy_(broadhead.merge_attn_states(v, s.T.contiguous(), v_other, s_other.T.contiguous())[0])


def _fa3() -> flash_attention.FlashAttention3:
    peer = flash_attention.FlashAttention3()
    peer._module = SimpleNamespace(
        flash_attn_with_kvcache=broadhead.flash_attn_with_kvcache,
        get_scheduler_metadata=broadhead.get_scheduler_metadata,
    )
    return peer


def _fa4() -> flash_attention.FlashAttention4:
    def varlen(
        q: Tensor, k: Tensor, v: Tensor, *, seqused_k: Tensor, page_table: Tensor, causal: bool
    ) -> tuple[Tensor, None]:
        out = broadhead.flash_attn_with_kvcache(q, k, v, cache_seqlens=seqused_k, page_table=page_table, causal=causal)
        return out, None

    peer = flash_attention.FlashAttention4()
    peer._module = SimpleNamespace(flash_attn_varlen_func=varlen)
    return peer


def _flashinfer() -> flashinfer_wrappers.FlashInfer:
    peer = flashinfer_wrappers.FlashInfer()
    peer._module = SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=Decode,
        BatchPrefillWithPagedKVCacheWrapper=Prefill,
        merge_state_in_place=_merge_state_in_place,
        mla=SimpleNamespace(BatchMLAPagedAttentionWrapper=LatentDecode, MLAPlanMetadata=SimpleNamespace(csr=dict)),
    )
    return peer


#: What each does not do.
SKIPPED = {"fa3": {"cascade"}, "fa4": {"decode-fp8", "decode-mla", "append", "cascade"}, "flashinfer": {"append"}}


@pytest.mark.parametrize("area", STEPS)
@pytest.mark.parametrize("make", [_fa3, _fa4, _flashinfer])
def test_adapters_compute_the_case(area: str, make: Any) -> None:
    peer = make()
    case = STEPS[area] if area == "cascade" else STEPS[area]._replace(area=area)
    task = measure.task_of(case, CPU)
    if area in SKIPPED[peer.name]:
        with pytest.raises(base.Skip):
            task.prepare(peer)
        return
    prepared = task.prepare(peer)
    assert prepared.error <= accuracy.MAX_ERROR[area]
    assert prepared.work == case.kv_bytes
    assert prepared.calls[0]().shape == (3, 4 if area == "decode-mtp" else 1, 4, 16)


def test_fa3_without_paging_gets_a_dense_latent_cache() -> None:
    """And says so; another error of it is not taken for that one."""
    peer = _fa3()
    task = measure.task_of(STEPS["decode-mla"]._replace(area="decode-mla"), CPU)
    attend, message = broadhead.flash_attn_with_kvcache, "This flash attention build does not support paged KV."

    def without_paging(*arguments: Any, page_table: Tensor | None = None, **options: Any) -> Any:
        if page_table is not None:
            raise RuntimeError(message)
        return attend(*arguments, **options)

    peer._module.flash_attn_with_kvcache = without_paging
    prepared = task.prepare(peer)
    assert prepared.error <= accuracy.MAX_ERROR["decode-mla"]
    assert "gathered" in prepared.versions["note"]
    message = "out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        task.prepare(peer)
    peer._module.flash_attn_with_kvcache = attend
    assert "note" not in task.prepare(peer).versions
    peer._module.flash_attn_with_kvcache = without_paging
    message = "This flash attention build does not support paged KV."
    assert "note" in task.prepare(peer).versions
    peer._module.flash_attn_with_kvcache = attend
    assert "note" not in measure.task_of(STEP, CPU).prepare(peer).versions, "it is of that call alone"


@pytest.mark.parametrize(("make", "planned"), [(_fa3, True), (_fa4, False), (_flashinfer, True)])
def test_plans_are_a_host_case(make: Any, planned: bool) -> None:
    task = measure.task_of(cases.HostCase("host metadata", "plan", STEP), CPU)
    if planned:
        task.prepare(make()).calls[0]()
    else:
        with pytest.raises(base.Skip, match="no metadata"):
            task.prepare(make())
