"""Packed sequences that only ``position_ids`` tell: found once a forward pass, in its first layer."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from . import forms


class _Found(NamedTuple):
    """What was found in the positions of the forward pass that runs."""

    positions: ReferenceType[Tensor]
    version: int | None  # None: an inference tensor, which counts no changes
    layer: int
    packed: Tensor | None


class _Last(threading.local):
    found: _Found | None = None


_last = _Last()


def packed_by_positions(module: torch.nn.Module, positions: Any, q: Tensor, k: Tensor) -> Tensor | None:
    """The packed form of `forms` if the rows hold several sequences each, else None.

    It waits for the device once a forward pass: all layers of a pass get one tensor of positions. Traced code, which
    must not read values, has what the mask function found instead.

    Args:
        module: the layer, with its ``layer_idx``.
        positions: ``(S,)``, ``(B, S)``, or ``(rows, B, S)`` with a row for each rotary axis; None: one sequence a row.
        q: ``(B, Sq, H, D)``.
        k: ``(B, Sk, Hkv, D)``.
    """
    if not isinstance(positions, Tensor) or q.shape[1] < 2 or q.shape[1] != k.shape[1]:
        return None
    if not 1 <= positions.dim() <= 3 or positions.shape[-1] != q.shape[1] or torch.compiler.is_compiling():
        return None
    batch, length = q.shape[:2]
    if positions.dim() > 1 and positions.shape[-2] not in (1, batch):
        return None
    version = None if positions.is_inference() else positions._version
    layer = getattr(module, "layer_idx", None)
    layer = -1 if layer is None else int(layer)
    found = _last.found
    same = found is not None and found.positions() is positions and found.version == version
    if found is not None and same and (version is not None or layer > found.layer):
        _last.found = found._replace(layer=layer)
        return found.packed
    starts = _starts(positions).expand(batch, length)
    packed = forms.make_packed(starts, None) if bool(starts[:, 1:].any()) else None
    _last.found = _Found(ref(positions), version, layer, packed)
    return packed


def _starts(positions: Tensor) -> Tensor:
    """bool ``(B | 1, S)``: True where a sequence starts; column 0 is True."""
    if positions.dim() == 3:
        # Images repeat positions in one axis and step back in others; only the first token is at 0 in all of them.
        inside = (positions == 0).all(0)[:, 1:]
    else:
        # A position that does not follow its predecessor starts a sequence: transformers' rule for packed rows.
        inside = positions.reshape(-1, positions.shape[-1]).diff(dim=1) != 1
    return torch.nn.functional.pad(inside, (1, 0), value=True)
