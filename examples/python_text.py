"""Text to train on that every Python has: the language's help topics, one token a byte."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from loss_curves import CannotRunError
from torch import Tensor

VOCABULARY = 256
#: What the loss leaves out.
IGNORED = -100


class Packing(NamedTuple):
    """Sequences that lie one behind the other in a row of tokens."""

    cu_seqlens: Tensor  # int32 (sequences + 1,): where each begins, and where the last one ends
    positions: Tensor  # int64 (tokens,): the place of each token in its sequence
    max_seqlen: int


class Batch(NamedTuple):
    tokens: Tensor  # int64 (batch, context), packed: (1, tokens)
    labels: Tensor  # likewise: the token that follows
    packing: Packing | None

    def to(self, device: torch.device) -> Batch:
        packing = self.packing
        if packing is not None:
            packing = packing._replace(cu_seqlens=packing.cu_seqlens.to(device), positions=packing.positions.to(device))
        return Batch(self.tokens.to(device), self.labels.to(device), packing)


def read_paragraphs() -> list[bytes]:
    """The paragraphs of this Python's help topics, those of ``help("topics")``, with the empty line behind each."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CannotRunError(
            f"this Python lacks the module pydoc_data.topics, whose text is trained on ({error}); "
            "install the full standard library"
        ) from error
    return [part.encode() + b"\n\n" for name in sorted(topics) for part in topics[name].split("\n\n")]


class PythonText:
    """Random batches of the text; one seed gives the same batches again."""

    def __init__(self, batch: int, context: int, packed: bool, seed: int) -> None:
        paragraphs = read_paragraphs()
        self.stream = torch.frombuffer(bytearray(b"".join(paragraphs)), dtype=torch.uint8).long()
        lengths = torch.tensor([len(paragraph) for paragraph in paragraphs])
        self.starts = lengths.cumsum(0) - lengths
        self.batch, self.context, self.packed = batch, context, packed
        self.random = random.Random(seed)

    def next(self) -> Batch:
        """The next batch. Packed, its rows are cut where a paragraph ends, and no token sees another one."""
        begins = [self.random.randrange(len(self.stream) - self.context) for _ in range(self.batch)]
        places = torch.tensor(begins)[:, None] + torch.arange(self.context)
        tokens, labels = self.stream[places], self.stream[places + 1]
        if not self.packed:
            return Batch(tokens, labels, None)
        is_start = torch.isin(places, self.starts)
        is_start[:, 0] = True
        offsets = torch.cat([is_start.flatten().nonzero()[:, 0], torch.tensor([tokens.numel()])])
        lengths = offsets.diff()
        positions = torch.arange(tokens.numel()) - offsets[:-1].repeat_interleave(lengths)
        labels = labels.flatten().clone()
        labels[offsets[1:] - 1] = IGNORED
        packing = Packing(offsets.to(torch.int32), positions, int(lengths.max()))
        return Batch(tokens.view(1, -1), labels.view(1, -1), packing)
