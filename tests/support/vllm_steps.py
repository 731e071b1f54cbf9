"""A step of vLLM as its model runner makes it: pages in its layouts, CommonAttentionMetadata; and the judge."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace
from typing import Any

import torch
from on_device import DEVICE
from oracle import Rule, attention
from tolerance import OUT_FACTOR, assert_close
from torch import Tensor

NAN = float("nan")
LAYER = "model.layers.0.self_attn.attn"


@dataclasses.dataclass(frozen=True)
class Step:
    """Tokens that a step computes of each request, and the tokens of each, those included; and a layer."""

    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    heads_q: int = 4
    heads_kv: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    fp8: bool = False
    window: int | None = None  # as vLLM counts it: the query itself, too
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None
    images: tuple[tuple[tuple[int, int], ...], ...] = ()  # of each request: first and last token
    clamped: bool = False  # images do not reach behind the window
    causal: bool | tuple[int, ...] = True
    common_prefix: int = 0
    padding: int = 0  # rows of q behind the tokens, as a CUDA graph has them
    padded_requests: int = 0  # requests without tokens behind the others, likewise
    heads_first: bool = False  # memory of the pages


class Run:
    """Inputs of a step, drawn afresh, in the layout of the vLLM that is installed."""

    def __init__(self, step: Step) -> None:
        self.step = step
        queries, lengths = step.seqlens_q, step.seqlens_k
        make: dict[str, Any] = {"device": DEVICE, "dtype": torch.float32}
        shape = (step.heads_kv, step.head_dim)
        self.q = [torch.randn(n, step.heads_q, step.head_dim, **make).to(step.dtype) for n in queries]
        self.k = [torch.randn(n, *shape, **make).to(step.dtype) for n in lengths]
        self.v = [torch.randn(n, *shape, **make).to(step.dtype) for n in lengths]
        shared = step.common_prefix
        for b in range(1, len(lengths)):
            self.k[b][:shared], self.v[b][:shared] = self.k[0][:shared], self.v[0][:shared]
        self.k_scale = torch.rand((), device=DEVICE) + 0.5
        self.v_scale = torch.rand((), device=DEVICE) + 0.5
        self.sinks = torch.randn(step.heads_q, **make).to(step.dtype) if step.sinks else None
        self.block_table, blocks = self._blocks()
        self.cache = self._fill(blocks)

    def _blocks(self) -> tuple[Tensor, int]:
        """Block ids ``(requests, max_blocks)``, scattered; entries that no request needs lead to a block of NaN."""
        step = self.step
        counts = [-(-n // step.block_size) for n in step.seqlens_k]
        shared = step.common_prefix // step.block_size
        ids = list(range(1, sum(counts) + 2))
        random.shuffle(ids)
        prefix = [ids.pop() for _ in range(shared)]
        rows = len(counts) + step.padded_requests
        table = torch.zeros(rows, max(counts) + 2, dtype=torch.int32)
        for b, count in enumerate(counts):
            own = [ids.pop() for _ in range(count - shared)]
            table[b, :count] = torch.tensor(prefix + own, dtype=torch.int32)
        return table.to(DEVICE), sum(counts) + 2

    def _fill(self, blocks: int) -> Tensor:
        """The cache with the keys of all requests in it, as vLLM allocates it: NaN elsewhere."""
        step = self.step
        cache, k_view, v_view = empty_cache(blocks, step)
        cache.fill_(NAN)
        for b, (k, v) in enumerate(zip(self.k, self.v)):
            position = torch.arange(len(k), device=DEVICE)
            block = self.block_table[b, position // step.block_size].long()
            if step.fp8:
                k, v = (k / self.k_scale).to(cache.dtype), (v / self.v_scale).to(cache.dtype)
                self.k[b] = (k.float() * self.k_scale).to(torch.float32)
                self.v[b] = (v.float() * self.v_scale).to(torch.float32)
            k_view[block, position % step.block_size] = k
            v_view[block, position % step.block_size] = v
        return cache.view(torch.uint8) if step.fp8 else cache

    def common(self) -> Any:
        """What vLLM's model runner hands to the builders."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        step = self.step
        offsets = [0]
        for n in (*step.seqlens_q, *[0] * step.padded_requests):
            offsets.append(offsets[-1] + n)
        lengths = [*step.seqlens_k, *[0] * step.padded_requests]
        start = torch.tensor(offsets, dtype=torch.int32)
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        tokens = offsets[-1] + step.padding
        causal: Any = step.causal
        if isinstance(causal, tuple):
            causal = torch.tensor([*causal, *[1] * step.padded_requests], dtype=torch.int32, device=DEVICE)
        return CommonAttentionMetadata(
            query_start_loc=start.to(DEVICE),
            query_start_loc_cpu=start,
            seq_lens=seq_lens.to(DEVICE),
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=len(lengths),
            num_actual_tokens=tokens,
            max_query_len=max(step.seqlens_q),
            max_seq_len=max(lengths),
            block_table_tensor=self.block_table,
            slot_mapping=torch.full((tokens,), -1, dtype=torch.int64, device=DEVICE),
            causal=causal,
            mm_req_doc_ranges={b: list(pairs) for b, pairs in enumerate(step.images)} if step.images else None,
        )

    def layer(self, impl: Any) -> Any:
        one = torch.ones((), device=DEVICE)
        return SimpleNamespace(
            impl=impl,
            _q_scale=one,
            _k_scale=self.k_scale if self.step.fp8 else one,
            _v_scale=self.v_scale if self.step.fp8 else one,
            mm_prefix_clamp_sliding_window=self.step.clamped,
        )

    def packed(self, tensors: list[Tensor]) -> Tensor:
        """The tokens of all requests, and rows of NaN behind them."""
        rows = torch.cat(tensors)
        return torch.cat((rows, rows.new_full((self.step.padding, *rows.shape[1:]), NAN)))

    def new_keys(self, tensors: list[Tensor]) -> Tensor:
        """Keys or values of the tokens of this step."""
        return self.packed([x[len(x) - n :].to(self.step.dtype) for x, n in zip(tensors, self.step.seqlens_q)])

    def judge(self, output: Tensor, what: str, *, encoder: bool = False) -> None:
        """Compare with the oracle in fp64, as far off as naive attention in the dtype of the model may be."""
        row = 0
        for b, q in enumerate(self.q):
            k, v, rule = self.k[b], self.v[b], self._rule(b, encoder)
            results = [
                attention(
                    q.to(dtype), k.to(dtype), v.to(dtype), rule,
                    sinks=None if self.sinks is None else self.sinks.to(dtype),
                )[0]
                for dtype in (torch.float64, self.step.dtype)
            ]  # fmt: skip
            actual = output[row : row + len(q)]
            assert_close("out", actual, *results, self.step.dtype, OUT_FACTOR, f"{what}, request {b}")
            row += len(q)
        assert torch.isnan(output[row:]).all(), f"{what}: rows of padding were written"

    def _rule(self, b: int, encoder: bool) -> Rule:
        step = self.step
        causal = step.causal if isinstance(step.causal, bool) else bool(step.causal[b])
        left = -1 if step.window is None else step.window - 1
        right = 0 if causal and not encoder else left
        ranges = None
        if step.images:
            n, end = step.seqlens_q[b], step.seqlens_k[b]
            ranges = tuple(
                next(((first, last + 1) for first, last in step.images[b] if first <= p <= last), (0, 0))
                for p in range(end - n, end)
            )
        scale = step.head_dim**-0.5 if step.scale is None else step.scale
        return Rule(scale, (left, right), softcap=step.softcap or 0.0, ranges=ranges, ranges_in_window=step.clamped)


