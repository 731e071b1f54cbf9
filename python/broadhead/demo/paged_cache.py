"""A small paged KV cache and the transformers attention function that runs on it."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

import broadhead

#: attn_implementation of the models that run on a `PagedKVCache`.
PAGED_ATTENTION = "broadhead_paged"


class LayerKind(NamedTuple):
    """Layers of one kind share their scheduler metadata."""

    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    window_left: int
    has_softcap: bool


class Dispatch(NamedTuple):
    """Where an attention call ran."""

    phase: str  # "prefill" or "decode"
    head_dim: int
    backend: str
    row: str | None
    reason: str


class PagedKVCache:
    """Keys and values of one batch in pages, one pool a layer, one page table for all layers.

    Args:
        batch_size: sequences; all have the same length.
        max_seqlen: tokens a sequence may grow to.
        page_size: tokens a page.
        device: where the pools live.
        seed: of the permutation that scatters the pages, so that a kernel that ignores the table cannot pass.

    Attributes:
        page_table: int32 ``(B, max_pages)``.
        cache_seqlens: int32 ``(B,)``, tokens in the cache before the current step.
        dispatches: how often each `Dispatch` happened.
    """

    def __init__(self, batch_size: int, max_seqlen: int, page_size: int, device: torch.device, seed: int = 0) -> None:
        self.page_size = page_size
        self.max_pages = -(-max_seqlen // page_size)
        self.num_pages = batch_size * self.max_pages
        generator = torch.Generator().manual_seed(seed)
        table = torch.randperm(self.num_pages, generator=generator).view(batch_size, self.max_pages)
        self.page_table = table.to(device=device, dtype=torch.int32)
        self.cache_seqlens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.seqlen = 0  # the same on the host, so that nothing waits for the device
        self.dispatches: Counter[Dispatch] = Counter()
        self._pools: dict[int, tuple[Tensor, Tensor]] = {}
        self._metadata: dict[LayerKind, Tensor] = {}
        self._fresh: set[LayerKind] = set()

    @property
    def max_seqlen(self) -> int:
        """Tokens that fit a sequence."""
        return self.max_pages * self.page_size

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` as cached, after every layer has seen them."""
        self.seqlen += tokens
        self.cache_seqlens += tokens
        self._fresh.clear()

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        window_left: int = -1,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        query_ranges: Tensor | None = None,
    ) -> Tensor:
        """Append ``k`` and ``v`` to a layer's pages and attend to all of its tokens, causally.

        Args:
            layer: the layer's index.
            q: ``(B, S, Hq, D)``, the queries of this step.
            k: ``(B, S, Hkv, D)``, the keys of this step.
            v: ``(B, S, Hkv, Dv)``, the values of this step.
            softmax_scale: as in `broadhead.flash_attn_with_kvcache`.
            softcap: likewise.
            sinks: likewise.
            window_left: keys before its own that a query sees, -1 for all.
            query_ranges: ``(B, S, 2)``, keys that each query sees besides, no further back than the window.

        Returns:
            ``(B, S, Hq, Dv)``.

        Raises:
            ValueError: the tokens do not fit ``max_seqlen``.
        """
        if self.seqlen + q.shape[1] > self.max_seqlen:
            raise ValueError(
                f"PagedKVCache.attend: {self.seqlen} cached + {q.shape[1]} new tokens exceed the {self.max_seqlen} "
                f"that {self.max_pages} pages of {self.page_size} hold; make the cache with a larger max_seqlen"
            )
        pools = self._pools.get(layer)
        if pools is None:
            pools = self._pools[layer] = (self._new_pool(k), self._new_pool(v))
        options: dict[str, Any] = {
            "page_table": self.page_table,
            "softmax_scale": softmax_scale,
            "causal": True,
            "window_size": (window_left, 0),
            "softcap": softcap,
            "sinks": sinks,
        }
        if query_ranges is not None:
            options.update(query_ranges=query_ranges, ranges_in_window=True)
        phase, run = ("decode", self._decode) if q.shape[1] == 1 else ("prefill", self._prefill)
        out = run(q, k, v, *pools, options)
        backend, row, reason = broadhead.last_dispatch()
        self.dispatches[Dispatch(phase, q.shape[-1], backend, row, reason)] += 1
        return out

    def _new_pool(self, like: Tensor) -> Tensor:
        """Pages of NaN: a read of a slot that no token owns shows in the output."""
        shape = (self.num_pages, self.page_size, *like.shape[2:])
        return torch.full(shape, float("nan"), dtype=like.dtype, device=like.device)

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, options: dict) -> Tensor:
        """Many tokens: write them into their pages, then one varlen call over the page table."""
        batch, seqlen = q.shape[:2]
        positions = torch.arange(self.seqlen, self.seqlen + seqlen, device=q.device)
        pages = self.page_table[:, positions // self.page_size].long()
        slots = (positions % self.page_size).expand(batch, -1)
        k_pool[pages, slots] = k
        v_pool[pages, slots] = v
        if "query_ranges" in options:
            options["query_ranges"] = options["query_ranges"].flatten(0, 1)
        cu_seqlens_q = torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32, device=q.device)
        out = broadhead.flash_attn_varlen_func(
            q.reshape(batch * seqlen, *q.shape[2:]),
            k_pool,
            v_pool,
            cu_seqlens_q,
            None,
            seqlen,
            self.max_seqlen,
            seqused_k=self.cache_seqlens + seqlen,
            **options,
        )
        return out.view(batch, seqlen, *out.shape[1:])

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, options: dict) -> Tensor:
        """One token: the call appends it and attends, with the split plan of this step."""
        window_left = options["window_size"][0]
        kind = LayerKind(
            q.shape[2], k.shape[2], q.shape[3], v.shape[3], window_left, has_softcap=options["softcap"] > 0
        )
        return broadhead.flash_attn_with_kvcache(
            q,
            k_pool,
            v_pool,
            k=k,
            v=v,
            cache_seqlens=self.cache_seqlens,
            scheduler_metadata=self._scheduler_metadata(kind, q.dtype),
            **options,
        )

    def _scheduler_metadata(self, kind: LayerKind, dtype: torch.dtype) -> Tensor:
        """The plan of this step, made once for all layers of a kind, in a buffer that stays for all steps."""
        if kind not in self._fresh:
            self._metadata[kind] = broadhead.get_scheduler_metadata(
                self.page_table.shape[0],
                1,
                self.max_seqlen,
                kind.num_heads_q,
                kind.num_heads_kv,
                kind.head_dim,
                self.cache_seqlens,
                qkv_dtype=dtype,
                headdim_v=kind.head_dim_v,
                page_size=self.page_size,
                max_seqlen_k_new=1,
                causal=True,
                window_size=(kind.window_left, 0),
                has_softcap=kind.has_softcap,
                out=self._metadata.get(kind),
            )
            self._fresh.add(kind)
        return self._metadata[kind]


