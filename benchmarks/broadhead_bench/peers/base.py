"""What the adapters share: each prepares a call of a case for one implementation."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from broadhead_bench.cases import AREAS, CascadeCase, DecodeCase, DenseCase, PagedCase, VarlenCase
from broadhead_bench.cases_landscape import LandscapeCase
from broadhead_bench.cases_masks import CausalityCase, ChunkCase, ImagesCase, MaskCase, TreeCase
from broadhead_bench.inputs import DenseInputs, Fp8Inputs, PagedInputs, VarlenInputs
from broadhead_bench.inputs_decode import AppendInputs, CascadeInputs, Fp8PagedInputs, LatentInputs
from broadhead_bench.inputs_landscape import LandscapeInputs
from broadhead_bench.inputs_masks import ChunkInputs, ImagesInputs, TreeInputs

#: Areas of which few peers do anything.
_SPECIAL_AREAS = ("decode-invariant", "training", "prefix-lm", "masks", "model")


class Skip(Exception):
    """An implementation does not do a case; the text says why."""


Gradients = tuple[Tensor, Tensor, Tensor]
#: What has gradients.
Differentiable = DenseCase | VarlenCase | ImagesCase
DifferentiableInputs = DenseInputs | VarlenInputs | ImagesInputs


class Peer:
    """One implementation. A prepared call enqueues the work and returns its output in broadhead's layout.

    Every method that prepares may raise Skip, or anything else: the runner reports it as a reason.
    """

    name = ""
    #: The areas in which it has anything to say; elsewhere it is not even skipped.
    areas: tuple[str, ...] = tuple(a for a in AREAS if a not in _SPECIAL_AREAS)

    #: Whether it compiles what it runs at the first call, for seconds.
    compiles_calls = False

    def why_unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run here at all, or None."""
        return None

    def versions(self) -> dict[str, str]:
        """Versions and notes for the record, of the call prepared last."""
        return {}

    def kernel(self) -> str | None:
        """The table row that ran last (broadhead only)."""
        return None

    def context(self) -> AbstractContextManager[Any]:
        """Entered around preparing and timing."""
        return contextlib.nullcontext()

    def forward(self, case: DenseCase, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        """A call that returns ``(B, S, H, Dv)``; the inputs have that layout."""
        raise Skip("has no dense forward")

    def measured(self, case: DenseCase) -> DenseCase:
        """The case that ``forward`` computes where it is not the one asked for (baselines only)."""
        return case

    def fp8(self, case: DenseCase, inputs: Fp8Inputs) -> Callable[[], Tensor]:
        """A call that returns ``(B, S, H, D)``, of e4m3 inputs."""
        raise Skip("has no FP8 forward")

    def varlen(self, case: VarlenCase, inputs: VarlenInputs) -> Callable[[], Tensor]:
        """A call that returns ``(T, H, D)``."""
        raise Skip("has no forward of packed sequences")

    def paged(self, case: PagedCase, inputs: PagedInputs) -> Callable[[], Tensor]:
        """A call that returns ``(B, Sq, H, D)``; plans are made here, once."""
        raise Skip("has no paged prefill")

    def decode(self, case: DecodeCase, inputs: PagedInputs) -> Callable[[], Tensor]:
        """A call that returns ``(B, Sq, H, D)``; plans and metadata are made here, once."""
        raise Skip("has no paged decode")

    def measured_decode(self, case: DecodeCase) -> DecodeCase:
        """The case that ``decode_fp8`` computes where it is not the one asked for (baselines only)."""
        return case

    def plan(self, case: DecodeCase, inputs: PagedInputs) -> Callable[[], Any]:
        """A call that makes the metadata or the plan of a decode step."""
        raise Skip("makes no metadata or plan")

    def decode_fp8(self, case: DecodeCase, inputs: Fp8PagedInputs) -> Callable[[], Tensor]:
        """A call that returns ``(B, 1, H, D)``, of bf16 queries, or of e4m3 ones, over an e4m3 cache."""
        raise Skip("has no decode over an e4m3 cache")

    def decode_mla(self, case: DecodeCase, inputs: LatentInputs) -> Callable[[], Tensor]:
        """A call that returns ``(B, Sq, H, Dv)``, of absorbed MLA; plans and metadata are made here, once."""
        raise Skip("has no decode of absorbed MLA")

    def landscape(self, case: LandscapeCase, inputs: LandscapeInputs) -> Callable[[], Tensor]:
        """A call that returns the output in the layout of q; plans and metadata are made here, once. What is said of a
        case by the cases of other areas is run as one of them."""
        return self._as_other_area(case, inputs)

    def _as_other_area(self, case: LandscapeCase, inputs: LandscapeInputs) -> Callable[[], Tensor]:
        heads = (case.num_heads_q, case.num_heads_kv, case.head_dim)
        if case.sinks or case.dtype == "e4m3":
            raise Skip("is measured without sinks, and on 16 bits")
        q, k, v = inputs[:3]
        if case.page_size:
            assert inputs.page_table is not None and inputs.cache_seqlens is not None
            paged = PagedInputs(q, k, v, inputs.page_table, inputs.cache_seqlens)
            context = max(case.seqlens_k)
            if case.window is not None:
                raise Skip("is measured without a window over pages")
            if case.kind == "decode":
                lengths = case.seqlens_k
                step = DecodeCase(case.batch, context, *heads, case.page_size, lengths=lengths)
                return self.decode(step._replace(seqlen_q=case.seqlens_q[0]), paged)
            if len(set(case.seqlens_k)) > 1:
                raise Skip("is measured over pages of sequences of one length")
            chunk = PagedCase("chunked", case.batch, case.seqlens_q[0], context, *heads, case.page_size, case.causal)
            return self.paged(chunk, paged)
        if not case.is_self_attention:
            raise Skip("is measured on as many queries as keys")
        if case.kind == "varlen":
            assert inputs.cu_seqlens_q is not None
            if case.head_dim != case.head_dim_v:
                raise Skip("is measured with one head_dim on packed sequences")
            packed = VarlenInputs(q, k, v, inputs.cu_seqlens_q, max(case.seqlens_q))
            return self.varlen(VarlenCase(case.seqlens_q, *heads, case.causal, window=case.window), packed)
        value_dim = None if case.head_dim == case.head_dim_v else case.head_dim_v
        tokens = (case.batch, case.seqlens_q[0])
        dense = DenseCase("forward", *tokens, *heads, case.causal, value_dim, case.window)
        return self.forward(dense, q, k, v)

    def append(self, case: DecodeCase, inputs: AppendInputs) -> Callable[[], Tensor]:
        """A call that rotates q and the new k, writes k and v to the cache, and returns ``(B, 1, H, D)``."""
        raise Skip("has no call that appends, rotates and attends")

    def cascade(self, case: CascadeCase, inputs: CascadeInputs) -> Callable[[], Tensor]:
        """A call that returns ``(B, 1, H, D)``, of sequences that share a prefix."""
        raise Skip("has no decode over a shared prefix")

    def images(self, case: ImagesCase, inputs: ImagesInputs) -> Callable[[], Tensor]:
        """A call that returns ``(1, S, H, D)``, of a sequence with images; blocks to skip are found here, once."""
        raise Skip("has no mask of images")

    def images_chunk(self, case: ChunkCase, inputs: ChunkInputs) -> Callable[[], Tensor]:
        """A call that returns ``(1, Sq, H, D)``, of e4m3 queries with images over an e4m3 cache."""
        raise Skip("has no mask of images over an e4m3 cache")

    def tree(self, case: TreeCase, inputs: TreeInputs) -> Callable[[], Tensor]:
        """A call that returns ``(B, Sq, H, D)``, of trees of drafts; plans and metadata are made here, once."""
        raise Skip("has no mask of a tree")

    def causal_by_sequence(self, case: CausalityCase, inputs: DenseInputs) -> Callable[[], Tensor]:
        """A call that returns ``(B, S, H, D)``, of sequences of which every other one is causal."""
        raise Skip("has no causality by sequence")

    def measured_masks(self, case: MaskCase) -> MaskCase:
        """The case that these compute where it is not the one asked for (baselines only)."""
        return case

    def backward(self, case: Differentiable, inputs: DifferentiableInputs, dout: Tensor) -> Callable[[], Gradients]:
        """A call that returns ``(dq, dk, dv)``; the forward pass has run before."""
        call, leaves = self._of_leaves(case, inputs)
        with torch.enable_grad():
            out = call()
        if not out.requires_grad:
            raise Skip("has no backward")

        def gradients() -> Gradients:
            dq, dk, dv = torch.autograd.grad(out, leaves, dout, retain_graph=True)
            return dq, dk, dv

        return gradients

    def forward_backward(
        self, case: Differentiable, inputs: DifferentiableInputs, dout: Tensor
    ) -> Callable[[], Gradients]:
        """A call that runs forward, then backward, and returns ``(dq, dk, dv)``."""
        call, leaves = self._of_leaves(case, inputs)

        def both() -> Gradients:
            with torch.enable_grad():
                out = call()
            if not out.requires_grad:
                raise Skip("has no backward")
            dq, dk, dv = torch.autograd.grad(out, leaves, dout)
            return dq, dk, dv

        return both

    def _of_leaves(self, case: Differentiable, inputs: DifferentiableInputs) -> tuple[Callable[[], Tensor], Gradients]:
        """The forward call on q, k and v that require grad, and these three."""
        q, k, v = (t.detach().requires_grad_() for t in inputs[:3])
        leaves = (q, k, v)
        self.watch(q)
        with torch.enable_grad():
            if isinstance(case, VarlenCase):
                assert isinstance(inputs, VarlenInputs)
                return self.varlen(case, inputs._replace(q=q, k=k, v=v)), leaves
            if isinstance(case, ImagesCase):
                assert isinstance(inputs, ImagesInputs)
                return self.images(case, inputs._replace(q=q, k=k, v=v)), leaves
            return self.forward(case, q, k, v), leaves

    def watch(self, leaf: Tensor) -> None:
        """Called with the leaf q before gradients are taken (broadhead only: which kernel computes them)."""

    def attention_of_transformers(self) -> str:
        """The name by which models of transformers find it."""
        raise Skip("is no attention of transformers")

    def two_passes(self, case: DenseCase, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        """A prefix-LM case in two calls: the prefix's queries see the prefix, the others all that is before them."""
        prefix = case.prefix
        first = case._replace(seqlen=prefix, causal=False, prefix=0)
        second = case._replace(seqlen=case.seqlen - prefix, prefix=0)
        own = self.forward(first, q[:, :prefix], k[:, :prefix], v[:, :prefix])
        rest = self.forward(second, q[:, prefix:], k, v)
        return lambda: torch.cat((own(), rest()), dim=1)


class PackagePeer(Peer):
    """A peer that is importable or not, under one of its names."""

    module_names: tuple[str, ...] = ()
    distributions: tuple[str, ...] = ()
    _module: Any = None

    def why_unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "needs a CUDA device"
        reasons = []
        for name in self.module_names:
            try:
                self._module = importlib.import_module(name)
            except Exception as error:  # an installed peer may fail to load in any way
                text = (str(error).splitlines() or [""])[0]
                reasons.append(f"cannot import {name}: {type(error).__name__}: {text}")
            else:
                return None
        return "; ".join(reasons)

    def versions(self) -> dict[str, str]:
        for name in self.distributions:
            try:
                return {self.name: f"{name} {importlib.metadata.version(name)}"}
            except importlib.metadata.PackageNotFoundError:
                continue
        return {self.name: str(getattr(self._module, "__version__", "unknown"))}


def first_output(result: Any) -> Tensor:
    """The output of a call that may also return its LSE."""
    return result[0] if isinstance(result, (tuple, list)) else result


def arguments_of_plan(case: DecodeCase, cache_seqlens: Tensor) -> tuple[Any, ...]:
    """The positional arguments of get_scheduler_metadata, which FlashAttention-3 has as well."""
    seqlen_k = case.pages_per_sequence * case.page_size
    return case.batch, case.seqlen_q, seqlen_k, case.num_heads_q, case.num_heads_kv, case.head_dim, cache_seqlens


def plan_of_landscape(case: LandscapeCase, inputs: LandscapeInputs) -> dict[str, Any]:
    """The arguments of get_scheduler_metadata by name, which FlashAttention-3 has as well."""
    assert inputs.page_table is not None
    return {
        "batch_size": case.batch,
        "max_seqlen_q": max(case.seqlens_q),
        "max_seqlen_k": inputs.page_table.shape[1] * case.page_size,
        "num_heads_q": case.num_heads_q,
        "num_heads_kv": case.num_heads_kv,
        "headdim": case.head_dim,
        "headdim_v": case.head_dim_v,
        "cache_seqlens": inputs.cache_seqlens,
        "qkv_dtype": inputs.q.dtype,
        "page_size": case.page_size,
        "causal": case.causal,
        "window_size": case.window_size,
    }


def images_blocks(case: ImagesCase, inputs: ImagesInputs, block_size: int | tuple[int, int] = 128) -> BlockMask:
    """The mask of images as a function of torch, and which blocks of queries and keys it leaves empty, part or full."""
    begin, end = inputs.bounds(case)
    window = case.window or case.seqlen

    def mask_mod(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        in_window = (kv_idx <= q_idx) & (kv_idx > q_idx - window)
        return in_window | ((kv_idx >= begin[q_idx]) & (kv_idx < end[q_idx]))

    return create_block_mask(mask_mod, None, None, case.seqlen, case.seqlen, device=begin.device, BLOCK_SIZE=block_size)
