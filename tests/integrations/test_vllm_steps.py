"""Steps of vLLM through the builder and the attention of its backend, by vLLM's own classes, against fp64."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace
from typing import Any

import broadhead
import pytest
import torch
from clients import client
from torch.utils._python_dispatch import TorchDispatchMode
from vllm_compiled import leave_out_compiled

client("vllm")
leave_out_compiled()
client("vllm", "vllm.v1.attention.backends.flash_attn")

from broadhead.integrations.vllm.metadata import FEWEST_DECODES, BroadheadMetadataBuilder  # noqa: E402
from broadhead.integrations.vllm.policy import is_fp8  # noqa: E402
from broadhead.plan import dispatch  # noqa: E402
from on_device import DEVICE  # noqa: E402
from oracle import Rule, attention  # noqa: E402
from tolerance import OUT_FACTOR, assert_close  # noqa: E402
from vllm.config import CUDAGraphMode  # noqa: E402
from vllm.v1.attention.backend import AttentionType  # noqa: E402
from vllm_steps import NAN, Run, Step, execute, make_builder, make_impl  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::broadhead.FallbackWarning")


def lengths(kind: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ragged ``(seqlens_q, seqlens_k)`` of a batch of a kind."""
    draw = random.randint
    if kind == "prefill":
        q = tuple(draw(1, 70) for _ in range(3))
        return q, q
    if kind == "chunked prefill":
        q = (draw(17, 40), draw(2, 30))
        return q, tuple(n + draw(1, 90) for n in q)
    if kind == "decode":
        return (1, 1, 1, 1), tuple(draw(1, 150) for _ in range(4))
    assert kind == "mixed"
    first = draw(20, 60)
    return (first, 1, 5, 1), (first, draw(2, 120), 5 + draw(1, 60), draw(2, 120))


KINDS = ("prefill", "chunked prefill", "decode", "mixed")
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp16": {"dtype": torch.float16},
    "one KV head": {"heads_q": 8, "heads_kv": 1, "heads_first": True},
    "head_dim 256, window, scale 1": {"head_dim": 256, "window": 24, "scale": 1.0, "block_size": 32},
    "head_dim 512": {"head_dim": 512, "heads_q": 4, "heads_kv": 1, "block_size": 64},
    "sinks and window": {"sinks": True, "window": 16},
    "softcap": {"softcap": 5.0, "heads_first": True},
    "fp8": {"fp8": True},
    "fp8, head_dim 512, sinks": {"fp8": True, "head_dim": 512, "sinks": True, "heads_first": True},
    "padding of a graph": {"padding": 3, "padded_requests": 2},
}


@pytest.mark.attends("forward")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_steps(layer: str, kind: str) -> None:
    step = Step(*lengths(kind), **LAYERS[layer])
    run, _, output = execute(step)
    run.judge(output, f"{layer}, {kind}")


@pytest.mark.attends("forward")
@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("fp8", [False, True])
def test_images(fp8: bool, window: int | None, clamped: bool) -> None:
    """A whole prompt, a chunk that begins inside an image, an image that is not all there yet, and a decode step."""
    images = (((3, 14), (20, 41)), ((5, 30),), ((30, 60),), ((2, 9),))
    step = Step((50, 20, 40, 1), (50, 33, 45, 77), window=window, images=images, clamped=clamped, fp8=fp8, padding=2)
    run, metadata, output = execute(step)
    assert metadata.mm_prefix_query_range_tensor.shape == (113, 2)
    run.judge(output, "images")


@pytest.mark.attends("forward")
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("window", [None, 20])
def test_decodes_in_front_of_prompts_run_apart(fp8: bool, window: int | None) -> None:
    """In a call of their own, be there images or not; fewer, or those behind a prompt, run with the prompts."""
    prompts = (30, 5)
    keys = tuple(random.randint(20, 90) for _ in range(FEWEST_DECODES))
    alone = (1,) * FEWEST_DECODES
    for images in ((), (((3, 14),),) * FEWEST_DECODES + (((5, 25),), ())):
        options: dict[str, Any] = {"window": window, "images": images, "fp8": fp8, "sinks": True, "padding": 2}
        run, metadata, output = execute(Step(alone + prompts, keys + (30, 40), **options))
        assert metadata.decodes == FEWEST_DECODES
        run.judge(output, "decodes in front of prompts")
        run, metadata, output = execute(Step(alone[1:] + prompts, keys[1:] + (30, 40), window=window, fp8=fp8))
        assert metadata.decodes == 0
        run.judge(output, "few decodes")
    inside = (((3, 14),),) + ((),) * (FEWEST_DECODES + 1)
    run, metadata, output = execute(Step(alone + prompts, (9, *keys[1:], 30, 40), window=window, images=inside))
    assert metadata.decodes == 0
    run.judge(output, "a decode inside an image")


