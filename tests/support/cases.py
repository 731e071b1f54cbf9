"""Builds attention inputs for the tests: random lengths, every layout, NaN or garbage in all that must not be read."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import oracle
import torch
from torch import Tensor

#: Page numbers that name no page: what an allocator leaves in the unused end of a page table.
GARBAGE_PAGES = (2**30, -1, -(2**31), 2**31 - 1)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a case is like. Lengths are drawn in [0, max] (their largest is max); dense q or k without seqused are full.

    layout_q: "dense" or "varlen". layout_k: "dense", "varlen" or "paged". storage: "separate" K and V, "interleaved"
    halves of one row (head-major, as vLLM has them), or "overlapping" views of one pool: V begins a page after K, as
    Hugging Face has them (paged only). padding: rows past the last sequence in packed tensors, and spare pages. freed:
    NaN also in keys of the sequence that no query sees.
    """

    batch: int = 3
    max_seqlen_q: int = 17
    max_seqlen_k: int = 43
    num_heads_q: int = 4
    num_heads_kv: int = 2
    head_dim: int = 16
    head_dim_v: int | None = None  # None: head_dim
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    layout_q: str = "dense"
    layout_k: str = "dense"
    page_size: int = 16
    storage: str = "separate"
    window_left: int = -1
    window_right: int = -1
    attention_chunk: int = 0
    softcap: float = 0.0
    softmax_scale: float | None = None
    sinks: bool = False
    prefix: bool = False
    qv: bool = False
    descale: bool = False
    kv_dtype: torch.dtype | None = None  # None: dtype
    seqused_q: bool = False
    seqused_k: bool = False
    leftpad: bool = False
    batch_idx: bool = False
    padding: bool = True
    freed: bool = True
    strided_q: bool = False  # q is a slice of a wider tensor


@dataclasses.dataclass
class Case:
    """Tensors in the normalised form of ``broadhead.reference.attention`` and ``oracle.attention``."""

    spec: Spec
    seed: int
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    seqlens_q: list[int]
    seqlens_k: list[int]

    def __str__(self) -> str:
        changed = (f for f in dataclasses.fields(Spec) if getattr(self.spec, f.name) != f.default)
        words = ", ".join(f"{f.name}={getattr(self.spec, f.name)!r}" for f in changed)
        return f"build(Spec({words}), seed={self.seed})"

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the naive run: that of q; bf16 for fp8, which has no arithmetic."""
        return torch.bfloat16 if self.q.dtype.itemsize == 1 else self.q.dtype

    @property
    def differentiable(self) -> list[str]:
        """Names of the arguments that have a gradient."""
        return ["q", "k", "v", *(name for name in ("qv", "sinks") if self.options.get(name) is not None)]

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``reference.attention`` and ``oracle.attention``."""
        return {"q": self.q, "k": self.k, "v": self.v, **self.options}

    def live_rows(self) -> Tensor:
        """Bool ``(B, Sq)`` or ``(T,)``: rows of q that a sequence owns and uses."""
        if self.spec.layout_q == "dense":
            live = torch.zeros(self.q.shape[:2], dtype=torch.bool)
            for b, length in enumerate(self.seqlens_q):
                live[b, :length] = True
        else:
            live = torch.zeros(self.q.shape[0], dtype=torch.bool)
            for begin, length in zip(self.options["cu_seqlens_q"].tolist(), self.seqlens_q):
                live[begin : begin + length] = True
        return live.to(self.q.device)

    def requires_grad(self) -> dict[str, Tensor]:
        """Makes contiguous leaves of the differentiable arguments, in place in this case; returns them by name."""
        leaves = {name: self.arguments()[name].detach().clone().requires_grad_() for name in self.differentiable}
        self.q, self.k, self.v = leaves["q"], leaves["k"], leaves["v"]
        self.options.update({name: leaf for name, leaf in leaves.items() if name in self.options})
        return leaves


