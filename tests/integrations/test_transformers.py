"""The transformers integration: models give the logits, gradients and tokens of eager attention."""

from __future__ import annotations

import broadhead
import pytest
import torch
from transformers_models import (
    MODELS,
    VOCABULARY,
    assert_same,
    assert_same_gradients,
    assert_same_tokens,
    ids,
    integration,
    make,
    output_of,
    padding,
    transformers,
)

DECODERS = [name for name in MODELS if name != "t5gemma"]
#: The chunks of llama4 outgrow the caches that it makes: see test_chunks_past_the_cache.
GENERATING = [name for name in MODELS if name != "llama4"]


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    integration.register()


@pytest.mark.parametrize("name", DECODERS)
def test_logits(name: str) -> None:
    assert_same(make(name), input_ids=ids(2, 19), use_cache=False)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_padded_batch(name: str, side: str) -> None:
    mask = padding(3, 17, side)
    assert_same(make(name), mask.bool(), input_ids=ids(3, 17), attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("side", ["left", "right"])
def test_encoder_and_decoder_padded(side: str) -> None:
    """T5Gemma: a bidirectional encoder with a window, a causal decoder, and attention from one to the other."""
    encoder, decoder = padding(3, 17, side), padding(3, 11, "right")
    inputs = {"input_ids": ids(3, 17), "attention_mask": encoder, "decoder_input_ids": ids(3, 11)}
    assert_same(make("t5gemma"), decoder.bool(), **inputs, decoder_attention_mask=decoder, use_cache=False)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", GENERATING)
def test_generate_left_padded(name: str, cache: str | None) -> None:
    options = {"disable_compile": True} if cache == "static" else {}
    mask = padding(2, 11, "left")
    assert_same_tokens(make(name), ids(2, 11), attention_mask=mask, cache_implementation=cache, **options)


def test_chunks_past_the_cache() -> None:
    """A cache of the model's own drops keys, after which nobody knows where chunks begin; the advised one keeps all."""
    model, prompt, mask = make("llama4"), ids(2, 7), padding(2, 7, "left")
    with pytest.raises(broadhead.UnsupportedError, match="made without its config"):
        assert_same_tokens(model, prompt, attention_mask=mask)
    tokens = []
    for attention in ("eager", "broadhead"):
        model.set_attn_implementation(attention)
        cache = transformers.DynamicCache()
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "past_key_values": cache}
        tokens.append(model.generate(prompt, attention_mask=mask, **options))
    assert torch.equal(*tokens)


def continue_padded(name: str, new: int, attention: str) -> torch.Tensor:
    """Logits of ``new`` tokens after a cached prompt that ends in padding, so that padding lies between the tokens."""
    model, mask = make(name), padding(2, 9, "right")
    model.set_attn_implementation(attention)
    torch.manual_seed(5)
    prompt, more = ids(2, 9), ids(2, new)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=prompt, attention_mask=mask, past_key_values=cache)
        longer = torch.cat([mask, torch.ones_like(more)], dim=1)
        return model(input_ids=more, attention_mask=longer, past_key_values=cache).logits


@pytest.mark.parametrize(("name", "new"), [("llama", 1), ("llama", 4), ("mistral", 1), ("gemma4_shared", 1)])
def test_padding_between_tokens(name: str, new: int) -> None:
    expected = continue_padded(name, new, "eager")
    got = continue_padded(name, new, "broadhead")
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4 * expected.abs().max().item())


def test_padding_between_tokens_of_a_window_refused() -> None:
    """A window counts positions, among which padding lies for some queries and not for others."""
    with pytest.raises(broadhead.UnsupportedError, match="padding lies between the tokens"):
        continue_padded("mistral", 4, "broadhead")


@pytest.mark.parametrize("name", ["gpt_oss", "gemma4_shared", "qwen3_5", "hrm_text"])
def test_gradients(name: str) -> None:
    tokens, mask = ids(2, 13), padding(2, 13, "right")
    labels = tokens.masked_fill(mask == 0, -100)
    assert_same_gradients(name, input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False)


def test_gradients_left_padded() -> None:
    tokens, mask = ids(2, 13), padding(2, 13, "left")
    # The token before the first one is padding, whose logits nobody asks for.
    first = mask.cumsum(1) <= 1
    labels = tokens.masked_fill(first, -100)
    assert_same_gradients("mistral", input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False)


def test_gradients_of_encoder_and_decoder() -> None:
    mask = padding(2, 13, "right")
    assert_same_gradients("t5gemma", input_ids=ids(2, 13), attention_mask=mask, labels=ids(2, 9), use_cache=False)


def test_packed_sequences_by_cu_seqlens() -> None:
    """What a flattening data collator passes gives the logits of the sequences on their own."""
    model, tokens = make("llama"), ids(1, 19)
    cu_seqlens = torch.tensor([0, 7, 19], dtype=torch.int32)
    positions = torch.cat([torch.arange(7), torch.arange(12)])[None]
    lengths = {"max_length_q": 12, "max_length_k": 12}
    with torch.no_grad():
        alone = torch.cat([output_of(model, "eager", input_ids=part) for part in tokens.split([7, 12], dim=1)], dim=1)
        packed = output_of(
            model,
            "broadhead",
            input_ids=tokens,
            position_ids=positions,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            use_cache=False,
            **lengths,
        )
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-4 * alone.abs().max().item())


@pytest.mark.parametrize("padded", [False, True])
def test_bidirectional_window(padded: bool) -> None:
    """ModernBERT: local layers see a window to both sides."""
    config = transformers.ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        local_attention=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        deterministic_flash_attn=False,
        reference_compile=False,
    )
    torch.manual_seed(3)
    model = transformers.ModernBertModel(config).eval()
    mask = padding(2, 21, "right") if padded else torch.ones(2, 21, dtype=torch.long)
    assert_same(model, mask.bool(), input_ids=ids(2, 21), attention_mask=mask)
