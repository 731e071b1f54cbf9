"""Argument checks: every refusal names the function, the argument, what came and what is accepted."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import InvalidArgumentError, InvalidTypeError
from .names import shown_name
from .scalars import INT32_MAX as INT32_MAX
from .scalars import MAX_SPLITS as MAX_SPLITS
from .scalars import check_attention_chunk as check_attention_chunk
from .scalars import check_bool as check_bool
from .scalars import check_int as check_int
from .scalars import check_num_splits as check_num_splits
from .scalars import check_number as check_number
from .scalars import check_optional_bool as check_optional_bool
from .scalars import check_softcap as check_softcap
from .scalars import describe_value as describe_value

#: Keys of a sequence: kernels add a window side or a chunk (masking.UNBOUNDED_WINDOW) to a position in 32 bits.
MAX_SEQLEN_K = 1 << 30
MAX_NUM_HEADS = 65535  # grid dimensions of a launch
#: Cuts of a sequence lie between whole tiles of keys.
TOKENS_PER_SPLIT_STEP = 64
MAX_TOKENS_PER_SPLIT = 1 << 30  # longer than any sequence
#: The results of the pieces that tokens_per_split makes: more is a page table or a cache far wider than its sequences.
MAX_CELL_BYTES = 4 << 30

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
#: Queries of these dtypes also attend over keys and values of float8_e4m3fn.
QUERY_DTYPES_OF_E4M3_KEYS = (torch.bfloat16, torch.float16)
BACKENDS = (None, "cuda", "torch")
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def check_tensor(function: str, name: str, value: object, accepted: str) -> Tensor:
    """A tensor, whatever its shape."""
    if not isinstance(value, Tensor):
        raise InvalidTypeError(f"{function}: {name} must be {accepted}, got {describe_value(value)}")
    return value


def check_device(function: str, name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise InvalidArgumentError(
            f"{function}: {name} must be on the device of {shown_name(function, 'q')}, {device}, got {value.device}"
        )


def check_backend(function: str, backend: object) -> str | None:
    if backend is not None and not isinstance(backend, str):
        raise InvalidTypeError(f"{function}: backend must be None, 'cuda' or 'torch', got {describe_value(backend)}")
    if backend not in BACKENDS:
        raise InvalidArgumentError(f"{function}: backend must be None, 'cuda' or 'torch', got {backend!r}")
    return backend


def check_int32(
    function: str, name: str, value: object, shape: Sequence[int | None], device: torch.device, spelled: str
) -> Tensor:
    """An int32 tensor of ``shape`` (None: any size) with contiguous last dimension, on ``device``."""
    accepted = f"an int32 tensor of shape {spelled}"
    tensor = check_tensor(function, name, value, accepted)
    if tensor.dtype != torch.int32:
        raise InvalidTypeError(
            f"{function}: {name} must be {accepted}, got dtype {tensor.dtype};"
            f" convert it once with {name}.to(torch.int32)"
        )
    wrong_rank = tensor.dim() != len(shape)
    if wrong_rank or any(want not in (None, got) for got, want in zip(tensor.shape, shape, strict=True)):
        wanted = tuple("any" if want is None else want for want in shape)
        raise InvalidArgumentError(f"{function}: {name} must be {accepted} = {wanted}, got shape {tuple(tensor.shape)}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise InvalidArgumentError(
            f"{function}: {name} must be contiguous in its last dimension, got strides {tensor.stride()}"
        )
    check_device(function, name, tensor, device)
    return tensor


def check_attention_tensor(function: str, name: str, value: object, ranks: Sequence[int], layout: str) -> Tensor:
    """q, k, v or alike: floating dtype, rank, contiguous last dimension, head_dim a multiple of 8."""
    tensor = check_tensor(function, name, value, f"a tensor {layout}")
    if tensor.dtype not in FLOAT_DTYPES and tensor.dtype not in FLOAT8_DTYPES:
        raise InvalidTypeError(
            f"{function}: {name} must be bf16, fp16 or float8 (fp32 or fp64 on the torch backend), got dtype"
            f" {tensor.dtype}"
        )
    if tensor.dim() not in ranks:
        raise InvalidArgumentError(f"{function}: {name} must be {layout}, got shape {tuple(tensor.shape)}")
    head_dim = tensor.shape[-1]
    if head_dim == 0 or head_dim % 8 != 0:
        raise InvalidArgumentError(
            f"{function}: the last dimension (head_dim) of {name} must be a positive multiple of 8, got {head_dim};"
            " pad it with zeros and pass softmax_scale of the unpadded head_dim"
        )
    if tensor.stride(-1) != 1:
        raise InvalidArgumentError(
            f"{function}: {name} must be contiguous in its last dimension, got strides {tensor.stride()};"
            " a cache is never copied: copy it once, with broadhead.maybe_contiguous"
        )
    return tensor


def check_same_dtype(function: str, name: str, value: Tensor, dtype: torch.dtype) -> None:
    if value.dtype != dtype:
        raise InvalidTypeError(
            f"{function}: {name} must have the dtype of {shown_name(function, 'q')}, {dtype}, got {value.dtype}"
        )


def keys_fit_queries(kv_dtype: torch.dtype, q_dtype: torch.dtype) -> bool:
    """Whether queries of ``q_dtype`` attend over keys and values of ``kv_dtype``."""
    return kv_dtype == q_dtype or (kv_dtype == torch.float8_e4m3fn and q_dtype in QUERY_DTYPES_OF_E4M3_KEYS)


def check_key_dtypes(function: str, name_k: str, k: Tensor, name_v: str, v: Tensor, q_dtype: torch.dtype) -> None:
    """k of the dtype of q, or of float8_e4m3fn under 16-bit q; v of the dtype of k."""
    if not keys_fit_queries(k.dtype, q_dtype):
        raise InvalidTypeError(
            f"{function}: {name_k} must have the dtype of q, {q_dtype}, or, with bf16 or fp16 q, torch.float8_e4m3fn,"
            f" got {k.dtype}"
        )
    if v.dtype != k.dtype:
        raise InvalidTypeError(f"{function}: {name_v} must have the dtype of {name_k}, {k.dtype}, got {v.dtype}")


def check_descale(
    function: str, name: str, value: object, batch: int, num_heads_kv: int, device: torch.device
) -> Tensor:
    """fp32 factors of 8-bit values, one for each sequence and KV head; any strides, 0 among them."""
    factors = check_tensor(function, name, value, "an fp32 tensor of shape (batch, heads_kv)")
    if factors.dtype != torch.float32:
        raise InvalidTypeError(f"{function}: {name} must be fp32, got {factors.dtype}")
    check_shape(function, name, factors, (batch, num_heads_kv), "(batch, heads_kv)")
    check_device(function, name, factors, device)
    return factors


def check_tokens_per_split(function: str, tokens_per_split: object, num_splits: int) -> int:
    """0 (off) or a multiple of TOKENS_PER_SPLIT_STEP, which leaves no say to ``num_splits``."""
    tokens = check_int(function, "tokens_per_split", tokens_per_split)
    if tokens > MAX_TOKENS_PER_SPLIT:
        raise InvalidArgumentError(
            f"{function}: tokens_per_split must be 0 (off) or a multiple of {TOKENS_PER_SPLIT_STEP} up to"
            f" {MAX_TOKENS_PER_SPLIT}, got {tokens}"
        )
    if tokens % TOKENS_PER_SPLIT_STEP:
        raise InvalidArgumentError(
            f"{function}: tokens_per_split must be 0 (off) or a multiple of {TOKENS_PER_SPLIT_STEP}, got {tokens}"
        )
    if tokens and num_splits > 1:
        raise InvalidArgumentError(
            f"{function}: tokens_per_split={tokens} fixes where every sequence is cut, and num_splits={num_splits} asks"
            " for a number of splits: pass one of them (with tokens_per_split, num_splits is 0, or 1 for no cut)"
        )
    return tokens


def clamp_seqlen_k(capacity: int) -> int:
    """The keys that a sequence of a cache can have: page tables may be wider than any sequence."""
    return min(capacity, MAX_SEQLEN_K)


def check_cells(
    function: str, tokens_per_split: int, seqlen_k: int, rows: int, head_dim_v: int, page_size: int
) -> None:
    """Refuse pieces of ``tokens_per_split`` keys whose fp32 results (``rows`` of a piece, with LSE) take too much."""
    if tokens_per_split == 0 or seqlen_k <= tokens_per_split:
        return
    cells = -(-seqlen_k // tokens_per_split)
    cell_bytes = rows * (head_dim_v + 1) * 4
    if cells * cell_bytes <= MAX_CELL_BYTES:
        return
    most = max(1, MAX_CELL_BYTES // cell_bytes)
    enough = -(-seqlen_k // (most * TOKENS_PER_SPLIT_STEP)) * TOKENS_PER_SPLIT_STEP
    length, shorten = "the cache", "a shorter cache"
    if page_size:
        length, shorten = "page_table.size(1) * page_size", "a narrower page_table"
    raise InvalidArgumentError(
        f"{function}: tokens_per_split={tokens_per_split} cuts sequences of up to {seqlen_k} keys (the length of"
        f" {length}) into {cells} pieces, whose results take {cells * cell_bytes / 2**30:.1f} GiB; at most"
        f" {MAX_CELL_BYTES >> 30} GiB are allocated: pass tokens_per_split={enough} or more, or {shorten}"
    )


def check_shape(function: str, name: str, value: Tensor, shape: Sequence[int], spelled: str) -> None:
    if tuple(value.shape) != tuple(shape):
        raise InvalidArgumentError(
            f"{function}: {name} must have shape {spelled} = {tuple(shape)}, got {tuple(value.shape)}"
        )


def may_read(*values: Tensor | None) -> bool:
    """Whether the values of tensors may be read: none of them is on a device, traced, or a subclass's or functorch's.

    Reading a tensor of a device waits for it; one that is traced has no values.
    """
    if torch.compiler.is_compiling():
        return False
    for value in values:
        if value is None:
            continue
        if value.device.type != "cpu" or type(value) not in _PLAIN_TENSORS or _is_wrapped(value):
            return False
    return True


_clamped: contextvars.ContextVar[bool] = contextvars.ContextVar("broadhead_clamped", default=False)


@contextlib.contextmanager
def clamped() -> Iterator[None]:
    """Within, values out of range are clamped and not refused: for what runs below an operator, in compiled code."""
    token = _clamped.set(True)
    try:
        yield
    finally:
        _clamped.reset(token)


def are_checked(*values: Tensor | None) -> bool:
    """Whether values of these tensors that are out of range are refused: on a CPU, in eager mode."""
    return may_read(*values) and not _clamped.get()


def _is_wrapped(value: Tensor) -> bool:
    """Whether functorch hides a tensor behind this one."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


