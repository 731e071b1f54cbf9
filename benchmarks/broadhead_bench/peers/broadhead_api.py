"""Adapters for broadhead itself, through its public API, and for what it does without the feature of an area."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import broadhead
import torch
from torch import Tensor

from broadhead_bench.cases import AREAS, CascadeCase, DecodeCase, DenseCase, PagedCase, VarlenCase
from broadhead_bench.cases_landscape import LandscapeCase
from broadhead_bench.cases_masks import CausalityCase, ChunkCase, ImagesCase, MaskCase, TreeCase
from broadhead_bench.inputs import DenseInputs, Fp8Inputs, PagedInputs, VarlenInputs
from broadhead_bench.inputs_decode import AppendInputs, CascadeInputs, Fp8PagedInputs, LatentInputs
from broadhead_bench.inputs_landscape import LandscapeInputs
from broadhead_bench.inputs_masks import ChunkInputs, ImagesInputs, TreeInputs
from broadhead_bench.peers.base import Peer, Skip, arguments_of_plan, plan_of_landscape


class Broadhead(Peer):
    """broadhead; on a GPU a fallback is an error."""

    name = "broadhead"
    areas: tuple[str, ...] = AREAS
    _backend: str | None = None
    _deterministic = False
    _gradients_by: Any = None  # last_dispatch() of the last backward pass, until it is read

    def watch(self, leaf: Tensor) -> None:
        """Autograd calls kernels in a thread of its own, whose last_dispatch() a hook of q's gradient can see."""

        def note(_: Tensor) -> None:
            self._gradients_by = broadhead.last_dispatch()

        leaf.register_hook(note)

    def attention_of_transformers(self) -> str:
        from broadhead.integrations.transformers import register

        register()
        return "broadhead"

    def kernel(self) -> str | None:
        backend, row, reason = self._gradients_by or broadhead.last_dispatch()
        self._gradients_by = None
        if self._backend == "cuda" and row is None:
            raise RuntimeError(f"ran the {backend} fallback instead of a kernel: {reason}")
        # A shared prefix takes one launch, or a call over it, one over the rest, and a merge.
        return f"{row} (composed)" if row is not None and reason.startswith("composed: ") else row

    def why_unavailable(self, device: torch.device) -> str | None:
        self._backend = "cuda" if device.type == "cuda" else None
        return None

    def forward(self, case: DenseCase, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        options: dict[str, Any] = {"causal": case.causal, "window_size": case.window_size, "backend": self._backend}
        if case.prefix:
            options["prefix_lens"] = torch.full((case.batch,), case.prefix, dtype=torch.int32, device=q.device)
        if self._deterministic:
            options["deterministic"] = True
        return lambda: broadhead.flash_attn_func(q, k, v, **options)

    def fp8(self, case: DenseCase, inputs: Fp8Inputs) -> Callable[[], Tensor]:
        q, k, v, q_descale, k_descale, v_descale = inputs
        options: dict[str, Any] = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
        return lambda: broadhead.flash_attn_func(q, k, v, causal=case.causal, backend=self._backend, **options)

    def varlen(self, case: VarlenCase, inputs: VarlenInputs) -> Callable[[], Tensor]:
        q, k, v, cu_seqlens, max_seqlen = inputs
        lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        options: dict[str, Any] = {"causal": case.causal, "window_size": case.window_size, "backend": self._backend}
        if self._deterministic:
            options["deterministic"] = True
        return lambda: broadhead.flash_attn_varlen_func(q, k, v, *lengths, **options)

    def paged(self, case: PagedCase, inputs: PagedInputs) -> Callable[[], Tensor]:
        return self._over_pages(inputs, causal=case.causal)

    def decode(self, case: DecodeCase, inputs: PagedInputs) -> Callable[[], Tensor]:
        return self._over_pages(inputs, scheduler_metadata=self.plan(case, inputs)(), **_split_options(case))

    def plan(self, case: DecodeCase, inputs: PagedInputs) -> Callable[[], Tensor]:
        return self._plan(case, inputs.cache_seqlens, **_split_options(case))

    def decode_fp8(self, case: DecodeCase, inputs: Fp8PagedInputs) -> Callable[[], Tensor]:
        """Without metadata: that of another dtype might be refused, and kernels that take such caches need none."""
        call = self._over_pages(inputs.paged, k_descale=inputs.k_descale, v_descale=inputs.v_descale)
        try:
            call()
        except broadhead.InvalidTypeError as error:
            raise Skip(f"takes no e4m3 cache with {inputs.paged.q.dtype} queries: {error}") from error
        return call

    def decode_mla(self, case: DecodeCase, inputs: LatentInputs) -> Callable[[], Tensor]:
        paged = inputs.beside_qv
        plan = self._plan(case.beside_qv, paged.cache_seqlens, headdim_v=case.head_dim_v, has_qv=True)()
        return self._over_pages(paged, qv=inputs.q_latent, softmax_scale=inputs.softmax_scale, scheduler_metadata=plan)

    def append(self, case: DecodeCase, inputs: AppendInputs) -> Callable[[], Tensor]:
        return self._over_pages(
            inputs.paged._replace(cache_seqlens=inputs.cache_seqlens),
            k=inputs.k,
            v=inputs.v,
            rotary_cos=inputs.cos,
            rotary_sin=inputs.sin,
            rotary_interleaved=False,
            scheduler_metadata=self._plan(case, inputs.cache_seqlens, max_seqlen_k_new=inputs.k.shape[1])(),
        )

    def cascade(self, case: CascadeCase, inputs: CascadeInputs) -> Callable[[], Tensor]:
        function = getattr(broadhead, "flash_attn_with_shared_prefix", None)
        if function is None:
            raise Skip("this version has no flash_attn_with_shared_prefix")
        options: dict[str, Any] = {}
        if "backend" in inspect.signature(function).parameters:
            options["backend"] = self._backend
        plain = inputs.plain
        return lambda: function(
            plain.q,
            plain.k_cache,
            plain.v_cache,
            prefix_page_table=inputs.prefix_page_table,
            prefix_len=case.prefix,
            page_table=inputs.page_table,
            cache_seqlens=inputs.cache_seqlens,
            **options,
        )

    def landscape(self, case: LandscapeCase, inputs: LandscapeInputs) -> Callable[[], Tensor]:
        q, k, v = inputs[:3]
        options: dict[str, Any] = {"causal": case.causal, "window_size": case.window_size, "backend": self._backend}
        options |= inputs.descale_options() | ({} if inputs.sinks is None else {"sinks": inputs.sinks})
        options |= self.landscape_options()
        if case.kind == "varlen":
            lengths = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, max(case.seqlens_q), max(case.seqlens_k))
            return lambda: broadhead.flash_attn_varlen_func(q, k, v, *lengths, **options)
        if not case.page_size:
            return lambda: broadhead.flash_attn_func(q, k, v, **options)
        options |= {"cache_seqlens": inputs.cache_seqlens, "page_table": inputs.page_table}
        if case.kind == "decode":
            options["scheduler_metadata"] = broadhead.get_scheduler_metadata(**plan_of_landscape(case, inputs))
        return lambda: broadhead.flash_attn_with_kvcache(q, k, v, **options)

    def landscape_options(self) -> dict[str, Any]:
        """The default of some functions, 1, does not divide the keys of a few queries."""
        return {"num_splits": 0}

    def images(self, case: ImagesCase, inputs: ImagesInputs) -> Callable[[], Tensor]:
        options: dict[str, Any] = {"window_size": case.plain.window_size, "backend": self._backend}
        if case.images:
            options |= {"query_ranges": inputs.ranges, "ranges_in_window": case.in_window}
        q, k, v = inputs[:3]
        return lambda: broadhead.flash_attn_func(q, k, v, causal=True, **options)

    def images_chunk(self, case: ChunkCase, inputs: ChunkInputs) -> Callable[[], Tensor]:
        fp8 = inputs.fp8
        options: dict[str, Any] = {"query_ranges": inputs.ranges} if case.images else {}
        descales = {"q_descale": fp8.q_descale, "k_descale": fp8.k_descale, "v_descale": fp8.v_descale}
        return self._over_pages(fp8.paged._replace(q=fp8.q), **descales, **options)

    def tree(self, case: TreeCase, inputs: TreeInputs) -> Callable[[], Tensor]:
        options: dict[str, Any] = {} if case.chain else {"tree_mask": inputs.words}
        plan = self.plan(case.plain, inputs.paged)()
        return self._over_pages(inputs.paged, scheduler_metadata=plan, **options)

    def causal_by_sequence(self, case: CausalityCase, inputs: DenseInputs) -> Callable[[], Tensor]:
        q, k, v = inputs[:3]
        causal = torch.arange(case.batch, device=q.device) % 2 == 0
        return lambda: broadhead.flash_attn_func(q, k, v, causal=causal, backend=self._backend)

    def _plan(self, case: DecodeCase, cache_seqlens: Tensor, **options: Any) -> Callable[[], Tensor]:
        positional = arguments_of_plan(case, cache_seqlens)
        options |= {"qkv_dtype": torch.bfloat16, "page_size": case.page_size, "causal": True}
        return lambda: broadhead.get_scheduler_metadata(*positional, **options)

    def _over_pages(self, inputs: PagedInputs, **options: Any) -> Callable[[], Tensor]:
        q, k_cache, v_cache, page_table, cache_seqlens = inputs
        given = {"cache_seqlens": cache_seqlens, "page_table": page_table, "backend": self._backend}
        options = {"causal": True} | options | given
        return lambda: broadhead.flash_attn_with_kvcache(q, k_cache, v_cache, **options)


