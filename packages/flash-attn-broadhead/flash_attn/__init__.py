"""FlashAttention-2's package, by broadhead.compat."""

from pkgutil import extend_path

# flash_attn.cute may be installed elsewhere on the path.
__path__ = extend_path(__path__, __name__)

from broadhead.compat.surfaces import fill

fill(globals(), "flash_attn")
