"""The decode steps of three engines under CUDA graphs: what they allocate once, refresh before each replay and capture.

The graph is of a fixed batch; the requests that run are fewer, and the rest of the batch is padding that each engine
fills in its own way. `step` is what it captures, `advance` what it does between two replays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import broadhead
import torch
from calls import Call
from decode_batch import DecodeBatch
from layouts import NAN, int32
from torch import Tensor

#: Requests that the metadata buffer is allocated for.
MAX_REQUESTS = 13
LONGEST = 1500


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class Flow:
    """What the engines share: a zeroed buffer of metadata that stays, a prefix copied into it, its tail zeroed.

    ``padding`` says what the requests behind the running ones look like, of the kinds in `paddings`.
    """

    name: ClassVar[str]
    options: ClassVar[dict[str, Any]]  # of the Call
    paddings: ClassVar[tuple[str, ...]]

    def __init__(self, head_dim: int, padding: str, device: torch.device, batch: int = 8, **changes: Any) -> None:
        seqlens_q = (self.options.get("seqlen_q", 1),) * batch
        options = {name: x for name, x in self.options.items() if name != "seqlen_q"}
        defaults = {"heads_q": 8, "heads_kv": 2, "head_dim": head_dim, "causal": True}
        call = Call("kvcache", seqlens_q, (LONGEST,) * batch, **{**defaults, **options, **changes})
        self.batch, self.padding = DecodeBatch(call, device), padding
        self.live = batch
        self.buffer = torch.zeros(1 + round_up(max(MAX_REQUESTS, batch), 4) * 4, dtype=torch.int32, device=device)
        self.size = 0  # of the metadata in the buffer
        self.out = self.batch.out

    def advance(self, lengths: Sequence[int]) -> None:
        """The next step: so many requests of those lengths, the padding behind them, and its metadata."""
        batch, self.live = self.batch, len(lengths)
        stale = batch.page_table.clone(), batch.cache_seqlens.clone()
        batch.draw(int32([*lengths, *(0,) * (batch.call.batch - self.live)], batch.device))
        self.pad(*stale)
        metadata = self.plan(max(lengths, default=0))
        self.size = metadata.shape[0]
        self.buffer[: self.size].copy_(metadata)
        self.buffer[self.size :].zero_()

    def pad(self, stale_table: Tensor, stale_lengths: Tensor) -> None:
        """Fill in the requests that do not run; given what the step before had there."""
        raise NotImplementedError

    def plan(self, longest: int) -> Tensor:
        """The engine's call of get_scheduler_metadata."""
        raise NotImplementedError

    def step(self) -> None:
        """The engine's call of attention, to be captured."""
        raise NotImplementedError

    def check(self) -> None:
        """The requests that run are right."""
        self.batch.check(range(self.live), self.out)


class VllmFlow(Flow):
    """varlen over a block table, one token each, out= given, a bound of 32 splits.

    Padding: "no_tokens": cu_seqlens_q ends early; "no_keys": one token, seqused_k 0; "stale": one token, the lengths
    and pages of the step before, whose last pages others have taken since.
    """

    name = "vllm"
    options: ClassVar = {
        "page_size": 16,
        "k_layout": "interleaved",
        "out_layout": "guarded",
        "ragged_q": True,
        "num_splits": 32,
    }
    paddings = ("no_tokens", "no_keys", "stale")

    def pad(self, stale_table: Tensor, stale_lengths: Tensor) -> None:
        batch, live = self.batch, self.live
        batch.cu_seqlens_q.copy_(torch.arange(batch.call.batch + 1, device=batch.device))
        if self.padding == "no_tokens":
            batch.cu_seqlens_q[live:] = live
        elif self.padding == "stale":
            batch.page_table[live:] = stale_table[live:]
            batch.cache_seqlens[live:] = stale_lengths[live:]

    def plan(self, longest: int) -> Tensor:
        batch, call = self.batch, self.batch.call
        return broadhead.get_scheduler_metadata(
            batch_size=call.batch,
            max_seqlen_q=1,
            max_seqlen_k=longest,
            num_heads_q=call.heads_q,
            num_heads_kv=call.heads_kv,
            headdim=call.head_dim,
            cache_seqlens=batch.cache_seqlens,
            qkv_dtype=call.dtype,
            cu_seqlens_q=batch.cu_seqlens_q,
            page_size=call.page_size,
            causal=True,
            window_size=[-1, -1],
            num_splits=32,
        )

    def step(self) -> None:
        batch, call = self.batch, self.batch.call
        descale = torch.ones(1, device=batch.device).expand(call.batch, call.heads_kv) if call.kv_dtype else None
        broadhead.flash_attn_varlen_func(
            q=batch.q,
            k=batch.k_cache,
            v=batch.v_cache,
            out=batch.out,
            cu_seqlens_q=batch.cu_seqlens_q,
            max_seqlen_q=1,
            seqused_k=batch.cache_seqlens,
            max_seqlen_k=LONGEST,
            softmax_scale=call.scale,
            causal=True,
            window_size=[-1, -1],
            block_table=batch.page_table,
            softcap=0.0,
            scheduler_metadata=self.buffer[: self.size],
            k_descale=descale,
            v_descale=descale,
            num_splits=32,
            s_aux=None,
        )

    def check(self) -> None:
        super().check()
        live = self.live if self.padding == "no_tokens" else self.batch.call.batch
        self.batch.check_surroundings(self.out, live)
        if self.padding == "no_keys":
            assert bool((self.out[self.live :] == 0).all()), "a request without keys must give 0"


