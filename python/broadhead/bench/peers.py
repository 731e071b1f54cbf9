"""Adapters: each implementation prepares a call of a case; here what they share, and torch's SDPA backends."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from broadhead.bench.cases import AREAS, CascadeCase, DecodeCase, DenseCase, PagedCase, VarlenCase
from broadhead.bench.inputs import Fp8Inputs, PagedInputs, VarlenInputs
from broadhead.bench.inputs_decode import AppendInputs, CascadeInputs, Fp8PagedInputs, LatentInputs


class Skip(Exception):
    """An implementation does not do a case; the text says why."""


Gradients = tuple[Tensor, Tensor, Tensor]


class Peer:
    """One implementation. A prepared call enqueues the work and returns its output in broadhead's layout.

    Every method that prepares may raise Skip, or anything else: the runner reports it as a reason.
    """

    name = ""
    #: The areas in which it has anything to say; elsewhere it is not even skipped.
    areas: tuple[str, ...] = tuple(area for area in AREAS if area != "decode-invariant")

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

    def append(self, case: DecodeCase, inputs: AppendInputs) -> Callable[[], Tensor]:
        """A call that rotates q and the new k, writes k and v to the cache, and returns ``(B, 1, H, D)``."""
        raise Skip("has no call that appends, rotates and attends")

    def cascade(self, case: CascadeCase, inputs: CascadeInputs) -> Callable[[], Tensor]:
        """A call that returns ``(B, 1, H, D)``, of sequences that share a prefix."""
        raise Skip("has no decode over a shared prefix")

    def backward(self, case: DenseCase, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Callable[[], Gradients]:
        """A call that returns ``(dq, dk, dv)``; the forward pass has run before."""
        leaves = (q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_())
        with torch.enable_grad():
            out = self.forward(case, *leaves)()
        if not out.requires_grad:
            raise Skip("has no backward")

        def gradients() -> Gradients:
            dq, dk, dv = torch.autograd.grad(out, leaves, dout, retain_graph=True)
            return dq, dk, dv

        return gradients


class TorchSdpa(Peer):
    """One backend of torch.nn.functional.scaled_dot_product_attention."""

    areas = ("forward", "odd", "window", "backward", "host")

    def __init__(self, name: str, backend: SDPBackend) -> None:
        self.name = name
        self._backend = backend
        self._notes: dict[str, str] = {}

    def why_unavailable(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else "this SDPA backend needs a CUDA device"

    def versions(self) -> dict[str, str]:
        return self._notes

    def context(self) -> AbstractContextManager[Any]:
        return sdpa_kernel([self._backend])

    def forward(self, case: DenseCase, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        self._notes = {}
        if case.window is not None:
            raise Skip("takes no window")
        if case.num_heads_q == case.num_heads_kv:
            return _sdpa_call(q, k, v, case.causal, enable_gqa=False)
        call = _sdpa_call(q, k, v, case.causal, enable_gqa=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
        except RuntimeError:
            group = case.num_heads_q // case.num_heads_kv
            self._notes = {"note": f"K and V repeated {group} times beforehand: this backend takes no GQA"}
            call = _sdpa_call(
                q, k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2), case.causal, enable_gqa=False
            )
        return call


def _sdpa_call(q: Tensor, k: Tensor, v: Tensor, causal: bool, enable_gqa: bool) -> Callable[[], Tensor]:
    """SDPA on ``(B, S, H, D)`` tensors, as views in its own layout."""
    attention = torch.nn.functional.scaled_dot_product_attention
    query, key, value = (t.transpose(1, 2) for t in (q, k, v))
    options: dict[str, Any] = {"enable_gqa": True} if enable_gqa else {}
    return lambda: attention(query, key, value, is_causal=causal, **options).transpose(1, 2)


def all_peers() -> list[Peer]:
    """Every implementation, in the order of the tables."""
    from broadhead.bench.peers_broadhead import Baseline, Broadhead
    from broadhead.bench.peers_flash import Ffpa, FlashAttention3, FlashAttention4
    from broadhead.bench.peers_flashinfer import FlashInfer

    return [
        Broadhead(),
        Baseline(),
        TorchSdpa("fa2", SDPBackend.FLASH_ATTENTION),
        FlashAttention3(),
        FlashAttention4(),
        Ffpa(),
        TorchSdpa("cudnn", SDPBackend.CUDNN_ATTENTION),
        TorchSdpa("memeff", SDPBackend.EFFICIENT_ATTENTION),
        FlashInfer(),
    ]