class Baseline(Broadhead):
    """What broadhead itself does without the feature that an area is about, on the same numbers."""

    name = "baseline"
    areas = ("paged", "window", "fp8", "masks", "prefix-lm", "decode-fp8", "decode-invariant", "cascade", "append")

    def measured(self, case: DenseCase) -> DenseCase:
        return case._replace(window=None)

    def measured_decode(self, case: DecodeCase) -> DecodeCase:
        return case._replace(cache="bf16", tokens_per_split=0)

    def forward(self, case: DenseCase, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        return self.two_passes(case, q, k, v) if case.prefix else super().forward(self.measured(case), q, k, v)

    def fp8(self, case: DenseCase, inputs: Fp8Inputs) -> Callable[[], Tensor]:
        return super().forward(case, *inputs.widened())

    def paged(self, case: PagedCase, inputs: PagedInputs) -> Callable[[], Tensor]:
        k, v = inputs.gathered(case.context)
        return lambda: broadhead.flash_attn_func(inputs.q, k, v, causal=True, backend=self._backend)

    def decode(self, case: DecodeCase, inputs: PagedInputs) -> Callable[[], Tensor]:
        return super().decode(self.measured_decode(case), inputs)

    def decode_fp8(self, case: DecodeCase, inputs: Fp8PagedInputs) -> Callable[[], Tensor]:
        return self.decode(case, inputs.wide)

    def append(self, case: DecodeCase, inputs: AppendInputs) -> Callable[[], Tensor]:
        return self.decode(case, inputs.appended())

    def cascade(self, case: CascadeCase, inputs: CascadeInputs) -> Callable[[], Tensor]:
        return self.decode(case.plain, inputs.plain)

    def measured_masks(self, case: MaskCase) -> MaskCase:
        if isinstance(case, (ImagesCase, ChunkCase)):
            return case._replace(images=0)
        return case._replace(chain=True) if isinstance(case, TreeCase) else case

    def images(self, case: ImagesCase, inputs: ImagesInputs) -> Callable[[], Tensor]:
        return super().images(case._replace(images=0), inputs)

    def images_chunk(self, case: ChunkCase, inputs: ChunkInputs) -> Callable[[], Tensor]:
        return super().images_chunk(case._replace(images=0), inputs)

    def tree(self, case: TreeCase, inputs: TreeInputs) -> Callable[[], Tensor]:
        return super().tree(case._replace(chain=True), inputs)

    def causal_by_sequence(self, case: CausalityCase, inputs: DenseInputs) -> Callable[[], Tensor]:
        """Two calls, which write to one tensor."""
        q, k, v = inputs[:3]

        def two_calls() -> Tensor:
            out = torch.empty_like(q)
            for part, half in case.halves:
                broadhead.flash_attn_func(
                    q[part], k[part], v[part], causal=half.causal, out=out[part], backend=self._backend
                )
            return out

        return two_calls


def _split_options(case: DecodeCase) -> dict[str, Any]:
    """The argument that fixes where sequences are cut, if the case asks for it.

    Raises:
        Skip: this version of broadhead has no such argument.
    """
    if not case.tokens_per_split:
        return {}
    for function in (broadhead.flash_attn_with_kvcache, broadhead.get_scheduler_metadata):
        if "tokens_per_split" not in inspect.signature(function).parameters:
            raise Skip(f"{function.__name__} of this version has no tokens_per_split")
    return {"tokens_per_split": case.tokens_per_split}
