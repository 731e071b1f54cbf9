"""Validates the masks that a call gives as values: causality by sequence, ranges of keys by query, trees of drafts."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..errors import InvalidArgumentError, InvalidTypeError
from . import validation as check
from .arguments import AttentionArgs
from .names import shown_name

#: Bits of a word of tree_mask: the keys at the end of a sequence that it speaks of, and the most drafts of a sequence.
TREE_KEYS = 64


class MaskRule(NamedTuple):
    """The mask of a call that follows from positions alone, normalised."""

    window_left: int  # -1: unbounded
    window_right: int  # -1: unbounded; causal is 0
    attention_chunk: int  # 0: off


def check_mask_values(function: str, args: AttentionArgs, batch: int, seqlen_q: int, rule: MaskRule) -> None:
    """The masks of ``args`` whose values only the device knows, and what they go with. Their values are not read.

    Args:
        batch: sequences of the call.
        seqlen_q: query tokens of the longest of them.
        rule: the mask beside them.

    Raises:
        InvalidTypeError: a wrong Python type or dtype.
        InvalidArgumentError: a wrong shape, stride or device, or two arguments that exclude each other.
    """
    tokens = tuple(args.q.shape[:-2])
    spelled = "total_q" if args.cu_seqlens_q is not None else "batch, seqlen_q"
    if args.causal_by_sequence is not None:
        _check_causal(function, args, batch)
    if args.prefix_lens is not None and rule.window_right != 0 and args.causal_by_sequence is None:
        raise InvalidArgumentError(f"{function}: prefix_lens requires causal=True, got causal=False")
    if args.query_ranges is not None:
        check.check_int32(function, "query_ranges", args.query_ranges, (*tokens, 2), args.q.device, f"({spelled}, 2)")
    if check.check_bool(function, "ranges_in_window", args.ranges_in_window) and args.query_ranges is None:
        raise InvalidArgumentError(
            f"{function}: ranges_in_window=True must come with query_ranges, which it restricts, got query_ranges=None"
        )
    if args.tree_mask is not None:
        accepted = f"an int64 tensor of shape ({spelled}{'' if len(tokens) > 1 else ','})"
        tree_mask = check.check_tensor(function, "tree_mask", args.tree_mask, accepted)
        if tree_mask.dtype != torch.int64:
            raise InvalidTypeError(
                f"{function}: tree_mask must be {accepted}, a bit for each of the last {TREE_KEYS} keys, got dtype"
                f" {tree_mask.dtype}"
            )
        if tuple(tree_mask.shape) != tokens:
            raise InvalidArgumentError(
                f"{function}: tree_mask must be {accepted} = {tokens}, got shape {tuple(tree_mask.shape)}"
            )
        check.check_device(function, "tree_mask", tree_mask, args.q.device)
        check_tree(
            function,
            shown_name(function, "max_seqlen_q") if args.cu_seqlens_q is not None else "seqlen_q (q.shape[1])",
            seqlen_q,
            rule,
            query_ranges=args.query_ranges is not None,
            prefix_lens=args.prefix_lens is not None,
        )


def _check_causal(function: str, args: AttentionArgs, batch: int) -> None:
    """``causal`` as a tensor: bool or int32 of the batch."""
    accepted = "True or False, or a bool or int32 tensor of shape (batch,)"
    name = shown_name(function, "causal_by_sequence")
    causal = check.check_tensor(function, name, args.causal_by_sequence, accepted)
    if causal.dtype not in (torch.bool, torch.int32):
        raise InvalidTypeError(
            f"{function}: {name} must be {accepted}, got dtype {causal.dtype}; convert it once with"
            f" {name}.to(torch.bool)"
        )
    if tuple(causal.shape) != (batch,):
        raise InvalidArgumentError(
            f"{function}: {name} must be {accepted} = ({batch},), got shape {tuple(causal.shape)}"
        )
    check.check_device(function, name, causal, args.q.device)


def check_tree(
    function: str, name_q: str, seqlen_q: int, rule: MaskRule, *, query_ranges: bool, prefix_lens: bool
) -> None:
    """What a tree_mask goes with.

    Args:
        name_q: what the caller knows seqlen_q by.
        query_ranges: whether the call has them.
        prefix_lens: likewise.

    Raises:
        InvalidArgumentError: naming tree_mask and what it excludes.
    """
    for name, given in (("query_ranges", query_ranges), ("prefix_lens", prefix_lens)):
        if given:
            raise InvalidArgumentError(
                f"{function}: tree_mask and {name} exclude each other, got both; a word of tree_mask says all of the"
                f" last {TREE_KEYS} keys: set the bits that {name} would show, or leave tree_mask away"
            )
    if rule.attention_chunk > 0:
        raise InvalidArgumentError(
            f"{function}: tree_mask and attention_chunk exclude each other, got attention_chunk={rule.attention_chunk}"
            " with tree_mask; pass attention_chunk=0"
        )
    if rule.window_right > 0:
        raise InvalidArgumentError(
            f"{function}: tree_mask goes with a window_size whose right side is unbounded or 0 (causal), got"
            f" window_size=({rule.window_left}, {rule.window_right}) with tree_mask"
        )
    if seqlen_q > TREE_KEYS:
        raise InvalidArgumentError(
            f"{function}: tree_mask takes at most {TREE_KEYS} query tokens a sequence, got {name_q} = {seqlen_q};"
            " drafts are its last tokens"
        )
