"""FlashAttention-3's package, by broadhead.compat."""
