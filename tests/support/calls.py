"""Describes one call of a public function by its logical sequences, lays it out as a client would, and judges it.

A `Call` says what is asked, lengths and all. `build` draws fresh sequences and scatters them into the layout of the
call: every slot, row and page that no sequence owns holds NaN, and so do keys that no query sees (freed pages); table
entries past the pages a sequence needs are garbage, and `out` and the gaps in it hold NaN. `judge` (judge.py) computes
the answer from the logical sequences alone: no mistake of layout can hide.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

import broadhead
import torch
from layouts import NAN, int32, place_keys, place_masks, place_output, place_queries
from masks import drawn
from oracle import Rule
from torch import Tensor

#: What the normalised form calls the arguments of flash_attn_with_kvcache.
NORMALISED = {
    "k_cache": "k",
    "v_cache": "v",
    "cache_seqlens": "seqused_k",
    "cache_leftpad": "leftpad_k",
    "cache_batch_idx": "kv_batch_idx",
}
#: Arguments that mha_fwd has and the reference does not.
NOT_OF_THE_REFERENCE = ("pack_gqa", "num_splits", "tokens_per_split", "sm_margin", "out")


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a public function: "func" (dense), "varlen", "kvcache" or "mha_fwd" (any mixture of layouts).

    Lengths are those of the live rows.
    """

    function: str
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    heads_q: int = 2
    heads_kv: int = 2
    head_dim: int = 64
    head_dim_v: int = 0  # 0: head_dim
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None  # of a cache that is not of the dtype of q
    causal: bool = False
    window: Any = (-1, -1)
    attention_chunk: int = 0
    softcap: float = 0.0
    softmax_scale: float | None = None
    sinks: str = ""  # "", "fp32", "q" (the dtype of q, of out where q is 8-bit)
    qv: bool = False
    # "", "each" (another factor for each sequence and KV head), "one" (expanded), "kv" (none for q); of q only where it
    # is 8-bit, but with "all"
    descale: str = ""
    prefix: tuple[int, ...] = ()
    # Masks as values, by sequence: a pattern of masks.py, or (begin, end) or a word of each query.
    ranges: str | tuple[tuple[tuple[int, int], ...], ...] = ""
    ranges_in_window: bool = False  # of no effect without ranges
    tree: str | tuple[tuple[int, ...], ...] = ""
    causal_each: tuple[bool, ...] = ()  # causality by sequence; then `causal` is False
    causal_dtype: torch.dtype = torch.bool  # of causal_each: or int32, where anything but 0 is true
    strided_masks: bool = False  # rows of ranges and words lie apart
    page_size: int = 0  # 0: not paged
    q_layout: str = "plain"  # "plain", "packed" (slice of q|k|v heads), "heads_first" (transposed), "gapped" (columns)
    # "plain", "rows" (K|V in a row), "interleaved" (vLLM), "heads_first", "gapped" (columns), "overlapping" (HF),
    # "followed" (by rows of NaN)
    k_layout: str = "plain"
    # "plain", "heads_first", "gapped" (columns and a head), "guarded" (gapped, and rows before and behind)
    out_layout: str = "plain"
    freed_entries: bool = False  # garbage in the page table also for pages whose keys no query sees
    ragged_q: bool = False  # kvcache or mha_fwd with cu_seqlens_q
    packed_k: bool = False  # mha_fwd with cu_seqlens_k
    slack_q: int = 0  # varlen or mha_fwd: dead rows after each sequence (seqused_q)
    slack_k: int = 0  # dead rows after each sequence (seqused_k)
    tail: int = 0  # packed q or keys: rows past cu_seqlens[-1]
    leftpad: tuple[int, ...] = ()
    batch_idx: bool = False
    num_new: tuple[int, ...] = ()  # kvcache: how many of seqlens_k the call appends
    num_splits: int | None = None
    tokens_per_split: int = 0
    sm_margin: int = 0
    metadata: bool = False
    pack_gqa: bool | None = None
    max_seqlen_slack: int = 0  # how much larger than needed the max_seqlen arguments are

    @property
    def batch(self) -> int:
        return len(self.seqlens_q)

    @property
    def dim_v(self) -> int:
        return self.head_dim_v or self.head_dim

    @property
    def normalized_window(self) -> tuple[int, int]:
        left, right = self.window if isinstance(self.window, (tuple, list)) else (self.window, self.window)
        left = -1 if left is None or left < 0 else left
        right = -1 if right is None or right < 0 else right
        return left, 0 if self.causal else right

    @property
    def scale(self) -> float:
        head_dim = self.head_dim + (self.dim_v if self.qv else 0)
        return head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype.itemsize == 1 else self.dtype

    @property
    def k_dtype(self) -> torch.dtype:
        """The dtype of k and v."""
        return self.kv_dtype or self.dtype

    @property
    def packed_rows(self) -> int:
        """Tokens times query heads of a KV head, of the sequence with the most tokens."""
        return max(self.seqlens_q, default=0) * (self.heads_q // self.heads_kv)

    @property
    def packs_queries(self) -> bool:
        return self.function == "varlen" or self.ragged_q

    @property
    def packs_keys(self) -> bool:
        return self.page_size == 0 and (self.function == "varlen" or self.packed_k)

    def rule(self, b: int) -> Rule:
        """What the oracle must know of sequence ``b``."""
        assert not any(x and isinstance(x, str) for x in (self.ranges, self.tree)), "patterns have no numbers yet"
        left, right = self.normalized_window
        return Rule(
            self.scale,
            (left, 0) if self.causal_each and self.causal_each[b] else (left, right),
            self.attention_chunk,
            self.prefix[b] if self.prefix else None,
            self.softcap,
            self.ranges[b] if self.ranges else None,
            self.ranges_in_window,
            self.tree[b] if self.tree else None,
        )

    def with_(self, **changes: Any) -> Call:
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass
class Built:
    """A call with its tensors: logical sequences, keyword arguments of the public function, where the live rows are."""

    call: Call
    q: list[Tensor]  # per sequence (sq, Hq, D)
    k: list[Tensor]  # per sequence (sk, Hkv, D)
    v: list[Tensor]
    sinks: Tensor | None
    kwargs: dict[str, Any]
    out: Tensor
    rows: list[Tensor]  # per sequence: indices of its live rows in out.flatten(0, -3)
    out_store: Tensor | None = None  # what out is a view of: NaN all around it
    qv: list[Tensor] | None = None  # per sequence (sq, Hq, Dv)
    descales: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # by argument, (batch, Hkv)
    slots: list[Tensor] = dataclasses.field(default_factory=list)  # per sequence: its keys' indices in k.flatten(0, -3)

    def run(self, **overrides: Any) -> tuple[Tensor, Tensor]:
        """Call the public function; ``(out, softmax_lse)``."""
        call, kwargs = self.call, {**self.kwargs, **overrides}
        if call.function == "mha_fwd":
            given = self.normalised() | {name: kwargs[name] for name in NOT_OF_THE_REFERENCE if name in kwargs}
            given |= {f"window_size_{side}": given.pop(f"window_{side}") for side in ("left", "right")}
            if call.causal_each:
                given["causal"] = given.pop("causal_by_sequence")
            return broadhead.mha_fwd(**{**given, **overrides})
        if call.metadata:
            kwargs.setdefault("scheduler_metadata", self.scheduler_metadata())
        if call.function == "kvcache":
            return broadhead.flash_attn_with_kvcache(**kwargs, return_softmax_lse=True)
        function = broadhead.flash_attn_func if call.function == "func" else broadhead.flash_attn_varlen_func
        return function(**kwargs, return_attn_probs=True)

    def normalised(self) -> dict[str, Any]:
        """The call as mha_fwd and the reference have it: keyword arguments of ``broadhead.reference.attention``."""
        call, kwargs = self.call, self.kwargs
        assert not call.num_new, "the reference does not append"
        left, right = call.normalized_window
        other = (*NOT_OF_THE_REFERENCE, "causal", "window_size")
        given = {NORMALISED.get(name, name): x for name, x in kwargs.items() if name not in other}
        max_seqlen_q = kwargs.get("max_seqlen_q")
        given |= {
            "softmax_scale": call.scale,
            "window_left": left,
            "window_right": right,
            "max_seqlen_q": kwargs["q"].shape[1] if max_seqlen_q is None else max_seqlen_q,
            "max_seqlen_k": self.max_seqlen_k(),
        }
        if call.causal_each:
            given["causal_by_sequence"] = kwargs["causal"]
        return given

    @property
    def differentiable(self) -> list[str]:
        """Names of the arguments that have a gradient."""
        return ["q", "k", "v", *(name for name in ("qv", "sinks") if getattr(self, name) is not None)]

    def logical(self, name: str) -> list[Tensor]:
        """A differentiable argument by its sequences; the sinks, which belong to all of them, as a list of one."""
        found = getattr(self, name)
        return [found] if name == "sinks" else found

    def requires_grad(self) -> dict[str, Tensor]:
        """Makes contiguous leaves of the differentiable arguments, in place in this call; returns them by name."""
        names = {NORMALISED.get(name, name): name for name in self.kwargs}
        leaves = {}
        for name in self.differentiable:
            leaves[name] = self.kwargs[names[name]].detach().clone(memory_format=torch.contiguous_format)
            self.kwargs[names[name]] = leaves[name].requires_grad_()
        return leaves

    def places(self, name: str) -> list[Tensor]:
        """Where the rows of each sequence lie in ``x.flatten(0, -3)`` of q, k, v or qv."""
        return self.slots if name in ("k", "v") else self.rows

    def scheduler_metadata(self, **overrides: Any) -> Tensor:
        call, kwargs = self.call, self.kwargs
        lengths = kwargs.get("cache_seqlens", kwargs.get("seqused_k"))
        max_q = kwargs["max_seqlen_q"] if kwargs.get("max_seqlen_q") is not None else max(call.seqlens_q)
        capacity = self.max_seqlen_k()
        arguments = {
            "qkv_dtype": call.dtype,
            "headdim_v": call.dim_v,
            "cu_seqlens_q": kwargs.get("cu_seqlens_q"),
            "cache_leftpad": kwargs.get("cache_leftpad"),
            "page_size": call.page_size or None,
            "max_seqlen_k_new": max(call.num_new, default=0),
            "causal": kwargs["causal"],
            "window_size": call.window,
            "attention_chunk": call.attention_chunk,
            "has_softcap": call.softcap > 0,
            "num_splits": call.num_splits or 0,
            "pack_gqa": call.pack_gqa,
            "has_qv": call.qv,
            **_launch_options(call),
            **overrides,
        }
        return broadhead.get_scheduler_metadata(
            call.batch, max_q, capacity, call.heads_q, call.heads_kv, call.head_dim, lengths, **arguments
        )

    def max_seqlen_k(self) -> int:
        """The length rule: what forward derives for this call."""
        if self.call.page_size:
            return self.kwargs["page_table"].shape[1] * self.call.page_size
        if self.call.packs_keys:
            return self.kwargs["max_seqlen_k"]
        return self.kwargs["k_cache" if self.call.function == "kvcache" else "k"].shape[1]

    def live_mask(self) -> Tensor:
        """``(rows of out,)``: which rows a sequence owns."""
        mask = torch.zeros(self.out.shape[:-2].numel(), dtype=torch.bool, device=self.out.device)
        for rows in self.rows:
            mask[rows] = True
        return mask

    def split(self, out: Tensor) -> list[Tensor]:
        """An output's live rows, per sequence ``(sq, Hq, Dv)``."""
        flat = out.reshape(-1, *out.shape[-2:])
        return [flat[rows] for rows in self.rows]

    def split_lse(self, lse: Tensor) -> list[Tensor]:
        """A softmax_lse's live rows, per sequence ``(Hq, sq)``."""
        flat = lse if lse.dim() == 2 else lse.transpose(0, 1).reshape(lse.shape[1], -1)
        return [flat[:, rows] for rows in self.rows]


def build(
    call: Call,
    device: torch.device,
    rng: random.Random | None = None,
    poison: bool = True,
    given: Mapping[int, tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Built:
    """Draw the sequences of ``call`` and lay them out. ``rng`` shuffles pages and makes numbers of the patterns of
    masks; torch's generator draws the values.

    ``given``: q, k and v of sequences, by index, that are not drawn.
    """
    rng = rng or random.Random(torch.initial_seed())
    call = drawn(call, rng)
    q = [draw(call.dtype, device, n, call.heads_q, call.head_dim) for n in call.seqlens_q]
    k = [draw(call.k_dtype, device, n, call.heads_kv, call.head_dim) for n in call.seqlens_k]
    v = [draw(call.k_dtype, device, n, call.heads_kv, call.dim_v) for n in call.seqlens_k]
    for b, sequence in (given or {}).items():
        assert tuple(map(len, sequence)) == (call.seqlens_q[b], call.seqlens_k[b], call.seqlens_k[b])
        q[b], k[b], v[b] = sequence
    sinks = None
    if call.sinks:
        sinks = torch.randn(call.heads_q, device=device) * 2
        sinks = sinks if call.sinks == "fp32" else sinks.to(call.out_dtype)

    kwargs: dict[str, Any] = {
        "causal": call.causal,
        "window_size": call.window,
        "attention_chunk": call.attention_chunk,
        "softcap": call.softcap,
        "softmax_scale": call.softmax_scale,
        "sinks": sinks,
        "pack_gqa": call.pack_gqa,
        **_launch_options(call),
    }
    if call.num_splits is not None:
        kwargs["num_splits"] = call.num_splits
    if call.prefix:
        kwargs["prefix_lens"] = int32(call.prefix, device)

    built = Built(call, q, k, v, sinks, kwargs, torch.empty(0), [], descales=_draw_descales(call, device))
    if call.qv:
        built.qv = [draw(call.dtype, device, n, call.heads_q, call.dim_v) for n in call.seqlens_q]
    kwargs |= built.descales
    place_queries(built, device)
    place_masks(built, device, rng)
    place_keys(built, device, rng)
    built.out, built.out_store = place_output(call, kwargs["q"].shape[:-2], NAN if poison else 0.0, device)
    kwargs["out"] = built.out
    return built


def draw(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    """Normal values."""
    return torch.randn(shape, dtype=torch.float32 if dtype.itemsize == 1 else dtype, device=device).to(dtype)


def _launch_options(call: Call) -> dict[str, int]:
    """What changes how a call is run and not what it gives, unless it is left at its default."""
    names = ("tokens_per_split", "sm_margin")
    return {name: getattr(call, name) for name in names if getattr(call, name)}


def _draw_descales(call: Call, device: torch.device) -> dict[str, Tensor]:
    """Factors in [0.5, 1.5) by argument."""
    if not call.descale:
        return {}
    shape = (call.batch, call.heads_kv)
    without_q = call.descale == "kv" or (call.dtype.itemsize > 1 and call.descale != "all")
    names = ("k", "v") if without_q else ("q", "k", "v")
    drawn = {f"{name}_descale": torch.rand(shape, device=device) + 0.5 for name in names}
    if call.descale == "one" and call.batch:
        drawn = {name: x[:1, :1].expand(shape) for name, x in drawn.items()}
    return drawn
