"""Adapters for the backends of torch's scaled_dot_product_attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from broadhead_bench.cases import DenseCase
from broadhead_bench.peers.base import Peer, Skip


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
