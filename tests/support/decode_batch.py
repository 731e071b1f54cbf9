"""A decode step of many sequences over one pool of pages: drawn, redrawn in place and checked by few operations.

calls.py places and judges every sequence by itself, which takes minutes for thousands and too long between two replays
of a graph. Here the full pages of a sequence are pages that all sequences share, as common prefixes are; its last page
is its own and holds NaN behind its end. Page 0 and some more are nobody's and hold NaN; table entries behind the used
ones are garbage. `wrong` compares with textbook attention in fp32, all sequences at once and without waiting for the
device; `check` judges some sequences as strictly as any other call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import broadhead
import torch
from calls import Built, Call, draw
from checks import LSE_ATOL, check_against, check_dead_rows
from layouts import GARBAGE_PAGES, NAN, bytes_of, int32, key_store, nan_of, place_output
from torch import Tensor

#: The largest fp32 copy of keys that a comparison makes, in elements.
MAX_ELEMENTS = 1 << 24


class DecodeBatch:
    """``call`` says what is asked: its seqlens_k bound the lengths, its queries are of one length.

    Tensors of the call: q, k_cache, v_cache, page_table, cache_seqlens, out, and cu_seqlens_q where q is packed.
    """

    def __init__(self, call: Call, device: torch.device, shared_pages: int = 61) -> None:
        assert call.page_size and call.k_layout != "overlapping" and len(set(call.seqlens_q)) == 1
        self.call, self.device, self.seqlen_q = call, device, call.seqlens_q[0]
        self.packed = call.ragged_q or call.function == "varlen"
        order = 1 + torch.randperm(shared_pages + call.batch + 2, device=device)
        self.shared, self.tails = order[:shared_pages].int(), order[shared_pages : shared_pages + call.batch].int()
        self.k_cache, self.v_cache = key_store(call, (len(order) + 1, call.page_size), device)
        self._fill(self.shared)
        lead = (call.batch * self.seqlen_q,) if self.packed else (call.batch, self.seqlen_q)
        self.q = draw(call.dtype, device, *lead, call.heads_q, call.head_dim)
        self.out, self.out_store = place_output(call, lead, NAN, device)
        self.longest = int32(call.seqlens_k, device)
        width = -(-max(call.seqlens_k) // call.page_size) + 1 + call.slack_k // call.page_size
        self.page_table = torch.empty(call.batch, width, dtype=torch.int32, device=device)
        self.cache_seqlens = torch.empty_like(self.longest)
        self.garbage = int32(GARBAGE_PAGES, device)
        if self.packed:
            tokens = call.batch * self.seqlen_q
            self.cu_seqlens_q = torch.arange(0, tokens + 1, self.seqlen_q, dtype=torch.int32, device=device)
        self.draw(self.longest)

    def _fill(self, pages: Tensor, dead: Tensor | None = None) -> None:
        """Fresh keys and values in ``pages``, NaN where ``dead`` (pages, page_size) says."""
        for cache in (self.k_cache, self.v_cache):
            fresh = bytes_of(draw(cache.dtype, self.device, len(pages), *cache.shape[1:]))
            if dead is not None:
                fresh = fresh.masked_fill(dead[:, :, None, None], nan_of(cache.dtype))
            bytes_of(cache)[pages] = fresh

    def draw(self, lengths: Tensor) -> None:
        """Other lengths (int32, on the device), other pages, other last pages; in place, without waiting."""
        size, shape = self.call.page_size, self.page_table.shape
        full, rest = (lengths // size)[:, None], (lengths % size)[:, None]
        self._fill(self.tails, torch.arange(size, device=self.device) >= rest)
        column = torch.arange(shape[1], device=self.device)
        shared = self.shared[torch.randint(len(self.shared), shape, device=self.device)]
        table = torch.where(
            column < full, shared, self.garbage[torch.randint(len(self.garbage), shape, device=self.device)]
        )
        self.page_table.copy_(torch.where((column == full) & (rest > 0), self.tails[:, None], table))
        self.cache_seqlens.copy_(lengths)

    def draw_random(self) -> None:
        """As `draw`, with random lengths: short ones more often, some empty."""
        share = torch.rand(self.call.batch, device=self.device) ** 3
        lengths = (share * (self.longest + 1)).int().minimum(self.longest)
        self.draw(lengths.masked_fill(torch.rand_like(share) < 0.15, 0))

    # --- the call -----------------------------------------------------------------------------------------------------

    @property
    def kwargs(self) -> dict[str, Any]:
        """Arguments of flash_attn_with_kvcache."""
        call = self.call
        kwargs: dict[str, Any] = {
            "q": self.q,
            "k_cache": self.k_cache,
            "v_cache": self.v_cache,
            "cache_seqlens": self.cache_seqlens,
            "page_table": self.page_table,
            "causal": call.causal,
            "window_size": call.window,
            "out": self.out,
        }
        for name in ("tokens_per_split", "sm_margin"):
            if getattr(call, name):
                kwargs[name] = getattr(call, name)
        if call.num_splits is not None:
            kwargs["num_splits"] = call.num_splits
        if self.packed:
            kwargs |= {"cu_seqlens_q": self.cu_seqlens_q, "max_seqlen_q": self.seqlen_q}
        return kwargs

    def run(self, **overrides: Any) -> tuple[Tensor, Tensor]:
        """``(out, softmax_lse)``, out poisoned before."""
        self.out.fill_(NAN)
        return broadhead.flash_attn_with_kvcache(**{**self.kwargs, **overrides}, return_softmax_lse=True)

    def scheduler_metadata(self, **overrides: Any) -> Tensor:
        return self.sample(()).scheduler_metadata(**overrides)

    def sample(self, which: Sequence[int]) -> Built:
        """A built call whose logical sequences are those; the whole call, without any, for none."""
        call, lengths, k, v = self.call, self.cache_seqlens.tolist() if which else [], [], []
        for b in which:
            pages = self.page_table[b, : -(-lengths[b] // call.page_size)]
            for cache, found in ((self.k_cache, k), (self.v_cache, v)):
                found.append(bytes_of(cache)[pages].flatten(0, 1)[: lengths[b]].view(cache.dtype))
        q = self.q.reshape(call.batch, self.seqlen_q, call.heads_q, call.head_dim)
        rows = [torch.arange(b * self.seqlen_q, (b + 1) * self.seqlen_q, device=self.device) for b in which]
        if which:
            call = call.with_(seqlens_q=(self.seqlen_q,) * len(which), seqlens_k=tuple(lengths[b] for b in which))
        return Built(call, [q[b] for b in which], k, v, None, self.kwargs, self.out, rows, self.out_store)

    # --- what it must give --------------------------------------------------------------------------------------------

    def check(self, which: Sequence[int], out: Tensor, lse: Tensor | None = None) -> None:
        """Some sequences against the judge, by the tolerance rule."""
        check_against(self.sample(which), out, lse)

    def check_surroundings(self, out: Tensor, live: int | None = None) -> None:
        """Only rows of the first ``live`` sequences were written, and nothing around out."""
        tokens = (self.call.batch if live is None else live) * self.seqlen_q
        rows = [torch.arange(tokens, device=self.device)]
        check_dead_rows(dataclasses.replace(self.sample(()), rows=rows), out)

    def check_all(self, out: Tensor, lse: Tensor | None = None) -> None:
        """Every sequence as `wrong` does, those of like lengths together; tells the first that is off."""
        lengths = self.cache_seqlens.tolist()
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        row = self.call.heads_kv * max(self.call.head_dim, self.call.dim_v)
        while order:
            width = lengths[order[-1]]
            count = max(1, MAX_ELEMENTS // max(1, (width + self.call.page_size) * row))
            which = torch.tensor(order[-count:], device=self.device)
            found = self.wrong(out, lse, which, width).nonzero()[:, 0].tolist()
            off = [order[-count:][i] for i in found]
            assert not off, f"sequences {off[:8]} of {len(lengths)}, with {[lengths[b] for b in off[:8]]} keys, are off"
            del order[-count:]

    def wrong(self, out: Tensor, lse: Tensor | None, which: Tensor | None = None, width: int | None = None) -> Tensor:
        """Whether each sequence (of ``which``, none longer than ``width``) is off: a tensor on the device.

        The probabilities and the output are rounded to the dtype, each by at most eps / 2 of ``sum(p * |v|)``; a
        quarter more is allowed. softmax_lse must be as exact as ever: it tells of a single key too many or too few.
        """
        call = self.call
        which = torch.arange(call.batch, device=self.device) if which is None else which
        expected, expected_lse, size = self._reference(which, width)
        rows = out.reshape(call.batch, self.seqlen_q, call.heads_q, call.dim_v)[which].float()
        right = (rows - expected).abs() <= 1.25 * torch.finfo(call.dtype).eps * size
        right = right.flatten(1).all(dim=1)
        if lse is not None:
            lse = lse.T.reshape(call.batch, self.seqlen_q, -1) if self.packed else lse.transpose(1, 2)
            lse = lse[which]
            bound = LSE_ATOL[self.device.type] + 32 * torch.finfo(torch.float32).eps * expected_lse.abs()
            empty = expected_lse == float("-inf")
            close = torch.where(empty, lse == expected_lse, (lse - expected_lse).abs() <= bound)
            right &= close.flatten(1).all(dim=1)
        return ~right

    def _reference(self, which: Tensor, width: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """In fp32 ``(n, sq, Hq, Dv)``, the LSE ``(n, sq, Hq)``, and the sum of ``p * |v|`` shaped like the first."""
        call, size = self.call, self.call.page_size
        columns = self.page_table.shape[1] if width is None else -(-width // size)
        lengths = self.cache_seqlens[which][:, None]
        used = torch.arange(columns, device=self.device) * size < lengths
        pages = self.page_table[which, :columns].masked_fill(~used, 0)
        k, v = (bytes_of(x)[pages].view(x.dtype).flatten(1, 2).float() for x in (self.k_cache, self.v_cache))
        key = torch.arange(columns * size, device=self.device)
        v = v.masked_fill((key >= lengths)[:, :, None, None], 0.0)
        position = (lengths - self.seqlen_q + torch.arange(self.seqlen_q, device=self.device))[:, :, None]
        seen = (key < lengths)[:, None, :].expand(-1, self.seqlen_q, -1)
        left, right = call.normalized_window
        if left >= 0:
            seen = seen & (position - key <= left)
        if right >= 0:
            seen = seen & (key - position <= right)
        q = self.q.reshape(call.batch, self.seqlen_q, call.heads_kv, -1, call.head_dim)[which].float()
        scores = torch.einsum("nqhgd,nkhd->nqhgk", q, k) * call.scale
        scores = scores.masked_fill(~seen[:, :, None, None, :], float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        p = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
        out, size_of = (torch.einsum("nqhgk,nkhd->nqhgd", p, x).flatten(2, 3) for x in (v, v.abs()))
        return out, lse.flatten(2), size_of


def check_replays(
    batch: DecodeBatch, replay: Callable[[], tuple[Tensor, Tensor | None]], count: int, every: int = 20
) -> None:
    """``count`` replays, each of other random lengths and pages; one in ``every`` against the judge.

    ``replay`` runs the captured call into batch.out, which is poisoned before: ``(out, softmax_lse)``.
    """
    wrong = torch.zeros(count, dtype=torch.int64, device=batch.device)
    for i in range(count):
        batch.draw_random()
        batch.out.fill_(NAN)
        out, lse = replay()
        wrong[i] = batch.wrong(out, lse).sum()
        if i % every == 0:
            batch.check(range(batch.call.batch), out, lse)
    off = wrong.nonzero()[:, 0].tolist()
    assert not off, f"{len(off)} of {count} replays are off, the first is {off[0]}: {batch.call}"
