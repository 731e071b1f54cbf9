"""Tiny random models of transformers, and the comparison with their eager attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import broadhead
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers", minversion="5.0")
#: It imports transformers, so that tests take it from here, behind the skip.
integration = pytest.importorskip("broadhead.integrations.transformers")

VOCABULARY = 97
#: Until then blocks of tokens that see each other were joined last, across the sequences of a row, which is refused.
cuts_blocks_by_sequence = pytest.mark.skipif(
    not hasattr(transformers.masking_utils, "remap_positions_for_packed_sequence"),
    reason=f"transformers {transformers.__version__} joins blocks across the sequences of a row",
)
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5GEMMA_HALF = {
    **COMMON,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 5.0,
    "dropout_rate": 0.0,
}
_GEMMA4 = {"sliding_window": 6, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
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
        {**_GEMMA4, "global_head_dim": 32, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    # The heads of E2B, and its layers that read the keys of earlier ones: the last two.
    "gemma4_shared": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            **_GEMMA4,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "global_head_dim": 512,
        },
    ),
    "qwen3_5": (
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 0],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.25,
            },
        },
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            "attention_chunk_size": 4,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
        },
    ),
    "hrm_text": (
        "HrmTextForCausalLM",
        "HrmTextConfig",
        {"num_hidden_layers": 4, "num_layers_per_stack": 1, "H_cycles": 2, "L_cycles": 1, "prefix_lm": True},
    ),
    "t5gemma": (
        "T5GemmaForConditionalGeneration",
        "T5GemmaConfig",
        {"encoder": _T5GEMMA_HALF, "decoder": {**_T5GEMMA_HALF, "cross_attention_hidden_size": 32}},
    ),
}
#: Continuous batching of this transformers is a function of its own, by names that begin with "paged|".
PAGES_BY_NAME = transformers.AttentionInterface().get("paged|flash_attention_3") is not None


def make(name: str) -> Any:
    """A tiny random model, its weights large enough that a wrong mask shows."""
    model_class, config_class, options = MODELS[name]
    if not hasattr(transformers, model_class):
        pytest.skip(f"transformers {transformers.__version__} has no {model_class}")
    common = dict(COMMON)
    if name == "hrm_text":
        del common["num_key_value_heads"]
    if name == "t5gemma":
        common = {key: COMMON[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(3)
    return enlarge(getattr(transformers, model_class)(getattr(transformers, config_class)(**{**common, **options})))


def enlarge(model: Any) -> Any:
    """The random model with weights large enough that a wrong mask shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


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


def assert_same_gradients(name: str, build: Callable[[str], Any] = make, **inputs: Any) -> None:
    """The loss of ``inputs``, which hold labels, has the gradients of eager attention in every parameter."""
    gradients = []
    for attention in ("eager", "broadhead"):
        model = build(name)
        model.set_attn_implementation(attention)
        model(**inputs).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    # A bias of keys has no gradient but rounding: the softmax takes no notice of it.
    floor = 1e-4 * max(gradient.norm() for gradient in gradients[0].values())
    for key, expected in gradients[0].items():
        error = (gradients[1][key] - expected).norm() / torch.maximum(expected.norm(), floor)
        assert error < 1e-3, f"{key}: {error:.2e}"


def assert_same_tokens(model: Any, prompt: torch.Tensor, **options: Any) -> None:
    """Greedy generation gives the tokens of eager attention."""
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, **options}
    tokens = []
    for attention in ("eager", "broadhead"):
        model.set_attn_implementation(attention)
        tokens.append(model.generate(prompt, **options))
    assert torch.equal(*tokens)


def batching(model: str, page_size: int, **options: Any) -> Any:
    """Options of continuous batching, under the names of this transformers; skips where it can not batch the model."""
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip(f"transformers {transformers.__version__} has no ContinuousBatchingConfig")
    if PAGES_BY_NAME and model in ("mistral", "gemma2"):
        pytest.skip(f"continuous batching of transformers {transformers.__version__} leaves out a mask of {model}")
    fields = transformers.ContinuousBatchingConfig.__dataclass_fields__
    return transformers.ContinuousBatchingConfig(
        **{"page_size" if "page_size" in fields else "block_size": page_size}, **options
    )


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def padding(batch: int, length: int, side: str) -> torch.Tensor:
    """int64 ``(B, S)``: row i lacks 2 i + 1 tokens, the first row none."""
    places = torch.arange(length)
    cut = torch.tensor([0, *(2 * i + 1 for i in range(1, batch))])[:, None]
    live = places >= cut if side == "left" else places < length - cut
    return live.long()


class Waits(TorchDispatchMode):
    """Counts the operators that read a value back, for which a device would have to be waited for.

    Attributes:
        seen: their names.
        largest: elements of the largest tensor that an operator made.
    """

    operators = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        mask_index = any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for i in (args[1] if name == "index" else ())
            if i is not None
        )
        if name in self.operators or mask_index:
            self.seen.append(name)
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else (out,)
        # A view may be expanded: what counts is memory.
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in made if isinstance(t, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out
