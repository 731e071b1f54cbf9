"""Answers questions about support without running anything: is_supported, explain and support_matrix."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import validation as check
from ..call.mask_values import MaskRule, check_tree
from ..call.masking import normalize_chunk, normalize_window, split_causal
from ..call.problem import DTYPE_NAMES, AttentionProblem, gradient_features, refuse_tree_gradient
from ..errors import InvalidArgumentError, InvalidTypeError
from ..plan.device import DeviceDescription, default_device, describe, hypothetical
from ..plan.dispatch import Plan, resolve
from ..plan.native import BuildDescription, build_description
from ..support import ROWS
from .explanation import Explanation, explanation

#: Keys of a sequence where a question does not say: few keys have kernels of their own.
MANY_KEYS = 8192

#: Masks that a call gives as tensors, of which only whether they are there matters.
_MASKS = ("prefix_lens", "query_ranges", "tree_mask")


def _device(function: str, device: Any) -> DeviceDescription:
    if device is None:
        return default_device()
    if isinstance(device, DeviceDescription):
        return device
    if isinstance(device, tuple) and len(device) == 2 and all(isinstance(part, int) for part in device):
        return hypothetical(device)
    if isinstance(device, str) and re.fullmatch(r"\d+\.\d+", device.strip()):
        major, minor = device.strip().split(".")
        return hypothetical((int(major), int(minor)))
    if isinstance(device, (str, torch.device)):
        try:
            return describe(torch.device(device))
        except (RuntimeError, AssertionError) as error:
            words = str(error).partition("\n")[0]
            raise InvalidArgumentError(
                f"{function}: device must be a device that is here, or a compute capability such as (8, 9) or '8.9',"
                f" got {device!r}: {words}"
            ) from error
    raise InvalidTypeError(
        f"{function}: device must be None, a torch.device or its name, a compute capability such as (8, 9) or '8.9', or"
        f" a DeviceDescription, got {check.describe_value(device)}"
    )


def _is_given(function: str, name: str, value: Any) -> bool:
    """Whether the call has an optional argument: said by a bool, or by the tensor itself."""
    if isinstance(value, Tensor) and value.dim() > 0:
        return True
    return value is not None and check.check_bool(function, name, value)


def _plan(function: str, device: DeviceDescription, build: BuildDescription | None, **asked: Any) -> tuple[Any, Plan]:
    q, k, v = asked["q"], asked["k"], asked["v"]
    varlen, page_size = False, asked["page_size"]
    if isinstance(q, Tensor):
        if not isinstance(k, Tensor) or not isinstance(v, Tensor):
            raise InvalidArgumentError(
                f"{function}: k and v must be given with q, or describe the call by head_dim=..."
            )
        packed = q.dim() == 3
        asked.update(
            dtype=q.dtype,
            kv_dtype=k.dtype,
            head_dim=q.shape[-1],
            head_dim_v=v.shape[-1],
            num_heads_q=q.shape[-2],
            num_heads_kv=k.shape[-2],
        )
        varlen = packed
        if not packed:
            asked["batch_size"], asked["seqlen_q"] = q.shape[0], q.shape[1]
        if k.dim() == 4 and page_size is None:
            asked["seqlen_k"] = k.shape[1]
        learned = (q, k, v, asked["qv"], asked["sinks"])
        asked["requires_grad"] = asked["requires_grad"] or any(
            t.requires_grad for t in learned if isinstance(t, Tensor)
        )
    if asked["head_dim"] is None:
        raise InvalidArgumentError(f"{function}: head_dim must be given, or the tensors q, k and v, got None")
    head_dim = check.check_int(function, "head_dim", asked["head_dim"], 1)
    head_dim_v = asked["head_dim_v"]
    head_dim_v = head_dim if head_dim_v is None else check.check_int(function, "head_dim_v", head_dim_v, 1)
    if asked["dtype"] not in DTYPE_NAMES:
        raise InvalidTypeError(f"{function}: dtype must be a floating-point torch.dtype, got {asked['dtype']!r}")
    kv_dtype = asked["dtype"] if asked["kv_dtype"] is None else asked["kv_dtype"]
    if kv_dtype not in DTYPE_NAMES or not check.keys_fit_queries(kv_dtype, asked["dtype"]):
        raise InvalidTypeError(
            f"{function}: kv_dtype must be dtype ({asked['dtype']}), or, with bf16 or fp16 dtype, torch.float8_e4m3fn,"
            f" got {kv_dtype!r}"
        )
    num_heads_q = check.check_int(function, "num_heads_q", asked["num_heads_q"], 1, check.MAX_NUM_HEADS)
    num_heads_kv = asked["num_heads_kv"]
    num_heads_kv = num_heads_q if num_heads_kv is None else check.check_int(function, "num_heads_kv", num_heads_kv, 1)
    if num_heads_q % num_heads_kv:
        raise InvalidArgumentError(
            f"{function}: num_heads_q must be a multiple of num_heads_kv, got {num_heads_q} and {num_heads_kv}"
        )
    causal, by_sequence = split_causal(asked["causal"])
    causal = check.check_bool(function, "causal", causal)
    left, right = normalize_window(asked["window_size"], causal, function)
    direction = asked["direction"]
    if direction not in ("forward", "backward"):
        raise InvalidArgumentError(f"{function}: direction must be 'forward' or 'backward', got {direction!r}")
    attention_chunk = normalize_chunk(check.check_attention_chunk(function, asked["attention_chunk"]))
    softcap = check.check_softcap(function, asked["softcap"])
    num_splits = check.check_num_splits(function, asked["num_splits"])
    given = {
        name: _is_given(function, name, asked[name])
        for name in ("varlen", "sinks", *_MASKS, "qv", "descale", "requires_grad", "deterministic")
    }
    batch = check.check_int(function, "batch_size", asked["batch_size"])
    seqlen_q = check.check_int(function, "seqlen_q", asked["seqlen_q"])
    total_q = q.shape[0] if varlen else batch * seqlen_q
    differentiated = given["requires_grad"] or direction == "backward"
    if given["tree_mask"]:
        rule = MaskRule(left, right, attention_chunk)
        others = {name: given[name] for name in ("query_ranges", "prefix_lens")}
        check_tree(function, "seqlen_q", seqlen_q, rule, **others)
        if differentiated:
            refuse_tree_gradient(function, given["tree_mask"])
    # A head_dim that is no multiple of 8 is refused by every function: say so instead of choosing a row.
    odd = tuple(f"head_dim must be a multiple of 8, got {d}" for d in sorted({head_dim, head_dim_v}) if d % 8)
    problem = AttentionProblem(
        direction=direction,
        dtype=asked["dtype"],
        kv_dtype=kv_dtype,
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=check.check_int(function, "seqlen_k", asked["seqlen_k"]),
        num_heads_q=num_heads_q,
        num_heads_kv=num_heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        page_size=0 if page_size is None else check.check_int(function, "page_size", page_size, 1),
        window=(left, right),
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        obstacles=odd,
        tokens_per_split=check.check_tokens_per_split(function, asked["tokens_per_split"], num_splits),
        sinks=given["sinks"],
        prefix_lens=given["prefix_lens"],
        causal_by_sequence=by_sequence is not None,
        query_ranges=given["query_ranges"],
        tree_mask=given["tree_mask"],
        varlen=given["varlen"] or varlen,
        qv=given["qv"],
        descale=given["descale"],
        gradients=given["requires_grad"] and direction == "forward",
        of_gradients=gradient_features(given["deterministic"], batch, total_q) if differentiated else (),
        total_q=total_q if varlen else 0,
        total_k=k.shape[0] if varlen and k is not None else 0,
    )
    return problem, resolve(problem, device, build)


def is_supported(
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    head_dim: int | None = None,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    num_heads_q: int = 1,
    num_heads_kv: int | None = None,
    batch_size: int = 1,
    seqlen_q: int = 1,
    seqlen_k: int = MANY_KEYS,
    causal: bool | Tensor = False,
    window_size: Any = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float | None = 0.0,
    page_size: int | None = None,
    varlen: bool = False,
    sinks: bool | Tensor = False,
    prefix_lens: bool | Tensor = False,
    qv: bool | Tensor = False,
    descale: bool | Tensor = False,
    requires_grad: bool = False,
    deterministic: bool = False,
    num_splits: int = 0,
    tokens_per_split: int = 0,
    direction: str = "forward",
    device: Any = None,
    build: BuildDescription | None = None,
    query_ranges: bool | Tensor = False,
    tree_mask: bool | Tensor = False,
) -> tuple[bool, str]:
    """Whether a CUDA kernel runs a call, and why: ``(supported, reason)``.

    The call is taken to bring no scheduler metadata. Which of several kernels runs depends on the lengths, and on
    num_splits: flash_attn_func and flash_attn_varlen_func pass 1 where they are given none, other functions 0.

    Args:
        q: the queries of the call; None: the arguments below describe it.
        k: its keys, with q.
        v: its values, with q.
        head_dim: columns of q and k, without q.
        head_dim_v: columns of v; None: head_dim.
        dtype: dtype of q.
        kv_dtype: dtype of k and v; None: dtype.
        num_heads_q: query heads.
        num_heads_kv: KV heads; None: num_heads_q.
        batch_size: sequences.
        seqlen_q: query tokens of the longest sequence.
        seqlen_k: keys of the longest sequence; 8192 where it is not given.
        page_size: keys of a page; None: not paged.
        varlen: whether q is packed.
        sinks: whether the call has them, or the tensor itself.
        prefix_lens: likewise.
        qv: likewise.
        descale: likewise.
        requires_grad: whether a gradient is asked for.
        deterministic: whether gradients must be the same in every run, bit for bit; None, False: as
            ``torch.use_deterministic_algorithms`` says. It matters where a gradient is asked for, and with
            direction="backward".
        direction: "forward" or "backward".
        device: None for the device of q, else the current CUDA device, else the CPU; a torch.device or its name; a
            compute capability such as ``(8, 9)`` or ``"8.9"``; or a DeviceDescription.
        build: the kernels to look at; None for those of this installation.
        causal: True, False, or a tensor of causality by sequence, of which nothing is read.
        query_ranges: whether the call has them, or the tensor itself.
        tree_mask: likewise.
        window_size, softcap, ...: the other arguments are what the call asks for, as in flash_attn_func.

    Raises:
        InvalidArgumentError: the description makes no sense; the text names the argument.
        InvalidTypeError: an argument has a wrong type or dtype; the text names it.
    """
    function = "is_supported"
    where = _device(function, q.device if device is None and isinstance(q, Tensor) else device)
    _, plan = _plan(
        function, where, build, q=q, k=k, v=v, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype,
        kv_dtype=kv_dtype, num_heads_q=num_heads_q, num_heads_kv=num_heads_kv, batch_size=batch_size,
        seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=causal, window_size=window_size, attention_chunk=attention_chunk,
        softcap=softcap, page_size=page_size, varlen=varlen, sinks=sinks, prefix_lens=prefix_lens, qv=qv,
        descale=descale, requires_grad=requires_grad, deterministic=deterministic, num_splits=num_splits,
        tokens_per_split=tokens_per_split, direction=direction, query_ranges=query_ranges, tree_mask=tree_mask,
    )  # fmt: skip
    return plan.row is not None, plan.reason


def explain(
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    head_dim: int | None = None,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    num_heads_q: int = 1,
    num_heads_kv: int | None = None,
    batch_size: int = 1,
    seqlen_q: int = 1,
    seqlen_k: int = MANY_KEYS,
    causal: bool | Tensor = False,
    window_size: Any = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float | None = 0.0,
    page_size: int | None = None,
    varlen: bool = False,
    sinks: bool | Tensor = False,
    prefix_lens: bool | Tensor = False,
    qv: bool | Tensor = False,
    descale: bool | Tensor = False,
    requires_grad: bool = False,
    deterministic: bool = False,
    num_splits: int = 0,
    tokens_per_split: int = 0,
    direction: str = "forward",
    device: Any = None,
    build: BuildDescription | None = None,
    query_ranges: bool | Tensor = False,
    tree_mask: bool | Tensor = False,
) -> str:
    """Where a call runs and why, as text whose first line is the answer.

    Where no kernel runs the call, the next line says what to do. Then come the plan, the kernel of the backward pass if
    a gradient is asked for, what was asked, the device, and which tensors are copied because their last dimension is
    not contiguous. Last come the kernels that refuse the call, grouped by what stands in their way: this build, the
    device or the arguments. Kernels with the same reason share a line.

    Args and errors are those of is_supported.
    """
    return explain_in_parts(
        q=q, k=k, v=v, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype, kv_dtype=kv_dtype,
        num_heads_q=num_heads_q, num_heads_kv=num_heads_kv, batch_size=batch_size, seqlen_q=seqlen_q,
        seqlen_k=seqlen_k, causal=causal, window_size=window_size, attention_chunk=attention_chunk, softcap=softcap,
        page_size=page_size, varlen=varlen, sinks=sinks, prefix_lens=prefix_lens, qv=qv, descale=descale,
        requires_grad=requires_grad, deterministic=deterministic, num_splits=num_splits,
        tokens_per_split=tokens_per_split, direction=direction, device=device, build=build, query_ranges=query_ranges,
        tree_mask=tree_mask,
    ).text()  # fmt: skip


def explain_in_parts(device: Any, build: BuildDescription | None, **asked: Any) -> Explanation:
    """The answer of explain in parts, for whoever shows it in another form.

    Args:
        asked: the other arguments of explain, all of them.
    """
    q = asked["q"]
    where = _device("explain", q.device if device is None and isinstance(q, Tensor) else device)
    build = build_description() if build is None else build
    tensors = {name: asked[name] for name in ("q", "k", "v", "qv")}
    problem, plan = _plan("explain", where, build, **asked)
    return explanation(problem, plan, where, build, tensors)


class SupportEntry(NamedTuple):
    """One kernel of the table and whether this installation holds it."""

    kernel: str
    family: str
    direction: str
    phase: str
    dtype: str  # of q
    kv_dtype: str  # of k and v
    head_dim: int  # the largest
    head_dim_v: int  # the largest
    capabilities: tuple[tuple[int, int], ...]
    features: tuple[str, ...]
    requires: tuple[str, ...]  # features without which a call does not run there
    in_build: bool


def support_matrix(build: BuildDescription | None = None) -> list[SupportEntry]:
    """Every kernel of the table, in its order, and whether this installation (or ``build``) holds it."""
    build = build_description() if build is None else build
    held = {kernel for family in build.families for kernel in family.kernels}
    return [
        SupportEntry(
            row.id,
            row.family,
            row.direction,
            row.phase,
            row.dtype,
            row.kv_dtype or row.dtype,
            row.head_dim,
            row.head_dim_v,
            row.capabilities,
            row.features,
            row.requires,
            row.id in held,
        )
        for row in ROWS
    ]
