"""The functions of the compiled module beside calls: combine and the stream; arguments of a wrong kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from broadhead.errors import KernelError
from stub_process import pytestmark, run, stub  # noqa: F401


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
                               (_C.run_known, ("f", True, (1,)), "a tuple of 34"), (_C.combine, (1,) * 5, "")):
    try:
        function(*given)
    except (TypeError, KernelError) as exception:
        assert words in str(exception), exception
    else:
        raise AssertionError(given)
assert "_C.Launch: window_left must fit 32 bits" in error(lambda: make_launch(ExchangeTensor, window_left=1 << 40))
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
