"""Makes a small model with the attention of Gemma 4 and random weights, with a tokenizer and an image processor.

It downloads nothing. Five layers of six have head_dim 256 and a window, the others head_dim 512. With images the tokens
of an image see each other in the layers with a window, as in google/gemma-4-31B-it.

Weights are such that tokens depend on attention and are not decided by noise: the head is not the embedding, for which
a random model repeats its last token, and the scores of a query over its keys have a standard deviation of 2, for which
it reads some keys in ten and not one alone.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

VOCABULARY = 32768
#: The attention of Gemma 4 26B-A4B, in a smaller model.
SHAPE = {
    "hidden_size": 2816, "intermediate_size": 8448, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 8, "num_global_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512,
    "sliding_window": 1024, "vocab_size": VOCABULARY, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
    "max_position_embeddings": 131072, "vocab_size_per_layer_input": VOCABULARY, "tie_word_embeddings": False,
    "attention_k_eq_v": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
#: Its vision tower, with few layers.
VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 4, "position_embedding_size": 1024,
    "default_output_length": 280,
}  # fmt: skip
#: The first ids of the vocabulary; words follow.
SPECIAL_TOKENS = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<|image|>", "<|image>", "<image|>", "<|audio|>", "<|audio>", "<audio|>",
    "<|video|>",
)  # fmt: skip
IMAGE_TOKEN = SPECIAL_TOKENS.index("<|image|>")
#: Tokens that stand for an image at most: 280 of the image, one before and one after it.
IMAGE_TOKENS = 282
_ATTRIBUTES = {
    "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>",
    "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>",
}  # fmt: skip
_SCORE_DEVIATION = 2.0


def make_model(folder: Path, images: bool, **changes: Any) -> None:
    """Write the model to a folder, as ``Gemma4ForConditionalGeneration`` with images, else ``Gemma4ForCausalLM``.

    Args:
        folder: exists; gets the configuration, weights in bfloat16, and with images what a processor reads.
        images: whether the model takes images.
        changes: other values for fields of the text model's configuration.
    """
    import torch
    from transformers import Gemma4ForCausalLM, Gemma4ForConditionalGeneration, Gemma4TextConfig

    shape = {**SHAPE, **changes}
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.no_grad():
        if images:
            model = Gemma4ForConditionalGeneration(_configuration(shape)).to(torch.bfloat16)
            text = model.model.language_model
        else:
            model = Gemma4ForCausalLM(Gemma4TextConfig(**shape)).to(torch.bfloat16)
            text = model.model
        for layer in text.layers:
            # Gemma 4 divides scores by nothing: those of normed queries and keys deviate by the root of the head size.
            weight = layer.self_attn.q_norm.weight
            weight.fill_(_SCORE_DEVIATION / math.sqrt(weight.numel()))
    model.save_pretrained(folder)
    if images:
        _write_processor(folder)


def image_prompt(draw: random.Random, words: int) -> dict[str, Any]:
    """A prompt of vLLM: words with one image of random pixels among them."""
    from PIL import Image

    size = draw.randrange(200, 800), draw.randrange(200, 800)
    ids = text_prompt(draw, words)["prompt_token_ids"]
    ids.insert(draw.randrange(words), IMAGE_TOKEN)
    pixels = Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1]))
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": pixels}}


def text_prompt(draw: random.Random, words: int) -> dict[str, Any]:
    """A prompt of vLLM: random words."""
    return {"prompt_token_ids": [draw.randrange(len(SPECIAL_TOKENS), VOCABULARY) for _ in range(words)]}


def _configuration(shape: dict[str, Any]) -> Any:
    from transformers import Gemma4Config

    return Gemma4Config(
        text_config={**shape, "use_bidirectional_attention": "vision"},
        vision_config=VISION,
        audio_config=None,
        tie_word_embeddings=False,
        **{f"{name}_token_id": SPECIAL_TOKENS.index(_ATTRIBUTES[f"{name}_token"]) for name in ("boi", "eoi", "image")},
        **{f"{name}_token_id": SPECIAL_TOKENS.index(_ATTRIBUTES[f"{name}_token"]) for name in ("boa", "audio")},
        eoa_token_index=SPECIAL_TOKENS.index("<audio|>"),
        video_token_id=SPECIAL_TOKENS.index("<|video|>"),
    )


def _write_processor(folder: Path) -> None:
    """A tokenizer of whole words, and the image processor of Gemma 4, without its audio and video parts' models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Gemma4Processor, PreTrainedTokenizerFast
    from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
    from transformers.models.gemma4.image_processing_gemma4 import Gemma4ImageProcessor
    from transformers.models.gemma4.video_processing_gemma4 import Gemma4VideoProcessor

    words = [f"w{i}" for i in range(len(SPECIAL_TOKENS), VOCABULARY)]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL_TOKENS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens=_ATTRIBUTES,
    )
    Gemma4Processor(
        Gemma4AudioFeatureExtractor(), Gemma4ImageProcessor(), fast, Gemma4VideoProcessor()
    ).save_pretrained(folder)
    # vLLM 0.24 asks for it under the name that older versions of transformers write.
    processor = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(processor["image_processor"], indent=1) + "\n")