def register() -> None:
    """Make ``attn_implementation=PAGED_ATTENTION`` known to transformers.

    It has no mask function on purpose: transformers then builds no mask, and the page table says what a query may see.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(PAGED_ATTENTION, paged_attention_forward)


def paged_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    paged_cache: PagedKVCache | None = None,
    local_ranges: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: pass the cache to the model as ``model(..., paged_cache=cache, use_cache=False)``.

    Args:
        module: the attention layer, of which ``layer_idx`` is read.
        query: ``(B, Hq, S, D)``, of the new tokens only.
        key: ``(B, Hkv, S, D)``, likewise.
        value: ``(B, Hkv, S, Dv)``, likewise.
        local_ranges: ``(B, S, 2)`` of `broadhead.make_query_ranges`, which layers with a window see besides, inside it:
            the images of Gemma 4.

    Returns:
        ``(out, None)`` with out ``(B, S, Hq, Dv)``.
    """
    if paged_cache is None:
        raise ValueError(f"attn_implementation={PAGED_ATTENTION!r} needs model(..., paged_cache=PagedKVCache(...))")
    layer_idx: Any = module.layer_idx
    out = paged_cache.attend(
        layer_idx,
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        softmax_scale=scaling,
        window_left=-1 if sliding_window is None else sliding_window - 1,
        softcap=softcap or 0.0,
        sinks=s_aux,
        query_ranges=None if sliding_window is None else local_ranges,
    )
    return out, None
