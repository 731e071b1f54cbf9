"""FlashAttention-4's package, by broadhead.compat."""

from broadhead.compat.surfaces import fill

fill(globals(), "flash_attn.cute")
