"""The transformers integration: models give the logits, gradients and tokens of eager attention, or are refused."""

from __future__ import annotations

from typing import Any

import broadhead
import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

import broadhead.integrations.transformers as integration  # noqa: E402

VOCABULARY = 97
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Model class, config class and what the config adds: each has another mask or another argument of attention.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 5}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {"sliding_window": 6, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {"sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "gemma4": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            "global_head_dim": 32,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCABULARY,
        },
    ),
}


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    integration.register()


def make(name: str) -> Any:
    """A tiny random model, its weights large enough that a wrong mask shows."""
    model_class, config_class, options = MODELS[name]
    if not hasattr(transformers, model_class):
        pytest.skip(f"transformers {transformers.__version__} has no {model_class}")
    torch.manual_seed(3)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**COMMON, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def output_of(model: Any, attention: str, **inputs: Any) -> torch.Tensor:
    model.set_attn_implementation(attention)
    output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def assert_same(model: Any, rows: torch.Tensor | None = None, **inputs: Any) -> None:
    """Outputs of broadhead and eager attention agree on ``rows`` (bool ``(B, S)``, default all)."""
    with torch.no_grad():
        expected, got = output_of(model, "eager", **inputs), output_of(model, "broadhead", **inputs)
    assert broadhead.last_dispatch()[0] == "torch"
    if rows is not None:
        expected, got = expected[rows], got[rows]
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4 * expected.abs().max().item())


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def padding(batch: int, length: int, side: str) -> torch.Tensor:
    """int64 ``(B, S)``: row i lacks 2 i + 1 tokens, the first row none."""
    places = torch.arange(length)
    cut = torch.tensor([0, *(2 * i + 1 for i in range(1, batch))])[:, None]
    live = places >= cut if side == "left" else places < length - cut
    return live.long()


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str) -> None:
    assert_same(make(name), input_ids=ids(2, 19), use_cache=False)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padded_batch(name: str, side: str) -> None:
    mask = padding(3, 17, side)
    assert_same(make(name), mask.bool(), input_ids=ids(3, 17), attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma4"])
def test_generate_left_padded(name: str, cache: str | None) -> None:
    model = make(name)
    mask = padding(2, 11, "left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "cache_implementation": cache}
    if cache == "static":
        options["disable_compile"] = True
    prompt = ids(2, 11)
    tokens = []
    for attention in ("eager", "broadhead"):
        model.set_attn_implementation(attention)
        tokens.append(model.generate(prompt, attention_mask=mask, **options))
    assert torch.equal(*tokens)


def test_packed_sequences_by_position_ids() -> None:
    positions = torch.cat([torch.arange(7), torch.arange(9), torch.arange(3)])[None]
    assert_same(make("llama"), input_ids=ids(1, 19), position_ids=positions, use_cache=False)


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


def test_cross_attention_with_padded_keys() -> None:
    """As many queries as keys, of which the last are padding: the queries are not."""
    layer = torch.nn.Module()
    layer.is_causal = False
    q, k, v = (torch.randn(2, 4, 9, 16) for _ in range(3))
    mask = padding(2, 9, "right").bool()
    out, _ = integration.attention_forward(layer, q, k, v, mask, sliding_window=None)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-5)


def test_chunked_attention() -> None:
    layer = torch.nn.Module()
    layer.config = transformers.LlamaConfig(**COMMON)
    layer.config.layer_types = ["chunked_attention"]
    layer.config.attention_chunk_size = 4
    layer.layer_idx, layer.is_causal = 0, True
    q, k, v = (torch.randn(1, 2, 11, 16) for _ in range(3))
    out, _ = integration.attention_forward(layer, q, k, v, None)
    place = torch.arange(11)
    mask = (place[:, None] >= place) & (place[:, None] // 4 == place // 4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_gradients(name: str) -> None:
    tokens, mask = ids(2, 13), padding(2, 13, "right")
    labels = tokens.masked_fill(mask == 0, -100)
    gradients = []
    for attention in ("eager", "broadhead"):
        model = make(name)
        model.set_attn_implementation(attention)
        model(input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, expected in gradients[0].items():
        error = (gradients[1][key] - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < 1e-3, f"{key}: {error:.2e}"


def test_mixed_dtypes_take_the_lowest() -> None:
    """Norms kept in fp32 upcast q and k, not v."""
    layer = torch.nn.Module()
    q, k = (torch.randn(1, 2, 5, 16) for _ in range(2))
    v = torch.randn(1, 2, 5, 16, dtype=torch.bfloat16)
    out, _ = integration.attention_forward(layer, q, k, v, None)
    assert out.dtype == torch.bfloat16


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "four_dimensional_mask": ({"attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool)}, "attention_mask"),
    "output_attentions": ({"output_attentions": True}, "output_attentions"),
    "dropout": ({"dropout": 0.1}, "dropout"),
    "position_bias": ({"position_bias": torch.zeros(1, 2, 6, 6)}, "position_bias"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_by_name(case: str) -> None:
    options, name = REFUSALS[case]
    q, k, v = (torch.randn(1, 2, 6, 16) for _ in range(3))
    with pytest.raises(broadhead.UnsupportedError, match=name):
        integration.attention_forward(torch.nn.Module(), q, k, v, **{"attention_mask": None, **options})


def test_custom_mask_function_refused() -> None:
    from transformers.masking_utils import create_causal_mask

    model = make("llama")
    model.set_attn_implementation("broadhead")
    with pytest.raises(broadhead.UnsupportedError, match="attention mask"):
        create_causal_mask(
            model.config, torch.zeros(1, 6, 64), None, None, and_mask_function=lambda b, h, q, k: q - k != 2
        )
