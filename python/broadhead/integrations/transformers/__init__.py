"""Registers broadhead as an attention implementation of Hugging Face transformers, for models on its interface.

    import broadhead.integrations.transformers  # makes the name known, changes no other implementation

    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="broadhead")

transformers finds implementations in a table of its own, which no entry point of a package fills: this import does.
A padded batch runs with the lengths of its rows: no key is copied, and rows of padding give zeros. Static caches run
inside ``torch.compile(fullgraph=True)``. Continuous batching (``generate_batch``) runs it over a paged cache; it takes
only names with "flash" in them, and finds the same attention as "broadhead_flash_3" by itself.

Blocks of tokens that see each other, such as images (Gemma 3, Gemma 4) or a prefix (PaliGemma), become ranges of keys
or prefixes. They are read from what the mask functions hold: no mask of queries times keys is made.

What cannot be expressed exactly (a custom 4-D mask, dropout, a position bias) is refused by name: it never runs with
another mask than the model's.
"""

from __future__ import annotations

from .attention import attention_forward
from .masks import attention_mask
from .registration import register

__all__ = ["attention_forward", "attention_mask", "register"]

register()
