"""Types of the compiled module (csrc/bindings/module.cpp).

Tensors are CUDA tensors; numbers are what host/params.h says. `stream` is a raw cudaStream_t, or -1 for the stream that
torch works on. What does not fit raises broadhead.errors.KernelError, which also carries a kernel library's error text.
"""

from collections.abc import Callable
from typing import Any, TypedDict

from torch import Tensor

from .call.check import CheckedCall
from .plan.dispatch import Plan

class Family(TypedDict):
    archs: str  # as compiled: "80;90"
    cuda: tuple[int, int]
    kernels: list[str]  # row ids
    path: str

class BuildInfo(TypedDict):
    version: str
    families: dict[str, Family]
    errors: dict[str, str]  # family: why its library did not load

def build_info() -> BuildInfo: ...

# A torch function that makes a tensor, its arguments and its keywords; without arguments it is given q.
Allocation = tuple[Callable[..., Tensor], tuple[Any, ...] | None, dict[str, Any] | None]
# The fields of AttentionArgs (call/arguments.py): q, k, v, qv, out, ...
Call = tuple[Any, ...]

class Launch:
    """What all calls of a kind have in common; the first one (run_new) packs the rest of its argument block."""

    def __init__(
        self,
        *,
        call: CheckedCall,
        plan: Plan,  # with a row and a schedule
        device: int,
        out: Allocation,  # as q with Dv; bf16 for 8-bit q. For calls that pass none
        lse: Allocation,  # fp32 (B, Hq, Sq) or (Hq, T). For calls that want one
        identity: tuple[Any, ...],  # what scheduler metadata must have been made for: arguments of check_identity
        dispatch: tuple[str, str | None, str],  # what last_dispatch() returns
    ) -> None: ...

class BackwardLaunch:
    """What all backward calls of a kind have in common."""

    def __init__(
        self,
        *,
        call: CheckedCall,
        plan: Plan,  # with a row and a schedule
        device: int,
        deterministic: bool,
    ) -> None: ...

