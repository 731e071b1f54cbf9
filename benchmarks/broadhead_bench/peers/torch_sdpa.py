"""Adapters for what torch itself has: the backends of scaled_dot_product_attention, and its FlashAttention-2."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from broadhead_bench.cases import DenseCase, VarlenCase
from broadhead_bench.cases_landscape import LandscapeCase
from broadhead_bench.inputs import VarlenInputs
from broadhead_bench.inputs_landscape import LandscapeInputs
from broadhead_bench.model_attention import register_beside_sdpa
from broadhead_bench.peers.base import Peer, Skip

#: The backends that hold no scores in memory.
FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


class TorchSdpa(Peer):
    """One backend of torch.nn.functional.scaled_dot_product_attention."""

    areas: tuple[str, ...] = ("forward", "odd", "window", "landscape", "backward", "backward-sweep", "host")

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
        return self._on_backend(q, k, v, case.causal)

    def landscape(self, case: LandscapeCase, inputs: LandscapeInputs) -> Callable[[], Tensor]:
        """Memory-efficient attention is what torch has above head_dim 256, and is measured there alone."""
        self._notes = {}
        if case.kind != "dense" or case.window is not None or case.sinks or case.dtype == "e4m3":
            raise Skip("takes dense 16-bit tensors alone, without window and sinks")
        if case.causal and not case.is_self_attention:
            raise Skip("aligns the causal mask to the first key")
        if self._backend == SDPBackend.EFFICIENT_ATTENTION and case.head_dim <= 256:
            raise Skip("is measured above head_dim 256")
        return self._on_backend(inputs.q, inputs.k, inputs.v, case.causal)

    def _on_backend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable[[], Tensor]:
        """The call, with K and V repeated beforehand where the backend takes no GQA."""
        group = q.shape[2] // k.shape[2]
        if group == 1:
            return _sdpa_call(q, k, v, causal, enable_gqa=False)
        call = _sdpa_call(q, k, v, causal, enable_gqa=True)
        if not _runs(call):
            self._notes = {"note": f"K and V repeated {group} times beforehand: this backend takes no GQA"}
            call = _sdpa_call(
                q, k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2), causal, enable_gqa=False
            )
        return call


class TorchFlash(TorchSdpa):
    """torch's FlashAttention-2. SDPA takes neither a window nor packed sequences; the operator below it does."""

    areas = (*TorchSdpa.areas, "training", "prefix-lm", "model")

    def attention_of_transformers(self) -> str:
        self._notes = {"note": "window layers alone; head_dim 512 by SDPA, as FlashAttention-2 ends at 256"}

        def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window_size: tuple[int, int]) -> Tensor:
            return _flash_call(q, k, v, (None, None), (q.shape[1], k.shape[1]), True, window_size, scale)()

        return register_beside_sdpa("fa2", attention)

    def forward(self, case: DenseCase, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        self._notes = {}
        if case.prefix:
            return self.two_passes(case, q, k, v)
        if case.window is None and q.shape[1] == k.shape[1]:
            return super().forward(case, q, k, v)
        return _flash_call(q, k, v, (None, None), (q.shape[1], k.shape[1]), case.causal, case.window_size)

    def landscape(self, case: LandscapeCase, inputs: LandscapeInputs) -> Callable[[], Tensor]:
        self._notes = {}
        if case.page_size or case.sinks or case.dtype == "e4m3" or case.head_dim != case.head_dim_v:
            raise Skip("takes no pages, no sinks, no e4m3, and one head_dim")
        q, k, v = inputs[:3]
        longest = (max(case.seqlens_q), max(case.seqlens_k))
        return _flash_call(q, k, v, (inputs.cu_seqlens_q, inputs.cu_seqlens_k), longest, case.causal, case.window_size)

    def varlen(self, case: VarlenCase, inputs: VarlenInputs) -> Callable[[], Tensor]:
        self._notes = {}
        q, k, v, offsets, longest = inputs
        return _flash_call(q, k, v, (offsets, offsets), (longest, longest), case.causal, case.window_size)


class TorchDefault(Peer):
    """SDPA as a model calls it: torch picks the backend, a mask says what is neither full nor causal, and where no
    fused backend takes GQA, K and V are repeated in each call."""

    name = "sdpa"
    areas = ("training", "prefix-lm", "model")

    def __init__(self) -> None:
        self._notes: dict[str, str] = {}

    def versions(self) -> dict[str, str]:
        return self._notes

    def attention_of_transformers(self) -> str:
        return "sdpa"

    def forward(self, case: DenseCase, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        mask = None
        if case.window is not None or case.prefix:
            positions = torch.arange(case.seqlen, device=q.device)
            distance = positions[:, None] - positions[None, :]
            mask = (distance >= 0) & (distance < (case.window or case.seqlen)) | (positions < case.prefix)[None, :]
        group = case.num_heads_q // case.num_heads_kv
        self._notes = {}
        if group > 1 and mask is None:
            call = _sdpa_call(q, k, v, case.causal, enable_gqa=True)
            with sdpa_kernel(list(FUSED)):
                if q.device.type != "cuda" or _runs(call):
                    return call
        if group == 1:
            return _sdpa_call(q, k, v, case.causal, enable_gqa=False, mask=mask)
        self._notes = {"note": f"K and V repeated {group} times in each call: no fused backend takes this GQA"}

        def repeated() -> Tensor:
            key, value = (t.repeat_interleave(group, dim=2) for t in (k, v))
            return _sdpa_call(q, key, value, case.causal, enable_gqa=False, mask=mask)()

        return repeated


def _runs(call: Callable[[], Tensor]) -> bool:
    """Whether a backend takes the call."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except RuntimeError:
        return False
    return True


def _sdpa_call(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, enable_gqa: bool, mask: Tensor | None = None
) -> Callable[[], Tensor]:
    """SDPA on ``(B, S, H, D)`` tensors, as views in its own layout; a mask says all."""
    attention = torch.nn.functional.scaled_dot_product_attention
    query, key, value = (t.transpose(1, 2) for t in (q, k, v))
    options: dict[str, Any] = {"enable_gqa": True} if enable_gqa else {}
    options |= {"is_causal": causal} if mask is None else {"attn_mask": mask}
    return lambda: attention(query, key, value, **options).transpose(1, 2)


def _flash_call(
    q: Tensor, k: Tensor, v: Tensor, offsets: tuple[Tensor | None, Tensor | None], longest: tuple[int, int],
    causal: bool, window_size: tuple[int, int], scale: float | None = None,
) -> Callable[[], Tensor]:  # fmt: skip
    """FlashAttention-2's operator, whose masks are aligned to the bottom right. ``offsets`` and ``longest`` are those
    of queries and of keys; dense tensors have no offsets."""
    left, right = window_size
    options: dict[str, Any] = {} if left < 0 else {"window_size_left": left, "window_size_right": right}
    options |= {} if scale is None else {"scale": scale}
    lengths = (*offsets, *longest)
    return lambda: torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, causal, False, **options)[0]
