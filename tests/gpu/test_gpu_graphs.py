"""Full GPU set: CUDA graphs, streams, torch.compile, packed forms, strict refusals."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable

import broadhead
import pytest
import torch
from broadhead import support
from calls import Call, build
from checks import check_against, check_equal
from gpu_calls import PREFILL_ROWS, capture, decode_call, prefill_call, row_call, row_id, shortened

pytestmark = [pytest.mark.gpu, pytest.mark.full]


LENGTHS = ([1500, 700, 1, 1200], [16, 3, 0, 1500], [1, 700, 1, 64], [0, 0, 0, 0], [1500, 700, 1, 1200])


@pytest.mark.parametrize("head_dim", [128, 512])
def test_stale_metadata_replays_right(head_dim: int, cuda: torch.device, rng: random.Random) -> None:
    """An engine that forgets the refresh loses balance, not correctness."""
    call = decode_call(head_dim, seqlens_k=(1500, 700, 1, 1200), num_splits=16, causal=True)
    built = build(call, cuda, rng)
    metadata = built.scheduler_metadata()
    graph = capture(lambda: broadhead.flash_attn_with_kvcache(**built.kwargs, scheduler_metadata=metadata))
    for lengths in LENGTHS:
        lengths = [min(n, most) for n, most in zip(lengths, call.seqlens_k, strict=False)]
        built.kwargs["cache_seqlens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        built.out.fill_(float("nan"))
        graph.replay()
        check_against(shortened(built, lengths), built.out)


def test_metadata_and_attention_in_one_graph(cuda: torch.device, rng: random.Random) -> None:
    """get_scheduler_metadata(out=) allocates nothing, waits for nothing and is captured with the call."""
    call = decode_call(128, seqlens_k=(1500, 700, 1, 1200), num_splits=16, causal=True)
    built = build(call, cuda, rng)
    buffer = torch.zeros(17, dtype=torch.int32, device=cuda)

    def step() -> None:
        built.scheduler_metadata(out=buffer)
        broadhead.flash_attn_with_kvcache(**built.kwargs, scheduler_metadata=buffer)

    graph = capture(step)
    for lengths in LENGTHS:
        lengths = [min(n, most) for n, most in zip(lengths, call.seqlens_k, strict=False)]
        built.kwargs["cache_seqlens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        built.out.fill_(float("nan"))
        graph.replay()
        check_against(shortened(built, lengths), built.out)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    built.scheduler_metadata(out=buffer)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before, "metadata with out= allocated memory"


def test_append_in_a_graph(cuda: torch.device, rng: random.Random) -> None:
    """Hugging Face's step: the captured call appends where cache_seqlens points at replay."""
    call = decode_call(64, seqlens_k=(90, 17, 1, 64), num_new=(1, 1, 1, 1), causal=True, k_layout="overlapping")
    built = build(call, cuda, rng)
    kw = built.kwargs
    clean = {name: kw[name].clone() for name in ("k_cache", "v_cache")}
    graph = capture(lambda: broadhead.flash_attn_with_kvcache(**kw))
    for name, x in clean.items():
        kw[name].copy_(x)
    built.out.fill_(float("nan"))
    graph.replay()
    check_against(built, built.out)


@pytest.mark.parametrize("row", [row for row in PREFILL_ROWS if row.dtype != "fp16"], ids=row_id)
def test_prefill_in_a_graph(row: support.KernelRow, only_row: Callable, cuda: torch.device, rng: random.Random) -> None:
    """A captured prefill replays, for other lengths too: its scratch memory starts afresh each time."""
    only_row(row)
    most = (700, 300, 129, 600)
    call = row_call(row, "kvcache", (130,) * 4, most, heads_q=16, heads_kv=4, page_size=64, causal=True, num_splits=2)
    built = build(call, cuda, rng)
    graph = capture(lambda: broadhead.flash_attn_with_kvcache(**built.kwargs))
    assert broadhead.last_dispatch()[1] == row.id
    for lengths in (most, (1, 0, 129, 599), (0, 0, 0, 0), (130, 300, 64, 257), most, most):
        built.kwargs["cache_seqlens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        built.out.fill_(float("nan"))
        graph.replay()
        check_against(shortened(built, list(lengths)), built.out)


def test_no_host_sync(cuda: torch.device, rng: random.Random) -> None:
    """Neither the calls nor the metadata read anything back."""
    built = [build(call, cuda, rng) for call in (decode_call(64, metadata=True), prefill_call(64))]
    appended = build(decode_call(64, seqlens_k=(90, 17, 1, 64), num_new=(1,) * 4), cuda, rng)
    for b in (*built, appended):
        b.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for b in (*built, appended):
            b.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "calls",
    [
        (decode_call(128, seqlens_k=(2100, 64, 900, 500), num_splits=6), prefill_call(128, num_splits=3)),
        (prefill_call(128, heads_q=16), prefill_call(128, heads_q=32, causal=False)),
        (prefill_call(256, heads_q=16), prefill_call(256, heads_q=32)),
        (prefill_call(512, heads_q=16), prefill_call(512, heads_q=32)),
    ],
    ids=("decode_and_prefill", "128", "256", "512"),
)
def test_two_streams(calls: tuple[Call, Call], cuda: torch.device, rng: random.Random) -> None:
    """Calls on two streams at once do not share scratch memory."""
    both = [build(call, cuda, rng, poison=False) for call in calls]
    expected = [torch.cat(b.split(b.run()[0])).clone() for b in both]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in both]
    for _ in range(20):
        for b, stream in zip(both, streams, strict=False):
            b.out.zero_()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                b.run()
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        for b, want in zip(both, expected, strict=False):
            check_equal(torch.cat(b.split(b.out)), want)


