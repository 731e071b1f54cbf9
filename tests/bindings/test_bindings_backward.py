"""_C.run_backward without a GPU: what it packs into AttnBwdParams, by a stub kernel library, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from stub_process import pytestmark, run, stub  # noqa: F401

BACKWARD = """
ROW = "backward_bf16"

def make_backward(**changes):
    a = dict(family="sm80", kernel_id=ROW, device=0, seqlen_q=3, seqlen_k=5, window_left=7, window_right=2,
             attention_chunk=9, softmax_scale=0.125, softcap=30.0, deterministic=True, num_splits=6, max_blocks=11)
    assert not set(changes) - set(a), changes
    a |= changes
    return _C.BackwardLaunch(**decision(a), **a)

def backward_arguments(T, **changes):
    # 2 sequences of 3 queries and 5 keys, 4 heads over 2 KV heads, head_dim 64, head_dim_v 32.
    a = dict.fromkeys(ARGUMENTS) | dict(
        q=T(1 << 12, (2, 3, 4, 64)), k=T(2 << 12, (2, 5, 2, 64)), v=T(3 << 12, (2, 5, 2, 32)),
        out=T(4 << 12, (2, 3, 4, 32), strides=(1024, 256, 64, 1)), seqused_q=T(8 << 12, (2,), INT),
        seqused_k=T(9 << 12, (2,), INT), prefix_lens=T(10 << 12, (2,), INT), sinks=T(11 << 12, (4,), F32),
        query_ranges=T(19 << 12, (2, 3, 2), INT, strides=(20, 4, 1)), ranges_in_window=True,
        causal_by_sequence=T(20 << 12, (2,), "torch.bool"))
    a |= {name: changes[name] for name in changes if name in a}
    b = dict(dout=T(12 << 12, (2, 3, 4, 32)), softmax_lse=T(13 << 12, (2, 4, 3), F32, strides=(40, 10, 1)),
             dlse=T(14 << 12, (2, 4, 3), F32), dq=T(15 << 12, (2, 3, 4, 64), strides=(2048, 512, 128, 1)),
             dk=T(16 << 12, (2, 5, 2, 64)), dv=T(17 << 12, (2, 5, 2, 32)), dsinks=T(18 << 12, (4,), F32))
    assert not set(changes) - set(a) - set(b), changes
    b |= {name: changes[name] for name in changes if name in b}
    return tuple(a.values()), *b.values()

def backward(T, launch={}, **changes):
    _C.run_backward(make_backward(**launch), *backward_arguments(T, **changes))
    return last_call(library)
"""


@pytest.mark.parametrize("kind", ["AttributeTensor", "ExchangeTensor"])
def test_every_field_is_packed(stub: Path, kind: str) -> None:  # noqa: F811
    run(
        stub,
        BACKWARD
        + f"""
got = backward({kind})
pages = dict(q=1, k=2, v=3, out=4, seqused_q=8, seqused_k=9, prefix_lens=10, sinks=11, dout=12, softmax_lse=13, dlse=14,
             dq=15, dk=16, dv=17, dsinks=18, query_ranges=19, causal_by_sequence=20)
# 6000 bytes of workspace, and D behind it at a multiple of 256.
expected = {{name: page << 12 for name, page in pages.items()}} | dict(
    index=7, stream=CURRENT_STREAM, struct_size_fits=1, workspace=SCRATCH, workspace_bytes=6000, delta=SCRATCH + 6144,
    cu_seqlens_q=0, cu_seqlens_k=0, q_strides="768,256,64", k_strides="640,128,64", v_strides="320,64,32",
    out_strides="1024,256,64", dout_strides="384,128,32", dq_strides="2048,512,128", dk_strides="640,128,64",
    dv_strides="320,64,32", lse_batch_stride=40, lse_head_stride=10, dlse_batch_stride=12, dlse_head_stride=3,
    batch=2, seqlen_q=3, seqlen_k=5, total_q=6, total_k=10, num_heads_q=4, num_heads_kv=2, head_dim=64, head_dim_v=32,
    window_left=7, window_right=2, attention_chunk=9, softmax_scale=0.125, softcap=30, sinks_are_fp32=1,
    deterministic=1, num_splits=6, max_blocks=11, tree_mask=0, ranges_batch_stride=20, ranges_row_stride=4,
    tree_batch_stride=0, tree_row_stride=0, ranges_in_window=1, causal_is_bool=1)