def build(spec: Spec, seed: int) -> Case:
    """The case of a spec; the same seed gives the same case on every device."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    head_dim_v = spec.head_dim if spec.head_dim_v is None else spec.head_dim_v
    kv_dtype = spec.kv_dtype or spec.dtype
    options: dict[str, Any] = {
        "softmax_scale": spec.softmax_scale or (spec.head_dim + (head_dim_v if spec.qv else 0)) ** -0.5,
        "window_left": spec.window_left,
        "window_right": spec.window_right,
        "attention_chunk": spec.attention_chunk,
        "softcap": spec.softcap,
        "max_seqlen_q": spec.max_seqlen_q,
        "max_seqlen_k": spec.max_seqlen_k,
    }

    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=spec.device)

    # Queries.
    full_q = spec.layout_q == "dense"
    slots_q = [spec.max_seqlen_q] * spec.batch if full_q else _lengths(rng, spec.batch, spec.max_seqlen_q)
    seqlens_q = [rng.randint(0, n) for n in slots_q] if spec.seqused_q else slots_q
    rows_q = [torch.arange(n) + sum(slots_q[:b]) for b, n in enumerate(seqlens_q)]
    total_q = sum(slots_q) + (rng.randint(1, 5) if spec.padding and not full_q else 0)
    packed_q = _poisoned((total_q, spec.num_heads_q, spec.head_dim), spec, spec.dtype, spec.strided_q)
    packed_qv = _poisoned((total_q, spec.num_heads_q, head_dim_v), spec, spec.dtype, False)
    for rows in rows_q:
        _fill(packed_q, (rows.to(spec.device),), generator)
        _fill(packed_qv, (rows.to(spec.device),), generator)
    shape_q = (spec.batch, spec.max_seqlen_q) if full_q else (total_q,)
    q = packed_q.unflatten(0, shape_q)
    if spec.qv:
        options["qv"] = packed_qv.unflatten(0, shape_q)
    if not full_q:
        options["cu_seqlens_q"] = integers(_cumulative(slots_q))
    if spec.seqused_q:
        options["seqused_q"] = integers(seqlens_q)

    # Keys: slots are the rows a sequence has room for, ends the rows it uses, leftpad the first of these that count.
    known_full = spec.layout_k == "dense" and not spec.seqused_k
    ends = [spec.max_seqlen_k] * spec.batch if known_full else _lengths(rng, spec.batch, spec.max_seqlen_k)
    leftpad = [rng.randint(0, n) for n in ends] if spec.leftpad else [0] * spec.batch
    seqlens_k = [end - pad for end, pad in zip(ends, leftpad)]
    prefix = [rng.randint(0, spec.max_seqlen_k + 3) for _ in range(spec.batch)] if spec.prefix else None
    owners = rng.sample(range(spec.batch + 2), spec.batch) if spec.batch_idx else list(range(spec.batch))
    num_owners = spec.batch + 2 if spec.batch_idx else spec.batch
    if spec.layout_k == "paged":
        k, v, places = _paged(spec, rng, ends, owners, num_owners, options, head_dim_v, kv_dtype)
    else:
        k, v, places = _unpaged(spec, rng, ends, owners, num_owners, options, head_dim_v, kv_dtype)
    if spec.seqused_k or spec.layout_k == "paged":
        options["seqused_k"] = integers(ends)
    if spec.leftpad:
        options["leftpad_k"] = integers(leftpad)
    if spec.batch_idx:
        options["kv_batch_idx"] = integers(owners)
    if prefix is not None:
        options["prefix_lens"] = integers(prefix)
    for b in range(spec.batch):
        place = tuple(index[leftpad[b] :] for index in places[b])
        if spec.freed and seqlens_k[b] > 0:
            seen = oracle.visible(
                seqlens_q[b],
                seqlens_k[b],
                spec.window_left,
                spec.window_right,
                spec.attention_chunk,
                None if prefix is None else prefix[b],
                torch.device("cpu"),
            ).any(dim=0)
            place = tuple(index[seen] for index in place)
        place = tuple(index.to(spec.device) for index in place)
        _fill(k, place, generator)
        _fill(v, place, generator)

    if spec.sinks:
        options["sinks"] = torch.randn(spec.num_heads_q, generator=generator).to(spec.device)
    if spec.descale:
        for name in ("q_descale", "k_descale", "v_descale"):
            factor = torch.rand((spec.batch, spec.num_heads_kv), generator=generator) + 0.5
            options[name] = factor.to(spec.device)
    return Case(spec, seed, q, k, v, options, seqlens_q, seqlens_k)


def _lengths(rng: random.Random, batch: int, longest: int) -> list[int]:
    """Random lengths whose largest is ``longest``; among three or more one is 0."""
    lengths = [rng.randint(0, longest) for _ in range(batch)]
    if not lengths:
        return lengths
    lengths[rng.randrange(batch)] = longest
    if batch > 2:
        spot = rng.choice([b for b in range(batch) if lengths[b] != longest] or [0])
        lengths[spot] = 0
    return lengths


def _cumulative(lengths: list[int]) -> list[int]:
    return [sum(lengths[:b]) for b in range(len(lengths) + 1)]


def _poisoned(shape: tuple[int, ...], spec: Spec, dtype: torch.dtype, strided: bool) -> Tensor:
    """NaN of that shape; strided: the last dim is a slice of a wider one."""
    wide = (*shape[:-1], shape[-1] * (3 if strided else 1))
    x = torch.full(wide, math.nan, device=spec.device).to(dtype)
    return x[..., : shape[-1]]


def _fill(x: Tensor, place: tuple[Tensor, ...], generator: torch.Generator) -> None:
    """Random values at ``x[place]`` (in place, drawn on the CPU)."""
    shape = (*place[0].shape, *x.shape[len(place) :])
    values = torch.randn(shape, generator=generator).to(x.dtype).to(x.device)
    if x.dtype.itemsize == 1:
        x, values = x.view(torch.uint8), values.view(torch.uint8)
    x[place] = values


def _storage(
    blocks: int, rows: int, spec: Spec, head_dim_v: int, dtype: torch.dtype, packed: bool = False
) -> tuple[Tensor, Tensor]:
    """Poisoned K and V ``(blocks, rows, Hkv, D | Dv)`` in the storage that the spec asks for."""
    heads, head_dim = spec.num_heads_kv, spec.head_dim
    if spec.storage == "interleaved":
        pool = _poisoned((blocks, heads, rows, head_dim + head_dim_v), spec, dtype, False).transpose(1, 2)
        return pool[..., :head_dim], pool[..., head_dim:]
    if spec.storage == "overlapping":
        assert head_dim == head_dim_v and not packed, "overlapping views need head_dim_v == head_dim"
        pool = _poisoned((blocks + 1, rows, heads, head_dim), spec, dtype, False)
        return pool[:-1], pool[1:]
    k = _poisoned((blocks, rows, heads, head_dim), spec, dtype, False)
    return k, _poisoned((blocks, rows, heads, head_dim_v), spec, dtype, False)


def _paged(
    spec: Spec,
    rng: random.Random,
    ends: list[int],
    owners: list[int],
    num_owners: int,
    options: dict[str, Any],
    head_dim_v: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
    """K, V and, for each sequence, the (page, slot) indices of its rows; adds the page table to the options."""
    size = spec.page_size
    needed = [-(-end // size) for end in ends]
    max_pages = max(1, -(-spec.max_seqlen_k // size)) + (rng.randint(0, 2) if spec.padding else 0)
    spare = rng.randint(1, 4) if spec.padding else 0
    # Overlapping: K's pages are the even ones of the pool, V's the odd ones.
    step = 2 if spec.storage == "overlapping" else 1
    num_pages = max(1, sum(needed) + spare)
    free = [page * step for page in rng.sample(range(num_pages), num_pages)]
    entries = [rng.choice(GARBAGE_PAGES) for _ in range(num_owners * max_pages)]
    table = torch.tensor(entries, dtype=torch.long).view(num_owners, max_pages)
    places: list[tuple[Tensor, ...]] = []
    for b, end in enumerate(ends):
        pages = torch.tensor([free.pop() for _ in range(needed[b])], dtype=torch.long)
        table[owners[b], : needed[b]] = pages
        row = torch.arange(end)
        places.append((pages[row // size], row % size))
    k, v = _storage(num_pages * step, size, spec, head_dim_v, dtype)
    options["page_table"] = table.to(torch.int32).to(spec.device)
    options["max_seqlen_k"] = max_pages * size
    return k, v, places


def _unpaged(
    spec: Spec,
    rng: random.Random,
    ends: list[int],
    owners: list[int],
    num_owners: int,
    options: dict[str, Any],
    head_dim_v: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
    """K, V and, for each sequence, the indices of its rows; adds cu_seqlens_k to the options."""
    if spec.layout_k == "dense":
        k, v = _storage(num_owners, spec.max_seqlen_k, spec, head_dim_v, dtype)
        return k, v, [(torch.full((end,), owner), torch.arange(end)) for end, owner in zip(ends, owners)]
    # With seqused_k a packed sequence has more room than it uses.
    slots = [end + (rng.randint(0, 4) if spec.seqused_k else 0) for end in ends]
    total = sum(slots) + (rng.randint(1, 5) if spec.padding else 0)
    k, v = _storage(1, total, spec, head_dim_v, dtype, packed=True)
    begins = _cumulative(slots)
    options["cu_seqlens_k"] = torch.tensor(begins, dtype=torch.int32, device=spec.device)
    options["max_seqlen_k"] = max(slots, default=0)
    return k[0], v[0], [(torch.arange(end) + begin,) for end, begin in zip(ends, begins)]
