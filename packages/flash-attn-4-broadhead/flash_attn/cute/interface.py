"""FlashAttention-4's functions, by broadhead.compat."""

from broadhead.compat.surfaces import fill

fill(globals(), "flash_attn.cute")
