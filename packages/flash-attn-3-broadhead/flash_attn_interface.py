"""FlashAttention-3's functions, by broadhead.compat; defines torch.ops.flash_attn_3."""

from broadhead.compat import flash_attn_3_ops
from broadhead.compat.surfaces import fill

fill(globals(), "flash_attn_interface")
# The operators stay defined as long as the module is there.
_operators = flash_attn_3_ops.define_once()
