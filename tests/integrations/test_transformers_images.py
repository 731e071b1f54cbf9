"""Models of transformers whose image tokens see each other: ranges of keys or prefixes, and no mask of every pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import broadhead
import pytest
import torch
from broadhead.demo.paged_cache import PAGED_ATTENTION, PagedKVCache
from broadhead.demo.paged_cache import register as register_paged
from transformers_images import IMAGE, make, padding_of, prompt, spans_of, types_of, without_images
from transformers_models import (
    Waits,
    assert_same,
    assert_same_gradients,
    assert_same_tokens,
    cuts_blocks_by_sequence,
    integration,
    output_of,
    transformers,
)

SIDES = [None, "left", "right"]
#: What the layer with a window and the layer without one get besides the causal mask.
MASKS = {
    "gemma3": ["ranges in window", "ranges"],
    "gemma4": ["ranges in window", "causal"],
    "paligemma": ["prefix", "prefix"],
    "paligemma2": ["ranges", "prefix"],
}
if not hasattr(transformers.masking_utils, "blockwise_overlay"):  # Older versions join images after the window.
    MASKS["gemma3"] = ["ranges", "ranges"]


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    integration.register()
    register_paged()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every causal call of attention; those of a vision tower are not causal."""
    seen: list[dict[str, Any]] = []

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **options: Any) -> Any:
            if options["causal"]:
                seen.append(options)
            return function(*args, **options)

        return record

    for name in ("flash_attn_func", "flash_attn_varlen_func", "mha_fwd"):
        monkeypatch.setattr(broadhead, name, recording(getattr(broadhead, name)))
    return seen


def mask_of(call: dict[str, Any]) -> str:
    if call.get("query_ranges") is not None:
        assert call.get("prefix_lens") is None
        return "ranges in window" if call["ranges_in_window"] else "ranges"
    return "causal" if call.get("prefix_lens") is None else "prefix"


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", MASKS)
def test_logits(name: str, side: str | None, calls: list[dict[str, Any]]) -> None:
    inputs = prompt(name, side=side)
    assert_same(make(name), inputs["attention_mask"].bool(), use_cache=False, **inputs)
    assert [mask_of(call) for call in calls] == MASKS[name]
    if side is None:
        assert all(call.get("seqused_k") is None or mask_of(call) == "prefix" for call in calls)
    spans = spans_of(name, 24)
    for call in calls:
        if call.get("query_ranges") is not None:
            shift = padding_of(24, side)[1].argmax() if side == "left" else 0
            expected = broadhead.make_query_ranges(spans, 24)
            # Positions count behind left padding, and queries from the first row of the tensor.
            expected[1] = expected[1].roll(int(shift), 0)
            assert torch.equal(call["query_ranges"], expected)
        if call.get("prefix_lens") is not None:
            assert call["prefix_lens"].tolist() == [end for [(_, end)] in spans]


@pytest.mark.parametrize("name", MASKS)
def test_images_are_seen(name: str) -> None:
    """Without the types of the tokens the logits are others, so that the comparisons above can fail."""
    model, inputs = make(name), prompt(name)
    inputs["use_cache"] = False
    with torch.no_grad():
        with_blocks = output_of(model, "broadhead", **inputs)
        inputs[types_of(inputs)] = torch.full_like(inputs[types_of(inputs)], int(name.startswith("paligemma")))
        without = output_of(model, "broadhead", **inputs)
        torch.testing.assert_close(
            without, output_of(model, "eager", **inputs), rtol=0, atol=2e-4 * without.abs().max()
        )
    assert (with_blocks - without).abs().max() > 1e-2 * with_blocks.abs().max()


@pytest.mark.parametrize("side", [None, "right"])
@pytest.mark.parametrize("name", MASKS)
def test_gradients(name: str, side: str | None, calls: list[dict[str, Any]]) -> None:
    inputs = prompt(name, side=side)
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] == IMAGE), -100)
    assert_same_gradients(name, make, labels=labels, use_cache=False, **inputs)
    assert [mask_of(call) for call in calls] == MASKS[name]
    assert all(call.get("leftpad_k") is None for call in calls if mask_of(call) != "prefix")


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_text_in_training_is_causal(name: str, calls: list[dict[str, Any]]) -> None:
    """Types that tell of no image, which training requires: no ranges, and no lengths either."""
    inputs = without_images(prompt(name))
    inputs["input_ids"] = torch.randint(7, IMAGE, (2, 24))
    inputs[types_of(inputs)] = torch.zeros(2, 24, dtype=torch.long)
    assert_same(make(name), use_cache=False, **inputs)
    assert [mask_of(call) for call in calls] == ["causal"] * 2
    assert all(call.get("seqused_k") is None for call in calls)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["paligemma", "paligemma2"])
