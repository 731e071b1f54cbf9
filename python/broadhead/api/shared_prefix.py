"""flash_attn_with_shared_prefix: decode over sequences that begin with the same tokens, which are read once."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from ..call import validation as check
from ..call import values
from ..call.arguments import AttentionArgs
from ..call.inputs import changed, read_tensors
from ..call.layout import contiguous
from ..call.plain import plain, plain_fields, refuse_transformed, runs_as_operator
from ..errors import InvalidArgumentError, InvalidTypeError
from ..run import known
from ..run.fallback import state
from ..run.forward import check_only
from ..run.shared_prefix import COMPOSED, FUNCTION, Composed, decide, run_first
from .forward import run_forward
from .kvcache import flash_attn_with_kvcache
from .merge import merge_attn_states
from .results import may_return_lse


@may_return_lse
def flash_attn_with_shared_prefix(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    prefix_len: int,
    page_table: Tensor,
    cache_seqlens: Tensor,
    prefix_page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    out: Tensor | None = None,
    backend: str | None = None,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries over paged sequences that share their first ``prefix_len`` tokens (cascade).

    All queries attend to the prefix in one pass, so its keys are read once and not once for each sequence. Each
    sequence attends to its own rest, and the two results are merged by their LSE. Few queries take one launch of a
    decode kernel and its combine; many take a call for each pass and merge_attn_states. ``last_dispatch()`` tells
    which, and why.

    Args:
        q: queries, ``(B, Sq, Hq, D)``, or ``(T, Hq, D)`` with cu_seqlens_q and max_seqlen_q.
        k_cache: pages of keys, ``(num_pages, page_size, Hkv, D)``, as for flash_attn_with_kvcache.
        v_cache: pages of values, ``(num_pages, page_size, Hkv, Dv)``.
        prefix_len: tokens that all sequences share, >= 0; without prefix_page_table a multiple of page_size.
        page_table: int32 ``(B, max_pages)``: with prefix_page_table the pages of what follows the prefix, which begins
            on a page of its own; else those of the whole sequences, whose first pages are the same.
        cache_seqlens: int32 ``(B,)``, the keys to which page_table leads.
        prefix_page_table: int32 ``(pages,)``, the pages of the prefix; None: the first pages of page_table.
        cu_seqlens_q: int32 ``(B + 1,)``, offsets of the sequences in packed q.
        max_seqlen_q: tokens of the longest sequence in packed q.
        q_descale: fp32 ``(B, Hkv)``, factor of float8 q; that of sequence 0 is the prefix's.
        k_descale: fp32 ``(B, Hkv)``, factor of float8 keys, likewise.
        v_descale: fp32 ``(B, Hkv)``, factor of float8 values, likewise.
        causal: bottom-right aligned; the queries are the last tokens of their sequences, behind the prefix.
        sinks: ``(Hq,)``, fp32 or the dtype of out; they join the denominator once.
        scheduler_metadata: int32, made for the call over what follows the prefix.
        softmax_scale, softcap, ...: the other arguments are those of flash_attn_with_kvcache.

    Returns:
        out, of the shape of q with Dv; with return_softmax_lse ``(out, softmax_lse)``, softmax_lse fp32 ``(B, Hq, Sq)``
        or ``(Hq, T)``, natural log.

    Raises:
        InvalidArgumentError: an argument has a wrong value, shape or device; the text names it.
        InvalidTypeError: an argument has a wrong type or dtype; the text names it.
        UnsupportedError: no kernel runs the call, and backend="cuda" or BROADHEAD_STRICT=1 forbids the fallback.
    """
    if type(prefix_len) is not int and not is_compiling():
        prefix_len = check.check_int(FUNCTION, "prefix_len", prefix_len)
    if isinstance(causal, Tensor) and causal.dim() > 0:
        raise InvalidTypeError(
            f"{FUNCTION}: causal must be True or False, got {check.describe_value(causal)}; a tensor is for"
            " flash_attn_with_kvcache, over the whole sequences"
        )
    by_length = prefix_page_table is None
    if by_length:
        if not is_compiling():
            _check_prefix(q, k_cache, page_table, cache_seqlens, prefix_len, None)
        pages = prefix_len // k_cache.shape[1]
        prefix_page_table, page_table = page_table[0, :pages], page_table[:, pages:]
        cache_seqlens = cache_seqlens - prefix_len
    assert prefix_page_table is not None
    # The fields of AttentionArgs.
    call = (
        q, k_cache, v_cache, None, out, cu_seqlens_q, None, None, cache_seqlens, max_seqlen_q, None, page_table, None,
        None, q_descale, k_descale, v_descale, softmax_scale, causal, (-1, -1), 0, softcap, scheduler_metadata,
        num_splits, None, 0, sinks, None, backend, 0,
    ) + (None, False, None, None)  # fmt: skip
    composed: Composed | None = None
    if not is_dynamo_compiling() and not runs_as_operator(*call, prefix_page_table):
        result = _run_one_launch(
            call, prefix_page_table, prefix_len, need_lse=return_softmax_lse, unchecked=not by_length
        )
        if not isinstance(result, Composed):
            return result if return_softmax_lse else result[0]
        composed = result
    elif not by_length and not is_compiling():
        _check_prefix(q, k_cache, page_table, cache_seqlens, prefix_len, prefix_page_table)
    if out is not None and not is_dynamo_compiling():
        refuse_transformed(FUNCTION, "out=", *call, prefix_page_table)

    own_call = AttentionArgs(*call)
    if prefix_len == 0:
        own, own_lse = run_forward(FUNCTION, own_call)
        return (own, own_lse) if return_softmax_lse else own
    # Every query sees the prefix: there the sinks join. What follows it may be empty, and have no denominator.
    # The first part goes to a tensor of its own: what refuses the second must find out as it was.
    if out is not None and not is_compiling():
        check_only(FUNCTION, own_call)
    own, own_lse = run_forward(FUNCTION, changed(own_call, {"sinks": None, "out": None}))
    # The queries of all sequences are those of one sequence here: every one of them sees the whole prefix.
    tokens = q.flatten(0, 1) if cu_seqlens_q is None else q
    own_row = None if composed is None else state.last[1]
    page_size = k_cache.shape[1]
    shared, shared_lse = flash_attn_with_kvcache(
        tokens.unsqueeze(0), k_cache, v_cache, page_table=prefix_page_table[: -(-prefix_len // page_size)].unsqueeze(0),
        cache_seqlens=prefix_len if prefix_len % page_size else None, q_descale=_first(q_descale),
        k_descale=_first(k_descale), v_descale=_first(v_descale), softmax_scale=softmax_scale, softcap=softcap,
        num_splits=num_splits, sinks=sinks, backend=backend, return_softmax_lse=True,
    )  # fmt: skip
    if composed is not None:
        reason = f"{COMPOSED}behind {own_row or 'torch'} over what follows it: {composed.why}"
        state.last = (*state.last[:2], reason)
    shared, shared_lse = shared[0].view(own.shape), shared_lse[0]
    if cu_seqlens_q is None:
        shared_lse = shared_lse.view(-1, q.shape[0], q.shape[1]).transpose(0, 1)
    merged, lse = merge_attn_states(own, own_lse, shared, shared_lse, own if out is None else out, backend=backend)
    return (merged, lse) if return_softmax_lse else merged


def _run_one_launch(
    call: tuple[Any, ...], prefix_page_table: Any, prefix_len: Any, *, need_lse: bool, unchecked: bool
) -> tuple[Tensor, Any] | Composed:
    """``(out, softmax_lse)`` of one launch, or why there is none.

    Args:
        call: the fields of AttentionArgs.
        prefix_page_table: int32 ``(pages,)``.
        prefix_len: tokens of the prefix.
        need_lse: without it softmax_lse may be None.
        unchecked: the prefix has not been validated yet.
    """
    result = known.run_known_shared(FUNCTION, need_lse, call, prefix_page_table, prefix_len)
    if result is not None:
        return result
    given = AttentionArgs(*call)
    args = read_tensors(FUNCTION, plain_fields(FUNCTION, given, written=("out",)))
    pages = contiguous(plain(FUNCTION, "prefix_page_table", prefix_page_table))
    if args is not given or pages is not prefix_page_table:
        found = _run_one_launch(args, pages, prefix_len, need_lse=need_lse, unchecked=unchecked)
        return found if isinstance(found, Composed) or given.out is None else (given.out, found[1])
    if unchecked:
        _check_prefix(args.q, args.k, args.page_table, args.seqused_k, prefix_len, prefix_page_table)
    decision = decide(args, prefix_len)
    if isinstance(decision, Composed):
        return decision
    return run_first(decision, need_lse, args, prefix_page_table, prefix_len)


def _first(descale: Tensor | None) -> Tensor | None:
    return None if descale is None else descale[:1]


def _check_prefix(
    q: Any, k_cache: Any, page_table: Any, cache_seqlens: Any, prefix_len: Any, prefix_page_table: Any
) -> None:
    """What the two calls behind this one would report under other names."""
    check.check_tensor(FUNCTION, "q", q, "a tensor")
    layout = "(num_pages, page_size, heads_kv, head_dim)"
    check.check_attention_tensor(FUNCTION, "k_cache", k_cache, (4,), layout)
    page_size = k_cache.shape[1]
    if page_size < 1:
        raise InvalidArgumentError(f"{FUNCTION}: page_size (k_cache.shape[1]) must be >= 1, got 0")
    check.check_int(FUNCTION, "prefix_len", prefix_len)
    table = check.check_int32(FUNCTION, "page_table", page_table, (None, None), q.device, "(batch, max_pages)")
    check.check_int32(FUNCTION, "cache_seqlens", cache_seqlens, (table.shape[0],), q.device, "(batch,)")
    if prefix_page_table is not None:
        check.check_int32(FUNCTION, "prefix_page_table", prefix_page_table, (None,), q.device, "(pages,)")
        held = prefix_page_table.shape[0] * page_size
        if prefix_len > held:
            raise InvalidArgumentError(
                f"{FUNCTION}: prefix_len must be at most what prefix_page_table holds, {prefix_page_table.shape[0]}"
                f" pages of {page_size} = {held}, got {prefix_len}"
            )
        _check_prefix_pages("prefix_page_table", prefix_page_table, k_cache, prefix_len)
        return
    if prefix_len % page_size:
        raise InvalidArgumentError(
            f"{FUNCTION}: prefix_len must be a multiple of page_size {page_size} without prefix_page_table, got"
            f" {prefix_len}; round it down, the rest of the shared tokens then counts as each sequence's own"
        )
    if prefix_len > table.shape[1] * page_size:
        raise InvalidArgumentError(
            f"{FUNCTION}: prefix_len must be at most page_table.size(1) * page_size = {table.shape[1] * page_size}, got"
            f" {prefix_len}"
        )
    _check_prefix_pages("page_table", table[:1].flatten(), k_cache, prefix_len)


def _check_prefix_pages(name: str, pages: Tensor, k_cache: Tensor, prefix_len: int) -> None:
    """Refuse ids that no page has before anything is written; where they may be read."""
    if check.are_checked(pages):
        values.check_pages(
            FUNCTION, pages.view(1, -1), k_cache, [(0, 0, prefix_len)] if pages.numel() else [], None, name
        )
