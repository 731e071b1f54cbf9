"""Full GPU set: how decode divides its work: lopsided batches, repeats, streams, metadata, batch invariance."""

from __future__ import annotations

import random
from collections.abc import Callable

import broadhead
import pytest
import torch
from broadhead import support
from calls import Call, build
from checks import check_call, check_equal
from decode_batch import DecodeBatch
from decode_lengths import PATTERNS, PLACES, lengths_of, place, sample_of
from gpu_calls import DECODE_ROWS, decode_call, expected_phase, row_call, row_id
from layouts import int32

pytestmark = [pytest.mark.gpu, pytest.mark.full, pytest.mark.usefixtures("first_rows")]

REPEATS = 500
BATCHES = (1, 3, 64, 992, 1000, 4097, 8192)
#: Head dims, heads and lengths of queries, in turn.
SHAPES = (
    {"head_dim": 64, "heads_q": 8, "heads_kv": 2},
    {"head_dim": 512, "heads_q": 4, "heads_kv": 1, "seqlen_q": 2},
    {"head_dim": 128, "heads_q": 16, "heads_kv": 1},
    {"head_dim": 256, "heads_q": 8, "heads_kv": 1, "seqlen_q": 4},
    {"head_dim": 192, "head_dim_v": 128, "heads_q": 4, "heads_kv": 4},
    {"head_dim": 96, "heads_q": 6, "heads_kv": 1, "seqlen_q": 3},
    {"head_dim": 320, "heads_q": 5, "heads_kv": 1},
)


def batch_of(lengths: list[int], device: torch.device, seqlen_q: int = 1, **options) -> DecodeBatch:
    """A paged decode step of those lengths."""
    defaults = {"page_size": 16, "causal": True, "out_layout": "guarded"}
    call = Call("kvcache", (seqlen_q,) * len(lengths), tuple(lengths), **{**defaults, **options})
    return DecodeBatch(call, device)


@pytest.fixture
def check_batch(row_ran: Callable, rng: random.Random) -> Callable[..., None]:
    """`check_batch(batch, **overrides)`: run, check all sequences, some by the judge, and which phase ran."""

    def check(batch: DecodeBatch, **overrides) -> None:
        out, lse = batch.run(**overrides)
        call = batch.call
        phase = expected_phase(call, planned=overrides.get("scheduler_metadata") is not None)
        row_ran(phase=phase, dtype=call.dtype, head_dim=call.head_dim, head_dim_v=call.dim_v)
        batch.check_all(out, lse)
        batch.check(sample_of(batch.cache_seqlens.tolist(), rng), out, lse)
        batch.check_surroundings(out)

    return check


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", BATCHES)
def test_batches(size: int, pattern: str, cuda: torch.device, rng: random.Random, check_batch: Callable) -> None:
    shape = SHAPES[(BATCHES.index(size) + list(PATTERNS).index(pattern)) % len(SHAPES)]
    batch = batch_of(lengths_of(pattern, size, rng), cuda, **shape)
    check_batch(batch)
    check_batch(batch, scheduler_metadata=batch.scheduler_metadata())
    batch.draw(batch.cache_seqlens.flip(0).minimum(batch.longest))
    check_batch(batch, num_splits=rng.choice((1, 7, 128)))


