"""FlashAttention-2's module flash_attn.bert_padding: between padded batches and packed sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: What the module exports.
NAMES = (
    "index_first_axis", "index_first_axis_residual", "index_put_first_axis", "pad_input", "unpad_input",
    "unpad_input_for_concatenated_sequences",
)  # fmt: skip


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` of ``x``; differentiable."""
    return x.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """``(first_axis_dim, ...)``: ``values`` in the rows ``indices``, 0 in the others; differentiable."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


def index_first_axis_residual(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``indices`` of ``x``, and ``x``; the gradients of both are added."""
    return x.index_select(0, indices), x.view_as(x)


def _offsets(lengths: Tensor) -> Tensor:
    return F.pad(torch.cumsum(lengths, dim=0, dtype=torch.int32), (1, 0))


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch, one after the other.

    Args:
        hidden_states: ``(B, S, ...)``.
        attention_mask: ``(B, S)``, bool or int: 1 where a token is used.
        unused_mask: ``(B, S)``, likewise: 1 where there is a token that is not used.

    Returns:
        ``(tokens, indices, cu_seqlens, max_seqlen, seqused)``: the tokens of either mask, ``(T, ...)``, their rows in
        the flattened batch, int32 ``(B + 1,)``, an int, and int32 ``(B,)``, the used tokens of each sequence.
    """
    present = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = present.sum(dim=-1, dtype=torch.int32)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(present.flatten()).flatten()
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _offsets(lengths), int(lengths.max()), used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The tokens of a padded batch whose rows hold several sequences each.

    Args:
        hidden_states: ``(B, S, ...)``.
        attention_mask_in_length: int ``(B, S)``: the lengths of the sequences of a row, then zeros.

    Returns:
        ``(tokens, indices, cu_seqlens, max_seqlen)``, as unpad_input.
    """
    filled = attention_mask_in_length.sum(dim=-1, keepdim=True)
    columns = torch.arange(attention_mask_in_length.shape[-1], device=filled.device, dtype=filled.dtype)
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    indices = torch.nonzero((columns < filled).flatten()).flatten()
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _offsets(lengths), int(lengths.max())


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """``(batch, seqlen, ...)``: the tokens ``(T, ...)`` back at their rows ``indices``, 0 elsewhere."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