def check_lengths_on_cpu(function: str, name: str, lengths: Tensor | None) -> None:
    """Negative lengths; only where reading the tensor costs no device synchronisation."""
    if lengths is not None and are_checked(lengths) and bool((lengths < 0).any()):
        raise InvalidArgumentError(f"{function}: {name} must hold lengths >= 0, got {int(lengths.min())}")


def check_cu_seqlens_on_cpu(function: str, name: str, cu_seqlens: Tensor | None, total: int) -> None:
    """Offsets start at >= 0, never decrease and end within the packed tensor; on CPU only."""
    if cu_seqlens is None or not are_checked(cu_seqlens):
        return
    if int(cu_seqlens[0]) < 0 or bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()) or int(cu_seqlens[-1]) > total:
        raise InvalidArgumentError(
            f"{function}: {name} must hold offsets >= 0 that never decrease and end at most at {total} (the tokens"
            f" packed), got {cu_seqlens.tolist() if cu_seqlens.numel() <= 16 else 'other values'}"
        )


def pick_synonym(function: str, name: str, value: object, synonym: str, other: object) -> object:
    """The one of two spellings of an argument that was given."""
    same = value is other or (isinstance(value, int) and value == other)
    if value is not None and other is not None and not same:
        raise InvalidArgumentError(f"{function}: {name} and {synonym} are the same argument; pass one of them")
    return other if value is None else value


def pick_sinks(
    function: str, sinks: Tensor | None, s_aux: Tensor | None, learnable_sink: Tensor | None
) -> Tensor | None:
    """The sinks, under whichever of their three names they came."""
    sinks = pick_synonym(function, "sinks", sinks, "s_aux", s_aux)  # type: ignore[assignment]
    return pick_synonym(function, "sinks", sinks, "learnable_sink", learnable_sink)  # type: ignore[return-value]


def check_floating(function: str, name: str, value: object) -> Tensor:
    tensor = check_tensor(function, name, value, "a floating-point tensor")
    if tensor.dtype not in FLOAT_DTYPES:
        raise InvalidTypeError(f"{function}: {name} must be bf16, fp16, fp32 or fp64, got {tensor.dtype}")
    return tensor


def check_out(function: str, out: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    tensor = check_tensor(function, "out", out, f"a {dtype} tensor of shape {shape}")
    if tensor.dtype != dtype:
        raise InvalidTypeError(f"{function}: out must have dtype {dtype}, got {tensor.dtype}")
    check_shape(function, "out", tensor, shape, "that of one part")
    check_device(function, "out", tensor, device)
    return tensor
