"""Runs torch's own attention functions on broadhead, through torch's registry of flash attention implementations.

    import broadhead.integrations.torch_attention  # makes the name known, changes nothing else

    torch.nn.attention.activate_flash_attention_impl("broadhead")

From then on ``torch.nn.functional.scaled_dot_product_attention``, ``torch.nn.attention.varlen.varlen_attn`` and
``torch.distributed.tensor.experimental.context_parallel`` run broadhead's kernels on CUDA devices, forward and
backward; SDPA does so up to head_dim 512, where torch's own selection of kernels ends at 256.
``torch.nn.attention.restore_flash_attention_impl()`` gives torch its kernels back.

`activate` does the same for one ``with`` block, and for a CPU where a test wants it.
"""

from __future__ import annotations

from .registration import NAME, Handle, activate, register

__all__ = ["NAME", "Handle", "activate", "register"]

register()
