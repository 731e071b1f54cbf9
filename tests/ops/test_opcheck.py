"""torch.library.opcheck of every operator: schemas, autograd, fake implementations, and AOT dispatch of all lengths."""

from __future__ import annotations

from typing import Any

import broadhead
import pytest
import torch
from broadhead.call.arguments import OPERATOR_NAMES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

OPERATORS = torch.ops.broadhead
CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_static",
    "test_aot_dispatch_dynamic",
)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def op_arguments(q: Tensor, k: Tensor, v: Tensor, **changes: Any) -> tuple[Any, ...]:
    """The arguments of mha_fwd, by name where they differ from the defaults."""
    values: dict[str, Any] = dict.fromkeys(OPERATOR_NAMES)
    values.update(
        q=q, k=k, v=v, causal=False, window_left=-1, window_right=-1, attention_chunk=0, softcap=0.0, num_splits=0,
        sm_margin=0, tokens_per_split=0, ranges_in_window=False, deterministic=False, differentiable=False,
        function="mha_fwd",
    )  # fmt: skip
    assert changes.keys() <= values.keys()
    return tuple({**values, **changes}.values())


def dense() -> tuple[Any, ...]:
    return op_arguments(randn(2, 5, 4, 16), randn(2, 7, 2, 16), randn(2, 7, 2, 24))


def varlen() -> tuple[Any, ...]:
    return op_arguments(
        randn(9, 4, 16), randn(11, 2, 16), randn(11, 2, 16), cu_seqlens_q=int32(0, 3, 9), cu_seqlens_k=int32(0, 6, 11),
        max_seqlen_q=6, max_seqlen_k=6, causal=True, window_right=0, sinks=randn(4),
    )  # fmt: skip


def paged() -> tuple[Any, ...]:
    return op_arguments(
        randn(2, 1, 4, 16), randn(6, 4, 2, 16), randn(6, 4, 2, 16), seqused_k=int32(9, 3),
        page_table=int32(5, 0, 1, 2, 4, 3).view(2, 3),
    )  # fmt: skip


def everything() -> tuple[Any, ...]:
    """All that is differentiable, with lengths and a prefix."""
    return op_arguments(
        randn(2, 5, 4, 16), randn(2, 7, 2, 16), randn(2, 7, 2, 24), qv=randn(2, 5, 4, 24), sinks=randn(4),
        seqused_q=int32(3, 5), seqused_k=int32(7, 2), prefix_lens=int32(1, 0), causal=True, window_right=0,
        softcap=3.0, softmax_scale=0.3,
    )  # fmt: skip


def ranges() -> tuple[Any, ...]:
    """Ranges of packed queries, and sequences of which one is causal."""
    return op_arguments(
        randn(9, 4, 16), randn(11, 2, 16), randn(11, 2, 16), cu_seqlens_q=int32(0, 3, 9), cu_seqlens_k=int32(0, 6, 11),
        max_seqlen_q=6, max_seqlen_k=6, window_left=2, query_ranges=int32(*[0, 4] * 5, *[2, 9] * 4).view(9, 2),
        ranges_in_window=True, causal_by_sequence=torch.tensor([True, False]),
    )  # fmt: skip


def tree() -> tuple[Any, ...]:
    return op_arguments(
        randn(2, 3, 4, 16), randn(2, 70, 2, 16), randn(2, 70, 2, 24), causal_by_sequence=int32(1, 0), window_left=66,
        tree_mask=torch.tensor([[-1, 1 << 62, -(1 << 63)], [0, 5, 1 << 61]]),
    )  # fmt: skip


ARGUMENTS = {"dense": dense, "varlen": varlen, "paged": paged, "everything": everything, "ranges": ranges}
FORWARD_ONLY = {"tree": tree}


def leaves(arguments: tuple[Any, ...], **changes: Any) -> tuple[Any, ...]:
    """The same call of inputs that require grad, as the public functions make it."""
    values = dict(zip(OPERATOR_NAMES, arguments, strict=True))
    for name, value in values.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            values[name] = value.requires_grad_()
    return tuple({**values, "differentiable": True, **changes}.values())


def opcheck(operator: Any, arguments: tuple[Any, ...], checks: tuple[str, ...] = CHECKS) -> None:
    found = torch.library.opcheck(operator.default, arguments, test_utils=checks)
    assert found.keys() == set(checks)


@pytest.mark.parametrize("name", ARGUMENTS | FORWARD_ONLY)
def test_forward(name: str) -> None:
    opcheck(OPERATORS.mha_fwd, (ARGUMENTS | FORWARD_ONLY)[name]())


@pytest.mark.parametrize(("name", "deterministic"), [*((name, False) for name in ARGUMENTS), ("dense", True)])
def test_forward_with_gradients(name: str, deterministic: bool) -> None:
    """AOT dispatch traces mha_bwd here, and compares the gradients with eager ones."""
    opcheck(OPERATORS.mha_fwd, leaves(ARGUMENTS[name](), deterministic=deterministic))


