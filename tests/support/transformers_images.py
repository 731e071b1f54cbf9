"""Tiny random models of transformers that take images, and prompts with images for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers_models import COMMON, VOCABULARY, enlarge, padding, transformers

#: The token in whose place the models put image features.
IMAGE = VOCABULARY - 1
#: Tokens of an image, by model; more than their windows of 5 tokens, so that a window cuts images.
TOKENS = {"gemma3": 9, "gemma4": 8, "paligemma": 9, "paligemma2": 9}
WINDOW = 5
_LAYERS = ["sliding_attention", "full_attention"]
_SIGLIP = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 12,
    "patch_size": 4, "vision_use_head": False,
}  # fmt: skip
_LOCAL = {"sliding_window": WINDOW, "layer_types": _LAYERS, "query_pre_attn_scalar": 16}
_GEMMA4_TEXT = {
    **COMMON, "sliding_window": WINDOW, "layer_types": _LAYERS, "use_bidirectional_attention": "vision",
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 32,
}  # fmt: skip
_GEMMA4_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2, "position_embedding_size": 16,
}  # fmt: skip
_OTHER_TOKENS = ("boi_token_id", "eoi_token_id", "video_token_id", "boa_token_id", "audio_token_id")


def make(name: str) -> Any:
    """A tiny random model that takes images, its weights large enough that a wrong mask shows."""
    torch.manual_seed(3)
    if name == "gemma3":
        config = transformers.Gemma3Config(
            text_config={**COMMON, **_LOCAL},
            vision_config=_SIGLIP,
            mm_tokens_per_image=TOKENS[name],
            image_token_index=IMAGE,
            boi_token_index=5,
            eoi_token_index=6,
        )
        return enlarge(transformers.Gemma3ForConditionalGeneration(config))
    if name == "gemma4":
        if not hasattr(transformers, "Gemma4ForConditionalGeneration"):
            pytest.skip(f"transformers {transformers.__version__} has no Gemma4ForConditionalGeneration")
        unused = {token: VOCABULARY + i for i, token in enumerate(_OTHER_TOKENS)}
        config = transformers.Gemma4Config(
            text_config=_GEMMA4_TEXT, vision_config=_GEMMA4_VISION, image_token_id=IMAGE, **unused
        )
        return enlarge(transformers.Gemma4ForConditionalGeneration(config))
    text = {**COMMON, "model_type": "gemma"}
    if name == "paligemma2":
        text = {**COMMON, **_LOCAL, "model_type": "gemma2", "attn_logit_softcapping": 5.0}
    vision = {**_SIGLIP, "model_type": "siglip_vision_model", "projection_dim": 32}
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, projection_dim=32, vocab_size=VOCABULARY
    )
    return enlarge(transformers.PaliGemmaForConditionalGeneration(config))


def spans_of(name: str, length: int) -> list[list[tuple[int, int]]]:
    """The blocks of the two rows of `prompt`: two images and one, or a prefix each; padding not counted."""
    image = TOKENS[name]
    if name.startswith("paligemma"):
        return [[(0, image + 6)], [(0, image + 2)]]
    return [[(3, 3 + image), (length - image - 1, length - 1)], [(4, 4 + image)]]


def padding_of(length: int, side: str | None) -> torch.Tensor:
    """int64 ``(2, length)``: row 1 lacks 3 tokens at a side."""
    return torch.ones(2, length, dtype=torch.long) if side is None else padding(2, length, side)


def prompt(name: str, length: int = 24, side: str | None = None) -> dict[str, Any]:
    """Inputs of the model: two rows with images, their pixels, padding and the types of their tokens."""
    image, mask = TOKENS[name], padding_of(length, side)
    ids = torch.randint(7, IMAGE, (2, length)).masked_fill(mask == 0, 0)
    types = torch.zeros(2, length, dtype=torch.long)
    images = 0
    for row, spans in enumerate(spans_of(name, length)):
        first = int(mask[row].argmax())
        for begin, end in spans:
            ids[row, first + begin : first + begin + image] = IMAGE
            types[row, first + begin : first + end] = 1
            images += 1
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if name == "gemma4":
        grid = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(4), indexing="xy"), dim=-1).flatten(0, 1)
        pixels = {"pixel_values": torch.rand(images, 4 * image, 48), "image_position_ids": grid.expand(images, -1, -1)}
        return {**inputs, **pixels, "mm_token_type_ids": types}
    if name.startswith("paligemma"):  # There a prefix has type 0, as padding has, and what follows it has type 1.
        types = (1 - types) * mask
    return {**inputs, "pixel_values": torch.rand(images, 3, 12, 12), "token_type_ids": types}


def types_of(inputs: dict[str, Any]) -> str:
    """The name under which the types of the tokens are given."""
    return "mm_token_type_ids" if "mm_token_type_ids" in inputs else "token_type_ids"


def without_images(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same tokens and types without pixels, so that they may be cut: the image token stands for itself."""
    return {name: value for name, value in inputs.items() if name not in ("pixel_values", "image_position_ids")}