assert got == {{name: str(value) for name, value in expected.items()}}, got
assert scratch_sizes == [6144 // 4 + 4 * 6] and hooks.devices == [0, 0]
""",
    )


def test_packed_sequences_without_what_may_be_missing(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        BACKWARD
        + """
T = ExchangeTensor
got = backward(
    T, dict(num_splits=0, deterministic=False, seqlen_q=100), q=T(1 << 12, (9, 4, 64)), k=T(2 << 12, (11, 2, 64)),
    v=T(3 << 12, (11, 2, 32)), out=T(4 << 12, (9, 4, 32)), dout=T(12 << 12, (9, 4, 32)),
    softmax_lse=T(13 << 12, (4, 9), F32), dlse=None, dq=T(15 << 12, (9, 4, 64)), dk=T(16 << 12, (11, 2, 64)),
    dv=T(17 << 12, (11, 2, 32)), cu_seqlens_q=T(5 << 12, (3,), INT), cu_seqlens_k=T(6 << 12, (3,), INT),
    seqused_q=None, seqused_k=None, prefix_lens=None, sinks=None, dsinks=None, query_ranges=None,
    ranges_in_window=False, causal_by_sequence=None)
wanted = dict(cu_seqlens_q=5 << 12, cu_seqlens_k=6 << 12, seqused_q=0, seqused_k=0, prefix_lens=0, sinks=0, dsinks=0,
              query_ranges=0, ranges_in_window=0, causal_by_sequence=0, causal_is_bool=0,
              dlse=0, dlse_batch_stride=0, dlse_head_stride=0, lse_batch_stride=0, lse_head_stride=9, batch=2,
              seqlen_q=9, total_q=9, total_k=11, q_strides="0,256,64", dk_strides="0,128,64", workspace=0,
              workspace_bytes=0, delta=SCRATCH, deterministic=0, sinks_are_fp32=0, num_splits=0)
assert {name: got[name] for name in wanted} == {name: str(value) for name, value in wanted.items()}, got
assert scratch_sizes == [36]
assert backward(T, sinks=T(11 << 12, (4,)))["sinks_are_fp32"] == "0"
""",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("q=T(4096, (2, 3, 4, 64), 'torch.float16')", "q must be bf16 tensor"),
        ("q=None", "q must be a tensor, got None"),
        ("out=None", "out must be a tensor, got None"),
        ("dout=None", "dout must be a tensor, got None"),
        ("dout=T(4096, (2, 3, 4, 64))", "dout must be of the shape and dtype of out, got bf16 (2, 3, 4, 64)"),
        ("dq=T(4096, (2, 3, 4, 64), F32)", "dq must be of the shape and dtype of q"),
        ("dk=T(4096, (2, 5, 4, 64))", "dk must be of the shape and dtype of k"),
        ("dv=T(4096, (2, 5, 2, 32), device=1)", "dv must be on the device of q"),
        ("dv=T(4096, (2, 5, 2, 32), strides=(640, 128, 1, 2))", "dv must be of 3 or 4 dimensions, the last contiguous"),
        ("softmax_lse=T(4096, (2, 3, 4), F32)", "softmax_lse must be [batch, heads, seqlen] or [heads, total]"),
        ("softmax_lse=T(4096, (2, 4, 3))", "softmax_lse must be fp32 tensor"),
        ("dlse=T(4096, (2, 4, 3), F32, strides=(12, 1, 4))", "dlse must be [batch, heads, seqlen] or"),
        ("dsinks=None", "dsinks must be given exactly with sinks"),
        ("dsinks=T(4096, (2,), F32)", "dsinks must be contiguous, an entry for each head of q"),
        ("seqused_q=T(4096, (1,), INT)", "seqused_q must hold at least 2 entries"),
        ("cu_seqlens_q=T(4096, (3,), INT)", "cu_seqlens_q must be given exactly when q has 3 dimensions"),
        ("cu_seqlens_k=T(4096, (3,), INT)", "k must be [tokens, heads, head_dim] with cu_seqlens_k"),
        ("page_table=T(4096, (2, 3), INT)", "page_table must be None: backward kernels do not read it"),
        ("tree_mask=T(4096, (2, 3), 'torch.int64')", "tree_mask must be None: backward kernels do not read it"),
        ("query_ranges=T(4096, (2, 3), INT)", "query_ranges must be int32 tensor of 3 dimensions"),
        ("query_ranges=T(4096, (2, 4, 2), INT)", "query_ranges must be of the tokens of q and 2"),
        ("causal_by_sequence=T(4096, (1,), INT)", "causal_by_sequence must hold at least 2 entries"),
        ("qv=T(4096, (2, 3, 4, 32))", "qv must be None: backward kernels do not read it"),
        (
            "launch=dict(kernel_id='sm80_fwd_d64_bf16')",
            "sm80_fwd_d64_bf16: a backward call was given a kernel of the other direction",
        ),
        ("launch=dict(softcap=-1.0)", "backward_bf16: launch: the stub was asked to fail"),
    ],
)
def test_what_does_not_fit_is_refused(stub: Path, changes: str, words: str) -> None:  # noqa: F811
    text = run(stub, BACKWARD + f"T = ExchangeTensor\nprint(error(lambda: backward(T, {changes})))")
    assert words in text, text