@pytest.mark.parametrize("options", [{"window": (100, 0)}, {"ragged_q": True}, {"page_size": 1}], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_batches_of_other_kinds(
    pattern: str, options: dict, cuda: torch.device, rng: random.Random, check_batch: Callable
) -> None:
    """Windows, whose keys begin late; packed q; pages of one key."""
    for shape in SHAPES[:4]:
        check_batch(batch_of(lengths_of(pattern, 200, rng), cuda, **{**shape, **options}))


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_splits": 5}, {"metadata": True}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape["head_dim"]))
def test_repeats_and_streams_agree(shape: dict, options: dict, cuda: torch.device, rng: random.Random) -> None:
    """Bit for bit, whatever ran before and beside, on whatever stream."""
    for size, pattern in ((3, "mixed"), (64, "one_huge"), (1000, "padding")):
        batch = batch_of(lengths_of(pattern, size, rng), cuda, **{**shape, **options})
        overrides = {"scheduler_metadata": batch.scheduler_metadata()} if batch.call.metadata else {}
        first = [x.clone() for x in batch.run(**overrides)]
        for x in first:
            assert not x.isnan().any()
        streams = [torch.cuda.current_stream(), *(torch.cuda.Stream() for _ in range(3))]
        noise = torch.randn(1024, 1024, device=cuda, dtype=torch.bfloat16)
        for stream in streams * 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                again = batch.run(**overrides)
            noise @ noise  # beside it, on another stream
            torch.cuda.current_stream().wait_stream(stream)
            for x, want in zip(again, first):
                check_equal(x, want)


@pytest.mark.parametrize("num_splits", [0, 1, 5])
@pytest.mark.parametrize("row", DECODE_ROWS, ids=row_id)
def test_many_repeats_agree(
    row: support.KernelRow, num_splits: int, only_row: Callable, cuda: torch.device, rng: random.Random
) -> None:
    """In whatever order the blocks finish: a race shows as another bit, sooner or later."""
    only_row(row)
    n = row.tile.tile_n
    lengths = {"seqlens_q": (2,) * 6, "seqlens_k": (40 * n + 3, 3000, 70, 0, 1, 2 * n), "num_splits": num_splits}
    built = build(row_call(row, "kvcache", **lengths, heads_q=16, heads_kv=2, page_size=16, causal=True), cuda, rng)
    first_out, first_lse = (x.clone() for x in check_call(built))
    differ = torch.zeros((), dtype=torch.int64, device=cuda)
    for _ in range(REPEATS):
        built.out.fill_(float("nan"))
        out, lse = built.run()
        differ += (out != first_out).any() | (lse != first_lse).any()
    assert int(differ) == 0, f"{int(differ)} of {REPEATS} runs differ: {built.call}"


def test_two_streams_at_once(cuda: torch.device, rng: random.Random) -> None:
    """Different calls share no scratch memory, however they overlap."""
    kinds = ((64, "one_huge", 0), (1000, "padding", 1), (3, "mixed", 2), (64, "mixed", 3))
    batches = [batch_of(lengths_of(pattern, size, rng), cuda, **SHAPES[i]) for size, pattern, i in kinds]
    expected = [[x.clone() for x in batch.run()] for batch in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    for _ in range(20):
        results = []
        for batch, stream in zip(batches, streams):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results.append(batch.run())
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        for result, want in zip(results, expected):
            for x, right in zip(result, want):
                check_equal(x, right)


# --- metadata ---------------------------------------------------------------------------------------------------------

FOREIGN = {
    "zeros": lambda x: x.zero_(),
    "ones": lambda x: x.fill_(1),
    "negative": lambda x: x.fill_(-1),
    "huge": lambda x: x.fill_(2**31 - 1),
    "random": lambda x: x.random_(-(2**31), 2**31 - 1),
    "shifted": lambda x: x.copy_(x.roll(1)),
    "stale": lambda x: x,
}


@pytest.mark.parametrize("content", FOREIGN)
@pytest.mark.parametrize("size, pattern", [(3, "mixed"), (64, "one_huge"), (1000, "padding")])
def test_metadata_can_not_matter(
    size: int, pattern: str, content: str, cuda: torch.device, rng: random.Random, check_batch: Callable
) -> None:
    """Made for other lengths, overwritten, or never filled: the result is right."""
    for i, num_splits in enumerate((0, 32)):
        shape = SHAPES[(list(FOREIGN).index(content) + i) % len(SHAPES)]
        batch = batch_of(lengths_of(pattern, size, rng), cuda, **shape, num_splits=num_splits)
        metadata = FOREIGN[content](batch.scheduler_metadata())
        lengths = [min(n, most) for n, most in zip(lengths_of("mixed", size, rng), batch.call.seqlens_k)]
        batch.draw(int32(lengths, cuda))
        check_batch(batch, scheduler_metadata=metadata)


# --- batch invariance -------------------------------------------------------------------------------------------------

INVARIANT = {
    "one_split": {"num_splits": 1},
    **{f"tokens_{tokens}": {"tokens_per_split": tokens} for tokens in (64, 256, 4096)},
}


@pytest.mark.parametrize("mode", INVARIANT)
@pytest.mark.parametrize("seqlen_q", [1, 4])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_batch_invariance(
    head_dim: int, seqlen_q: int, mode: str, cuda: torch.device, rng: random.Random, row_ran: Callable
) -> None:
    """A sequence gives the same bits alone and in any place of any batch, with metadata or without."""
    for length in (1, 65, 1000, 9000):
        options = {"heads_q": 4, "heads_kv": 2, "page_size": 16, "causal": True, **INVARIANT[mode]}
        call = Call("kvcache", (seqlen_q,), (length,), head_dim=head_dim, **options)
        alone = build(call, cuda, rng)
        out, lse = check_call(alone)
        row_ran(phase="decode", dtype=call.dtype, head_dim=head_dim)
        for name in PLACES:
            built, at = place(call.with_(metadata=name == "behind six"), name, alone, cuda, rng)
            result, result_lse = built.run()
            check_equal(result[at], out[0])
            check_equal(result_lse[at], lse[0])


@pytest.mark.parametrize("tokens", [64, 192, 4096])
@pytest.mark.parametrize("head_dim", [64, 320, 512])
def test_tokens_per_split(head_dim: int, tokens: int, run_call: Callable) -> None:
    """Right for every mask and layout: the cuts lie at multiples of the number of tokens, whatever is seen of them."""
    lengths = {"seqlens_k": (3 * tokens + 5, tokens, 0, tokens + 1), "tokens_per_split": tokens}
    run_call(decode_call(head_dim, **lengths))
    run_call(decode_call(head_dim, **lengths, page_size=0, sinks="fp32", leftpad=(5, 0, 0, 70), metadata=True))
    run_call(decode_call(head_dim, **lengths, seqlens_q=(3,) * 4, causal=True, window=(tokens, 0), page_size=1))
    run_call(decode_call(head_dim, **lengths, seqlens_q=(1, 2, 0, 8), ragged_q=True, tail=2, causal=True, softcap=9.0))


def test_functions_agree(cuda: torch.device, rng: random.Random) -> None:
    """tokens_per_split of each public function that takes it."""
    built = build(decode_call(128, seqlens_k=(1000, 64, 0, 129), ragged_q=True, tokens_per_split=64), cuda, rng)
    kw, (expected, expected_lse) = built.kwargs, built.run(out=None)
    common = {"q": kw["q"], "k": kw["k_cache"], "v": kw["v_cache"], "page_table": kw["page_table"]}
    common |= {name: kw[name] for name in ("cu_seqlens_q", "max_seqlen_q")} | {"seqused_k": kw["cache_seqlens"]}
    # Its num_splits is 1 by default, which cuts nothing.
    varlen = broadhead.flash_attn_varlen_func(**common, tokens_per_split=64, num_splits=0, return_attn_probs=True)
    for out, lse in (varlen, broadhead.mha_fwd(**common, tokens_per_split=64)):
        check_equal(out, expected)
        check_equal(lse, expected_lse)


@pytest.mark.parametrize("tokens", [1, 63, 96, -64, 2**40, 64.0, "64", (64,)], ids=str)
def test_wrong_tokens_per_split_are_told(tokens: object, cuda: torch.device, rng: random.Random) -> None:
    """Not a positive multiple of 64: every function names the argument, what came and what it takes."""
    built = build(decode_call(64), cuda, rng)
    told = "tokens_per_split"
    with pytest.raises(broadhead.BroadheadError, match=told) as raised:
        built.run(tokens_per_split=tokens)
    assert str(tokens) in str(raised.value) and "64" in str(raised.value)
    with pytest.raises(broadhead.BroadheadError, match=told):
        built.scheduler_metadata(tokens_per_split=tokens)