def test_layers_that_say_they_are_not_causal(name: str, side: str | None, calls: list[dict[str, Any]]) -> None:
    """Their masks are causal where no types are given, in a forward pass and over a cache."""
    model, inputs = make(name), without_images(prompt(name, side=side))
    assert not model.model.language_model.layers[0].self_attn.is_causal
    del inputs["token_type_ids"]
    assert_same(model, inputs["attention_mask"].bool(), use_cache=False, **inputs)
    assert [mask_of(call) for call in calls] == ["causal"] * 2
    if side is None:
        del inputs["attention_mask"]
        calls.clear()
        assert_same(model, use_cache=False, **inputs)
        assert all(call.get("leftpad_k") is None for call in calls), "gradients need none"
        positions = torch.cat([torch.arange(9), torch.arange(15)]).expand(2, -1) + 1
        assert_same(model, use_cache=False, position_ids=positions, **inputs)
    if side != "right":
        assert_same_tokens(model, inputs.pop("input_ids"), suppress_tokens=[IMAGE], max_new_tokens=8, **inputs)


CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunks": {"prefill_chunk_size": 7},
    "none": {"use_cache": False},
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", MASKS)
def test_generate(name: str, cache: str) -> None:
    if (name, cache) == ("paligemma2", "static"):
        pytest.skip("generate of transformers hands this model a mask that it does not take, whatever the attention")
    inputs = prompt(name, side="left")
    if cache == "chunks":  # generate cuts no pixels
        inputs = without_images(inputs)
    options = {"max_new_tokens": 6, "suppress_tokens": [IMAGE], **CACHES[cache]}
    assert_same_tokens(make(name), inputs.pop("input_ids"), **inputs, **options)


def run_in_chunks(model: Any, attention: str, sizes: list[int], inputs: dict[str, Any], cache: Any) -> torch.Tensor:
    model.set_attn_implementation(attention)
    types, begin, logits = inputs[types_of(inputs)], 0, []
    with torch.no_grad():
        for size in sizes:
            chunk = inputs["input_ids"][:, begin : begin + size]
            mask = inputs["attention_mask"][:, : begin + size]
            # The types are those of all tokens from the first one on, as transformers' generate passes them.
            given = {types_of(inputs): types, "attention_mask": mask, "past_key_values": cache}
            logits.append(model(input_ids=chunk, **given).logits)
            begin += size
    return torch.cat(logits, dim=1)


def new_cache(kind: str, model: Any, length: int) -> Any:
    config = model.config.get_text_config()
    if kind == "static":
        return transformers.StaticCache(config=config, max_cache_len=length + 4)
    return transformers.DynamicCache(config=config) if kind == "dynamic" else transformers.DynamicCache()


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("kind", ["dynamic", "keeps all", "static"])
@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_chunked_prefill(name: str, kind: str, side: str | None, calls: list[dict[str, Any]]) -> None:
    """Chunks that cut an image, and single tokens of one: what eager attention gives for the same chunks."""
    model, inputs = make(name), without_images(prompt(name, side=side))
    sizes = [5, 1, 6, 8, 4]
    expected = run_in_chunks(model, "eager", sizes, inputs, new_cache(kind, model, 24))
    got = run_in_chunks(model, "broadhead", sizes, inputs, new_cache(kind, model, 24))
    live = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[live], expected[live], rtol=0, atol=2e-4 * expected.abs().max().item())
    assert MASKS[name][0] in [mask_of(call) for call in calls]


