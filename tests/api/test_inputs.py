"""What is taken for scalars, by every public function alike: it gives what the plain arguments give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import broadhead
import numpy as np
import pytest
import torch
from broadhead.call.validation import MAX_SPLITS
from broadhead.run import metadata_records
from spelled_calls import (
    CALLS,
    COMMON,
    SPELLINGS,
    appending,
    clone,
    dense,
    function_of,
    int32,
    kvcache,
    metadata,
    randn,
    same,
    strided,
)


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


def test_metadata_reads_a_tensor_each_time() -> None:
    """The value of a tensor may change between two calls."""
    left = torch.tensor(3)
    for window, expected in (((left, 0), 3), ((left, 0), 4), (torch.tensor([8, 0]), 8)):
        made = broadhead.get_scheduler_metadata(**metadata(), window_size=window)
        assert metadata_records.filled[made.data_ptr()].made_for.config.window_left == expected
        left += 1


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
