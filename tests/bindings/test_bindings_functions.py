"""The functions of the compiled module beside calls: signature, metadata, combine; arguments of a wrong kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from broadhead.errors import KernelError
from stub_process import pytestmark, run, stub  # noqa: F401


def test_signature_tells_calls_apart(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        """
T = ExchangeTensor
base = [T(4096, (2, 3)), None, T(4096, (5,), INT)]
others = [
    [T(4104, (2, 3)), None, T(4096, (5,), INT)],  # alignment
    [T(4096, (3, 2)), None, T(4096, (5,), INT)],
    [T(4096, (2, 3), strides=(4, 1)), None, T(4096, (5,), INT)],
    [T(4096, (2, 3), "torch.float16"), None, T(4096, (5,), INT)],
    [T(4096, (2, 3), device=1), None, T(4096, (5,), INT)],
    [T(4096, (2, 3)), T(4096, (5,), INT), None],
]
seen = [_C.signature(*x) for x in (base, *others)]
assert all(isinstance(x, bytes) for x in seen) and len(set(seen)) == len(seen), seen
assert _C.signature(T(8192, (2, 3)), None, T(8192, (5,), INT)) == seen[0]
assert _C.signature(AttributeTensor(8192, (2, 3)), None, AttributeTensor(8192, (5,), INT)) == seen[0]
assert _C.signature(T(4096, (2, 3), "torch.int64")) is None, "not told from other dtypes"
assert _C.signature(7) is None and _C.signature(T(4096, (1,) * 7)) is None
""",
    )


def test_scheduler_metadata(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        """
T = ExchangeTensor
_C.scheduler_metadata(T(4096, (33,), INT), T(8192, (5,), INT), None, T(12288, (5,), INT), T(16384, (6,), INT), None,
                      5, 1, 64, 2, 3, 0, 4, 8, 6, 16, 128, 7, 132, 99, -1)
got = last_call(library)
wanted = dict(metadata=4096, seqused_k=8192, cu_seqlens_k=0, leftpad_k=12288, cu_seqlens_q=16384, seqused_q=0, batch=5,
              seqlen_q=1, seqlen_k=64, seqlen_k_new=2, window_left=3, window_right=0, attention_chunk=4,
              rows_per_token=8, heads_in_grid=6, tile_m=16, tile_n=128, num_splits=7, target_ctas=132, metadata_tag=99,
              stream=CURRENT_STREAM, struct_size_fits=1)
assert got == {name: str(value) for name, value in wanted.items()}, got
rest = (1, 64, 2, 3, 0, 4, 8, 6, 16, 128, 7, 132, 99, -1)
none = (None,) * 4
assert "metadata must be" in error(_C.scheduler_metadata, T(4096, (32,), INT), None, *none, 5, *rest)
assert "seqused_k must" in error(_C.scheduler_metadata, T(4096, (33,), INT), T(1, (4,), INT), *none, 5, *rest)
""",
    )


def test_combine(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        """
T = ExchangeTensor
partial, lse = T(4096, (3, 7, 4, 32), F32), T(8192, (3, 7, 4), F32, strides=(28, 1, 7))
_C.combine(partial, lse, T(12288, (7, 4, 32), "torch.float16"), T(16384, (7, 4), F32, strides=(1, 7)), 5)
got = last_call(library)
wanted = dict(out_partial=4096, lse_partial=8192, out=12288, softmax_lse=16384, out_partial_split_stride=896,
              out_partial_row_stride=128, out_partial_head_stride=32, lse_partial_split_stride=28,
              lse_partial_row_stride=1, lse_partial_head_stride=7, out_row_stride=128, out_head_stride=32,
              lse_row_stride=1, lse_head_stride=7,
              rows=7, heads=4, head_dim_v=32, num_splits=3, out_dtype=2, stream=5, struct_size_fits=1)
assert got == {name: str(value) for name, value in wanted.items()}, got
assert "out must be" in error(_C.combine, partial, lse, T(12288, (7, 5, 32)), None, 5)
assert "out must be" in error(_C.combine, partial, lse, T(12288, (7, 4, 32), INT), None, 5)
""",
    )


def test_argument_count_and_types(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        """
for function, given, words in ((_C.run_known, (), "takes 3 positional"), (_C.combine, (1,), "takes 5 positional"),
                               (_C.run_known, ("f", True, (1,)), "a tuple of 30"), (_C.combine, (1,) * 5, "")):
    try:
        function(*given)
    except (TypeError, KernelError) as exception:
        assert words in str(exception), exception
    else:
        raise AssertionError(given)
try:
    make_launch(ExchangeTensor, window_left=1 << 40)
except TypeError as exception:
    assert "window_left" in str(exception), exception
""",
    )


def test_a_torch_tensor_is_read() -> None:
    """Also one that requires grad, and a non-contiguous one: only the device is refused."""
    import torch
    from broadhead import _C

    partial = torch.zeros(2, 3, 4, 8, requires_grad=True)
    with pytest.raises(KernelError, match=r"out_partial .* got fp32 \(2, 3, 4, 8\) on a device that is not CUDA"):
        _C.combine(partial, partial[..., 0], partial[0], None, 0)
    with pytest.raises(KernelError, match=r"got float8_e4m3fn \(2, 8\)"):
        _C.combine(torch.zeros(2, 8).to(torch.float8_e4m3fn), partial, partial, None, 0)
    with pytest.raises(KernelError, match=r"got fp32 \(3, 2, 4, 8\)"):
        _C.combine(torch.nn.Parameter(partial.detach().transpose(0, 1)), partial, partial, None, 0)
