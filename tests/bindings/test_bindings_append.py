"""Appends and merges without a GPU: what is packed, by the stub kernel library, refused, and known the next time."""

from __future__ import annotations

from pathlib import Path

import pytest
from stub_process import pytestmark, run, stub  # noqa: F401

APPEND = """
def append(T, **changes):
    # 2 sequences of 3 new keys and 5 queries, 4 heads over 2 KV heads, head_dim 64 and 32, 7 pages of 16 tokens.
    a = dict(
        k_cache=T(1 << 12, (7, 16, 2, 64), strides=(4096, 128, 64, 1)), v_cache=T(2 << 12, (7, 16, 2, 32)),
        k_new=T(3 << 12, (2, 3, 2, 64)), v_new=T(4 << 12, (2, 3, 2, 32)),
        cache_seqlens=T(5 << 12, (2,), INT), seqlens_out=T(6 << 12, (2,), INT),
        q=T(7 << 12, (2, 5, 4, 64)), q_out=T(8 << 12, (2, 5, 4, 64)),
        rotary_cos=T(9 << 12, (100, 8), F32, strides=(16, 1)), rotary_sin=T(10 << 12, (100, 8), F32),
        rotary_seqlens=T(11 << 12, (2,), INT), cu_seqlens_q=None, cu_seqlens_k_new=None,
        page_table=T(12 << 12, (3, 9), INT, strides=(11, 1)), cache_batch_idx=T(13 << 12, (2,), INT),
        k_descale=None, v_descale=None, rotary_interleaved=1, causal_or_local=1, stream=0,
    )
    assert not set(changes) - set(a), changes
    a.update(changes)
    _C.append_kv(*a.values())
    return last_call(library)

def check(got, **wanted):
    assert {name: got[name] for name in wanted} == {name: str(value) for name, value in wanted.items()}, got

NO_ROTARY = dict(q=None, q_out=None, rotary_cos=None, rotary_sin=None, rotary_seqlens=None)
"""
MERGE = """
def merge(T, **changes):
    a = dict(
        out_a=T(1 << 12, (2, 3, 4, 32)), lse_a=T(2 << 12, (2, 4, 3), F32), out_b=T(3 << 12, (2, 3, 4, 32)),
        lse_b=T(4 << 12, (2, 4, 3), F32, strides=(1, 2, 8)), out=T(5 << 12, (2, 3, 4, 32), strides=(960, 320, 40, 1)),
        softmax_lse=T(6 << 12, (2, 4, 3), F32))
    a.update(changes)
    lse = a.pop("softmax_lse")
    made = [(lambda t: new_out, None, None), (lambda t: lse, None, None)]
    out, result = _C.run_new_merge(0, *made, *a.values())
    assert out is (new_out if a["out"] is None else a["out"]) and result is lse
    return last_call(library)

def known_merge(T, **changes):
    a = dict(
        out_a=T(7 << 12, (2, 3, 4, 32)), lse_a=T(8 << 12, (2, 4, 3), F32), out_b=T(9 << 12, (2, 3, 4, 32)),
        lse_b=T(10 << 12, (2, 4, 3), F32, strides=(1, 2, 8)), out=T(11 << 12, (2, 3, 4, 32), strides=(960, 320, 40, 1)))
    return _C.run_known_merge(*(a | changes).values())

new_out = ExchangeTensor(12 << 12, (2, 3, 4, 32))
"""