def test_chunks_between_images_give_the_logits_of_the_whole() -> None:
    model, inputs = make("gemma4"), without_images(prompt("gemma4"))
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][:1], inputs["attention_mask"][:1]
    inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"][:1]
    with torch.no_grad():
        whole = output_of(model, "eager", use_cache=False, **inputs)
    [(_, first_end), (second, _)] = spans_of("gemma4", 24)[0]
    sizes = [first_end, second - first_end, 24 - second]
    got = run_in_chunks(model, "broadhead", sizes, inputs, new_cache("dynamic", model, 24))
    torch.testing.assert_close(got, whole, rtol=0, atol=2e-4 * whole.abs().max().item())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("gemma3", marks=cuts_blocks_by_sequence),
        "gemma4",
        pytest.param("paligemma", marks=cuts_blocks_by_sequence),
    ],
)
def test_packed_sequences(name: str, calls: list[dict[str, Any]]) -> None:
    """Several sequences in a row, told by positions that start again: one call of packed keys, with what they see."""
    inputs = without_images(prompt(name, 40))
    del inputs["attention_mask"]
    inputs["position_ids"] = torch.cat([torch.arange(23), torch.arange(17)]).expand(2, -1)
    if name == "paligemma":  # A prefix in each sequence; its positions count from 1.
        inputs["token_type_ids"] = torch.ones(2, 40, dtype=torch.long)
        inputs["token_type_ids"][:, :6] = inputs["token_type_ids"][:, 23:27] = 0
        inputs["position_ids"] = inputs["position_ids"] + 1
    assert_same(make(name), use_cache=False, **inputs)
    assert [mask_of(call) for call in calls] == MASKS[name]


def test_generation_over_pages() -> None:
    """Gemma 4 over the paged cache of the demo, whose caller gives the ranges: the tokens of eager attention."""
    model, inputs = make("gemma4"), prompt("gemma4")
    model.set_attn_implementation("eager")
    ids = inputs["input_ids"]
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, 24:]

    model.set_attn_implementation({"text_config": PAGED_ATTENTION, "vision_config": "broadhead"})
    cache = PagedKVCache(2, 32, 4, torch.device("cpu"))
    del inputs["attention_mask"]
    inputs["local_ranges"] = broadhead.make_query_ranges(spans_of("gemma4", 24), 24)
    tokens = []
    with torch.no_grad():
        for _ in range(6):
            positions = torch.arange(cache.seqlen, cache.seqlen + ids.shape[1])[None]
            inputs["input_ids"] = ids
            logits = model(**inputs, position_ids=positions, use_cache=False, paged_cache=cache).logits
            cache.advance(ids.shape[1])
            ids = logits[:, -1:].argmax(-1)
            tokens.append(ids)
            inputs = {}
    assert torch.equal(torch.cat(tokens, dim=1), expected)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[Waits], list[Waits]]]:
    """What the mask function and the attention function do, a `Waits` for each call, under "broadhead_watched".

    Attention itself reads lengths on a CPU: it is left out.
    """
    masks: list[Waits] = []
    layers: list[Waits] = []

    def watching(function: Callable[..., Any], watches: list[Waits]) -> Callable[..., Any]:
        def watch(*args: Any, **options: Any) -> Any:
            watches.append(Waits())
            with watches[-1]:
                return function(*args, **options)

        return watch

    def attention(q: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return torch.zeros_like(q)

    monkeypatch.setattr(broadhead, "mha_fwd", lambda *args, **options: (attention(*args), None))
    for function in ("flash_attn_func", "flash_attn_varlen_func"):
        monkeypatch.setattr(broadhead, function, attention)
    transformers.AttentionInterface.register("broadhead_watched", watching(integration.attention_forward, layers))
    transformers.AttentionMaskInterface.register("broadhead_watched", watching(integration.attention_mask, masks))
    yield masks, layers


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", MASKS)
def test_no_mask_of_every_pair(name: str, side: str | None, watched: tuple[list[Waits], list[Waits]]) -> None:
    """Nothing is made that grows with queries times keys; a mask waits once for the device, and no layer does."""
    masks, layers = watched
    model, length = make(name), 200
    model.set_attn_implementation({"text_config": "broadhead_watched", "vision_config": "eager"})
    with torch.no_grad():
        model(**prompt(name, length, side), use_cache=False)
    assert len(layers) == 2 and len(masks) >= 1
    # Gemma 4's layers without a window get a plain mask. Unpadded, it is none; the first reads the positions instead.
    assert len([seen for watch in layers for seen in watch.seen]) == ((name, side) == ("gemma4", None))
    assert all(len(watch.seen) <= 1 for watch in masks), [watch.seen for watch in masks]
    assert all(watch.largest < length * length for watch in masks)


def test_the_watch_sees_a_mask_of_every_pair() -> None:
    masks = transformers.masking_utils
    with Waits() as watch:
        masks.sdpa_mask(1, 200, 200, mask_function=masks.causal_mask_function, allow_is_causal_skip=False)
    assert watch.largest >= 200 * 200


def causal(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return k <= q


def test_unknown_functions_are_refused() -> None:
    """What looks like blocks and is another mask: another window, cut by a causal mask, with somebody's function."""
    masks = transformers.masking_utils
    if not hasattr(masks, "blockwise_overlay"):
        pytest.skip(f"transformers {transformers.__version__} has no functions for blocks of its own")
    block = torch.tensor([[0, 0, -1, 1, 1, -1]])
    blocks = masks.blockwise_overlay(block)
    union = masks.or_masks(masks.causal_mask_function, blocks)
    config = transformers.LlamaConfig(sliding_window=4)
    others = [
        masks.and_masks(union, masks.sliding_window_overlay(3)),
        masks.and_masks(union, masks.causal_mask_function),
        masks.and_masks(masks.sliding_window_overlay(4), masks.sliding_window_overlay(4), union),
        masks.or_masks(masks.causal_mask_function, masks.and_masks(blocks, masks.sliding_window_overlay(4))),
        masks.or_masks(masks.causal_mask_function, blocks, blocks),
        masks.or_masks(causal, blocks),
        blocks,
    ]
    for function in others:
        with pytest.raises(broadhead.UnsupportedError, match="adds its own function"):
            integration.attention_mask(1, 6, 6, mask_function=function, use_vmap=True, config=config)
    known = masks.and_masks(union, masks.sliding_window_overlay(4))
    assert integration.attention_mask(1, 6, 6, mask_function=known, use_vmap=True, config=config) is not None


def token_type_ids_mask_function(token_type_ids: torch.Tensor, image_group_ids: torch.Tensor) -> Callable[..., Any]:
    """Stands for that of the models of transformers 5.0, which is read by its name and by what it holds."""

    def inner_mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (token_type_ids[b, q] == 1) & (image_group_ids[b, q] == image_group_ids[b, k])

    inner_mask.__module__ = "transformers.models.gemma3.modeling_gemma3"
    return inner_mask


def test_functions_of_older_models() -> None:
    masks = transformers.masking_utils
    types = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0]])
    blocks = token_type_ids_mask_function(types, torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1]]))
    function = masks.or_masks(masks.causal_mask_function, blocks)
    mask = integration.attention_mask(1, 8, 8, mask_function=function, use_vmap=True)
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    out, _ = integration.attention_forward(torch.nn.Module(), q, k, v, mask)
    place = torch.arange(8)
    visible = function(torch.zeros(1, dtype=torch.long), 0, place[:, None], place)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-5)


