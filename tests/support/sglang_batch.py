"""Requests over a pool of KV slots as SGLang holds them: ragged, on shuffled pages, with garbage in all other slots."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from on_device import DEVICE
from oracle import Rule, attention
from tolerance import OUT_FACTOR, assert_close
from torch import Tensor


@dataclasses.dataclass
class Requests:
    """``slots[b]`` are the places in the pool of the keys of request b, whose last ``q_lens[b]`` tokens are queries."""

    q: Tensor  # (T, Hq, D)
    k_pool: Tensor  # (slots, Hkv, D)
    v_pool: Tensor  # (slots, Hkv, Dv)
    slots: list[Tensor]
    q_lens: list[int]
    page_size: int
    page_table: Tensor  # int32 (B, max_pages)

    @property
    def cache_seqlens(self) -> Tensor:
        return torch.tensor([len(each) for each in self.slots], dtype=torch.int32, device=DEVICE)

    @property
    def cu_seqlens_q(self) -> Tensor:
        return torch.tensor([0, *self.q_lens], device=DEVICE).cumsum(0).int()

    def paged(self, pool: Tensor) -> Tensor:
        return pool.view(-1, self.page_size, *pool.shape[1:])

    def judge(
        self, rule: Rule, dtype: torch.dtype = torch.float64, sinks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output and LSE of every request by the oracle."""
        outs, lses = [], []
        for rows, q in zip(self.slots, self.q.split(self.q_lens)):
            keys, values = (pool[rows].to(dtype) for pool in (self.k_pool, self.v_pool))
            out, lse = attention(q.to(dtype), keys, values, rule, sinks=None if sinks is None else sinks.to(dtype))
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses, dim=1)


def make_requests(
    page_size: int,
    q_lens: list[int] | None = None,
    heads: tuple[int, int] = (4, 2),
    head_dims: tuple[int, int] = (64, 64),
    dtype: torch.dtype = torch.bfloat16,
    most: int = 90,
) -> Requests:
    """Requests of random lengths; q_lens: None: one token each."""
    q_lens = [1] * 5 if q_lens is None else q_lens
    lengths = [length + random.randrange(most) for length in q_lens]
    pages = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(pages) + 3, device=DEVICE).int()
    table = torch.full(
        (len(q_lens), max(pages) + 2), 2**30, dtype=torch.int32, device=DEVICE
    )  # garbage past what is needed
    slots, used = [], 0
    for row, (count, length) in enumerate(zip(pages, lengths)):
        ids = order[used : used + count]
        table[row, :count] = ids
        slots.append((ids.long()[:, None] * page_size + torch.arange(page_size, device=DEVICE)).flatten()[:length])
        used += count
    total = len(order) * page_size
    made: dict[str, Any] = {"dtype": dtype, "device": DEVICE}
    k_pool, v_pool = (torch.full((total, heads[1], size), float("nan"), **made) for size in head_dims)
    for pool in (k_pool, v_pool):
        owned = torch.cat(slots)
        pool[owned] = torch.randn(len(owned), *pool.shape[1:], **made)
    q = torch.randn(sum(q_lens), heads[0], head_dims[0], **made)
    return Requests(q, k_pool, v_pool, slots, q_lens, page_size, table)


def assert_near(got: Tensor, requests: Requests, rule: Rule, sinks: Tensor | None = None) -> None:
    """At most twice the error of attention in the dtype of the inputs."""
    truth, _ = requests.judge(rule, sinks=sinks)
    naive, _ = requests.judge(rule, requests.q.dtype, sinks)
    assert_close("out", got.reshape(truth.shape), truth, naive, requests.q.dtype, OUT_FACTOR, "attention")