@pytest.mark.parametrize("kind", ["AttributeTensor", "ExchangeTensor"])
def test_append_packs_every_argument(stub: Path, kind: str) -> None:  # noqa: F811
    run(
        stub,
        APPEND
        + f"""
got = append({kind}, stream=99)
pages = dict(k_cache=1, v_cache=2, k_new=3, v_new=4, cache_seqlens=5, seqlens_out=6, q=7, q_out=8, rotary_cos=9,
             rotary_sin=10, rotary_seqlens=11, page_table=12, cache_batch_idx=13)
expected = {{name: page << 12 for name, page in pages.items()}} | dict(
    stream=99, struct_size_fits=1, cu_seqlens_q=0, cu_seqlens_k_new=0, k_descale=0, v_descale=0,
    k_cache_strides="4096,128,64", v_cache_strides="1024,64,32", k_new_strides="384,128,64", v_new_strides="192,64,32",
    q_strides="1280,256,64", q_out_strides="1280,256,64", cos_stride=16, sin_stride=8, k_descale_strides="0,0",
    v_descale_strides="0,0", page_table_batch_stride=11, num_blocks=7, num_owners=3, block_size=16, max_pages=9,
    batch=2, seqlen_q=5, seqlen_new=3, total_q=10, total_new=6, num_heads_q=4, num_heads_kv=2, head_dim=64,
    head_dim_v=32, rotary_dim=16, num_positions=100, rotary_interleaved=1, causal_or_local=1, angles_dtype=0,
    dtype=1, cache_dtype=1)
assert got == {{name: str(value) for name, value in expected.items()}}, got
""",
    )


