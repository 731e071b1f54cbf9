"""Forward calls of decode kernels without a GPU, by the stub library: workspace, and dtypes of inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
from stub_process import pytestmark, run, stub  # noqa: F401

DECODE = """
def decode(T, kernel="bf16", **changes):
    q = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "e4m3": FP8}[kernel[:4]]
    kv = FP8 if kernel.endswith("e4m3") else q
    out = "torch.float16" if kernel[:4] == "fp16" else "torch.bfloat16"
    return call(T, **dict(
        kernel_id="decode_" + kernel, q=T(1 << 12, (2, 3, 4, 64), q), k=T(2 << 12, (5, 16, 2, 64), kv),
        v=T(3 << 12, (5, 16, 2, 32), kv), out=T(4 << 12, (2, 3, 4, 32), out), max_blocks=0) | changes)

def check(got, **wanted):
    assert {name: got[name] for name in wanted} == {name: str(value) for name, value in wanted.items()}, got
"""


@pytest.mark.parametrize("num_splits", [0, 1, 6])
def test_a_workspace_is_passed_as_it_is(stub: Path, num_splits: int) -> None:  # noqa: F811
    """The kernel says its size and lays it out: nothing follows from num_splits."""
    run(
        stub,
        DECODE
        + f"""
T, common = ExchangeTensor, dict(num_splits={num_splits}, cell_blocks=64)
got = decode(T, max_blocks=1000, **common)
check(got, index=3, out_partial=SCRATCH, workspace_bytes=4000, lse_partial=0, tile_counter=0, cell_blocks=64,
      num_splits={num_splits}, q_dtype=1)
check(decode(T, **common), out_partial=0, workspace_bytes=0, tile_counter=0)
""",
    )


@pytest.mark.parametrize(
    ("kernel", "index", "q_dtype", "q", "out"),
    [
        ("e4m3", 4, 3, "float8_e4m3fn", "bf16"),
        ("bf16_kve4m3", 5, 1, "bf16", "bf16"),
        ("fp16_kve4m3", 6, 2, "fp16", "fp16"),
    ],
)
def test_the_dtypes_of_a_kernel_are_those_that_it_tells(
    stub: Path,  # noqa: F811
    kernel: str,
    index: int,
    q_dtype: int,
    q: str,
    out: str,
) -> None:
    run(
        stub,
        DECODE
        + f"""
T, kernel = ExchangeTensor, "{kernel}"
factors = dict(k_descale=T(6 << 12, (2, 2), F32, strides=(0, 0)), v_descale=T(7 << 12, (2, 2), F32, strides=(1, 2)))
check(decode(T, kernel, **factors), index={index}, q_dtype={q_dtype}, k_descale=6 << 12, k_descale_strides="0,0",
      v_descale=7 << 12, v_descale_strides="1,2", q_descale=0)
for name, shape, wanted in (("q", (2, 3, 4, 64), "{q}"), ("k", (5, 16, 2, 64), "float8_e4m3fn"),
                            ("v", (5, 16, 2, 32), "float8_e4m3fn"), ("out", (2, 3, 4, 32), "{out}")):
    for given, spelled in ((FP8, "float8_e4m3fn"), ("torch.bfloat16", "bf16"), ("torch.float16", "fp16")):
        if spelled != wanted:
            text = error(lambda: decode(T, kernel, **{{name: T(4096, shape, given)}}))
            assert f"{{name}} must be {{wanted}} tensor" in text and f"got {{spelled}}" in text, text
# Logits of sinks have the dtype of out.
own, other = ("torch.float16", "torch.bfloat16")[:: 1 if "{out}" == "fp16" else -1]
check(decode(T, kernel, sinks=T(32768, (4,), own)), sinks_are_fp32=0)
assert "sinks must be" in error(lambda: decode(T, kernel, sinks=T(32768, (4,), other)))
""",
    )
