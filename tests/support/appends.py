"""Random appends of new keys to a cache, and what the cache must hold afterwards, token by token."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from layouts import GARBAGE_PAGES
from torch import Tensor

CACHES = ("contiguous", "contiguous_batch_idx", "paged", "paged_batch_idx", "interleaved", "overlapping")
ROTARY = ("none", "interleaved", "halves", "partial", "partial_interleaved", "own_positions")
HEADS, HEAD_DIM, POSITIONS = 2, 32, 200


@dataclasses.dataclass
class Append:
    """One call's tensors. ``places[b][r]`` indexes row r of sequence b in the caches; None: there is no such place."""

    k_cache: Tensor
    v_cache: Tensor
    k_new: Tensor
    v_new: Tensor
    options: dict[str, Any]
    seqlens: list[int]
    num_new: list[int]
    first_new: list[int]  # where the new rows of a sequence begin in k_new.flatten(0, -3)
    places: list[list[tuple[int, int] | None]]
    block_step: int  # 2 where K's pages are every other one of the pool that V shares


def build(
    seed: int, cache: str, rotary: str, ragged: bool, dtype: torch.dtype = torch.float32, overflow: bool = False
) -> Append:
    """A random append. overflow: some rows land past the cache or on pages that were never allocated."""
    rng = random.Random(seed)
    step = 2 if cache == "overlapping" else 1
    batch, page_size = 4, rng.choice([1, 3, 16])
    paged = not cache.startswith("contiguous")
    same = rng.randint(1, 7)
    num_new = [rng.choice([0, 1, rng.randint(1, 9)]) for _ in range(batch)] if ragged else [same] * batch
    seqlens = [rng.randint(0, 30) for _ in range(batch)]
    capacity = max(n + new for n, new in zip(seqlens, num_new))
    capacity -= rng.randint(1, 5) if overflow and not paged else -2
    capacity = max(capacity, 1)
    options: dict[str, Any] = {"cache_seqlens": torch.tensor(seqlens, dtype=torch.int32)}

    num_owners = batch + 2 if cache.endswith("batch_idx") else batch
    owners = rng.sample(range(num_owners), batch)
    if cache.endswith("batch_idx"):
        options["cache_batch_idx"] = torch.tensor(owners, dtype=torch.int32)
    else:
        owners = list(range(batch))

    places: list[list[tuple[int, int] | None]] = []
    if paged:
        max_pages = -(-capacity // page_size) + 1
        num_pages = num_owners * max_pages
        free = [page * step for page in rng.sample(range(num_pages), num_pages)]
        table = [[rng.choice(GARBAGE_PAGES) for _ in range(max_pages)] for _ in range(num_owners)]
        for b, owner in enumerate(owners):
            needed = -(-(seqlens[b] + num_new[b]) // page_size)
            allocated = max(0, needed - rng.randint(0, 2)) if overflow else needed
            table[owner][:allocated] = [free.pop() for _ in range(allocated)]
            rows = range(max_pages * page_size)
            places.append(
                [(table[owner][r // page_size], r % page_size) if r // page_size < allocated else None for r in rows]
            )
        options["page_table"] = torch.tensor(table, dtype=torch.int32)
        shape = (num_pages * step, page_size, HEADS, HEAD_DIM)
    else:
        places = [[(owner, r) for r in range(capacity)] for owner in owners]
        shape = (num_owners, capacity, HEADS, HEAD_DIM)
    if cache == "interleaved":
        pool = torch.randn(shape[0], HEADS, shape[1], 2 * HEAD_DIM).to(dtype).transpose(1, 2)
        k_cache, v_cache = pool[..., :HEAD_DIM], pool[..., HEAD_DIM:]
    elif cache == "overlapping":
        pool = torch.randn(shape[0] + 1, *shape[1:]).to(dtype)
        k_cache, v_cache = pool[:-1], pool[1:]
    else:
        k_cache, v_cache = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)

    first_new = [sum(num_new[:b]) for b in range(batch)]
    if ragged:
        lead: tuple[int, ...] = (sum(num_new) + rng.randint(0, 3),)  # rows past the last sequence
        options["cu_seqlens_k_new"] = torch.tensor([*first_new, sum(num_new)], dtype=torch.int32)
    else:
        lead = (batch, same)
    k_new, v_new = torch.randn(*lead, HEADS, HEAD_DIM), torch.randn(*lead, HEADS, HEAD_DIM)
    if ragged:
        k_new[sum(num_new) :], v_new[sum(num_new) :] = float("nan"), float("nan")
    if rotary != "none":
        columns = HEAD_DIM // 4 if rotary.startswith("partial") else HEAD_DIM // 2
        angle = torch.rand(POSITIONS, columns) * 6.28
        options |= {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()}
        options["rotary_interleaved"] = "interleaved" in rotary
        if rotary == "own_positions":
            options["rotary_seqlens"] = torch.tensor([rng.randint(0, 99) for _ in range(batch)], dtype=torch.int32)
    return Append(k_cache, v_cache, k_new, v_new, options, seqlens, num_new, first_new, places, step)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """One token ``(H, D)`` by the angles of its position, pair by pair."""
    x = x.double().clone()
    source, half = x.clone(), len(cos)
    for pair in range(half):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        c, s = cos[pair].double(), sin[pair].double()
        x[:, a] = source[:, a] * c - source[:, b] * s
        x[:, b] = source[:, b] * c + source[:, a] * s
    return x


def rotate_fp32(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """rotate, each operation rounded to fp32."""
    source, half = x.clone(), len(cos)
    for pair in range(half):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        x[:, a] = source[:, a] * cos[pair] - source[:, b] * sin[pair]
        x[:, b] = source[:, b] * cos[pair] + source[:, a] * sin[pair]
    return x


def e4m3(x: Tensor) -> Tensor:
    """Rounded to float8_e4m3fn by arithmetic alone: three bits of mantissa, steps of 2^-9 at least, 448 at most."""
    x = x.double().clamp(-448, 448)
    exponent = torch.frexp(x).exponent.clamp(min=-5)
    step = torch.ldexp(torch.ones_like(x), exponent - 4)
    return torch.round(x / step) * step


def expected_caches(call: Append) -> tuple[Tensor, Tensor, Tensor]:
    """K and V after the append in fp64, and which ``(block, slot)`` were written."""
    k, v = call.k_cache.double(), call.v_cache.double()
    written = torch.zeros(k.shape[:2], dtype=torch.bool)
    options = call.options
    for b, length in enumerate(call.seqlens):
        for i in range(call.num_new[b]):
            row = length + i
            place = call.places[b][row] if row < len(call.places[b]) else None
            if place is None:
                continue
            k_token = call.k_new.flatten(0, -3)[call.first_new[b] + i]
            if "rotary_cos" in options:
                position = (int(options["rotary_seqlens"][b]) if "rotary_seqlens" in options else length) + i
                cos, sin = options["rotary_cos"][position], options["rotary_sin"][position]
                k_token = rotate(k_token, cos, sin, options["rotary_interleaved"])
            k[place], v[place] = k_token.double(), call.v_new.flatten(0, -3)[call.first_new[b] + i].double()
            written[place] = True
    return k, v, written