def test_append_packs_packed_tokens_and_8_bits(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        APPEND
        + """
T = ExchangeTensor
F16 = "torch.float16"
packed = dict(k_new=T(3 << 12, (9, 2, 64), F16), v_new=T(4 << 12, (9, 2, 32), F16), q=T(7 << 12, (11, 4, 64), F16),
              q_out=T(8 << 12, (11, 4, 64), F16), cu_seqlens_q=T(14 << 12, (3,), INT),
              cu_seqlens_k_new=T(15 << 12, (3,), INT), rotary_cos=T(9 << 12, (1, 32), F16),
              rotary_sin=T(10 << 12, (1, 32), F16), rotary_interleaved=0, causal_or_local=0, page_table=None,
              cache_batch_idx=None, k_cache=T(1 << 12, (2, 16, 2, 64), FP8), v_cache=T(2 << 12, (2, 16, 2, 32), FP8),
              k_descale=T(16 << 12, (2, 2), F32), v_descale=T(17 << 12, (2, 2), F32, strides=(0, 0)))
check(append(T, **packed), k_new_strides="0,128,64", q_strides="0,256,64", cu_seqlens_q=14 << 12,
      cu_seqlens_k_new=15 << 12, total_new=9, total_q=11, seqlen_new=0, seqlen_q=0, batch=2, angles_dtype=2,
      dtype=2, cache_dtype=3, num_owners=2, max_pages=0, page_table=0, k_descale=16 << 12, v_descale=17 << 12,
      k_descale_strides="2,1", v_descale_strides="0,0", rotary_dim=64, num_positions=1, cos_stride=0,
      rotary_interleaved=0, causal_or_local=0)
fp8 = dict(k_new=T(3 << 12, (2, 3, 2, 64), FP8), v_new=T(4 << 12, (2, 3, 2, 32), FP8),
           k_cache=packed["k_cache"], v_cache=packed["v_cache"], page_table=None, cache_batch_idx=None, **NO_ROTARY)
check(append(T, **fp8), dtype=3, cache_dtype=3, q=0, q_out=0, rotary_cos=0, rotary_dim=0, total_q=0)
# The keys alone may be rotated; strides along dimensions of one element are none.
check(append(T, q=None, q_out=None, k_new=T(3 << 12, (2, 1, 2, 64), strides=(128, 7, 64, 1)),
             v_new=T(4 << 12, (2, 1, 2, 32))), rotary_dim=16, q=0, total_q=0, k_new_strides="128,0,64", seqlen_new=1)
check(append(lambda *a, **k: T(*a, device=3, **k), stream=-1), stream=CURRENT_STREAM + 3)
""",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("k_cache=T(4096, (7, 16, 2, 64), F32)", ["v_cache must be fp32"]),
        ("k_cache=T(4096, (7, 16, 2, 64), F32), v_cache=T(4096, (7, 16, 2, 32), F32)", ["k_cache must be bf16, fp16"]),
        ("v_cache=T(4096, (7, 8, 2, 32))", ["v_cache must be as k_cache", "(7, 8, 2, 32)"]),
        ("k_new=T(4096, (2, 3, 2, 64), F16), v_new=T(4096, (2, 3, 2, 32), F16)", ["k_new must be of the dtype"]),
        ("k_new=T(4096, (2, 3, 2, 48))", ["k_new must be of the heads and head_dim", "(2, 3, 2, 48)"]),
        ("v_new=T(4096, (2, 2, 2, 32))", ["v_new must be of the tokens of k_new"]),
        ("k_new=T(4096, (2, 3, 2, 64), strides=(384, 128, 1, 2))", ["k_new must be", "the last contiguous"]),
        ("k_new=T(4096, (2, 3, 2, 64), device=1)", ["k_new must be on the device of k_cache"]),
        ("cache_seqlens=None", ["cache_seqlens must be a tensor"]),
        ("seqlens_out=T(4096, (1,), INT)", ["seqlens_out must hold at least 2"]),
        ("rotary_sin=None", ["rotary_sin must be given with rotary_cos"]),
        ("q_out=None", ["q_out must be given with q"]),
        ("rotary_cos=None, rotary_sin=None", ["rotary_cos must be given with q"]),
        ("rotary_cos=T(4096, (100, 33), F32)", ["rotary_cos must be", "at most head_dim", "(100, 33)"]),
        ("rotary_cos=T(4096, (100, 8), F16)", ["rotary_cos must be", "got fp16"]),
        ("rotary_sin=T(4096, (100, 8))", ["rotary_sin must be of the shape and dtype of rotary_cos"]),
        ("q=T(4096, (2, 5, 4, 64), F16)", ["q must be", "dtype and head_dim of k_new"]),
        ("q_out=T(4096, (2, 4, 4, 64))", ["q_out must be of the shape"]),
        ("q=T(4096, (3, 5, 4, 64)), q_out=T(4096, (3, 5, 4, 64))", ["q must have as many sequences as k_new, 2"]),
        ("cu_seqlens_q=T(4096, (3,), INT)", ["cu_seqlens_q must be given exactly when q has 3"]),
        ("cu_seqlens_k_new=T(4096, (3,), INT)", ["cu_seqlens_k_new must be given exactly when k_new has 3"]),
        ("k_cache=T(4096, (7, 0, 2, 64)), v_cache=T(4096, (7, 0, 2, 32))", ["k_cache must be of page_size >= 1"]),
        ("page_table=T(4096, (3, 9), INT, strides=(1, 3))", ["page_table must be contiguous"]),
        ("cache_batch_idx=T(4096, (1,), INT)", ["cache_batch_idx must hold at least 2"]),
        ("k_descale=T(4096, (2, 4), F32)", ["k_descale must be [batch, heads of k]"]),
        ("v_descale=T(4096, (2, 2))", ["v_descale must be fp32"]),
        ("k_new=T(4096, (2, 99, 2, 64)), v_new=T(4096, (2, 99, 2, 32))", ["append_kv: launch: the stub was asked"]),
    ],
)
def test_append_refuses(stub: Path, changes: str, words: list[str]) -> None:  # noqa: F811
    text = run(stub, f'{APPEND}\nT, F16 = ExchangeTensor, "torch.float16"\nprint(error(lambda: append(T, {changes})))')
    assert all(word in text for word in words), text


def test_append_of_8_bits_takes_rotary(stub: Path) -> None:  # noqa: F811
    """With tables of fp32, bf16 or fp16; q is of 8 bits, too."""
    run(
        stub,
        APPEND
        + """
T, F16 = ExchangeTensor, "torch.float16"
fp8 = dict(k_cache=T(1 << 12, (7, 16, 2, 64), FP8), v_cache=T(2 << 12, (7, 16, 2, 32), FP8),
           k_new=T(3 << 12, (2, 3, 2, 64), FP8), v_new=T(4 << 12, (2, 3, 2, 32), FP8),
           q=T(5 << 12, (2, 5, 4, 64), FP8), q_out=T(6 << 12, (2, 5, 4, 64), FP8))
for dtype, number in ((F32, 0), ("torch.bfloat16", 1), (F16, 2)):
    angles = dict(rotary_cos=T(7 << 12, (100, 8), dtype), rotary_sin=T(8 << 12, (100, 8), dtype))
    got = append(T, **fp8, **angles)
    assert (got["angles_dtype"], got["dtype"], got["cache_dtype"]) == (str(number), "3", "3"), got
eight = dict(rotary_cos=T(7 << 12, (100, 8), FP8), rotary_sin=T(8 << 12, (100, 8), FP8))
text = error(lambda: append(T, **fp8, **eight))
assert "rotary_cos must be" in text and "float8_e4m3fn" in text, text
""",
    )