class SglangFlow(Flow):
    """kvcache with packed q, pages of one slot, the longest length from the page table, splits by the heuristic.

    Padding: "slot_0": one key each, in slot 0, which is nobody's; "no_keys": lengths of 0.
    """

    name = "sglang"
    options: ClassVar = {"page_size": 1, "ragged_q": True, "num_splits": 0}
    paddings = ("slot_0", "no_keys")

    def pad(self, stale_table: Tensor, stale_lengths: Tensor) -> None:
        if self.padding == "slot_0":
            self.batch.page_table[self.live :] = 0
            self.batch.cache_seqlens[self.live :] = 1

    def plan(self, longest: int) -> Tensor:
        batch, call = self.batch, self.batch.call
        return broadhead.get_scheduler_metadata(
            batch_size=call.batch,
            max_seqlen_q=1,
            max_seqlen_k=batch.page_table.shape[1],
            cache_seqlens=batch.cache_seqlens,
            num_heads=call.heads_q,
            num_heads_k=call.heads_kv,
            headdim=call.head_dim,
            headdim_v=call.dim_v,
            qkv_dtype=call.dtype,
            page_size=1,
            causal=True,
            has_softcap=False,
            num_splits=0,
        )

    def step(self) -> None:
        batch, call = self.batch, self.batch.call
        # The tokens of each sequence: passed without k and v, so nothing is appended.
        starts = torch.nn.functional.pad(batch.cache_seqlens.cumsum(0, dtype=torch.int32), (1, 0))
        self.out, self.lse, *_ = broadhead.flash_attn_with_kvcache(
            q=batch.q,
            k_cache=batch.k_cache,
            v_cache=batch.v_cache,
            page_table=batch.page_table,
            cache_seqlens=batch.cache_seqlens,
            cu_seqlens_q=batch.cu_seqlens_q,
            cu_seqlens_k_new=starts,
            max_seqlen_q=1,
            softmax_scale=call.scale,
            causal=True,
            window_size=(-1, -1),
            softcap=0.0,
            k_descale=None,
            v_descale=None,
            return_softmax_lse=True,
            num_splits=0,
            scheduler_metadata=self.buffer[: self.size],
            sinks=None,
        )

    def check(self) -> None:
        self.batch.check(range(self.live), self.out, self.lse)


class LmdeployFlow(Flow):
    """Speculative decoding: kvcache with several tokens each and one tensor of metadata that is kept.

    Padding: "dummy_page": as many keys as tokens, in page 0, which is nobody's.
    """

    name = "lmdeploy"
    options: ClassVar = {"page_size": 64, "num_splits": 0, "seqlen_q": 3}
    paddings = ("dummy_page",)

    def pad(self, stale_table: Tensor, stale_lengths: Tensor) -> None:
        self.batch.page_table[self.live :] = 0
        self.batch.cache_seqlens[self.live :] = self.batch.seqlen_q

    def plan(self, longest: int) -> Tensor:
        batch, call = self.batch, self.batch.call
        return broadhead.get_scheduler_metadata(
            call.batch,
            batch.seqlen_q,
            batch.page_table.shape[1] * call.page_size,
            call.heads_q,
            call.heads_kv,
            call.head_dim,
            batch.cache_seqlens.to(torch.int32),
            qkv_dtype=call.dtype,
            headdim_v=call.dim_v,
            cu_seqlens_q=None,
            cu_seqlens_k_new=None,
            page_size=call.page_size,
            causal=True,
            window_size=(-1, -1),
            has_softcap=False,
            num_splits=0,
        )

    def step(self) -> None:
        batch, call = self.batch, self.batch.call
        self.out = broadhead.flash_attn_with_kvcache(
            batch.q,
            batch.k_cache,
            batch.v_cache,
            cache_seqlens=batch.cache_seqlens,
            max_seqlen_q=batch.seqlen_q,
            scheduler_metadata=self.buffer[: self.size],
            page_table=batch.page_table,
            softmax_scale=call.scale,
            causal=True,
            window_size=(-1, -1),
            softcap=0.0,
        )


FLOWS: dict[str, type[Flow]] = {flow.name: flow for flow in (VllmFlow, SglangFlow, LmdeployFlow)}
#: Every engine with every kind of padding, as parameters.
FLOW_CASES = tuple((name, padding) for name, flow in FLOWS.items() for padding in flow.paddings)
#: Lengths of the requests that run, step by step.
FLOW_STEPS = (
    (1500, 700, 1, 1200, 33),
    (1499, 16, 700),
    (1, 1, 1, 1, 1, 1, 1, 1),
    (0, 1500, 0, 64, 65),
    (),
    (1024,),
    (1500,) * 8,
    (17, 3, 900, 0, 1488),
)


def check_steps(flow: Flow, replay: Any, steps: Sequence[Sequence[int]] = FLOW_STEPS) -> None:
    """``replay`` runs the captured step: right for every one of ``steps``, and nothing is left from the one before."""
    for lengths in steps:
        flow.advance(lengths)
        flow.out.fill_(NAN)
        replay()
        flow.check()