def connect(
    *,
    records: dict[int, Any],  # address of metadata -> what it was made for
    # (function, metadata, *identity) -> the record that it compared, or None; raises to refuse
    check_identity: Callable[..., Any],
    exchange_device: Callable[[int], int],  # makes a device the current one -> the one before
    restore_device: Callable[[int], int],  # likewise, but makes no context on a device that has none
    is_grad_enabled: Callable[[], bool],
    state: Any,  # its `last` becomes the dispatch of a call that runs
    is_plain_type: Callable[[type], bool],  # whether tensors of a type are plain memory; asked once a type
    is_negative: Callable[[Tensor], bool],  # whether a tensor is a lazily negated view
    count_modes: Callable[[], int],  # dispatch modes that are active
    forward_ad: dict[str, Any],  # its "_current_level" is -1 outside forward-mode AD
    increment_version: Callable[[tuple[Tensor, ...]], None],  # tells autograd that tensors were written
    empty_like: Callable[[Tensor], Tensor],
    dtype: type,  # torch.dtype
    remember_metadata: Callable[[Tensor, Any], None],  # notes in `records` what a buffer was made for
) -> None: ...  # before any call is run
def run_known(function: str, need_lse: bool, call: Call, /) -> tuple[Tensor, Tensor | None] | None: ...
def run_new(launch: Launch, function: str, need_lse: bool, call: Call, /) -> tuple[Tensor, Tensor | None]: ...
def run_known_shared(
    function: str,
    need_lse: bool,
    call: Call,
    shared_page_table: Tensor,  # int32 (pages,)
    shared_length: int,  # keys that all sequences see first
    /,
) -> tuple[Tensor, Tensor | None] | None: ...
def run_new_shared(
    launch: Launch,
    function: str,
    need_lse: bool,
    call: Call,
    shared_page_table: Tensor,
    shared_length: int,
    /,
) -> tuple[Tensor, Tensor | None]: ...
def run_backward(
    launch: BackwardLaunch,
    call: Call,  # with the result of the forward call as out; without pages, offsets of the cache, qv and factors
    dout: Tensor,  # as out
    softmax_lse: Tensor,  # fp32 (B, Hq, Sq) or (Hq, T), the last dimension contiguous
    dlse: Tensor | None,  # likewise
    dq: Tensor,  # as q, written
    dk: Tensor,  # as k, written
    dv: Tensor,  # as v, written
    dsinks: Tensor | None,  # fp32 (Hq,), written; exactly with sinks
    /,
) -> None: ...
def forget_calls() -> None: ...
def run_known_append(
    function: str,
    need_lse: bool,
    call: Call,
    new: tuple[Any, ...],  # the fields of NewKeys (api/append.py)
    /,
) -> tuple[Tensor, Tensor | None] | None: ...
def remember_append(
    dispatch: tuple[str, str | None, str],
    causal_or_local: bool,
    call: Call,
    new: tuple[Any, ...],
    attention: Call,  # the call behind its append, which ran by a Launch: rotated q, new lengths
    /,
) -> bool: ...  # whether there is such a Launch
def run_known_merge(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor | None, /
) -> tuple[Tensor, Tensor] | None: ...
def run_new_merge(
    device: int,
    new_out: Allocation,  # as out_a; for calls that pass none
    new_lse: Allocation,  # as lse_a
    out_a: Tensor,  # fp32, bf16 or fp16 (B, S, H, Dv) or (T, H, Dv)
    lse_a: Tensor,  # fp32 (B, H, S) or (H, T)
    out_b: Tensor,  # as out_a
    lse_b: Tensor,  # as lse_a
    out: Tensor | None,  # as out_a, written; may be out_a or out_b
    /,
) -> tuple[Tensor, Tensor]: ...
def known_calls_size() -> tuple[int, int]: ...  # how many calls are known, and the bytes that they take
def bound_known_calls(bytes: int) -> None: ...  # 0: as the module is built
def run_known_metadata(
    cache_seqlens: Tensor,  # int32 (B,)
    cu_seqlens_q: Tensor | None,  # int32 (B + 1,)
    cache_leftpad: Tensor | None,  # int32 (B,)
    out: Tensor | None,  # int32 (1 + 4 * round_up(batch, 4),) or longer, written
    page_table: Tensor | None,  # int32 (B, max_pages); only its shape is looked at
    numbers: tuple[Any, ...],  # the other arguments of get_scheduler_metadata
    /,
) -> Tensor | None: ...
def run_new_metadata(
    device: int,
    new_metadata: Callable[[Tensor], Tensor],  # given cache_seqlens; for requests that pass no out
    made_for: Any,  # what remember_metadata is given with each buffer
    schedule: tuple[int, ...],  # ScheduleNumbers (run/metadata.py)
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor | None,
    cache_leftpad: Tensor | None,
    out: Tensor | None,
    page_table: Tensor | None,
    numbers: tuple[Any, ...] | None,  # None: no other request is to be run as this one
    /,
) -> Tensor: ...
def combine(
    out_partial: Tensor,  # fp32 (splits, rows, heads, Dv)
    lse_partial: Tensor,  # fp32 (splits, rows, heads)
    out: Tensor,  # fp32, bf16 or fp16 (rows, heads, Dv)
    softmax_lse: Tensor | None,  # fp32 (rows, heads)
    stream: int,
    /,
) -> None: ...
def append_kv(
    k_cache: Tensor,  # (rows, S, Hkv, D) or (pages, page_size, Hkv, D); written
    v_cache: Tensor,  # as k_cache with Dv; written
    k_new: Tensor,  # (B, S_new, Hkv, D) or (T_new, Hkv, D); the caches' dtype, or bf16 or fp16 for e4m3 caches
    v_new: Tensor,  # as k_new with Dv
    cache_seqlens: Tensor,  # int32 (B,), before the append
    seqlens_out: Tensor,  # int32 (B,), written: after it
    q: Tensor | None,  # (B, Sq, Hq, D) or (T, Hq, D), dtype of k_new; with rotary_cos alone
    q_out: Tensor | None,  # as q, written: rotated; rows that no sequence owns are left alone
    rotary_cos: Tensor | None,  # (positions, rotary_dim / 2), fp32 or the dtype of k_new
    rotary_sin: Tensor | None,  # likewise
    rotary_seqlens: Tensor | None,  # int32 (B,)
    cu_seqlens_q: Tensor | None,  # int32 (B + 1,), exactly with packed q
    cu_seqlens_k_new: Tensor | None,  # int32 (B + 1,), exactly with packed k_new
    page_table: Tensor | None,  # int32 (B or more, max_pages)
    cache_batch_idx: Tensor | None,  # int32 (B,)
    k_descale: Tensor | None,  # fp32 (B, Hkv)
    v_descale: Tensor | None,  # fp32 (B, Hkv)
    rotary_interleaved: int,
    causal_or_local: int,  # q token i is at the position of new token i; else all are at that of the first
    stream: int,
    /,
) -> None: ...
