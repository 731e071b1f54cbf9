"""flash_attn_with_shared_prefix on the device against fp64: one decode launch, or two calls and a merge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import broadhead
import oracle
import pytest
import torch
from broadhead import support
from broadhead.run.shared_prefix import MAX_WORK
from checks import LSE_ATOL
from gpu_calls import DECODE_ROWS, TORCH_DTYPES, cache_dtype, capture, row_id
from layouts import GARBAGE_PAGES, bytes_of, int32, nan_of
from torch import Tensor

pytestmark = pytest.mark.gpu

E4M3 = torch.float8_e4m3fn
DTYPES = [(torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, E4M3), (torch.float16, E4M3), (E4M3, None)]


@dataclasses.dataclass
class Step:
    """Sequences that share ``prefix`` keys. Slots behind them, padded query rows and unused table entries are
    garbage."""

    device: torch.device
    own: tuple[int, ...]
    prefix: int = 1000
    seqlens_q: int | tuple[int, ...] = 1  # a tuple: packed
    heads_q: int = 8
    heads_kv: int = 1
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    page_size: int = 16
    slack: int = 3  # pages, and padded query rows
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kv_dtype = self.kv_dtype or self.dtype
        batch = len(self.own)
        self.packed = isinstance(self.seqlens_q, tuple)
        self.lengths_q = self.seqlens_q if isinstance(self.seqlens_q, tuple) else (self.seqlens_q,) * batch
        lead = (sum(self.lengths_q) + self.slack,) if self.packed else (batch, self.seqlens_q)
        self.q = self.random(self.dtype, *lead, self.heads_q, self.head_dim)
        if self.packed:
            bytes_of(self.q)[sum(self.lengths_q) :] = nan_of(self.dtype)
        self.own_pages = -(-max(self.own) // self.page_size) + self.slack
        self.prefix_pages = -(-self.prefix // self.page_size)
        pages = self.prefix_pages + batch * self.own_pages
        self.caches = tuple(
            self.random(self.kv_dtype, pages, self.page_size, self.heads_kv, self.head_dim) for _ in "kv"
        )
        self.lens = int32(self.own, self.device)
        self.page_table = torch.empty(batch, self.own_pages, dtype=torch.int32, device=self.device)
        self.prefix_table = torch.empty(self.prefix_pages + 1, dtype=torch.int32, device=self.device)
        if self.kv_dtype == E4M3:
            for name in ("q_descale", "k_descale", "v_descale")[self.dtype != E4M3 :]:
                # The prefix has the factors of sequence 0: those of a sequence's own keys are the same here.
                factors = torch.rand(1, self.heads_kv, device=self.device) + 0.5
                self.options[name] = factors.expand(batch, -1)
        self.draw(self.own)

    def random(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)

    def draw(self, own: tuple[int, ...]) -> None:
        """Other pages and, up to those it was made for, other lengths; in place."""
        self.own = own
        self.lens.copy_(int32(own, self.device))
        order = torch.randperm(self.caches[0].shape[0], dtype=torch.int32, device=self.device)
        self.prefix_table.fill_(GARBAGE_PAGES[0])
        self.prefix_table[:-1] = order[: self.prefix_pages]
        self.page_table.copy_(order[self.prefix_pages :].view_as(self.page_table))
        for cache in self.caches:
            bytes_of(cache).copy_(bytes_of(self.random(cache.dtype, *cache.shape)))
            rest = self.prefix % self.page_size
            if rest:
                bytes_of(cache)[self.prefix_table[-2].long(), rest:] = nan_of(cache.dtype)
            for b, length in enumerate(own):
                for i in range(length // self.page_size, self.own_pages):
                    live = max(0, length - i * self.page_size)
                    bytes_of(cache)[self.page_table[b, i].long(), live:] = nan_of(cache.dtype)
        for b, length in enumerate(own):
            self.page_table[b, -(-length // self.page_size) :] = GARBAGE_PAGES[b % len(GARBAGE_PAGES)]

    def run(self, **overrides: Any) -> tuple[Tensor, Tensor]:
        kwargs: dict[str, Any] = {
            "q": self.q, "k_cache": self.caches[0], "v_cache": self.caches[1], "prefix_len": self.prefix,
            "prefix_page_table": self.prefix_table, "page_table": self.page_table, "cache_seqlens": self.lens,
            "return_softmax_lse": True, **self.options,
        }  # fmt: skip
        if self.packed:
            starts = torch.tensor((0, *self.lengths_q)).cumsum(0)
            kwargs |= {"cu_seqlens_q": int32(starts.tolist(), self.device), "max_seqlen_q": max(self.lengths_q)}
        return broadhead.flash_attn_with_shared_prefix(**{**kwargs, **overrides})

    def check(self, out: Tensor, lse: Tensor) -> None:
        """P and out are rounded to 16 bits, each by at most eps / 2 of sum(p * |v|); a quarter more is allowed."""
        start = 0
        scale = self.options.get("softmax_scale", self.head_dim**-0.5)
        softcap = self.options.get("softcap", 0.0)
        # Every query sees all of the prefix.
        window = (-1, 0 if self.options.get("causal", True) else -1)
        rule = oracle.Rule(scale, window, prefix=self.prefix, softcap=softcap)
        sinks = self.options.get("sinks")
        for b, (sq, own) in enumerate(zip(self.lengths_q, self.own, strict=True)):
            rows = self.q[start : start + sq] if self.packed else self.q[b]
            got = out[start : start + sq] if self.packed else out[b]
            got_lse = lse[:, start : start + sq] if self.packed else lse[b]
            start += sq
            q = rows.double() * self.factor("q_descale", self.heads_q // self.heads_kv)[:, None]
            k, v = (
                self.keys(cache, b, own) * self.factor(name).unsqueeze(-1)
                for cache, name in zip(self.caches, ("k_descale", "v_descale"), strict=True)
            )
            expected, expected_lse = oracle.attention(q, k, v, rule, sinks=sinks)
            size, _ = oracle.attention(q, k, v.abs(), rule, sinks=sinks)
            where = f"sequence {b}: {sq} queries, {self.prefix} + {own} keys"
            eps = max(torch.finfo(got.dtype).eps, torch.finfo(torch.float16).eps)
            assert ((got.double() - expected).abs() <= 1.25 * eps * size).all(), where
            bound = LSE_ATOL["cuda"] + 32 * torch.finfo(torch.float32).eps * expected_lse.abs()
            assert ((got_lse.double() - expected_lse).abs() <= bound * (50 if softcap else 1)).all(), where

    def keys(self, cache: Tensor, b: int, own: int) -> Tensor:
        prefix = bytes_of(cache)[self.prefix_table[:-1].long()].flatten(0, 1)[: self.prefix]
        rest = bytes_of(cache)[self.page_table[b, : -(-own // self.page_size)].long()].flatten(0, 1)[:own]
        return torch.cat((prefix, rest)).view(cache.dtype).double()

    def factor(self, name: str, repeat: int = 1) -> Tensor:
        descale = self.options.get(name)
        one = torch.ones(self.heads_kv, device=self.device)
        return (one if descale is None else descale[0]).double().repeat_interleave(repeat)


def ran_at_once() -> str:
    """The id of the row that ran the whole call."""
    backend, row, reason = broadhead.last_dispatch()
    assert backend == "cuda" and row is not None and reason.endswith("the shared prefix in the same launch"), reason
    return row


def check(step: Step, **overrides: Any) -> str:
    step.check(*step.run(**overrides))
    return ran_at_once()


OWN = (300, 7, 0, 129, 16)


@pytest.mark.curated
@pytest.mark.parametrize("dtype, kv_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_one_launch(head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype | None, cuda: torch.device) -> None:
    """40 rows of the prefix and 10; a prefix that ends in a page and in a key block."""
    options = {"head_dim": head_dim, "dtype": dtype, "kv_dtype": kv_dtype}
    assert ("_m32" in check(Step(cuda, OWN, **options))) == (head_dim > 256)
    assert "_m32" in check(Step(cuda, OWN, seqlens_q=3, **options))
    assert "_m32" not in check(Step(cuda, OWN, prefix=8192, heads_q=4, heads_kv=2, page_size=64, **options))


@pytest.mark.curated
@pytest.mark.parametrize("seqlens_q", [1, 2, 3, 4, (1, 4, 0, 2, 3), (1,) * 5])
def test_query_lengths(seqlens_q: int | tuple[int, ...], cuda: torch.device) -> None:
    """Packed queries are followed by rows of NaN that belong to no sequence."""
    for group in (1, 3, 8):
        check(Step(cuda, OWN, seqlens_q=seqlens_q, heads_q=2 * group, heads_kv=2, prefix=777))


@pytest.mark.curated
def test_what_joins(cuda: torch.device) -> None:
    for options in (
        {"softcap": 5.0}, {"softmax_scale": 0.3}, {"causal": False}, {"sinks": torch.randn(8, device=cuda)},
        {"sinks": torch.randn(8, device=cuda).bfloat16(), "softcap": 20.0}, {"num_splits": 2}, {"num_splits": 7},
    ):  # fmt: skip
        check(Step(cuda, OWN, seqlens_q=2, options=options))


@pytest.mark.curated
@pytest.mark.parametrize("prefix", [1, 15, 16, 17, 64, 20000])
@pytest.mark.parametrize("page_size", [1, 16, 48, 64])
def test_prefix_lengths(prefix: int, page_size: int, cuda: torch.device) -> None:
    check(Step(cuda, OWN, prefix=prefix, page_size=page_size))
    check(Step(cuda, (0, 0, 0), prefix=prefix, page_size=page_size))


@pytest.mark.curated
def test_from_whole_sequences(cuda: torch.device) -> None:
    """page_table and cache_seqlens of whole sequences."""
    step = Step(cuda, OWN, prefix=1008)
    whole = torch.cat((step.prefix_table[:-1].expand(len(OWN), -1), step.page_table), dim=1)
    step.check(*step.run(prefix_page_table=None, page_table=whole, cache_seqlens=step.lens + step.prefix))
    ran_at_once()


@pytest.mark.curated
def test_threshold(cuda: torch.device) -> None:
    """More work than MAX_WORK takes two calls and a merge, as do calls that one launch is not for."""
    prefix = 40000
    most = MAX_WORK // (prefix * 8 * 128)
    check(Step(cuda, tuple(range(most)), prefix=prefix))
    larger = Step(cuda, tuple(range(most + 1)), prefix=prefix)
    apart = Step(cuda, OWN, seqlens_q=2)
    apart.q = torch.stack((apart.q, apart.q), dim=1)[:, 0]
    for step, options, words in (
        (larger, {}, f"{MAX_WORK} multiplied"),
        (apart, {}, "equal distances"),
        (Step(cuda, OWN), {"num_splits": 1}, "num_splits=1"),
        (Step(cuda, OWN, seqlens_q=5), {}, "no decode kernel"),
    ):
        step.check(*step.run(**options))
        assert words in broadhead.last_dispatch()[2]


@pytest.mark.curated
def test_strides_and_out(cuda: torch.device) -> None:
    """q of any one stride between tokens; out= and its strides; without softmax_lse."""
    step = Step(cuda, OWN)
    wide = step.random(step.dtype, 5, 3, 8, 256)
    wide[:, 1, :, :128] = step.q[:, 0]
    step.q = wide[:, 1:2, :, :128]
    out, lse = step.run()
    step.check(out, lse)
    ran_at_once()
    given = torch.full((5, 1, 8, 136), float("nan"), dtype=step.dtype, device=cuda)[..., :128]
    assert step.run(out=given)[0] is given and torch.equal(given, out)
    assert torch.equal(step.run(return_softmax_lse=False), out)


@pytest.mark.curated
def test_known_calls(cuda: torch.device) -> None:
    """A call like one before: other tensors, lengths and pages."""
    for _ in range(3):
        step = Step(cuda, OWN)
        check(step)
        step.draw((1, 300, 33, 0, 5))
        check(step)


@pytest.mark.curated
@pytest.mark.parametrize("batch", [4, 40])
def test_replays(batch: int, cuda: torch.device) -> None:
    """A graph follows lengths, pages and keys; more sequences than a warp has lanes."""
    step = Step(cuda, (400,) * batch, heads_q=4)
    results: list[tuple[Tensor, Tensor]] = []
    step.run()
    ran_at_once()
    graph = capture(lambda: results.append(step.run()))
    for shift in range(4):
        step.draw(tuple((b * 97 + shift * 131) % 401 if b % 3 else 0 for b in range(batch)))
        results[-1][0].fill_(float("nan"))
        graph.replay()
        step.check(*results[-1])


@pytest.mark.full
@pytest.mark.parametrize("row", [row for row in DECODE_ROWS if "qv" not in row.requires], ids=row_id)
def test_every_row(row: support.KernelRow, only_row: Callable, cuda: torch.device) -> None:
    only_row(row)
    dtypes = {"dtype": TORCH_DTYPES[row.dtype], "kv_dtype": TORCH_DTYPES[cache_dtype(row)], "head_dim": row.head_dim}
    for options in (
        {}, {"seqlens_q": 4, "heads_q": 4}, {"seqlens_q": (2, 1, 0, 3, 4), "heads_q": 6, "heads_kv": 2},
        {"heads_q": 1, "prefix": 5000}, {"heads_q": 32, "heads_kv": 2, "page_size": 64},
    ):  # fmt: skip
        assert check(Step(cuda, OWN, **dtypes, **options)) == row.id


@pytest.mark.full
def test_compiled(cuda: torch.device) -> None:
    step = Step(cuda, OWN)
    step.check(*torch.compile(lambda: step.run(), fullgraph=True)())
