"""Forward calls of the compiled module without a GPU: what it packs, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from stub_process import pytestmark, run, stub  # noqa: F401


@pytest.mark.parametrize("kind", ["AttributeTensor", "ExchangeTensor"])
def test_forward_packs_every_argument(stub: Path, kind: str) -> None:  # noqa: F811
    run(
        stub,
        f"""
T = {kind}
# Ranges of every second token of more, and words that lie apart.
got = call(T, cell_blocks=11, query_ranges=T(15 << 12, (2, 3, 2), INT, strides=(20, 4, 1)), ranges_in_window=True,
           tree_mask=T(16 << 12, (2, 3), "torch.int64", strides=(9, 3)), causal_by_sequence=T(17 << 12, (2,), INT))
pages = dict(q=1, k=2, v=3, out=4, softmax_lse=5, out_partial=6, seqused_k=8, leftpad_k=9,
             kv_batch_idx=10, page_table=11, prefix_lens=12, sinks=13, scheduler_metadata=14, query_ranges=15,
             tree_mask=16, causal_by_sequence=17)
expected = {{name: page << 12 for name, page in pages.items()}} | dict(
    index=0, stream=CURRENT_STREAM, struct_size_fits=1, lse_partial=0,
    cu_seqlens_q=0, cu_seqlens_k=0, seqused_q=0,
    lse_batch_stride=12, lse_head_stride=3,
    q_strides="768,256,64", k_strides="2048,128,64", v_strides="4096,128,64", out_strides="384,128,32",
    page_table_batch_stride=9, batch=2, seqlen_q=3, seqlen_k=112, total_q=6, num_heads_q=4, num_heads_kv=2, head_dim=64,
    head_dim_v=32, page_size=16, window_left=7, window_right=0, attention_chunk=9, sinks_are_fp32=1, num_splits=6,
    pack_gqa=1, metadata_tag=77, heads_per_section=2, softmax_scale=0.125, softcap=30, tile_counter=0,
    max_blocks=5, cell_blocks=11, q_dtype=1, workspace_bytes=6 * 4 * 6 * 33 * 4,
    total_k=0, num_pages=5, num_kv_batches=2,
    ranges_batch_stride=20, ranges_row_stride=4, tree_batch_stride=9, tree_row_stride=3, ranges_in_window=1,
    causal_is_bool=0,
    qv=0, qv_strides="0,0,0", q_descale=0, k_descale=0, v_descale=0, q_descale_strides="0,0", k_descale_strides="0,0",
    v_descale_strides="0,0", shared_page_table=0, shared_seqlen_k=0)
assert got == {{name: str(value) for name, value in expected.items()}}, got
""",
    )


def test_forward_packs_packed_sequences(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        """
T = ExchangeTensor
F16 = "torch.float16"
got = call(T, kernel_id="counting", q=T(4096, (9, 4, 64), F16), k=T(8192, (11, 2, 64), F16),
           v=T(12288, (11, 2, 64), F16), out=T(16384, (9, 4, 64), F16),
           lse=T(20480, (4, 9), F32), cu_seqlens_q=T(24576, (3,), INT), cu_seqlens_k=T(28672, (3,), INT),
           page_table=None, kv_batch_idx=None, leftpad_k=None, num_splits=1,
           sinks=T(32768, (4,), F16), query_ranges=T(36864, (9, 2), INT, strides=(5, 1)),
           tree_mask=T(40960, (9,), "torch.int64", strides=(2,)), causal_by_sequence=T(45056, (2,), "torch.bool"))
wanted = dict(index=1, q_dtype=2, workspace_bytes=4, tile_counter=0,
              batch=2, total_q=9, page_size=0, q_strides="0,256,64", k_strides="0,128,64", lse_head_stride=9,
              lse_batch_stride=0, cu_seqlens_q=24576, cu_seqlens_k=28672, sinks_are_fp32=0,
              query_ranges=36864, ranges_batch_stride=0, ranges_row_stride=5, tree_mask=40960, tree_batch_stride=0,
              tree_row_stride=2, causal_by_sequence=45056, causal_is_bool=1, ranges_in_window=0,
              out_partial=SCRATCH, page_table=0, total_k=11, num_pages=0, num_kv_batches=0)
assert {name: got[name] for name in wanted} == {name: str(value) for name, value in wanted.items()}, got
# A dense cache of more rows than the call has sequences.
got = call(T, page_table=None, k=T(8192, (5, 112, 2, 64)), v=T(12288, (5, 112, 2, 32)))
assert (got["total_k"], got["num_pages"], got["num_kv_batches"], got["page_size"]) == ("0", "0", "5", "0"), got
""",
    )


@pytest.mark.parametrize("kind", ["AttributeTensor", "ExchangeTensor"])
def test_forward_packs_8_bit_tensors_and_qv(stub: Path, kind: str) -> None:  # noqa: F811
    run(
        stub,
        f"""
