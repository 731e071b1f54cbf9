"""Makes the tensors of the decode cases: input sets whose pages lie scattered over one pool, filled at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from broadhead_bench import timing
from broadhead_bench.cases import CascadeCase, DecodeCase
from broadhead_bench.inputs import E4M3_MAX, PagedInputs, normal

#: The sets of a case hold at least this many times the L2, so that no call finds its own keys there.
L2_MULTIPLE = 4
#: Enough for the smallest case.
MAX_INPUT_SETS = 64
#: Sets of more bytes than this share their pages, in another order: what the L2 keeps of them is next to nothing.
SHARED_POOL_BYTES = 4 << 30

#: Factors of e4m3 numbers: powers of two, so that bf16 holds the products exactly; normal data fit below 448 times.
Q_DESCALE, K_DESCALE, V_DESCALE = 2.0**-6, 2.0**-6, 2.0**-5

ROTARY_BASE = 10000.0


class Fp8PagedInputs(NamedTuple):
    """``paged`` has e4m3 caches and bf16 queries; ``q`` is the same queries in e4m3. The factors, fp32 ``(B, Hkv)``,
    are one number a tensor, as servers have it. ``wide`` has the same numbers in bf16."""

    paged: PagedInputs
    q: Tensor
    q_descale: Tensor
    k_descale: Tensor
    v_descale: Tensor
    wide: PagedInputs


class LatentInputs(NamedTuple):
    """A step of absorbed MLA in parts: q_rope ``(B, Sq, Hq, D - Dv)`` and q_latent ``(B, Sq, Hq, Dv)``; rope and latent
    are views of one cache ``(num_pages, page_size, 1, D)``, which begins with the latent columns. ``paged`` has q and
    the cache whole."""

    q_rope: Tensor
    q_latent: Tensor
    rope: Tensor
    latent: Tensor
    softmax_scale: float
    paged: PagedInputs

    @property
    def beside_qv(self) -> PagedInputs:
        """q, k and v of a call whose qv is q_latent."""
        return self.paged._replace(q=self.q_rope, k_cache=self.rope, v_cache=self.latent)


class CascadeInputs(NamedTuple):
    """A step over a shared prefix: prefix_page_table int32 ``(pages,)``; page_table int32 ``(B, pages)`` and
    cache_seqlens int32 ``(B,)`` are those of the suffixes. ``plain`` has the whole sequences."""

    prefix_page_table: Tensor
    page_table: Tensor
    cache_seqlens: Tensor
    plain: PagedInputs


class AppendInputs(NamedTuple):
    """A step whose last token is not in the cache yet: k and v ``(B, 1, Hkv, D)``; cos and sin bf16 ``(positions,
    D / 2)``, whose angles turn the two halves of a head; cache_seqlens int32 ``(B,)`` before the append. ``paged`` has
    queries that are not rotated and lengths after the append."""

    paged: PagedInputs
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    cache_seqlens: Tensor

    def appended(self) -> PagedInputs:
        """The step for a call that neither appends nor rotates: both are done here."""
        self._store(self._rotated(self.k), self.v)
        return self.paged._replace(q=self._rotated(self.paged.q))

    def poison(self) -> None:
        """NaN where the new token belongs, so that a call that does not store it shows."""
        self._store(torch.full_like(self.k, float("nan")), torch.full_like(self.v, float("nan")))

    def _store(self, k: Tensor, v: Tensor) -> None:
        rows = self.cache_seqlens.long()
        page_size = self.paged.k_cache.shape[1]
        pages = self.paged.page_table.gather(1, (rows // page_size)[:, None])[:, 0].long()
        self.paged.k_cache[pages, rows % page_size] = k[:, 0]
        self.paged.v_cache[pages, rows % page_size] = v[:, 0]

    def _rotated(self, x: Tensor) -> Tensor:
        position = self.cache_seqlens.long()
        cos, sin = (table[position].float()[:, None, None] for table in (self.cos, self.sin))
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def set_count(kv_bytes: int, device: torch.device) -> int:
    """How many input sets a case needs whose calls read ``kv_bytes``; on a CPU one."""
    if device.type != "cuda":
        return 1
    return max(2, min(MAX_INPUT_SETS, -(-L2_MULTIPLE * timing.l2_bytes(device) // kv_bytes)))


def decode_sets(case: DecodeCase, device: torch.device) -> list[PagedInputs]:
    """bf16 inputs, as many sets as the case needs. They share the caches, not the pages unless a set is very large."""
    count = set_count(case.kv_bytes, device)
    cache_seqlens = torch.tensor(case.seqlens, dtype=torch.int32, device=device)
    pages = -(-cache_seqlens // case.page_size)
    used = torch.arange(case.pages_per_sequence, device=device) < pages[:, None]
    total = sum(-(-length // case.page_size) for length in case.seqlens)
    shared = case.kv_bytes > SHARED_POOL_BYTES and case.area != "append"
    caches = _caches(total if shared else total * count, case, device)
    if shared:
        orders = [torch.randperm(total, device=device) for _ in range(count)]
    else:
        orders = list(torch.randperm(total * count, device=device).split(total))
    sets = []
    for order in orders:
        # Past the pages of a sequence stands a page that exists: some peers fetch ahead of what they need.
        page_table = torch.zeros_like(used, dtype=torch.int32)
        page_table[used] = order.to(torch.int32)
        sets.append(PagedInputs(_queries(case, device), *caches, page_table, cache_seqlens))
    return sets


def fp8_decode_sets(case: DecodeCase, device: torch.device) -> list[Fp8PagedInputs]:
    """The same in e4m3 and, of the same numbers, in bf16."""
    wide_sets = decode_sets(case, device)
    k_cache, v_cache = wide_sets[0].k_cache, wide_sets[0].v_cache
    k8, v8 = _to_e4m3(k_cache, K_DESCALE), _to_e4m3(v_cache, V_DESCALE)
    k_cache.copy_(k8).mul_(K_DESCALE)
    v_cache.copy_(v8).mul_(V_DESCALE)
    shape = (case.batch, case.num_heads_kv)
    q_descale, k_descale, v_descale = (
        torch.full(shape, factor, dtype=torch.float32, device=device) for factor in (Q_DESCALE, K_DESCALE, V_DESCALE)
    )
    sets = []
    for wide in wide_sets:
        q8 = _to_e4m3(wide.q, Q_DESCALE)
        wide = wide._replace(q=q8.to(torch.bfloat16) * Q_DESCALE)
        paged = wide._replace(k_cache=k8, v_cache=v8)
        sets.append(Fp8PagedInputs(paged, q8, q_descale, k_descale, v_descale, wide))
    return sets


def latent_sets(case: DecodeCase, device: torch.device) -> list[LatentInputs]:
    """bf16 inputs of absorbed MLA, as many sets as the case needs."""
    sets = []
    for paged in decode_sets(case, device):
        q_latent, q_rope = (part.contiguous() for part in paged.q.tensor_split([case.head_dim_v], dim=-1))
        latent, rope = paged.k_cache.tensor_split([case.head_dim_v], dim=-1)
        sets.append(LatentInputs(q_rope, q_latent, rope, latent, case.head_dim**-0.5, paged))
    return sets


def cascade_sets(case: CascadeCase, device: torch.device) -> list[CascadeInputs]:
    """bf16 inputs, as many sets as the case needs."""
    count = set_count(case.kv_bytes, device)
    prefix_pages, suffix_pages = case.prefix // case.page_size, -(-case.suffix // case.page_size)
    total = prefix_pages + case.batch * suffix_pages
    caches = _caches(total * count, case.plain, device)
    suffixes, wholes = (
        torch.full((case.batch,), tokens, dtype=torch.int32, device=device)
        for tokens in (case.suffix, case.prefix + case.suffix)
    )
    sets = []
    for order in torch.randperm(total * count, device=device).to(torch.int32).split(total):
        prefix, suffix = order[:prefix_pages].clone(), order[prefix_pages:].view(case.batch, -1).contiguous()
        page_table = torch.cat((prefix.expand(case.batch, -1), suffix), dim=1)
        plain = PagedInputs(_queries(case.plain, device), *caches, page_table, wholes)
        sets.append(CascadeInputs(prefix, suffix, suffixes, plain))
    return sets


def append_sets(case: DecodeCase, device: torch.device) -> list[AppendInputs]:
    """bf16 inputs, as many sets as the case needs; no two write to the same page."""
    positions = torch.arange(case.pages_per_sequence * case.page_size, device=device)
    speeds = ROTARY_BASE ** (-torch.arange(0, case.head_dim, 2, device=device) / case.head_dim)
    angles = positions[:, None] * speeds
    cos, sin = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
    shape = (case.batch, 1, case.num_heads_kv, case.head_dim)
    return [
        AppendInputs(
            paged, normal(*shape, device=device), normal(*shape, device=device), cos, sin, paged.cache_seqlens - 1
        )
        for paged in decode_sets(case, device)
    ]


def _queries(case: DecodeCase, device: torch.device) -> Tensor:
    return normal(case.batch, case.seqlen_q, case.num_heads_q, case.head_dim, device=device)


def _caches(pages: int, case: DecodeCase, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = (pages, case.page_size, case.num_heads_kv, case.head_dim)
    k_cache = normal(*shape, device=device)
    return k_cache, k_cache[..., : case.head_dim_v] if case.head_dim_v else normal(*shape, device=device)


def _to_e4m3(values: Tensor, descale: float) -> Tensor:
    return (values / descale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