@pytest.mark.parametrize("kind", ["AttributeTensor", "ExchangeTensor"])
def test_merge_states(stub: Path, kind: str) -> None:  # noqa: F811
    run(
        stub,
        MERGE
        + f"""
T = {kind}
got = merge(T)
wanted = dict(out_a=1 << 12, lse_a=2 << 12, out_b=3 << 12, lse_b=4 << 12, out=5 << 12, softmax_lse=6 << 12,
              out_a_strides="384,128,32", out_b_strides="384,128,32", out_strides="960,320,40", lse_a_strides="12,1,3",
              lse_b_strides="1,8,2", lse_strides="12,1,3", batch=2, seqlen=3, heads=4, head_dim_v=32, dtype=1,
              stream=CURRENT_STREAM, struct_size_fits=1)
assert got == {{name: str(value) for name, value in wanted.items()}}, got
packed, lse = T(4096, (9, 4, 32), F32), T(8192, (4, 9), F32)
got = merge(T, out_a=packed, out_b=packed, out=packed, lse_a=lse, lse_b=lse, softmax_lse=lse)
wanted = dict(batch=1, seqlen=9, heads=4, dtype=0, out_strides="0,128,32", lse_strides="0,1,9")
assert {{name: got[name] for name in wanted}} == {{name: str(value) for name, value in wanted.items()}}, got
for changes, words in (
    (dict(out_a=T(4096, (2, 3, 4, 32), FP8)), "out_b must be float8_e4m3fn"),
    (dict(out_b=T(4096, (2, 3, 5, 32))), "out_b must be of the shape of out_a"),
    (dict(out=T(4096, (2, 3, 4, 32), F32)), "out must be bf16"),
    (dict(lse_b=T(4096, (2, 3, 4), F32)), "lse_b must be [batch, heads, seqlen]"),
    (dict(softmax_lse=T(4096, (2, 4, 3))), "softmax_lse must be fp32"),
    (dict(lse_a=T(4096, (4, 3), F32)), "lse_a must be fp32 tensor of 3 dimensions"),
    (dict(out=T(4096, (2, 3, 4, 32), device=1)), "out must be on the device of out_a"),
):
    text = error(lambda: merge(T, **changes))
    assert words in text, text
""",
    )


def test_a_known_merge(stub: Path) -> None:  # noqa: F811
    """Only addresses come from the call itself; what validation could tell apart is no known call."""
    run(
        stub,
        MERGE
        + """
T = ExchangeTensor
assert known_merge(T) is None
merge(T)
out, lse = known_merge(T)
got = last_call(library)
pages = dict(out_a=7, lse_a=8, out_b=9, lse_b=10, out=11, softmax_lse=6)
assert {name: got[name] for name in pages} == {name: str(page << 12) for name, page in pages.items()}, got
assert out.data_ptr() == 11 << 12 and lse.data_ptr() == 6 << 12 and hooks.written == [5 << 12, 11 << 12]
assert got["out_strides"] == "960,320,40" and got["lse_b_strides"] == "1,8,2"
plain = T(7 << 12, (2, 3, 4, 32))
for change in (dict(out=None), dict(out_a=T(4096, (2, 3, 4, 32), F32)), dict(out_b=T(4104, (2, 3, 4, 32))),
               dict(lse_a=T(4096, (2, 4, 5), F32)), dict(out=plain), dict(lse_b=None), dict(out_a=7)):
    assert known_merge(T, **change) is None, change
class Other(ExchangeTensor):
    pass
assert known_merge(T, lse_a=Other(4096, (2, 4, 3), F32)) is None
negated = T(7 << 12, (2, 3, 4, 32))
negated.is_negative = True
assert known_merge(T, out_a=negated) is None
hooks.grad, plain.requires_grad = True, True
assert known_merge(T, out_a=plain) is None and known_merge(T) is not None
hooks.grad, hooks.modes = False, 1
assert known_merge(T) is None
""",
    )


