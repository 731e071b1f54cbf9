"""Many kinds of calls from several threads at once: decode, prefill, appends; results are checked without waiting."""

from __future__ import annotations

import random
import threading

import broadhead
import torch
from torch import Tensor

LONGEST = 640
HEADS = ((4, 2), (8, 1), (2, 2))
HEAD_DIMS = (64, 128)
QUERIES = (1, 2, 4, 40, 70)


class Caller:
    """What one thread calls. q is 0 and the values of a head_dim are one number: it comes out, and the log of the
    number of keys is softmax_lse. Kind i has a shape of its own."""

    def __init__(self, device: torch.device, backend: str | None) -> None:
        self.device, self.backend = device, backend
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.zeros = {d: torch.zeros(2, max(QUERIES), 8, d, dtype=dtype, device=device) for d in HEAD_DIMS}
        self.keys = {d: torch.randn(2, LONGEST, 2, d, device=device).to(dtype) for d in HEAD_DIMS}
        self.values = {
            d: torch.full((2, LONGEST, 2, d), 0.5 + i, dtype=dtype, device=device) for i, d in enumerate(HEAD_DIMS)
        }
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)

    def call(self, kind: int) -> None:
        """One call of a kind; what is wrong adds to ``wrong``."""
        length = 8 + kind % (LONGEST - 8)  # the number of kinds is that of lengths times that of the choices below
        choice = kind // (LONGEST - 8)
        head_dim = HEAD_DIMS[choice % 2]
        heads_q, heads_kv = HEADS[choice // 2 % 3]
        seqlen_q = QUERIES[choice % len(QUERIES)]
        form = (choice + kind) % 4
        q = self.zeros[head_dim][:, :seqlen_q, :heads_q]
        k, v = (x[head_dim][:, :length, :heads_kv] for x in (self.keys, self.values))
        if form == 0:
            out, lse = broadhead.flash_attn_func(q, k, v, return_attn_probs=True, backend=self.backend)
        elif form == 1:
            lengths = torch.full((2,), length - 3, dtype=torch.int32, device=self.device)
            out, lse = broadhead.flash_attn_with_kvcache(
                q, k, v, cache_seqlens=lengths, return_softmax_lse=True, backend=self.backend
            )
            length -= 3
        elif form == 2:
            lengths = torch.full((2,), length - 4, dtype=torch.int32, device=self.device)
            new = (self.keys[head_dim][:, :2, :heads_kv], self.values[head_dim][:, :2, :heads_kv])
            out, lse = broadhead.flash_attn_with_kvcache(
                q, k, v, *new, cache_seqlens=lengths, return_softmax_lse=True, backend=self.backend
            )
            length -= 2
        else:
            offsets = torch.tensor([0, seqlen_q, 2 * seqlen_q], dtype=torch.int32).to(self.device)
            ends = torch.tensor([0, length, 2 * length], dtype=torch.int32).to(self.device)
            packed = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
            out, lse = broadhead.flash_attn_varlen_func(
                *packed, offsets, ends, seqlen_q, length, return_attn_probs=True, backend=self.backend
            )
        self._judge(out, lse, self.values[head_dim][0, 0, 0, 0], length)

    def _judge(self, out: Tensor, lse: Tensor, value: Tensor, length: int) -> None:
        off = ~((out - value).abs() <= 1e-2 * value).all()
        self.wrong += off | ~((lse - torch.tensor(float(length)).log().item()).abs() < 1e-3).all()


def run_threads(device: torch.device, kinds: int, threads: int, backend: str | None = None) -> list[str]:
    """What went wrong when each thread made every kind of call once, in an order of its own; empty: nothing."""
    complaints: list[str] = []
    barrier = threading.Barrier(threads)

    def work(number: int) -> None:
        order = list(range(kinds))
        random.Random(number).shuffle(order)
        kind = -1
        try:
            stream = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else torch.no_grad()
            with stream, torch.no_grad():
                caller = Caller(device, backend)
                barrier.wait()
                for kind in order:
                    caller.call(kind)
                wrong = int(caller.wrong)
            if wrong:
                complaints.append(f"thread {number}: {wrong} of {kinds} results are wrong")
        except BaseException as error:
            complaints.append(f"thread {number}, kind {kind}: {type(error).__name__}: {error}")

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return complaints
