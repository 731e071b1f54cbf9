"""flash_attn.bert_padding against loops over tokens."""

from __future__ import annotations

from typing import Any

import torch
from surface_modules import SOURCES

PADDING: Any = SOURCES["flash_attn.bert_padding"]


def test_unpad_and_pad() -> None:
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.int32)
    x = torch.randn(3, 4, 2, 5, requires_grad=True)
    tokens, indices, cu_seqlens, longest, used = PADDING["unpad_input"](x, mask)
    places = [(b, i) for b in range(3) for i in range(4) if mask[b, i]]
    assert indices.tolist() == [4 * b + i for b, i in places]
    assert torch.equal(tokens, torch.stack([x[b, i] for b, i in places]))
    assert cu_seqlens.tolist() == [0, 3, 3, 6] and cu_seqlens.dtype == torch.int32
    assert longest == 3 and type(longest) is int and used.tolist() == [3, 0, 3]
    back = PADDING["pad_input"](tokens, indices, 3, 4)
    assert torch.equal(back, x * mask[..., None, None])
    weights = torch.randn_like(back)
    (gradient,) = torch.autograd.grad((back * weights).sum(), x)
    assert torch.equal(gradient, weights * mask[..., None, None])


def test_unused_tokens_are_kept_and_not_counted() -> None:
    mask, unused = torch.tensor([[1, 0, 0], [1, 1, 0]]), torch.tensor([[0, 1, 0], [0, 0, 1]])
    x = torch.arange(6.0).view(2, 3, 1)
    tokens, indices, cu_seqlens, longest, used = PADDING["unpad_input"](x, mask, unused)
    assert tokens.flatten().tolist() == indices.tolist() == [0, 1, 3, 4, 5]
    assert cu_seqlens.tolist() == [0, 2, 5] and longest == 3 and used.tolist() == [1, 2]


def test_concatenated_sequences() -> None:
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    x = torch.arange(12.0).view(2, 6, 1)
    tokens, indices, cu_seqlens, longest = PADDING["unpad_input_for_concatenated_sequences"](x, lengths)
    assert tokens.flatten().tolist() == indices.tolist() == [0, 1, 2, 3, 4, 6]
    assert cu_seqlens.tolist() == [0, 2, 5, 6] and cu_seqlens.dtype == torch.int32 and longest == 3


def test_first_axis_functions() -> None:
    x, rows = torch.randn(5, 3, requires_grad=True), torch.tensor([3, 0])
    picked, rest = PADDING["index_first_axis_residual"](x, rows)
    assert torch.equal(picked, x[rows]) and torch.equal(rest, x)
    a, b = torch.randn(2, 3), torch.randn(5, 3)
    (gradient,) = torch.autograd.grad((picked * a).sum() + (rest * b).sum(), x)
    expected = b.clone()
    expected[rows] += a
    torch.testing.assert_close(gradient, expected)
    put = PADDING["index_put_first_axis"](a, rows, 5)
    assert torch.equal(put[rows], a) and not put[[1, 2, 4]].any()
