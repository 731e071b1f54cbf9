"""Blocks of tokens that see each other, such as those of an image: read from the mask function, as ranges of keys.

transformers joins blocks to a causal mask by functions of indices, which hold the block of each token. That tensor of a
number a token is all that is used here: no mask of queries times keys is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_HOME = "transformers.masking_utils"
#: In transformers 5.0 each model with images has a function of its own, of this name.
_OWN_BLOCKS = "token_type_ids_mask_function.<locals>.inner_mask"


class Blocks(NamedTuple):
    """What a mask function says, in parts: a causal mask, and blocks whose tokens see each other besides."""

    causal: bool = False
    #: Integers ``(B | 1, S)``, the block of each token; negative: none. None: no blocks.
    ids: Tensor | None = None
    #: Keys that the causal part leaves to a query, its own included; None: all.
    window: int | None = None
    #: The window bounds the blocks, too.
    bounded: bool = False
    #: Integers ``(B | 1, S)``, the packed sequence of each token; None: a row is one sequence.
    owner: Tensor | None = None
    #: Positions stand in place of tokens, which is the same only inside one packed sequence.
    remapped: bool = False


class Runs(NamedTuple):
    """The live keys of each row by blocks; all but torn ``(B, Sk)``."""

    inside: Tensor  # bool: the key belongs to a block
    begin: Tensor  # of the run of equal keys around a key
    end: Tensor
    sequence_begin: Tensor | None  # where rows are packed: of the sequence of the key
    torn: Tensor  # bool (B,): a block has other keys between its own


def read(mask_function: Callable[..., Any] | None, local_size: int | None, config: Any) -> Blocks | None:
    """The parts of a causal mask with blocks, or None: there are no blocks, or not in a way that is known.

    It looks at the functions of transformers that ``mask_function`` is made of, and at no value on a device.

    Args:
        mask_function: the index-based mask of the model.
        local_size: the window that transformers tells of the layers; None where it tells none.
        config: the model's, with the window of its local layers.
    """
    found = None if mask_function is None else _read(mask_function, None)
    if found is None or found.ids is None or not found.causal or (found.remapped and found.owner is None):
        return None
    told = local_size
    if local_size is None and found.bounded:  # a model that adds the window itself tells it by its config alone
        told = getattr(config, "sliding_window", None)
    return found if found.window == told else None


def _read(function: Any, positions: Tensor | None) -> Blocks | None:
    """The parts of one function; positions: what it takes in place of tokens."""
    name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", "")
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    held = dict(zip(names, (cell.cell_contents for cell in cells), strict=True))
    if name == _OWN_BLOCKS and module.startswith("transformers.models."):
        types, groups = held.get("token_type_ids"), held.get("image_group_ids")
        if types is None or groups is None or positions is not None:
            return None
        return Blocks(ids=torch.where(types == 1, groups, -1))
    if module != _HOME:
        return None
    if name == "causal_mask_function":
        return Blocks(causal=True)
    if name == "sliding_window_overlay.<locals>.inner_mask":
        return Blocks(window=held["sliding_window"])
    if name == "blockwise_overlay.<locals>.inner_mask":
        ids = held["block_sequence_ids"]
        if positions is not None:
            ids = ids.expand(positions.shape[0], -1).gather(1, positions.long().clamp(0, ids.shape[1] - 1))
        return Blocks(ids=ids, remapped=positions is not None)
    if name == "packed_sequence_mask_function.<locals>.inner_mask":
        return None if positions is not None else Blocks(owner=held["packed_sequence_mask"])
    if name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        part = None if positions is not None else _read(held["mask_function"], held["position_ids"])
        return None if part is None else part._replace(remapped=True)
    if name not in ("and_masks.<locals>.and_mask", "or_masks.<locals>.or_mask"):
        return None
    parts = [_read(each, positions) for each in held["mask_functions"]]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return _intersection(known) if name.startswith("and") else _union(known)


def _intersection(parts: list[Blocks]) -> Blocks | None:
    unions = [part for part in parts if part.ids is not None]
    windows = [part.window for part in parts if part.window is not None]
    owners = [part.owner for part in parts if part.owner is not None]
    causals = [part for part in parts if part.causal]
    if len(unions) > 1 or len(windows) > 1 or len(owners) > 1:
        return None
    # Blocks alone, or blocks that a second causal mask cuts, are another mask.
    if unions and (not unions[0].causal or len(causals) > 1):
        return None
    union = unions[0] if unions else Blocks()
    return Blocks(
        causal=bool(causals),
        ids=union.ids,
        window=windows[0] if windows else None,
        bounded=bool(unions) and (union.bounded or (bool(windows) and union.window is None)),
        owner=owners[0] if owners else None,
        remapped=any(part.remapped for part in parts),
    )


def _union(parts: list[Blocks]) -> Blocks | None:
    bases = [part for part in parts if part.ids is None]
    blocks = [part for part in parts if part.ids is not None]
    if len(bases) != 1 or len(blocks) != 1:
        return None
    base, block = bases[0], blocks[0]
    alone = not block.causal and block.window is None and block.owner is None
    # Blocks joined after sequences were separated reach from one into another.
    if not alone or not base.causal or base.owner is not None:
        return None
    return base._replace(ids=block.ids, remapped=base.remapped or block.remapped)


def find_runs(found: Blocks, real: Tensor, kv_offset: int) -> Runs:
    """Where the blocks lie among the keys ``real``, bool ``(B, Sk)``, of which the first is token kv_offset."""
    batch, length = real.shape
    assert found.ids is not None
    ids = torch.where(real, _of_keys(found.ids, batch, length, kv_offset, real.device), -1)
    place = torch.arange(length, device=real.device).expand(batch, length)
    changes = ids[:, 1:] != ids[:, :-1]
    order = ids.argsort(dim=1, stable=True)
    in_order = ids.gather(1, order)
    together = in_order[:, 1:] == in_order[:, :-1]
    sequence_begin = None
    if found.owner is not None:
        owner = _of_keys(found.owner, batch, length, kv_offset, real.device)
        starts = owner[:, 1:] != owner[:, :-1]
        changes = changes | starts
        in_order_owner = owner.gather(1, order)
        together = together & (in_order_owner[:, 1:] == in_order_owner[:, :-1])
        sequence_begin = _last_true(starts, place)
    end = torch.where(torch.nn.functional.pad(changes, (0, 1), value=True), place + 1, length)
    return Runs(
        inside=ids >= 0,
        begin=_last_true(changes, place),
        end=end.flip(1).cummin(1).values.flip(1),
        sequence_begin=sequence_begin,
        torn=(together & (in_order[:, 1:] >= 0) & (order.diff(dim=1) != 1)).any(1),
    )


def _of_keys(values: Tensor, batch: int, length: int, kv_offset: int, device: torch.device) -> Tensor:
    """``values`` ``(B | 1, S)`` of tokens for the keys, ``(B, length)``; tokens behind the last value have -1."""
    values = values[:, kv_offset : kv_offset + length].to(device=device, dtype=torch.int64)
    return torch.nn.functional.pad(values, (0, length - values.shape[1]), value=-1).expand(batch, length)


def _last_true(inside: Tensor, place: Tensor) -> Tensor:
    """For each of ``(B, S)`` places the last one, itself included, where ``inside`` ``(B, S - 1)`` is True, or 0."""
    return torch.where(torch.nn.functional.pad(inside, (1, 0)), place, 0).cummax(1).values


def ranges_of(runs: Runs, first_query: int | Tensor, q_length: int, origin: Tensor) -> Tensor:
    """int32 ``(B, q_length, 2)``: the keys ``[begin, end)`` that each query sees besides; ``(0, 0)``: none.

    Args:
        runs: of the keys.
        first_query: the key of the first query.
        q_length: queries of a sequence.
        origin: ``(B, Sk)`` or broadcastable to it, the key that positions count from.
    """
    both = torch.stack([runs.begin - origin, runs.end - origin], dim=2)
    both = torch.where(runs.inside[:, :, None], both, 0).to(torch.int32)
    if isinstance(first_query, int):
        return both[:, first_query : first_query + q_length]
    places = first_query + torch.arange(q_length, device=both.device)
    return both[:, places.clamp(0, both.shape[1] - 1)]