T = {kind}
fp8 = dict(kernel_id="prefill_8_bit", q=T(1 << 12, (2, 3, 4, 64), FP8), k=T(2 << 12, (5, 16, 2, 64), FP8),
           v=T(3 << 12, (5, 16, 2, 32), FP8), qv=T(4 << 12, (2, 3, 4, 32), FP8, strides=(1024, 256, 64, 1)),
           q_descale=T(5 << 12, (2, 2), F32), k_descale=T(6 << 12, (2, 2), F32, strides=(0, 0)),
           v_descale=T(7 << 12, (2, 2), F32, strides=(1, 2)))
got = call(T, **fp8)
wanted = dict(index=2, q_dtype=3, q=1 << 12, k=2 << 12, v=3 << 12, out=4 << 12, qv=4 << 12, qv_strides="1024,256,64",
              q_descale=5 << 12, k_descale=6 << 12, v_descale=7 << 12, q_descale_strides="2,1",
              k_descale_strides="0,0", v_descale_strides="1,2")
assert {{name: got[name] for name in wanted}} == {{name: str(value) for name, value in wanted.items()}}, got
text = error(lambda: call(T, **fp8 | dict(out=T(4 << 12, (2, 3, 4, 32), FP8))))
assert "out must be bf16 tensor" in text and "got float8_e4m3fn (2, 3, 4, 32)" in text, text
text = error(lambda: call(T, **fp8 | dict(q=T(1 << 12, (2, 3, 4, 64)))))
assert "q must be float8_e4m3fn tensor" in text, text
assert call(T, **fp8 | dict(sinks=T(32768, (4,))))["sinks_are_fp32"] == "0"
assert call(T, **fp8 | dict(sinks=T(32768, (4,), F32)))["sinks_are_fp32"] == "1"
text = error(lambda: call(T, **fp8 | dict(sinks=T(32768, (4,), FP8))))
assert "sinks must be one logit for each head of q, fp32 or the dtype of out" in text, text
""",
    )


def test_the_kernel_is_asked_for_its_workspace(stub: Path) -> None:  # noqa: F811
    """Once a kind of call, with all that was packed; the launcher lays it out."""
    run(
        stub,
        """
T = ExchangeTensor
room = 6 * 4 * 6 * (32 + 1)
got = call(T)
assert got["out_partial"] == str(SCRATCH) and got["workspace_bytes"] == str(4 * room), got
assert got["lse_partial"] == got["tile_counter"] == "0", got
got = call(T, num_splits=1)
assert got["out_partial"] == got["workspace_bytes"] == "0", got
assert scratch_sizes == freed == [room]
# Where the exchange API fails, torch is asked, which raises its own exception if it must.
got = call(T, kernel_id="decode_bf16", max_blocks=9999)
assert got["out_partial"] == str(SCRATCH) and got["workspace_bytes"] == "39996", got
assert scratch_sizes[1:] == [9999] and len(freed) == 1
""",
    )


def test_an_lse_that_is_not_wanted_and_a_long_bound(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        """
T = ExchangeTensor
assert call(T, need_lse=False)["softmax_lse"] == "0"
# A packed call is no longer than all its rows, whatever bound it gives.
got = call(T, need_lse=False, q=T(4096, (9, 4, 64)), out=T(16384, (9, 4, 32)), cu_seqlens_q=T(24576, (3,), INT),
           num_splits=1, seqlen_q=(1 << 31) - 1)
assert got["seqlen_q"] == "9", got
""",
    )


def test_arguments_come_in_the_order_of_attention_args(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        """
values = ("max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal", "window_size", "attention_chunk", "softcap",
          "num_splits", "pack_gqa", "sm_margin", "backend", "tokens_per_split", "ranges_in_window")
for name in ARGUMENTS:
    changed = arguments(ExchangeTensor, **{name: "no tensor"})
    if name in values:
        _C.run_new(make_launch(ExchangeTensor), "f", True, changed)
    else:
        text = error(lambda: _C.run_new(make_launch(ExchangeTensor), "f", True, changed))
        assert text == f"_C.forward: {name} must be a tensor or None, got str", text