def test_steps_of_graphs_that_hold_prompts_are_not_divided() -> None:
    """Another step than the one that was captured has other requests in front."""
    alone = (1,) * FEWEST_DECODES
    run = Run(Step((*alone, 9), (*alone, 9)))
    builder = make_builder(run, run.layer(make_impl(run)))
    for mode in CUDAGraphMode:
        builder._compilation = SimpleNamespace(cudagraph_mode=mode)
        assert builder.build(0, run.common()).decodes == (0 if mode == CUDAGraphMode.FULL else FEWEST_DECODES)


@pytest.mark.parametrize("drafts", [0, 3])
def test_requests_with_drafts_come_in_front_as_other_backends_want_them(drafts: int) -> None:
    """vLLM takes the least threshold of all backends of a model; those that keep states need drafts in front."""
    run = Run(Step((1,), (9,)))
    layer = run.layer(make_impl(run))
    config = make_builder(run, layer).vllm_config
    config.speculative_config = SimpleNamespace(num_speculative_tokens=drafts, parallel_drafting=False)
    spec = make_builder(run, layer).kv_cache_spec
    assert BroadheadMetadataBuilder(spec, ["layer"], config, DEVICE).reorder_batch_threshold == 1 + drafts


@pytest.mark.attends("forward")
def test_models_clear_the_ranges_by_either_name() -> None:
    step = Step((30,), (30,), images=(((4, 20),),))
    for name in ("mm_prefix_range_tensor", "mm_prefix_query_range_tensor"):
        _, metadata, _ = execute(step)
        assert getattr(metadata, name) is not None
        setattr(metadata, name, None)
        assert metadata.mm_prefix_query_range_tensor is None


@pytest.mark.attends("forward")
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("causal", [False, (1, 0, 1)])
def test_batches_that_are_not_causal(causal: Any, window: int | None) -> None:
    step = Step((20, 30, 1), (50, 30, 44), causal=causal, window=window)
    run, _, output = execute(step)
    run.judge(output, f"causal {causal}")


@pytest.mark.attends("forward")
@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_cascade(kind: str) -> None:
    prefix = 48
    seqlens_q, seqlens_k = lengths(kind)
    own = tuple(max(n, m) for n, m in zip(seqlens_q, seqlens_k))
    step = Step(seqlens_q, tuple(prefix + n for n in own), common_prefix=prefix, sinks=kind == "mixed")
    run, metadata, output = execute(step)
    assert metadata.use_cascade
    run.judge(output, "cascade")


@pytest.mark.attends("forward")
@pytest.mark.parametrize("window", [None, 9])
def test_encoder(window: int | None) -> None:
    seqlens, _ = lengths("prefill")
    run = Run(Step(seqlens, seqlens, window=window))
    impl = make_impl(run, attn_type=AttentionType.ENCODER_ONLY)
    layer = run.layer(impl)
    metadata = make_builder(run, layer).build(0, run.common())
    q = run.packed(run.q)
    output = torch.full_like(q, NAN)
    impl.forward(layer, q, run.packed(run.k), run.packed(run.v), torch.empty(0), metadata, output=output)
    run.step = dataclasses.replace(run.step, causal=False)
    run.judge(output, "encoder", encoder=True)


