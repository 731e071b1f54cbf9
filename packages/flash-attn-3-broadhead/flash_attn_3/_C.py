"""Defines torch.ops.flash_attn_3, as FlashAttention-3's compiled module does, by broadhead.compat."""

from broadhead.compat import flash_attn_3_ops

_operators = flash_attn_3_ops.define_once()
