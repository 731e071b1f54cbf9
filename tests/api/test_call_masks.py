"""Masks that are values through every public function: results, gradients, what is equal to what, and refusals."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import broadhead
import pytest
import torch
from broadhead import InvalidArgumentError, InvalidTypeError, UnsupportedError
from calls import Built, Call, build
from checks import check_against, check_call, check_gradients, random_gradients
from layouts import int32
from masks import RANGES, TREES
from random_calls import random_call

CPU = torch.device("cpu")

#: Of four sequences, or of as many as their lengths are.
FORMS = {
    "func": Call("func", (23,) * 4, (70,) * 4, heads_q=4),
    "func_square": Call("func", (37,) * 4, (37,) * 4, heads_q=4, q_layout="packed", k_layout="rows"),
    "varlen": Call("varlen", (23, 0, 40, 1), (90, 7, 40, 130), heads_q=4, slack_q=3, slack_k=2, tail=4),
    "varlen_paged": Call("varlen", (23, 0, 40, 1), (90, 7, 40, 130), page_size=4, tail=2, slack_k=9),
    "cache": Call("kvcache", (9,) * 4, (90, 9, 0, 130), slack_k=4, heads_q=4),
    "cache_idx_leftpad": Call("kvcache", (9,) * 4, (90, 9, 40, 130), batch_idx=True, leftpad=(3, 0, 40, 1)),
    "paged_1": Call("kvcache", (1,) * 4, (90, 1, 0, 130), page_size=1, slack_k=3),
    "paged_vllm": Call("kvcache", (3,) * 4, (90, 9, 3, 130), page_size=16, k_layout="interleaved", freed_entries=True),
    "paged_leftpad": Call("kvcache", (3,) * 4, (90, 9, 3, 70), page_size=4, leftpad=(5, 2, 0, 70), batch_idx=True),
    "ragged": Call("kvcache", (23, 0, 40, 1), (90, 7, 40, 130), page_size=8, ragged_q=True, tail=2),
    "append": Call("kvcache", (3,) * 4, (90, 9, 3, 130), num_new=(3,) * 4, slack_k=2),
    "append_ragged": Call("kvcache", (3, 0, 1, 9), (90, 4, 1, 130), num_new=(3, 0, 1, 9), page_size=4, ragged_q=True),
    "metadata": Call("kvcache", (3,) * 4, (90, 9, 3, 130), page_size=16, metadata=True, num_splits=3),
    "mha_fwd": Call("mha_fwd", (23, 5, 0, 23), (90, 7, 40, 130), slack_k=3, heads_q=4),
    "mha_fwd_mixed": Call("mha_fwd", (23, 5, 0, 1), (90, 7, 40, 130), ragged_q=True, page_size=16, slack_q=2),
    "qv": Call(
        "varlen", (23, 0, 40, 1), (90, 7, 40, 130), heads_q=4, qv=True, head_dim=16, head_dim_v=32, page_size=16
    ),
    "e4m3_cache": Call("kvcache", (2,) * 4, (90, 9, 3, 130), page_size=16, kv_dtype=torch.float8_e4m3fn, descale="kv"),
}
EACH = (True, False, True, False)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small calls by the hundred: threads cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MASKS: dict[str, dict[str, Any]] = {
    **{f"ranges_{name}": {"causal": True, "window": (12, 0), "ranges": name} for name in RANGES},
    "ranges_causal": {"causal": True, "ranges": "images"},
    "ranges_in_window": {"causal": True, "window": (12, 0), "ranges": "random", "ranges_in_window": True},
    "ranges_both_sides": {"window": (9, 3), "ranges": "pages", "ranges_in_window": True, "strided_masks": True},
    "ranges_chunk": {"causal": True, "attention_chunk": 11, "ranges": "random"},
    "ranges_prefix": {"causal": True, "window": (3, 0), "ranges": "single", "prefix": (20, 0, 3, 500)},
    "ranges_scores": {"causal": True, "window": (3, 0), "ranges": "random", "softcap": 4.0, "sinks": "fp32"},
    "causal_each": {"causal_each": EACH},
    "causal_each_int32": {"causal_each": EACH, "causal_dtype": torch.int32, "window": (9, 4)},
    "causal_each_prefix": {"causal_each": EACH, "prefix": (20, 0, 3, 500)},
    "causal_each_chunk": {"causal_each": (False, True, True, False), "attention_chunk": 13, "sinks": "q"},
    "causal_each_ranges": {"causal_each": EACH, "window": (6, -1), "ranges": "random", "ranges_in_window": True},
    **{f"tree_{name}": {"causal": True, "tree": name} for name in TREES},
    "tree_window": {"causal": True, "window": (70, 0), "tree": "words", "strided_masks": True},
    "tree_full": {"tree": "eagle", "softcap": 4.0, "sinks": "fp32"},
    "tree_causal_each": {"causal_each": (False, True, True, False), "window": (66, -1), "tree": "words"},
}


def masked(form: str, mask: str, **options: Any) -> Call:
    return FORMS[form].with_(**MASKS[mask], **options)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_every_function(form: str, mask: str, rng: random.Random) -> None:
    dtype = torch.bfloat16 if FORMS[form].kv_dtype else torch.float32
    check_call(build(masked(form, mask, dtype=dtype, heads_kv=1 if FORMS[form].heads_q == 4 else 2), CPU, rng))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("form", ["func", "varlen", "paged_vllm"])
def test_dtypes(form: str, dtype: torch.dtype, rng: random.Random) -> None:
    descale = "each" if dtype.itemsize == 1 else ""
    for mask in ("ranges_random", "ranges_in_window", "causal_each_ranges", "tree_words"):
        check_call(build(masked(form, mask, dtype=dtype, descale=descale), CPU, rng))


def test_metadata_knows_of_no_values(rng: random.Random) -> None:
    """Plans made without the masks serve calls that have them; a causal tensor plans as a call that is not causal."""
    for name, pattern in (("causal_each", EACH), ("ranges", "random"), ("tree", "words")):
        built = build(FORMS["metadata"].with_(**{name: pattern}, dtype=torch.float32), CPU, rng)
        for planned in (False, built.kwargs["causal"]):
            check_call(built, scheduler_metadata=built.scheduler_metadata(causal=planned))
            built.out.fill_(float("nan"))
    each = build(FORMS["metadata"].with_(causal_each=EACH, dtype=torch.float32), CPU, rng)
    with pytest.raises(InvalidArgumentError, match=r"scheduler_metadata.*causal"):
        each.run(scheduler_metadata=each.scheduler_metadata(causal=True))


# --- gradients --------------------------------------------------------------------------------------------------------

TRAINED = [name for name, options in MASKS.items() if "tree" not in options]
TRAINED_FORMS = ("func", "varlen", "cache", "ragged", "mha_fwd_mixed", "qv")


def gradients(built: Built) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
    """Of a random loss over out and softmax_lse; NaN comes in at the rows that no sequence owns."""
    leaves = built.requires_grad()
    built.kwargs.pop("out", None)
    out, lse = built.run()
    found, grad_out, grad_lse = random_gradients(built, leaves, out, lse)
    check_gradients(built, found, grad_out, grad_lse)
    return found, (out.detach(), lse.detach(), grad_out, grad_lse)


@pytest.mark.parametrize("mask", TRAINED)
@pytest.mark.parametrize("form", TRAINED_FORMS)
def test_gradients(form: str, mask: str, rng: random.Random) -> None:
    gradients(build(masked(form, mask, dtype=torch.float32, freed_entries=False, metadata=False), CPU, rng))


@pytest.mark.parametrize("chunk", range(3))
def test_gradients_of_random_calls(chunk: int, seed: int) -> None:
    """Every call that has a gradient, with ranges or causality by sequence in most of them."""
    ran = 0
    for number in range(400):
        rng = random.Random(seed + number)
        dtype = rng.choice((torch.float32, torch.float64, torch.bfloat16))
        call = random_call(rng, (dtype,), rng.choice((6, 40)), (8, 16, 40), qv=0.2, values=("ranges", "causal_each"))
        if call.num_new or call.metadata or not (call.ranges or call.causal_each):
            continue
        torch.manual_seed(seed + number)
        try:
            gradients(build(call.with_(num_splits=None, tokens_per_split=0), CPU, rng))
        except Exception as error:
            raise AssertionError(f"case {number} (seed {seed + number}): {call}") from error
        ran += 1
        if ran == 12:
            return
    pytest.fail(f"only {ran} calls were drawn")


@pytest.mark.parametrize("mask", ["ranges_random", "ranges_in_window", "causal_each_int32", "causal_each_ranges"])
@pytest.mark.parametrize("form", ["func", "varlen"])
def test_mha_bwd(form: str, mask: str, rng: random.Random) -> None:
    """The gradients of autograd, from an output that is given and from one that it computes."""
    call = masked(form, mask, dtype=torch.float32)
    built = build(call, CPU, rng)
    expected, (out, lse, grad_out, grad_lse) = gradients(built)
    kwargs = built.kwargs
    names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k", "causal",
             "softcap", "softmax_scale", "window_size", "attention_chunk", "sinks", "prefix_lens", "query_ranges",
             "ranges_in_window")  # fmt: skip
    given = {name: kwargs[name] for name in names if name in kwargs}
    q, k, v = (kwargs[name].detach() for name in ("q", "k", "v"))
    for results in ({"out": out, "softmax_lse": lse}, {}):
        found = broadhead.mha_bwd(grad_out, q, k, v, dlse=grad_lse, **results, **given)
        for name, x in zip(("q", "k", "v"), found, strict=False):
            torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-5)


def test_a_tree_has_no_gradient() -> None:
    q = torch.randn(1, 5, 2, 16, requires_grad=True)
    words = torch.full((1, 5), -1)
    with pytest.raises(UnsupportedError, match="tree_mask"):
        broadhead.flash_attn_func(q, q, q, causal=True, tree_mask=words)
    with torch.no_grad():
        broadhead.flash_attn_func(q, q, q, causal=True, tree_mask=words)


# --- what is told from what -------------------------------------------------------------------------------------------


def shifted(x: torch.Tensor, side: int) -> torch.Tensor:
    x = x.clone()
    x[..., side] += 1
    return x


FAULTS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "begin": ({"ranges": "far"}, lambda kw: {"query_ranges": shifted(kw["query_ranges"], 0)}),
    "end": ({"ranges": "far"}, lambda kw: {"query_ranges": shifted(kw["query_ranges"], 1)}),
    "rows": ({"ranges": "single"}, lambda kw: {"query_ranges": kw["query_ranges"].roll(1, dims=0)}),
    "in_window": ({"ranges": "far", "ranges_in_window": True}, lambda kw: {"ranges_in_window": False}),
    "not_in_window": ({"ranges": "far"}, lambda kw: {"ranges_in_window": True}),
    "no_ranges": ({"ranges": "far"}, lambda kw: {"query_ranges": None}),
    "causal": ({"causal": False, "causal_each": EACH, "window": (12, 5)}, lambda kw: {"causal": ~kw["causal"]}),
    "tree": ({"tree": "eagle"}, lambda kw: {"tree_mask": kw["tree_mask"] ^ (1 << 60)}),
    "tree_sign": ({"tree": "chain"}, lambda kw: {"tree_mask": kw["tree_mask"] ^ -(2**63)}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_masks_are_told(fault: str, rng: random.Random) -> None:
    """The check of a call notices one key too many, one too few, and the values of another query or sequence."""
    options, change = FAULTS[fault]
    base = Call("varlen", (23, 0, 40, 9), (190, 7, 140, 130), causal=True, window=(12, 0), dtype=torch.float32)
    built = build(base.with_(**options), CPU, rng)
    for name in ("k", "v"):  # a key that the fault shows is told by its weight as well as by NaN
        built.kwargs[name] = built.kwargs[name].nan_to_num(0.5)
    check_call(built)
    built.out.fill_(float("nan"))
    with pytest.raises(AssertionError, match=r"off by|-inf in the LSE|must be 0"):
        check_against(built, *built.run(**change(built.kwargs)))


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_masks_that_say_the_same(rng: random.Random) -> None:
    """Prefixes are ranges from 0, causality of all sequences is causality, a chain of drafts is causal."""
    q, k, v = (torch.randn(3, n, 2, 16) for n in (20, 50, 50))

    def run(**options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return broadhead.flash_attn_func(q, k, v, **options, return_attn_probs=True)

    prefix = int32((7, 0, 45), CPU)
    ranges = torch.stack((torch.zeros_like(prefix), prefix), dim=1)[:, None].expand(3, 20, 2).contiguous()
    for causal in (True, torch.ones(3, dtype=torch.bool), int32((1, -7, 256), CPU)):
        same(run(causal=causal), run(causal=True))
        same(run(causal=causal, window_size=(5, -1)), run(causal=True, window_size=(5, 0)))
        same(
            run(causal=causal, window_size=(5, 0), query_ranges=ranges),
            run(causal=True, window_size=(5, 0), prefix_lens=prefix),
        )
        same(
            run(causal=causal, window_size=(5, 0), prefix_lens=prefix),
            run(causal=True, window_size=(5, 0), prefix_lens=prefix),
        )
    same(run(causal=torch.zeros(3, dtype=torch.int32)), run())
    same(run(causal=torch.zeros(3, dtype=torch.bool), window_size=(5, 2)), run(window_size=(5, 2)))
    chain = torch.tensor(TREES["chain"](rng, 20, 50)).expand(3, 20)
    same(run(tree_mask=chain), run(causal=True))
    nothing = torch.tensor(RANGES["nothing"](rng, 20, 50), dtype=torch.int32).expand(3, 20, 2)
    same(run(causal=True, query_ranges=nothing), run(causal=True))


@pytest.mark.parametrize("causal", [torch.tensor(True), torch.tensor(1), 1])
def test_a_scalar_stays_a_scalar(causal: Any) -> None:
    q = torch.randn(2, 5, 2, 16)
    same(broadhead.flash_attn_func(q, q, q, causal=causal), broadhead.flash_attn_func(q, q, q, causal=True))


@pytest.mark.parametrize(
    "options", [{"ranges": "random", "window": (4, 0)}, {"tree": "words"}, {"causal_each": (True, False)}], ids=str
)
def test_packed_forms(options: dict[str, Any], rng: random.Random) -> None:
    """flash_attn_qkvpacked_func, flash_attn_kvpacked_func and flash_attn_varlen_qkvpacked_func hand the masks on."""
    call = Call("varlen", (20, 20), (20, 20), dtype=torch.float32, **options)
    built = build(call, CPU, rng)
    kwargs = built.kwargs
    q, k, v = (torch.cat(x) for x in (built.q, built.k, built.v))
    masks = {name: kwargs[name] for name in ("query_ranges", "tree_mask", "causal", "window_size") if name in kwargs}
    dense = {
        name: x.view(2, 20, *x.shape[1:]) if name in ("query_ranges", "tree_mask") else x for name, x in masks.items()
    }
    wanted = {"return_attn_probs": True}
    qkv = torch.stack((q, k, v), dim=1)
    out, lse = broadhead.flash_attn_varlen_qkvpacked_func(qkv, kwargs["cu_seqlens_q"], 20, **masks, **wanted)
    check_against(built, out, lse)
    of_batch = qkv.view(2, 20, 3, *q.shape[1:])
    for out, lse in (
        broadhead.flash_attn_qkvpacked_func(of_batch, **dense, **wanted),
        broadhead.flash_attn_kvpacked_func(of_batch[:, :, 0], of_batch[:, :, 1:], **dense, **wanted),
    ):
        check_against(built, out.flatten(0, 1), lse.transpose(0, 1).flatten(1))


# --- refusals ---------------------------------------------------------------------------------------------------------


def dense(queries: int = 6) -> dict[str, Any]:
    return {"q": torch.randn(2, queries, 4, 16), "k": torch.randn(2, 9, 2, 16), "v": torch.randn(2, 9, 2, 16)}


def words(*shape: int) -> torch.Tensor:
    return torch.full(shape, -1)


RANGE = torch.zeros(2, 6, 2, dtype=torch.int32)
TREE = {"tree_mask": words(2, 6), "causal": True}
REFUSED: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"query_ranges": RANGE[:, :, 0]}, InvalidArgumentError, ["query_ranges", "(2, 6)"]),
    ({"query_ranges": RANGE[:1]}, InvalidArgumentError, ["query_ranges", "(1, 6, 2)"]),
    ({"query_ranges": RANGE.flatten(0, 1)}, InvalidArgumentError, ["query_ranges", "(12, 2)"]),
    ({"query_ranges": RANGE.long()}, InvalidTypeError, ["query_ranges", "int64", "int32"]),
    ({"query_ranges": RANGE.tolist()}, InvalidTypeError, ["query_ranges"]),
    ({"query_ranges": RANGE.to("meta")}, InvalidArgumentError, ["query_ranges", "meta"]),
    ({"ranges_in_window": True}, InvalidArgumentError, ["ranges_in_window", "query_ranges"]),
    ({"query_ranges": RANGE, "ranges_in_window": "yes"}, InvalidTypeError, ["ranges_in_window", "yes"]),
    ({"causal": torch.ones(3, dtype=torch.bool)}, InvalidArgumentError, ["causal", "(3,)"]),
    ({"causal": torch.ones(2, 1, dtype=torch.bool)}, InvalidArgumentError, ["causal", "(2, 1)"]),
    ({"causal": torch.ones(2)}, InvalidTypeError, ["causal", "float32"]),
    ({"causal": torch.ones(2, dtype=torch.int64)}, InvalidTypeError, ["causal", "int64"]),
    ({"causal": torch.ones(2, dtype=torch.bool, device="meta")}, InvalidArgumentError, ["causal", "meta"]),
    ({"tree_mask": words(2, 5)}, InvalidArgumentError, ["tree_mask", "(2, 5)"]),
    ({"tree_mask": words(12)}, InvalidArgumentError, ["tree_mask", "(12,)"]),
    ({"tree_mask": words(2, 6).int()}, InvalidTypeError, ["tree_mask", "int32", "int64"]),
    ({"tree_mask": words(2, 6).to("meta")}, InvalidArgumentError, ["tree_mask", "meta"]),
    ({**TREE, "query_ranges": RANGE}, InvalidArgumentError, ["tree_mask", "query_ranges"]),
    ({**TREE, "prefix_lens": int32((1, 2), CPU)}, InvalidArgumentError, ["tree_mask", "prefix_lens"]),
    ({**TREE, "attention_chunk": 4}, InvalidArgumentError, ["tree_mask", "attention_chunk"]),
    ({"tree_mask": words(2, 6), "window_size": (-1, 3)}, InvalidArgumentError, ["tree_mask", "window_size"]),
    ({"tree_mask": words(2, 6), "window_size": 3}, InvalidArgumentError, ["tree_mask", "window_size"]),
    ({**dense(65), "tree_mask": words(2, 65)}, InvalidArgumentError, ["tree_mask", "64", "65"]),
    ({"prefix_lens": int32((1, 2), CPU), "causal": False}, InvalidArgumentError, ["prefix_lens", "causal"]),
]  # fmt: skip


def ids(x: Any) -> str:
    return "+".join(x) if isinstance(x, dict) else ""


@pytest.mark.parametrize("changes, error, words", REFUSED, ids=ids)
def test_refused(changes: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    for function in ("flash_attn_func", "mha_fwd"):
        with pytest.raises(error) as caught:
            getattr(broadhead, function)(**{**dense(), **changes})
        assert isinstance(caught.value, broadhead.BroadheadError)
        missing = [word for word in [function, *words] if word not in str(caught.value)]
        assert not missing, f"the text lacks {missing}: {caught.value}"


def test_the_longest_sequence_bounds_a_tree() -> None:
    """max_seqlen_q, not the lengths, is what the host sees."""
    q, k = torch.randn(70, 2, 16), torch.randn(90, 2, 16)
    cu = {"cu_seqlens_q": int32((0, 35, 70), CPU), "cu_seqlens_k": int32((0, 45, 90), CPU), "max_seqlen_k": 45}
    broadhead.flash_attn_varlen_func(q, k, k, **cu, max_seqlen_q=64, tree_mask=words(70))
    with pytest.raises(InvalidArgumentError, match=r"max_seqlen_q.*65"):
        broadhead.flash_attn_varlen_func(q, k, k, **cu, max_seqlen_q=65, tree_mask=words(70))


def test_shared_prefixes_take_no_values() -> None:
    q, cache = torch.randn(2, 1, 4, 16), torch.randn(6, 4, 2, 16)
    arguments = {
        "q": q, "k_cache": cache, "v_cache": cache, "cache_seqlens": int32((3, 2), CPU), "prefix_len": 4,
        "prefix_page_table": int32((5,), CPU), "page_table": int32((0, 1), CPU).view(2, 1),
    }  # fmt: skip
    broadhead.flash_attn_with_shared_prefix(**arguments, causal=True)
    with pytest.raises(broadhead.BroadheadError, match=r"flash_attn_with_shared_prefix: .*causal"):
        broadhead.flash_attn_with_shared_prefix(**arguments, causal=torch.ones(2, dtype=torch.bool))
    for name, value in (("query_ranges", RANGE), ("tree_mask", words(2, 1))):
        with pytest.raises(TypeError, match=name):
            broadhead.flash_attn_with_shared_prefix(**arguments, **{name: value})
