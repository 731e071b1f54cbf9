"""FlashAttention-2's functions between padded and packed batches, by broadhead.compat."""

from broadhead.compat.surfaces import fill

fill(globals(), "flash_attn")
