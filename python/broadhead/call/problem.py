"""Everything that the choice of a kernel depends on, as a hashable AttentionProblem."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..errors import UnsupportedError
from ..support import DECODE_MAX_ROWS
from . import validation as check

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e5m2: "float8_e5m2",
}

#: Kernels move 16 bytes at a time.
ALIGNMENT_BYTES = 16
#: Rows of the fp32 sums of dq that a sequence of a fused kernel has at least, of the kernel that needs most
#: (csrc/common/dq_sums.h).
DQ_SUM_ROWS = 128


class _Fields(NamedTuple):
    """What an AttentionProblem holds."""

    direction: str  # "forward" or "backward"
    dtype: str  # a value of DTYPE_NAMES
    batch: int
    seqlen_q: int  # max over the batch
    seqlen_k: int  # max over the batch; page_table.size(1) * page_size when paged
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    page_size: int  # 0: not paged
    window_left: int  # -1: unbounded
    window_right: int  # -1: unbounded; causal is 0
    attention_chunk: int  # 0: off
    #: Sorted: support.FEATURES and EXTRA_FEATURES, "gradients", and what gradient_features says of these.
    features: tuple[str, ...]
    num_splits: int  # 0: heuristic
    pack_gqa: bool | None
    has_metadata: bool
    sm_margin: int
    obstacles: tuple[str, ...]  # strides or addresses that no kernel takes
    kv_dtype: str = ""  # of k and v where it is not that of q, never equal to dtype
    tokens_per_split: int = 0  # every sequence's keys are cut at multiples of it, whatever the batch; 0: off
    shared_tokens: int = 0  # query tokens of all sequences, over keys that these share, in the same launch; 0: none
    #: Queries and keys of a packed sequence in the mean, about; 0: as many as the longest. They decide nothing but
    #: which of several kernels takes less time.
    mean_q: int = 0
    mean_k: int = 0


class AttentionProblem(_Fields):
    """Everything the choice of a kernel depends on. It holds no tensor data: building it never waits for a device."""

    __slots__ = ()

    def __new__(
        cls,
        *,
        direction: str = "forward",
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        batch: int,
        seqlen_q: int,
        seqlen_k: int,
        num_heads_q: int,
        num_heads_kv: int,
        head_dim: int,
        head_dim_v: int,
        page_size: int = 0,
        window: tuple[int, int] = (-1, -1),
        attention_chunk: int = 0,
        softcap: float = 0.0,
        num_splits: int = 0,
        pack_gqa: bool | None = None,
        has_metadata: bool = False,
        sm_margin: int = 0,
        obstacles: tuple[str, ...] = (),
        tokens_per_split: int = 0,
        of_gradients: tuple[str, ...] = (),
        total_q: int = 0,
        total_k: int = 0,
        **features: bool,
    ) -> AttentionProblem:
        """The one way to a problem.

        Args:
            window: ``(left, right)``, normalised.
            kv_dtype: dtype of k and v; None: dtype.
            of_gradients: gradient_features of a problem that is differentiated.
            total_q, total_k: rows of packed q and k; 0: they are not packed.
            features: what the call has of support.FEATURES and EXTRA_FEATURES that no other argument tells, and
                "gradients".
        """
        left, right = window
        found = features | {
            "causal": right == 0,
            "window": left >= 0 or right > 0,
            "attention_chunk": attention_chunk > 0,
            "softcap": softcap > 0,
            "gqa": num_heads_q != num_heads_kv,
            "paged": page_size > 0,
            "split_kv": num_splits > 1,
            "lse": True,
            **dict.fromkeys(of_gradients, True),
        }
        return super().__new__(
            cls,
            direction=direction,
            dtype=DTYPE_NAMES[dtype],
            batch=batch,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            num_heads_q=num_heads_q,
            num_heads_kv=num_heads_kv,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            page_size=page_size,
            window_left=left,
            window_right=right,
            attention_chunk=attention_chunk,
            features=tuple(sorted(name for name, wanted in found.items() if wanted)),
            num_splits=num_splits,
            pack_gqa=pack_gqa,
            has_metadata=has_metadata,
            sm_margin=sm_margin,
            obstacles=obstacles,
            kv_dtype="" if kv_dtype is None or kv_dtype == dtype else DTYPE_NAMES[kv_dtype],
            tokens_per_split=tokens_per_split,
            mean_q=_rounded(total_q, batch),
            mean_k=_rounded(total_k, batch),
        )

    @property
    def query_rows(self) -> int:
        """Tokens times query heads of one KV head: what one pass over its keys serves."""
        return self.seqlen_q * (self.num_heads_q // self.num_heads_kv)

    @property
    def shared_rows(self) -> int:
        """The same over keys that all sequences share."""
        return self.shared_tokens * (self.num_heads_q // self.num_heads_kv)

    @property
    def is_decode(self) -> bool:
        """Bound by the memory that holds its keys."""
        return self.query_rows <= DECODE_MAX_ROWS


def _rounded(total: int, batch: int) -> int:
    """``total / batch`` with two bits behind the first one, so that a few problems stand for all totals."""
    mean = total // max(1, batch)
    drop = max(0, mean.bit_length() - 3)
    return mean >> drop << drop


def backward_of(problem: AttentionProblem, extra: tuple[str, ...] = ()) -> AttentionProblem:
    """The problem of the gradients of a forward problem: how its keys were divided does not matter to them.

    Args:
        extra: its gradient_features; a problem that has "gradients" has them itself.
    """
    features = {name for name in problem.features if name not in ("gradients", "split_kv")} | set(extra)
    return problem._replace(
        direction="backward",
        features=tuple(sorted(features)),
        num_splits=0,
        pack_gqa=None,
        has_metadata=False,
        tokens_per_split=0,
        mean_q=0,
        mean_k=0,
    )


def asks_deterministic(deterministic: bool) -> bool:
    """Whether gradients must be the same in every run: the call says so, or torch does for all calls."""
    return deterministic or torch.are_deterministic_algorithms_enabled()


def gradient_features(deterministic: bool, batch: int, total_q: int) -> tuple[str, ...]:
    """What a problem has if it is differentiated; both call for a kernel whose sums have an order.

    Whoever asks about gradients asks here: the forward pass, autograd, mha_bwd, is_supported and explain.

    Args:
        deterministic: as the call says it.
        total_q: queries of all sequences.

    Returns:
        Of "deterministic" and "short_sequences" those that hold. The sums of dq of kernels without an order have
        DQ_SUM_ROWS rows for each sequence at least: too much memory for short ones.
    """
    found = {"deterministic": asks_deterministic(deterministic), "short_sequences": batch * DQ_SUM_ROWS > 2 * total_q}
    return tuple(name for name, holds in found.items() if holds)


def canonical_right(seqlen_q: int, window_right: int) -> int:
    """The right window for comparing masks: one query at the end of its sequence has no key to its right."""
    return -1 if seqlen_q <= 1 else window_right


def needs_gradients(*tensors: Any) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_float8_gradient(function: str, q_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """Raise where a gradient is asked for through 8-bit inputs: what was rounded to 8 bits has none."""
    if q_dtype in check.FLOAT8_DTYPES:
        raise UnsupportedError(
            f"{function}: attention of {q_dtype} inputs has no gradient, and an input requires grad; call it under"
            " torch.no_grad(), or pass q, k and v as torch.bfloat16"
        )
    if kv_dtype != q_dtype:
        raise UnsupportedError(
            f"{function}: attention of {q_dtype} q over {kv_dtype} k and v has no gradient, and one is asked for; call"
            f" it under torch.no_grad(), or pass k and v as {q_dtype}"
        )


def refuse_tree_gradient(function: str, tree_mask: Any) -> None:
    """Raise where a gradient is asked for through a tree of drafts, which only decoding has."""
    if tree_mask is not None:
        raise UnsupportedError(
            f"{function}: tree_mask has no gradient, and an input requires grad; call it under torch.no_grad(), or pass"
            " query_ranges, which have one"
        )


def out_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the output for queries of ``dtype``."""
    return torch.bfloat16 if dtype in check.FLOAT8_DTYPES else dtype