APPENDING = """
NEW_NAMES = ("k", "v", "cu_seqlens_k_new", "rotary_cos", "rotary_sin", "rotary_seqlens", "rotary_interleaved")
READ = dict(leftpad_k=None, prefix_lens=None, attention_chunk=0)

def fresh(T, **changes):
    a = dict(k=T(20 << 12, (2, 3, 2, 64)), v=T(21 << 12, (2, 3, 2, 32)), cu_seqlens_k_new=None,
             rotary_cos=T(22 << 12, (112, 16), F32), rotary_sin=T(23 << 12, (112, 16), F32), rotary_seqlens=None,
             rotary_interleaved=True)
    assert tuple(a) == NEW_NAMES and not set(changes) - set(a)
    return tuple((a | changes).values())

def known_append(T, new={}, need_lse=True, **changes):
    return _C.run_known_append("known", need_lse, arguments(T, **READ | changes), fresh(T, **new))

def remember_append(T, new={}, launch={}, causal_or_local=True, **changes):
    # Attention runs on the rotated q and the new lengths.
    behind = arguments(T, **READ | dict(q=T(24 << 12, (2, 3, 4, 64)), seqused_k=T(25 << 12, (2,), INT)) | changes)
    _C.run_new(make_launch(T, attention_chunk=0, **launch), "new", True, behind)
    dispatch = ("cuda", "append_kv", "why")
    return _C.remember_append(dispatch, causal_or_local, arguments(T, **READ | changes), fresh(T, **new), behind)
"""


def test_a_known_append_is_one_launch_of_two_kernels(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        APPENDING
        + """
T = ExchangeTensor
assert known_append(T) is None
assert remember_append(T) is True
hooks.written.clear()
out, lse = known_append(T, scheduler_metadata=T(30 << 12, (17,), INT))
append, attention = last_call(library, "append_kv"), last_call(library)
rotated, lengths = hooks.made
assert rotated.shape == (2, 3, 4, 64) and lengths.shape == (2,)
wanted = dict(k_cache=2 << 12, v_cache=3 << 12, k_new=20 << 12, v_new=21 << 12, q=1 << 12, q_out=rotated.data_ptr(),
              rotary_cos=22 << 12, rotary_sin=23 << 12, cache_seqlens=8 << 12, seqlens_out=lengths.data_ptr(),
              page_table=11 << 12, cache_batch_idx=10 << 12, rotary_interleaved=1, causal_or_local=1, batch=2,
              stream=CURRENT_STREAM)
assert {name: append[name] for name in wanted} == {name: str(value) for name, value in wanted.items()}, append
assert attention["q"] == str(rotated.data_ptr()) and attention["seqused_k"] == str(lengths.data_ptr()), attention
assert attention["scheduler_metadata"] == str(30 << 12) and attention["k"] == str(2 << 12)
assert hooks.written == [2 << 12, 3 << 12, 4 << 12], "both caches and out"
assert hooks.append == ("cuda", "append_kv", "why") and hooks.last == ("cuda", "row", "why")
# Without rotary q is attention's own.
no_rotary = dict(rotary_cos=None, rotary_sin=None)
remember_append(T, no_rotary, sm_margin=1)
hooks.made.clear()
known_append(T, no_rotary, sm_margin=1)
append, attention = last_call(library, "append_kv"), last_call(library)
assert append["q"] == append["q_out"] == append["rotary_cos"] == "0" and attention["q"] == str(1 << 12)
assert len(hooks.made) == 1 and attention["seqused_k"] == append["seqlens_out"]
""",
    )


