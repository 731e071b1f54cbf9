"""What is taken for scalars and layouts, by every public function alike: it gives what the plain arguments give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import broadhead
import pytest
import torch
from broadhead.call.validation import MAX_SPLITS
from broadhead.run import metadata as metadata_module

np = pytest.importorskip("numpy")

Function = Callable[..., Any]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense() -> dict[str, Any]:
    return {"q": randn(2, 6, 4, 16), "k": randn(2, 9, 2, 16), "v": randn(2, 9, 2, 16)}


def varlen() -> dict[str, Any]:
    return {
        "q": randn(7, 4, 16), "k": randn(11, 2, 16), "v": randn(11, 2, 16), "cu_seqlens_q": int32(0, 3, 7),
        "cu_seqlens_k": int32(0, 5, 11), "max_seqlen_q": 4, "max_seqlen_k": 6,
    }  # fmt: skip


def kvcache() -> dict[str, Any]:
    return {
        "q": randn(2, 2, 4, 16), "k_cache": randn(6, 4, 2, 16), "v_cache": randn(6, 4, 2, 16),
        "cache_seqlens": int32(7, 5), "page_table": int32(5, 1, 0, 2).view(2, 2),
    }  # fmt: skip


def appending() -> dict[str, Any]:
    return {
        "q": randn(2, 2, 4, 16), "k_cache": randn(2, 12, 2, 16), "v_cache": randn(2, 12, 2, 16),
        "k": randn(2, 2, 2, 16), "v": randn(2, 2, 2, 16), "cache_seqlens": int32(7, 5),
        "rotary_cos": randn(12, 4), "rotary_sin": randn(12, 4), "rotary_interleaved": False,
    }  # fmt: skip


def shared() -> dict[str, Any]:
    return {
        "q": randn(2, 2, 4, 16), "k_cache": randn(8, 4, 2, 16), "v_cache": randn(8, 4, 2, 16),
        "prefix_len": 4, "page_table": int32(5, 1, 0, 2).view(2, 2), "cache_seqlens": int32(7, 5),
        "prefix_page_table": int32(7, 6),
    }  # fmt: skip


def metadata() -> dict[str, Any]:
    return {
        "batch_size": 2, "max_seqlen_q": 1, "max_seqlen_k": 64, "num_heads_q": 4, "num_heads_kv": 2, "headdim": 64,
        "cache_seqlens": int32(7, 5),
    }  # fmt: skip


#: Every public function that takes scalars: name -> (its arguments, the scalars that it takes beside the common ones).
CALLS: dict[str, tuple[str, Callable[[], dict[str, Any]], dict[str, Any]]] = {
    "dense": ("flash_attn_func", dense, {"attention_chunk": 4, "num_splits": 3, "sm_margin": 1, "pack_gqa": True}),
    "varlen": ("flash_attn_varlen_func", varlen, {"attention_chunk": 4, "max_seqlen_q": 4, "max_seqlen_k": 6}),
    "kvcache": ("flash_attn_with_kvcache", kvcache, {"attention_chunk": 4, "num_splits": 3, "tokens_per_split": 0}),
    "append": ("flash_attn_with_kvcache", appending, {"attention_chunk": 4, "rotary_interleaved": True}),
    "mha_fwd": (
        "mha_fwd", lambda: {**dense(), "k_new": None},
        {"attention_chunk": 4, "window_size_left": 3, "window_size_right": 1, "num_splits": 3},
    ),
    "mha_bwd": ("mha_bwd", lambda: {"dout": randn(2, 6, 4, 16), **dense()}, {"attention_chunk": 4}),
    "qkvpacked": ("flash_attn_qkvpacked_func", lambda: {"qkv": randn(2, 6, 3, 4, 16)}, {"attention_chunk": 4}),
    "heads packed": (
        "flash_attn_qkvpacked_func", lambda: {"qkv": randn(2, 6, 8, 16), "num_heads_q": 4}, {"num_heads_q": 4},
    ),
    "kvpacked": (
        "flash_attn_kvpacked_func", lambda: {"q": randn(2, 6, 4, 16), "kv": randn(2, 9, 2, 2, 16)},
        {"attention_chunk": 4},
    ),
    "varlen packed": (
        "flash_attn_varlen_qkvpacked_func",
        lambda: {"qkv": randn(7, 3, 4, 16), "cu_seqlens": int32(0, 3, 7), "max_seqlen": 4}, {"max_seqlen": 4},
    ),
    "shared prefix": ("flash_attn_with_shared_prefix", shared, {"prefix_len": 4, "num_splits": 3}),
}  # fmt: skip
COMMON = {"causal": True, "softcap": 3.0, "softmax_scale": 0.3}
#: Ways to spell a scalar.
SPELLINGS: dict[str, Callable[[Any], Any]] = {
    "NumPy": lambda x: np.bool_(x) if isinstance(x, bool) else np.int64(x) if isinstance(x, int) else np.float64(x),
    "narrow NumPy": lambda x: (
        np.bool_(x) if isinstance(x, bool) else np.int32(x) if isinstance(x, int) else np.float32(x)
    ),
    "array": lambda x: np.array(x),
    "tensor": lambda x: torch.tensor(x),
    "int for bool": lambda x: int(x) if isinstance(x, bool) else x,
}


def clone(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def same(got: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    elif expected is not None:
        for a, b in zip(got, expected, strict=True):
            same(a, b)


def function_of(name: str) -> Function:
    return getattr(broadhead, CALLS[name][0])


# --- scalars ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", CALLS)
def test_scalars(name: str, spelling: str) -> None:
    _, make, more = CALLS[name]
    scalars = {**COMMON, **more}
    if name == "shared prefix":
        scalars["causal"] = False  # beside what its default is
    if scalars["softmax_scale"] == 0.3 and "narrow" in spelling:
        scalars["softmax_scale"] = 0.25
    arguments = make()
    expected_arguments = {**clone(arguments), **scalars}
    expected = function_of(name)(**expected_arguments)
    spelled = {key: SPELLINGS[spelling](value) for key, value in scalars.items()}
    got_arguments = {**clone(arguments), **spelled}
    same(function_of(name)(**got_arguments), expected)
    for key in ("k_cache", "v_cache"):
        if key in arguments:
            same(got_arguments[key], expected_arguments[key])


@pytest.mark.parametrize("name", CALLS)
def test_what_means_off(name: str) -> None:
    _, make, more = CALLS[name]
    arguments = make()
    off: dict[str, Any] = {"softcap": None}
    if "attention_chunk" in more:
        off["attention_chunk"] = None
    same(function_of(name)(**clone(arguments), **off), function_of(name)(**clone(arguments)))
    if name == "mha_fwd":
        same(
            function_of(name)(**arguments, window_size_left=None, window_size_right=None),
            function_of(name)(**arguments),
        )


@pytest.mark.parametrize("spelled", [
    torch.tensor([3, 1]), [torch.tensor(3), torch.tensor(1)], (np.int64(3), 1), np.array([3, 1]), (3, torch.tensor(1)),
    torch.tensor([3, 1], dtype=torch.int32),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", [name for name in CALLS if name != "shared prefix"])
def test_windows(name: str, spelled: Any) -> None:
    _, make, _more = CALLS[name]
    arguments = make()
    got = function_of(name)(**clone(arguments), window_size=spelled)
    same(got, function_of(name)(**clone(arguments), window_size=(3, 1)))
    unbounded = function_of(name)(**clone(arguments), window_size=(None, torch.tensor(-1)))
    same(unbounded, function_of(name)(**clone(arguments)))


@pytest.mark.parametrize(
    "length", [np.int64(7), np.int32(7), np.array(7), torch.tensor(7), torch.tensor(7, dtype=torch.int32)], ids=repr
)
@pytest.mark.parametrize("make", [kvcache, appending])
def test_cache_lengths(make: Callable[[], dict[str, Any]], length: Any) -> None:
    arguments = {**make(), "cache_seqlens": 6}
    if make is kvcache:
        arguments["cache_seqlens"] = 7
    else:
        length = type(length)(6) if not isinstance(length, torch.Tensor) else length - 1
        length = length if not isinstance(length, np.ndarray) else np.array(6)
    expected = broadhead.flash_attn_with_kvcache(**clone(arguments))
    same(broadhead.flash_attn_with_kvcache(**{**clone(arguments), "cache_seqlens": length}), expected)


@pytest.mark.parametrize("value, error", [
    (torch.tensor(True, device="meta"), "on the CPU"), (torch.tensor([1]), "True or False"), (1.0, "True or False"),
    (torch.tensor(1.0), "True or False"), ("yes", "True or False"), (None, "True or False"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_truth_value(name: str, value: Any, error: str) -> None:
    name_shown = CALLS[name][0]
    with pytest.raises(broadhead.InvalidTypeError, match=f"^{name_shown}: causal must be .*{error}"):
        function_of(name)(**CALLS[name][1](), causal=value)


@pytest.mark.parametrize("name", CALLS)
def test_scalars_on_a_device_are_refused_by_name(name: str) -> None:
    """Reading them would wait for the device; tensors of the meta device stand for it."""
    function, make, more = CALLS[name]
    for key, value in {**COMMON, **more}.items():
        there = torch.tensor(value, device="meta")
        with pytest.raises(
            broadhead.InvalidTypeError, match=f"^{function}: {key.replace('_left', '').replace('_right', '')} must"
        ):
            function_of(name)(**{**make(), key: there})
    if name != "shared prefix":
        for window in (torch.tensor([1, 2], device="meta"), (torch.tensor(1, device="meta"), 2)):
            with pytest.raises(broadhead.InvalidTypeError, match=f"^{function}: window_size must"):
                function_of(name)(**make(), window_size=window)


def test_a_scalar_that_wants_a_gradient_is_refused() -> None:
    scale = torch.tensor(0.3, requires_grad=True)
    with pytest.raises(broadhead.InvalidTypeError, match="softmax_scale has no gradient"):
        broadhead.flash_attn_func(**dense(), softmax_scale=scale)
    with torch.no_grad():
        broadhead.flash_attn_func(**dense(), softmax_scale=scale)


def test_metadata_takes_the_same() -> None:
    expected = broadhead.get_scheduler_metadata(**metadata(), causal=True, window_size=(3, 0), num_splits=4)
    for spell in SPELLINGS.values():
        arguments = {name: spell(x) if type(x) is int else x for name, x in metadata().items()}
        got = broadhead.get_scheduler_metadata(
            **arguments, causal=spell(True), window_size=(spell(3), spell(0)), num_splits=spell(4), attention_chunk=None
        )
        same(got, expected)


def test_metadata_is_not_remembered_by_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value of a tensor may change between two calls; the metadata of a device is remembered by its arguments."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(metadata_module, "_prepared", {})
    sizes = []
    monkeypatch.setattr(
        metadata_module, "fill", lambda prepared, *_: sizes.append(prepared.request.problem.window_left)
    )
    lengths, left = int32(7, 5), torch.tensor(3)
    for window in ((left, 0), (left, 0), torch.tensor([8, 0])):
        broadhead.get_scheduler_metadata(**{**metadata(), "cache_seqlens": lengths}, window_size=window)
        left += 1
    assert sizes == [3, 4, 8] and not metadata_module._prepared
    broadhead.get_scheduler_metadata(**{**metadata(), "cache_seqlens": lengths}, window_size=(3, 0))
    assert len(metadata_module._prepared) == 1


def test_num_splits_to_256() -> None:
    arguments = dense()
    for splits in (MAX_SPLITS, 129, 256):
        same(broadhead.flash_attn_func(**arguments, num_splits=splits), broadhead.flash_attn_func(**arguments))
        broadhead.get_scheduler_metadata(**metadata(), num_splits=splits)
        assert broadhead.explain(head_dim=64, num_splits=splits, device=(9, 0))
    made = broadhead.get_scheduler_metadata(2, 1, 8, 4, 2, 16, int32(7, 5), qkv_dtype=torch.float32, num_splits=128)
    call = {**kvcache(), "q": randn(2, 1, 4, 16)}
    broadhead.flash_attn_with_kvcache(**call, scheduler_metadata=made, num_splits=256)  # both are all that there is
    for function in (broadhead.flash_attn_func, broadhead.mha_fwd):
        with pytest.raises(broadhead.InvalidArgumentError, match=r"num_splits must be an int in \[0, 256\], got 257"):
            function(**arguments, num_splits=257)


# --- layouts ---------------------------------------------------------------------------------------------------------


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with every other element of memory left out."""
    wide = torch.zeros(*x.shape, 2, dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


#: Arguments that are only read; a function that lacks one is not asked for it.
READ = (
    "q", "k", "v", "kv", "qkv", "dout", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "cache_seqlens", "page_table",
    "prefix_page_table", "rotary_cos", "rotary_sin",
)  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_strided_tensors_are_copied(name: str) -> None:
    arguments = CALLS[name][1]()
    expected = function_of(name)(**clone(arguments))
    for key in READ:
        if isinstance(arguments.get(key), torch.Tensor):
            same(function_of(name)(**{**clone(arguments), key: strided(arguments[key])}), expected)


def test_other_strided_tensors_are_copied() -> None:
    more = {
        "sinks": randn(4), "seqused_q": int32(5, 3), "seqused_k": int32(8, 3), "prefix_lens": int32(2, 3),
        "leftpad_k": int32(1, 2), "kv_batch_idx": int32(1, 0), "qv": randn(2, 6, 4, 16), "causal": True,
    }  # fmt: skip
    arguments = {**dense(), **more}
    expected = broadhead.mha_fwd(**arguments)
    for key, value in more.items():
        if isinstance(value, torch.Tensor):
            got, lse = broadhead.mha_fwd(**{**arguments, key: strided(value)})
            same(
                (got[0, :5], got[1, :3], lse[0, :, :5]), (expected[0][0, :5], expected[0][1, :3], expected[1][0, :, :5])
            )


def test_strided_tensors_without_elements() -> None:
    q, k, v = randn(2, 0, 4, 16), randn(2, 0, 2, 16), randn(2, 0, 2, 16)
    assert broadhead.flash_attn_func(strided(q), strided(k), strided(v)).shape == q.shape
    assert broadhead.flash_attn_func(randn(2, 3, 4, 16), strided(k), v).eq(0).all()
    assert broadhead.merge_attn_states(strided(q), randn(2, 4, 0), q, randn(2, 4, 0))[0].shape == q.shape


def test_gradients_pass_through_the_copy() -> None:
    q, k, v = (x.requires_grad_(True) for x in dense().values())
    expected = torch.autograd.grad(broadhead.flash_attn_func(q, k, v).square().sum(), (q, k, v))
    wide = [strided(x.detach()).requires_grad_(True) for x in (q, k, v)]
    assert all(x.stride(-1) == 2 for x in wide)
    same(torch.autograd.grad(broadhead.flash_attn_func(*wide).square().sum(), wide), expected)


@pytest.mark.parametrize("name", ["kvcache", "append", "shared prefix"])
@pytest.mark.parametrize("key", ["k_cache", "v_cache"])
def test_caches_are_never_copied(name: str, key: str) -> None:
    arguments = CALLS[name][1]()
    arguments[key] = strided(arguments[key])
    before = clone(arguments)
    with pytest.raises(broadhead.InvalidArgumentError, match=f"{CALLS[name][0]}: {key} must be contiguous .*strides"):
        function_of(name)(**arguments)
    same(list(arguments.values())[1:3], list(before.values())[1:3])


def test_what_is_written_is_never_copied() -> None:
    arguments = dense()
    for function in ("flash_attn_func", "mha_fwd"):
        with pytest.raises(broadhead.InvalidArgumentError, match=f"{function}: out must be contiguous"):
            getattr(broadhead, function)(**arguments, out=strided(randn(2, 6, 4, 16)))
    for name, like in (("dq", "q"), ("dk", "k"), ("dv", "v")):
        given = strided(arguments[like])
        with pytest.raises(broadhead.InvalidArgumentError, match=f"mha_bwd: {name} must be contiguous .*strides"):
            broadhead.mha_bwd(randn(2, 6, 4, 16), **arguments, **{name: given})
        same(given, arguments[like])
    paged = {
        **varlen(),
        "k": strided(randn(6, 4, 2, 16)),
        "v": randn(6, 4, 2, 16),
        "page_table": int32(0, 1, 2, 3).view(2, 2),
    }
    with pytest.raises(broadhead.InvalidArgumentError, match="flash_attn_varlen_func: k must be contiguous"):
        broadhead.flash_attn_varlen_func(**paged)


def test_metadata_of_strided_lengths() -> None:
    arguments = metadata()
    expected = broadhead.get_scheduler_metadata(**arguments)
    same(
        broadhead.get_scheduler_metadata(**{**arguments, "cache_seqlens": strided(arguments["cache_seqlens"])}),
        expected,
    )


def test_merges_copy_what_they_read_and_nothing_else() -> None:
    outs, lses = randn(3, 5, 4, 16), randn(3, 5, 4)
    expected = broadhead.flash_attn_combine(outs, lses)
    same(broadhead.flash_attn_combine(strided(outs), strided(lses)), expected)
    states = [outs[0], lses[0].T.contiguous(), outs[1], lses[1].T.contiguous()]
    merged = broadhead.merge_attn_states(*states)
    same(broadhead.merge_attn_states(*map(strided, states)), merged)
    with pytest.raises(broadhead.InvalidArgumentError, match="flash_attn_combine: out must be contiguous"):
        broadhead.flash_attn_combine(outs, lses, strided(outs[0]))
    with pytest.raises(broadhead.InvalidArgumentError, match="merge_attn_states: out must be contiguous"):
        broadhead.merge_attn_states(*states, strided(outs[0]))


def test_explain_tells_the_copy() -> None:
    q, k, v = dense().values()
    assert "copied" not in broadhead.explain(q, k, v)
    text = broadhead.explain(strided(q), k, strided(v))
    assert "copied: q, in every call: its last dimension is not contiguous, it has strides (768, 128, 32, 2)" in text
    assert "copied: v" in text and "copied: k" not in text
    assert "refused: k is a cache, which is never copied" in broadhead.explain(q, strided(k), v, page_size=9)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_q_descale_under_16_bit_q(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in dense().values())
    k, v = (x.to(torch.float8_e4m3fn) for x in (k, v))
    with pytest.raises(
        broadhead.InvalidArgumentError, match=r"flash_attn_func: q_descale must be None.*drop q_descale"
    ):
        broadhead.flash_attn_func(q, k, v, q_descale=torch.ones(2, 2))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("length, fits", [(48, True), (49, False), (5000, False)])
def test_a_length_that_the_host_knows_is_refused_on_every_device(length: int, fits: bool, device: str) -> None:
    """The meta device stands for those whose tensors are not read."""
    q, cache = randn(2, 1, 4, 16).to(device), randn(2, 48, 2, 16).to(device)
    pages = {"page_table": torch.zeros(2, 3, dtype=torch.int32).to(device)}
    for caches in ((cache, cache, {}), (cache.view(6, 16, 2, 16),) * 2 + (pages,)):
        if fits:
            if device == "cpu":
                broadhead.flash_attn_with_kvcache(q, *caches[:2], cache_seqlens=length, **caches[2])
            continue
        with pytest.raises(
            broadhead.InvalidArgumentError, match=f"cache_seqlens must be at most .* = 48, got {length}"
        ):
            broadhead.flash_attn_with_kvcache(q, *caches[:2], cache_seqlens=length, **caches[2])
    new = randn(2, 1, 2, 16).to(device)
    with pytest.raises(broadhead.InvalidArgumentError, match=r"got .* with 1 new keys behind them"):
        broadhead.flash_attn_with_kvcache(q, cache, cache, new, new, cache_seqlens=length)


def test_values_are_not_dumped_into_the_text() -> None:
    _, k, v = dense().values()
    for q in (np.zeros((2, 6, 4, 16)), [[0.0] * 1000], "x" * 1000):
        with pytest.raises(broadhead.InvalidTypeError, match="flash_attn_func: q must be a tensor") as caught:
            broadhead.flash_attn_func(q, k, v)
        assert len(str(caught.value)) < 300
    with pytest.raises(broadhead.InvalidTypeError, match=r"numpy.ndarray of shape \(2, 6, 4, 16\), dtype float64"):
        broadhead.flash_attn_func(np.zeros((2, 6, 4, 16)), k, v)


@pytest.mark.parametrize("name, changes, words", [
    ("qkvpacked", {"qkv": torch.zeros(2, 6, 3, 4, 12)}, r"of qkv must be a positive multiple of 8, got 12"),
    ("qkvpacked", {"qkv": torch.zeros(2, 6, 3, 4, 16, dtype=torch.int32)}, r"qkv must be bf16"),
    ("qkvpacked", {"qkv": torch.zeros(2, 6, 4, 16)}, r"qkv must be \(batch"),
    ("qkvpacked", {"sinks": randn(3)}, r"sinks must have shape"),
    ("qkvpacked", {"sinks": randn(4), "s_aux": randn(4)}, r"sinks and s_aux"),
    ("qkvpacked", {"sinks": randn(4).to("meta")}, r"sinks must be on the device of qkv"),
    ("heads packed", {"num_heads_q": 2}, r"num_heads_q must be a multiple of the key heads .* got 2 and 3"),
    ("kvpacked", {"kv": torch.zeros(2, 9, 2, 2, 24)}, r"kv must have the head_dim of q, 16, got 24"),
    ("kvpacked", {"kv": torch.zeros(3, 9, 2, 2, 16)}, r"kv must have the batch of q, 2, got 3"),
    ("kvpacked", {"kv": torch.zeros(2, 9, 2, 3, 16)}, r"multiple of the heads of kv, got 4 and 3"),
    ("varlen packed", {"cu_seqlens": torch.tensor([0, 3, 7])}, r"cu_seqlens must be an int32 tensor"),
    ("varlen packed", {"cu_seqlens": None}, r"cu_seqlens must be an int32 tensor"),
    ("varlen packed", {"max_seqlen": None}, r"max_seqlen must be given with cu_seqlens"),
    ("varlen packed", {"max_seqlen": 2.5}, r"max_seqlen must be a Python int"),
    ("varlen packed", {"qkv": torch.zeros(7, 3, 4, 12)}, r"of qkv must be a positive multiple of 8"),
])  # fmt: skip
def test_packed_forms_speak_of_their_own_arguments(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(broadhead.BroadheadError, match=f"^{CALLS[name][0]}: .*{words}"):
        function_of(name)(**{**CALLS[name][1](), **changes})


# --- explain and is_supported ----------------------------------------------------------------------------------------


def test_explain_takes_tensors_for_what_a_call_brings() -> None:
    asked = {"head_dim": 64, "head_dim_v": 512, "device": (9, 0)}
    for name, value in (("sinks", randn(4)), ("prefix_lens", int32(1, 2)), ("qv", randn(2, 6, 4, 16)),
                        ("descale", torch.ones(2, 2))):  # fmt: skip
        assert broadhead.explain(**asked, **{name: value}) == broadhead.explain(**asked, **{name: True})
        assert broadhead.is_supported(**asked, **{name: value}) == broadhead.is_supported(**asked, **{name: True})
        assert broadhead.explain(**asked, **{name: None}) == broadhead.explain(**asked, **{name: False})
        for wrong in ("yes", 1.5):
            with pytest.raises(broadhead.InvalidTypeError, match=f"explain: {name} must be True or False"):
                broadhead.explain(**asked, **{name: wrong})


def test_a_capability_as_text() -> None:
    assert broadhead.is_supported(head_dim=64, device="8.9") == broadhead.is_supported(head_dim=64, device=(8, 9))
    assert "compute capability 12.0" in broadhead.explain(head_dim=64, device="12.0")
    for wrong in ("8.x", "sm_90", ""):
        with pytest.raises(broadhead.InvalidArgumentError, match=r"is_supported: device must be .*such as \(8, 9\) or"):
            broadhead.is_supported(head_dim=64, device=wrong)


def test_reasons_are_grouped() -> None:
    for device in ("cpu", "8.9", "9.0"):
        lines = broadhead.explain(head_dim=128, device=device).splitlines()
        reasons = [line.rpartition(": ")[2] for line in lines if line.startswith("refused: ")]
        assert len(lines) < 25 and len(set(reasons)) == len(reasons) > 3


def test_the_command_asks_all_that_explain_does() -> None:
    runner = pytest.importorskip("typer.testing").CliRunner()
    import inspect

    from broadhead.cli_commands import app

    text = runner.invoke(app, ["explain", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    for name in inspect.signature(broadhead.explain).parameters:
        option = "--window" if name == "window_size" else "--" + name.replace("_", "-")
        assert name in ("q", "k", "v", "build") or option in text, option
    options = (
        "--head-dim 64 --head-dim-v 512 --qv --descale --window 128,0 --attention-chunk 64 --tokens-per-split 128"
        " --device 9.0"
    )
    result = runner.invoke(app, ["explain", *options.split()])
    assert result.exit_code == 0, result.output
    for word in ("qv", "descale", "window", "attention_chunk", "tokens_per_split 128"):
        assert word in result.output
    assert len(result.output.splitlines()) < 25
    result = runner.invoke(app, ["explain", "--window", "wide"])
    assert result.exit_code == 2 and "--window must be" in result.output


# --- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelled, plain",
    [
        ({"causal": 1}, {"causal": True}),
        ({"softcap": None, "attention_chunk": None}, {}),
        ({"softcap": 3, "num_splits": 256}, {"softcap": 3.0}),
        ({"window_size": [3, None]}, {"window_size": (3, -1)}),
    ],
    ids=str,
)
def test_compiled_calls_take_them_in_one_graph(spelled: dict[str, Any], plain: dict[str, Any]) -> None:
    q, k, v = dense().values()
    torch.compiler.reset()
    compiled = torch.compile(broadhead.flash_attn_func, backend="aot_eager", fullgraph=True)
    same(compiled(strided(q), k, v, **spelled), broadhead.flash_attn_func(q, k, v, **plain))