@pytest.mark.parametrize("name", ARGUMENTS | FORWARD_ONLY)
def test_forward_into_out(name: str) -> None:
    inputs = (ARGUMENTS | FORWARD_ONLY)[name]()
    out, _ = OPERATORS.mha_fwd(*inputs)
    opcheck(OPERATORS.mha_fwd_out, (*inputs, torch.empty_like(out)))


@pytest.mark.parametrize(
    ("name", "given"),
    [*((name, "all") for name in ARGUMENTS), *(("everything", given) for given in ("dout", "dlse", "not the results"))],
)
def test_backward(name: str, given: str) -> None:
    inputs = ARGUMENTS[name]()
    out, lse = OPERATORS.mha_fwd(*inputs)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    outputs = {
        "all": (dout, dlse, out, lse),
        "dout": (dout, None, out, lse),
        "dlse": (None, dlse, out, lse),
        "not the results": (dout, dlse, None, None),
    }[given]
    opcheck(OPERATORS.mha_bwd, (*outputs, *inputs))


def test_backward_has_no_derivative() -> None:
    """It is registered as one that refuses: AOT dispatch, which would differentiate it, can not pass."""
    inputs = leaves(dense(), differentiable=False)
    with torch.no_grad():
        out, lse = OPERATORS.mha_fwd(*inputs)
    arguments = (torch.randn_like(out), torch.randn_like(lse), out, lse, *inputs)
    opcheck(OPERATORS.mha_bwd, arguments, CHECKS[:3])
    found = torch.library.opcheck(OPERATORS.mha_bwd.default, arguments, test_utils=CHECKS[3:], raise_exception=False)
    assert all(isinstance(found[check], broadhead.UnsupportedError) for check in CHECKS[3:]), found


def test_append() -> None:
    caches, new = (randn(2, 9, 2, 16), randn(2, 9, 2, 16)), (randn(2, 3, 2, 16), randn(2, 3, 2, 16))
    arguments = (*caches, *new, int32(2, 5), None, None, None, None, None, None, True, None, None)
    opcheck(OPERATORS.append_kv, arguments)


@pytest.mark.parametrize("causal_or_local", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_append_with_rotary_and_queries(packed: bool, causal_or_local: bool) -> None:
    caches, new = (randn(2, 9, 2, 16), randn(2, 9, 2, 16)), (randn(2, 3, 2, 16), randn(2, 3, 2, 16))
    angles = (randn(20, 4), randn(20, 4))
    q, cu_seqlens_q = (randn(7, 4, 16), int32(0, 2, 6)) if packed else (randn(2, 3, 4, 16), None)
    arguments = (*caches, *new, int32(2, 5), None, None, None, *angles, None, True, q, cu_seqlens_q, causal_or_local)
    opcheck(OPERATORS.append_kv, arguments)
    turned, lengths = OPERATORS.append_kv(*arguments)
    assert turned.shape == q.shape and lengths.tolist() == [5, 8]


def test_merge() -> None:
    """Without gradients: where one is asked for, merge_attn_states runs torch ops and not this operator."""
    arguments = (randn(2, 5, 4, 16), randn(2, 4, 5), randn(2, 5, 4, 16), randn(2, 4, 5))
    opcheck(OPERATORS.merge_states, arguments)
    opcheck(OPERATORS.merge_states_out, (*arguments, torch.empty(2, 5, 4, 16)))


def test_metadata() -> None:
    arguments = (
        int32(9, 3), 2, 1, 64, 4, 2, 64, 64, torch.bfloat16, None, None, 16, 0, True, -1, 0, 0, 0, None, 0, None,
        None, torch.float8_e4m3fn, 128,
    )  # fmt: skip
    opcheck(OPERATORS.get_scheduler_metadata, arguments)
    opcheck(OPERATORS.get_scheduler_metadata_out, (*arguments, torch.empty(17, dtype=torch.int32)))


def test_every_operator_is_checked() -> None:
    """An operator that is new has a test here."""
    import inspect
    import sys

    names = {
        schema.name.removeprefix("broadhead::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("broadhead::")
    }
    text = inspect.getsource(sys.modules[__name__])
    assert names and all(f"opcheck(OPERATORS.{name}, " in text for name in names), names


@pytest.mark.parametrize("name", ARGUMENTS)
def test_fake_tensors_have_the_shapes_of_real_ones(name: str) -> None:
    inputs = ARGUMENTS[name]()
    real = OPERATORS.mha_fwd(*inputs)
    real_gradients = OPERATORS.mha_bwd(*real, *real, *inputs)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs]
        fake = OPERATORS.mha_fwd(*fakes)
        fake_gradients = OPERATORS.mha_bwd(*fake, *fake, *fakes)
    for a, b in zip((*real, *real_gradients), (*fake, *fake_gradients), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
