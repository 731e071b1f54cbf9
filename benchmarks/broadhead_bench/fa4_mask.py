"""The mask of images as a function that FlashAttention-4 compiles. Imports what only its package brings."""

from typing import Any

import cutlass
import cutlass.cute as cute
from flash_attn.cute import utils


def images_mask_mod(window: int) -> Any:
    """A mask_mod: the last ``window`` keys up to the query, and the query's range, whose bounds are aux_tensors."""

    @cute.jit
    def mask_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        begin = utils.scalar_to_ssa(aux_tensors[0][q_idx[0]], cutlass.Int32)
        end = utils.scalar_to_ssa(aux_tensors[1][q_idx[0]], cutlass.Int32)
        behind_window = q_idx - utils.scalar_to_ssa(window, cutlass.Int32)
        in_window = (kv_idx <= q_idx) & (kv_idx > behind_window)
        return in_window | ((kv_idx >= begin) & (kv_idx < end))

    return mask_mod
