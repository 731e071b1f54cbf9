"""FlashAttention-3's functions, by broadhead.compat; importing it defines torch.ops.flash_attn_3."""

from broadhead.compat import flash_attn_3_ops
from broadhead.compat.surfaces import fill

fill(globals(), "flash_attn_interface")
_operators = flash_attn_3_ops.define_once()