def empty_cache(blocks: int, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """``(cache, k, v)``: what vLLM gives a layer, and its keys and values ``(blocks, block_size, Hkv, D)``."""
    from broadhead.integrations.vllm import BroadheadBackend

    dtype = torch.float8_e4m3fn if step.fp8 else step.dtype
    size, heads, columns = step.block_size, step.heads_kv, step.head_dim
    shape: tuple[int, ...] = (blocks, heads, size, 2 * columns)
    if hasattr(BroadheadBackend, "get_kv_cache_shape"):  # older versions ask the backend
        shape = BroadheadBackend.get_kv_cache_shape(blocks, size, heads, columns)
    if len(shape) == 5:  # vLLM 0.24: (blocks, 2, block_size, Hkv, D)
        order = (0, 1, 3, 2, 4) if step.heads_first else (0, 1, 2, 3, 4)
    else:
        order = (0, 1, 2, 3) if step.heads_first else (0, 2, 1, 3)
    memory = torch.empty([shape[i] for i in order], dtype=dtype, device=DEVICE)
    cache = memory.permute(order)  # these orders are their own inverses
    if len(shape) == 5:
        return cache, cache[:, 0], cache[:, 1]
    return cache, cache[..., :columns].transpose(1, 2), cache[..., columns:].transpose(1, 2)


def config_of(step: Step, layers: dict[str, Any]) -> Any:
    """As much of a VllmConfig as builders read."""
    return SimpleNamespace(
        model_config=SimpleNamespace(dtype=step.dtype, is_mm_prefix_lm=bool(step.images)),
        cache_config=SimpleNamespace(cache_dtype="fp8" if step.fp8 else "auto"),
        scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=256),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=8, static_forward_context=layers),
        parallel_config=SimpleNamespace(cp_kv_cache_interleave_size=1, decode_context_parallel_size=1),
        speculative_config=None,
    )


def make_impl(run: Run, **changes: Any) -> Any:
    """The attention of the layer, made as vLLM's Attention makes it."""
    from broadhead.integrations.vllm import BroadheadBackend

    step = run.step
    scale = step.head_dim**-0.5 if step.scale is None else step.scale
    cache = "fp8" if step.fp8 else "auto"
    options = {"attn_type": "decoder", "sinks": run.sinks, **changes}
    return BroadheadBackend.get_impl_cls()(
        step.heads_q, step.head_dim, scale, step.heads_kv, None, step.window, cache, step.softcap,
        options.pop("attn_type"), None, **options,
    )  # fmt: skip


def make_builder(run: Run, layer: Any) -> Any:
    """The builder of the group of the layer."""
    from broadhead.integrations.vllm import BroadheadBackend
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    step = run.step
    spec = FullAttentionSpec(
        block_size=step.block_size, num_kv_heads=step.heads_kv, head_size=step.head_dim,
        dtype=torch.uint8 if step.fp8 else step.dtype,
    )  # fmt: skip
    builder = BroadheadBackend.get_builder_cls()
    return builder(spec, [LAYER], config_of(step, {LAYER: layer}), DEVICE)


def execute(step: Step) -> tuple[Run, Any, Tensor]:
    """``(run, metadata, output)`` of a step: builder, then the attention of the layer."""
    run = Run(step)
    impl = make_impl(run)
    layer = run.layer(impl)
    metadata = make_builder(run, layer).build(step.common_prefix, run.common())
    q = run.packed(run.q)
    output = torch.full_like(q, NAN)
    result = impl.forward(layer, q, run.new_keys(run.k), run.new_keys(run.v), run.cache, metadata, output=output)
    assert result is output
    return run, metadata, output