def test_padding_inside_an_image_is_refused() -> None:
    inputs = prompt("gemma3")
    inputs["attention_mask"][0, 6] = 0
    with pytest.raises(broadhead.UnsupportedError, match="blocks of tokens that see each other"):
        output_of(make("gemma3"), "broadhead", use_cache=False, **inputs)


def test_offsets_do_not_tell_images() -> None:
    inputs = without_images(prompt("gemma4"))
    offsets = torch.tensor([0, 24, 48], dtype=torch.int32)
    with pytest.raises(broadhead.UnsupportedError, match="images"):
        output_of(make("gemma4"), "broadhead", use_cache=False, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, **inputs)


def test_masks_made_outside_of_compiled_code() -> None:
    """Compiled code knows no closures: it refuses blocks in a window, and takes masks that were made before."""
    torch.compiler.reset()
    model, inputs = make("gemma4"), without_images(prompt("gemma4", side="right"))
    with torch.no_grad():
        expected = output_of(model, "eager", use_cache=False, **inputs)
        model.set_attn_implementation("broadhead")
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="outside of what is compiled"):
            compiled(use_cache=False, **inputs)
        types, mask = inputs.pop("mm_token_type_ids"), inputs["attention_mask"]
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        positions = torch.arange(24)[None]
        inputs["attention_mask"] = model.create_masks_for_generate(
            model.config, embedded, mask, None, positions, mm_token_type_ids=types
        )
        got = compiled(use_cache=False, position_ids=positions, **inputs).logits
    live = mask.bool()
    torch.testing.assert_close(got[live], expected[live], rtol=0, atol=2e-4 * expected.abs().max().item())