""",
    )


def test_current_stream_of_the_tensors_device(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        """
T = lambda *a, **k: ExchangeTensor(*a, device=3, **k)
assert call(T, device=3)["stream"] == str(CURRENT_STREAM + 3)
""",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ('q=T(4096, (2, 3, 4, 64), "torch.float16")', ["q must be", "bf16", "got fp16 (2, 3, 4, 64) on cuda:0"]),
        ("k=T(4096, (5, 16, 2, 64), is_cuda=False)", ["k must be", "CUDA device"]),
        ("v=T(4096, (5, 16, 2, 32), strides=(2048, 64, 1, 32))", ["v must be", "contiguous"]),
        ("out=T(4096, (2, 3, 4, 32), device=1)", ["out must be", "device of q", "cuda:1"]),
        ('seqused_k=T(4096, (2,), "torch.int64")', ["seqused_k must be", "int32"]),
        ("seqused_k=T(4096, (1,), INT)", ["seqused_k must", "at least 2"]),
        ("page_table=None, k=T(4096, (9, 2, 64))", ["k must be [batch, tokens, heads, head_dim] without cu_seqlens_k"]),
        ("cu_seqlens_q=T(4096, (3,), INT)", ["cu_seqlens_q must be given exactly when q has 3"]),
        ("scheduler_metadata=T(4096, (16,), INT)", ["scheduler_metadata must be", "(16)"]),
        ("lse=T(4096, (2, 4, 3))", ["softmax_lse must be fp32 tensor"]),
        ("k=T(4096, (5, 16, 3, 64))", ["k must be", "divides"]),
        ("sinks=T(4096, (3,), F32)", ["sinks must be"]),
        ("qv=T(4096, (2, 3, 4, 64))", ["qv must be of the shape of q with head_dim_v", "(2, 3, 4, 64)"]),
        ("qv=T(4096, (2, 3, 4, 32), device=1)", ["qv must be", "on its device", "cuda:1"]),
        ("qv=T(4096, (2, 3, 4, 32), F32)", ["qv must be bf16 tensor", "got fp32"]),
        ("q_descale=T(4096, (2, 4), F32)", ["q_descale must be [batch, heads of k]", "(2, 4)"]),
        ("k_descale=T(4096, (2,), F32)", ["k_descale must be fp32 tensor of 2 dimensions"]),
        ("v_descale=T(4096, (2, 2))", ["v_descale must be fp32 tensor", "got bf16"]),
        ("query_ranges=T(4096, (2, 3, 2), 'torch.int64')", ["query_ranges must be int32 tensor of 3", "got int64"]),
        ("query_ranges=T(4096, (6, 2), INT)", ["query_ranges must be int32 tensor of 3 dimensions"]),
        ("query_ranges=T(4096, (2, 3, 3), INT)", ["query_ranges must be of the tokens of q and 2"]),
        ("query_ranges=T(4096, (2, 3, 2), INT, strides=(6, 1, 3))", ["query_ranges must be", "last dimension"]),
        (
            "query_ranges=T(4096, (2, 3, 2), INT, strides=(6, 2**31, 1))",
            ["query_ranges must be", "2^31 elements apart"],
        ),
        ("query_ranges=T(4096, (2, 3, 2), INT, device=1)", ["query_ranges must be", "cuda:1"]),
        ("tree_mask=T(4096, (2, 3), INT)", ["tree_mask must be int64 tensor of 2 dimensions", "got int32"]),
        ("tree_mask=T(4096, (2, 4), 'torch.int64')", ["tree_mask must be a word for each token of q", "(2, 4)"]),
        ("causal_by_sequence=T(4096, (2,), F32)", ["causal_by_sequence must be bool or int32", "got fp32"]),
        ("causal_by_sequence=T(4096, (1,), INT)", ["causal_by_sequence must hold at least 2 entries"]),
        ("q=None", ["q must be a tensor, got None"]),
        ("q=7", ["q must be a tensor", "int"]),
        ("q=T(4096, (1,) * 7)", ["a tensor has 7 dimensions"]),
        ("softcap=-1.0", ["sm80_fwd_d64_bf16: launch: the stub was asked to fail"]),
        ('kernel_id="sm80_fwd_d128_bf16"', ["sm80_fwd_d128_bf16", "built without this kernel", "80;90"]),
        ('kernel_id="backward_bf16"', ["backward_bf16: a forward call was given a kernel of the other direction"]),
        (
            'family="sm90", kernel_id="sm90_fwd_d128_bf16"',
            ["sm90_fwd_d128_bf16", "libbroadhead_sm90.so", "BROADHEAD_CUDA_ARCHS"],
        ),
    ],
)
@pytest.mark.parametrize("kind", ["AttributeTensor", "ExchangeTensor"])
def test_forward_refuses(stub: Path, kind: str, changes: str, words: list[str]) -> None:  # noqa: F811
    text = run(stub, f"T = {kind}\nprint(error(lambda: call(T, {changes})))")
    if "sm90" not in changes and "CUDA device" not in words:
        assert all(word in text for word in words), text
    else:
        assert all(word.lower() in text.lower() for word in words), text