def test_side_stream_is_used(cuda: torch.device, rng: random.Random) -> None:
    """The kernels run on the current stream: what that stream computed before is seen."""
    built = build(prefill_call(64), cuda, rng)
    q, source = built.kwargs["q"], built.kwargs["q"].clone()
    q.fill_(float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        q.copy_(source)
        out, lse = built.run()
    stream.synchronize()
    check_against(built, out, lse)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_compile_fullgraph(kind: str, backend: str, cuda: torch.device, rng: random.Random, row_ran: Callable) -> None:
    if backend == "inductor":
        pytest.importorskip("triton", reason="inductor generates Triton code for CUDA devices")
    built = build(decode_call(64, num_splits=2) if kind == "decode" else prefill_call(64), cuda, rng)
    kwargs = {name: x for name, x in built.kwargs.items() if name != "out"}

    def step(q: torch.Tensor) -> torch.Tensor:
        if kind == "decode":
            return broadhead.flash_attn_with_kvcache(**{**kwargs, "q": q * 1.0}) + 0.0
        return broadhead.flash_attn_varlen_func(**{**kwargs, "q": q * 1.0}) + 0.0

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = torch.compile(step, fullgraph=True, backend=backend)(built.kwargs["q"])
    row_ran(dtype=torch.bfloat16, head_dim=64)
    check_against(built, out)


def test_packed_forms_copy_nothing(cuda: torch.device, row_ran: Callable) -> None:
    qkv = torch.randn(2, 300, 3, 16, 128, dtype=torch.bfloat16, device=cuda)
    expected = broadhead.flash_attn_func(*qkv.unbind(2), causal=True)
    out = torch.empty_like(expected)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    broadhead.flash_attn_qkvpacked_func(qkv, causal=True)
    row_ran(phase="prefill", dtype=torch.bfloat16, head_dim=128)
    grown = torch.cuda.max_memory_allocated() - before
    lse = 2 * 16 * 300 * 4
    assert grown <= out.nbytes + lse + 4096, f"{grown} bytes for an out of {out.nbytes}: q, k or v was copied"
    check_equal(broadhead.flash_attn_qkvpacked_func(qkv, causal=True), expected)


# --- refusals on a device ---


def test_strict_refuses_instead_of_falling_back(cuda: torch.device) -> None:
    q = torch.randn(1, 4, 2, 64, device=cuda)  # fp32 has no kernel
    with pytest.raises(broadhead.UnsupportedError, match="fp32"):
        broadhead.flash_attn_func(q, q, q)
    half = q.bfloat16().requires_grad_()
    with pytest.raises(broadhead.UnsupportedError, match="grad"):
        broadhead.flash_attn_func(half, half, half, backend="cuda")


def test_fallback_warns_once(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BROADHEAD_STRICT")
    q = torch.randn(1, 4, 2, 520, device=cuda, dtype=torch.bfloat16)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        broadhead.flash_attn_func(q, q, q)
        broadhead.flash_attn_func(q, q, q)
    assert broadhead.last_dispatch()[0] == "torch"
    assert len([w for w in seen if issubclass(w.category, broadhead.FallbackWarning)]) == 1


def test_tensors_on_two_devices(cuda: torch.device) -> None:
    q = torch.randn(1, 4, 2, 64, device=cuda, dtype=torch.bfloat16)
    with pytest.raises(broadhead.InvalidArgumentError, match="device"):
        broadhead.flash_attn_func(q, q.cpu(), q)
    with pytest.raises(broadhead.InvalidArgumentError, match="device"):
        broadhead.flash_attn_with_kvcache(q, q, q, cache_seqlens=torch.tensor([4], dtype=torch.int32))