class Operators(TorchDispatchMode):
    """Notes the operators that run; views launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.attends("forward")
def test_a_decode_step_prepares_nothing() -> None:
    """Its builder launches nothing, and the kernel that runs it divides the keys by itself: it is one of decode."""
    run = Run(Step((1, 1, 1), (40, 3, 90)))
    impl = make_impl(run)
    layer, common = run.layer(impl), run.common()
    builder = make_builder(run, layer)
    with Operators() as ran:
        step = builder.build(0, common)
        again = builder.update_block_table(step, common.block_table_tensor, common.slot_mapping)
    assert not ran.seen and again.seq_lens is step.seq_lens
    q = run.packed(run.q)
    impl.forward(layer, q, None, None, run.cache, step, output=torch.empty_like(q))
    if DEVICE.type == "cuda":
        rows = {row.id: row for row in dispatch.ROWS}
        assert rows[str(broadhead.last_dispatch()[1])].phase == "decode"


@pytest.mark.attends()
def test_profiling_gives_zeros() -> None:
    run = Run(Step((4,), (4,)))
    impl = make_impl(run)
    output = torch.full_like(run.packed(run.q), NAN)
    impl.forward(run.layer(impl), run.q[0], None, None, run.cache, None, output=output)
    assert torch.equal(output, torch.zeros_like(output))


class Ranks:
    """Both ranks of decode context parallelism in one process: what vLLM's group and its merge of LSEs give."""

    world_size = 2

    def __init__(self, other_query: torch.Tensor, partials: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.other_query = other_query
        self.partials = partials

    def all_gather(self, query: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat((query, self.other_query), dim=dim)

    def combine(self, out: torch.Tensor, lse: torch.Tensor, group: Any, return_lse: bool) -> Any:
        """Merge with the other rank's part; keep the heads of this rank."""
        assert group is self and return_lse
        other, other_lse = self.partials
        heads = out.shape[1] // 2
        both = torch.stack((lse.double(), other_lse.T.double()))
        total = both.logsumexp(0)
        weights = (both - total).exp().nan_to_num(0.0)[..., None]
        merged = weights[0] * out.double() + weights[1] * other.double()
        return merged[:, :heads].to(out.dtype), total[:, :heads].float().contiguous()


@pytest.mark.attends("forward")
def test_decode_context_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of a rank has every other token of the context. Ranks share the KV head and have other query heads."""
    from vllm.v1.attention.backends import flash_attn

    q_lens, context = (3, 1), (41, 60)
    local = tuple(-(-n // 2) for n in context)
    run = Run(Step(q_lens, local, heads_q=2, heads_kv=1))  # the cache of this rank: context only
    others = Run(Step(q_lens, tuple(n // 2 for n in context), heads_q=2, heads_kv=1))
    new = Run(Step(q_lens, q_lens, heads_q=2, heads_kv=1))
    scale = run.step.head_dim**-0.5
    parts = []
    for b in range(2):  # what the other rank finds for the heads of both
        heads = torch.cat((run.q[b], others.q[b]), dim=1).double()
        k, v = (x[b].double() for x in (others.k, others.v))
        parts.append(attention(heads, k, v, Rule(scale)))
    ranks = Ranks(others.packed(others.q), (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts], dim=1)))
    monkeypatch.setattr(flash_attn, "get_dcp_group", lambda: ranks)
    impl = make_impl(run)
    impl.dcp_world_size, impl.dcp_combine = 2, ranks.combine
    layer = run.layer(impl)
    metadata = make_builder(run, layer).build(0, run.common())
    metadata.dcp_context_kv_lens = metadata.seq_lens
    q = run.packed(run.q)
    output = torch.full_like(q, NAN)
    impl.forward(layer, q, new.packed(new.k), new.packed(new.v), run.cache, metadata, output=output)
    row = 0
    for b, n in enumerate(q_lens):
        results = []
        for dtype in (torch.float64, run.step.dtype):
            k = torch.cat((run.k[b], others.k[b], new.k[b])).to(dtype)
            v = torch.cat((run.v[b], others.v[b], new.v[b])).to(dtype)
            results.append(attention(run.q[b].to(dtype), k, v, Rule(scale, (-1, 0)))[0])
        assert_close("out", output[row : row + n], *results, run.step.dtype, OUT_FACTOR, f"request {b}")
        row += n


def test_refusals_name_the_argument() -> None:
    run = Run(Step((2,), (2,)))
    impl = make_impl(run)
    with pytest.raises(broadhead.UnsupportedError, match="alibi_slopes must be None"):
        type(impl)(4, 64, 1.0, 2, [0.5] * 4)
    with pytest.raises(broadhead.InvalidArgumentError, match=r"sinks must have shape \(4,\)"):
        type(impl)(4, 64, 1.0, 2, sinks=torch.zeros(3))
    output = torch.empty_like(run.q[0])
    metadata = make_builder(run, run.layer(impl)).build(0, run.common())
    with pytest.raises(broadhead.UnsupportedError, match="output_scale"):
        impl.forward(None, run.q[0], None, None, run.cache, metadata, output=output, output_scale=torch.ones(1))
    with pytest.raises(broadhead.UnsupportedError, match="kv_cache must have shape"):
        impl.forward(
            SimpleNamespace(), run.q[0], None, None, run.cache.flatten(0, 1).unsqueeze(0)[0], metadata, output=output
        )
    assert not is_fp8("auto")