def test_appends_that_differ_are_not_known(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        APPENDING
        + """
T = ExchangeTensor
remember_append(T)
for changes in (dict(causal=1), dict(softcap=29.0), dict(q=T((1 << 12) + 8, (2, 3, 4, 64))), dict(out=None),
                dict(seqused_k=None), dict(k_descale=T(4096, (2, 2), F32)), dict(backend="cuda"),
                dict(num_splits=6.0), dict(q=T(1 << 12, (2, 3, 4, 64), is_cuda=False))):
    assert known_append(T, **changes) is None, changes
for new in (dict(k=T(4096, (2, 4, 2, 64))), dict(v=T(4096, (2, 3, 2, 32), FP8)), dict(rotary_interleaved=False),
            dict(rotary_interleaved=1), dict(rotary_seqlens=T(4096, (2,), INT)), dict(rotary_cos=None), dict(k=None),
            dict(cu_seqlens_k_new=T(4096, (3,), INT)), dict(k=7)):
    assert known_append(T, new) is None, new
learning, negated = T(20 << 12, (2, 3, 2, 64)), T(20 << 12, (2, 3, 2, 64))
learning.requires_grad = negated.is_negative = True
assert known_append(T, dict(k=negated)) is None
hooks.grad = True
assert known_append(T, dict(k=learning)) is None and known_append(T) is not None
hooks.grad, hooks.modes = False, 1
assert known_append(T) is None
hooks.modes = 0
assert known_append(T) is not None
# Attention that did not run by a Launch makes no append known.
call = arguments(T, **READ | dict(sm_margin=5))
assert _C.remember_append(None, True, call, fresh(T), call) is False and known_append(T, sm_margin=5) is None
""",
    )


def test_a_refused_append_has_written_nothing(stub: Path) -> None:  # noqa: F811
    """Metadata of another call is refused before the first of the two launches."""
    run(
        stub,
        APPENDING
        + """
T = ExchangeTensor
remember_append(T)
known_append(T)
before = last_call(library, "append_kv")
hooks.written.clear()
def refuse(*arguments):
    raise ValueError("made for another call")
connect(check_identity=refuse)
hooks.records[14 << 12] = "another"
for _ in range(2):
    try:
        known_append(T, dict(k=T(40 << 12, (2, 3, 2, 64))))
    except ValueError:
        assert last_call(library, "append_kv") == before and hooks.written == []
    else:
        raise AssertionError("it ran")
""",
    )


def test_an_append_whose_attention_fails_has_written(stub: Path) -> None:  # noqa: F811
    """Its caches were written, and autograd is told; an append that failed itself wrote nothing."""
    run(
        stub,
        APPENDING
        + """
T = ExchangeTensor
remember_append(T)
hooks.written.clear()
text = error(lambda: known_append(T, out=T(0xBAD << 12, (2, 3, 4, 32))))
assert "the stub was asked to fail" in text and hooks.written == [2 << 12, 3 << 12], (text, hooks.written)
""",
    )


def test_known_calls_are_bounded_in_bytes(stub: Path) -> None:  # noqa: F811
    """Calls of every kind count together; at the bound all are forgotten, and what runs then is remembered."""
    run(
        stub,
        MERGE
        + APPENDING
        + """
T = ExchangeTensor
sizes = []
for remember in (lambda: remember_append(T), lambda: merge(T)):
    remember()
    sizes.append(_C.known_calls_size())
(first, bytes_of_two), (second, all_bytes) = sizes
assert (first, second) == (2, 3) and 2000 < bytes_of_two < all_bytes < 20000, sizes
merge(T)
assert _C.known_calls_size() == (3, all_bytes), "it was known"
_C.bound_known_calls(all_bytes)
merge(T, out=None)
assert _C.known_calls_size()[0] == 1 and known_merge(T) is None and known_merge(T, out=None) is not None
_C.bound_known_calls(0)
_C.forget_calls()
assert _C.known_calls_size() == (0, 0)
""",
    )
