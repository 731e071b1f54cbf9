"""tokens_per_split, the batch-invariant mode: validation, plans that do not look at the batch, metadata, operators."""

from __future__ import annotations

import inspect
import re
from typing import Any

import broadhead
import pytest
import torch
from broadhead import InvalidArgumentError, InvalidTypeError
from broadhead.call.arguments import AttentionArgs
from broadhead.call.check import check_forward
from broadhead.call.metadata_request import describe_request
from broadhead.plan.device import hypothetical
from broadhead.plan.dispatch import refusal_text, resolve
from broadhead.run import forward, known
from described import FULL, h200, problem, schedule, without_family
from torch import Tensor

pytestmark = pytest.mark.usefixtures("first_rows")

BF16 = torch.bfloat16
FUNCTIONS = ("flash_attn_with_kvcache", "flash_attn_varlen_func", "mha_fwd", "get_scheduler_metadata")


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def call(function: str, **options: Any) -> Any:
    """A small call of each function that takes tokens_per_split."""
    q, cache = torch.randn(2, 1, 4, 16), torch.randn(2, 9, 2, 16)
    lengths = int32(9, 3)
    if function == "flash_attn_with_kvcache":
        return broadhead.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths, **options)
    if function == "flash_attn_varlen_func":
        return broadhead.flash_attn_varlen_func(
            q.flatten(0, 1), cache, cache, int32(0, 1, 2), None, 1, 9, seqused_k=lengths, **options
        )
    if function == "mha_fwd":
        return broadhead.mha_fwd(q, cache, cache, seqused_k=lengths, **options)
    return broadhead.get_scheduler_metadata(2, 1, 9, 4, 2, 16, lengths, **options)


# --- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_last_keyword_and_off_by_default(function: str) -> None:
    name, parameter = list(inspect.signature(getattr(broadhead, function)).parameters.items())[-1]
    assert name == "tokens_per_split" and parameter.default == 0 and parameter.kind == parameter.KEYWORD_ONLY


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"tokens_per_split": -64}, InvalidArgumentError, r"tokens_per_split must be an int in \[0, .*got -64"),
        ({"tokens_per_split": 2**31}, InvalidArgumentError, r"tokens_per_split must be an int in"),
        ({"tokens_per_split": 100}, InvalidArgumentError, r"tokens_per_split must be 0 \(off\) or a .*64, got 100"),
        ({"tokens_per_split": 64.0}, InvalidTypeError, r"tokens_per_split must be a Python int, got 64.0"),
        ({"tokens_per_split": None}, InvalidTypeError, r"tokens_per_split must be a Python int, got None"),
        ({"tokens_per_split": int32(64)}, InvalidTypeError, r"tokens_per_split must be a Python int, got a .*\(1,\)"),
        (
            {"tokens_per_split": 128, "num_splits": 4},
            InvalidArgumentError,
            r"tokens_per_split=128 fixes where .*num_splits=4 asks.*pass one of them",
        ),
    ],
)  # fmt: skip
def test_refusals(function: str, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        call(function, **options)
    assert re.search(f"^{function}: {words}", str(caught.value)), str(caught.value)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_accepted(function: str) -> None:
    for num_splits in (0, 1):
        torch.manual_seed(0)
        plain = call(function, num_splits=num_splits)
        torch.manual_seed(0)
        cut = call(function, num_splits=num_splits, tokens_per_split=64)
        if function != "get_scheduler_metadata":
            torch.testing.assert_close(cut, plain, rtol=0, atol=0)  # the fallback ignores it
    call(function, num_splits=4, tokens_per_split=0)


def test_refused_before_the_cache_is_written() -> None:
    cache, new = torch.zeros(1, 9, 2, 16), torch.ones(1, 1, 2, 16)
    with pytest.raises(InvalidArgumentError, match="tokens_per_split"):
        broadhead.flash_attn_with_kvcache(
            torch.ones(1, 1, 2, 16), cache, cache, new, new, cache_seqlens=3, tokens_per_split=1
        )
    assert (cache == 0).all()


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sm90", "sm80"])
@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (192, 128), (256, 256), (512, 512)])
@pytest.mark.parametrize("seqlen_q", [1, 8, 9, 100, 4096])
def test_nothing_that_changes_results_depends_on_the_batch(
    seqlen_q: int, head_dims: tuple[int, int], family: str
) -> None:
    """Neither the kernel nor its schedule but for the order of heads, whatever the batch, the lengths and metadata."""
    fixed = {"seqlen_q": seqlen_q, "head_dim": head_dims[0], "head_dim_v": head_dims[1], "tokens_per_split": 256}
    build = FULL if family == "sm90" else without_family("sm90")
    found = set()
    for batch in (1, 2, 7, 500):
        for seqlen_k in (64, 5000, 10**6):
            for has_metadata in (False, True):
                plan, row = schedule(batch=batch, seqlen_k=seqlen_k, has_metadata=has_metadata, build=build, **fixed)
                assert plan.num_splits == 1
                assert plan.tokens_per_split == (256 if seqlen_q <= 8 else 0)
                assert (row.phase == "decode") == (seqlen_q <= 8)
                found.add((row.id, plan._replace(heads_per_section=0)))
    assert len(found) == 1
    uncut, row = schedule(batch=1, seqlen_k=10**6, build=build, **{**fixed, "tokens_per_split": 0})
    assert uncut.tokens_per_split == 0
    if row.phase == "decode":
        assert uncut.num_splits == 0, "the kernel looks at the batch"
    elif seqlen_q <= 100:
        assert uncut.num_splits > 1, "the heuristic looks at the batch"


def test_one_split_is_no_cut() -> None:
    for seqlen_q in (1, 4096):
        plan, _ = schedule(seqlen_q=seqlen_q, seqlen_k=10**5, tokens_per_split=256, num_splits=1)
        assert (plan.num_splits, plan.tokens_per_split) == (1, 0)


@pytest.mark.parametrize("dtypes", [{"dtype": "float8_e4m3fn"}, {"kv_dtype": "float8_e4m3fn"}])
def test_prefill_on_decode_kernels_is_not_cut(dtypes: dict[str, str]) -> None:
    """8-bit prefill has no other kernels on most devices: cells of all its query tiles would fill the device."""
    for seqlen_q, tokens in ((1, 64), (8, 64), (9, 0), (4096, 0)):
        for batch in (1, 64):
            asked = {"seqlen_q": seqlen_q, "batch": batch, "seqlen_k": 10**5, "tokens_per_split": 64, **dtypes}
            plan, row = schedule(hypothetical((8, 9)), **asked)
            assert row.phase == "decode" and (plan.num_splits, plan.tokens_per_split) == (1, tokens)


def test_explain_and_refusals_tell_it() -> None:
    asked = {"head_dim": 128, "seqlen_k": 65536, "device": h200(), "build": FULL}
    text = broadhead.explain(**asked, tokens_per_split=512)
    assert ", tokens_per_split 512\n" in text and "plan: a split of every 512 keys, GQA" in text
    text = broadhead.explain(**asked, seqlen_q=4096, tokens_per_split=512)
    assert ", tokens_per_split 512\n" in text and "plan: 1 splits, GQA" in text
    assert "tokens_per_split" not in broadhead.explain(**asked)
    assert broadhead.is_supported(**asked, tokens_per_split=512)[0]
    with pytest.raises(InvalidArgumentError, match=r"explain: tokens_per_split=512 .* num_splits=2"):
        broadhead.explain(**asked, tokens_per_split=512, num_splits=2)
    wide = problem(head_dim=520, tokens_per_split=512)
    assert "tokens_per_split=512, features" in refusal_text("mha_fwd", wide, h200(), resolve(wide, h200(), FULL))


# --- scheduler metadata -----------------------------------------------------------------------------------------------


def test_metadata_must_agree() -> None:
    q, k = torch.randn(2, 1, 8, 64).to(BF16), torch.randn(2, 256, 2, 64).to(BF16)
    made = {
        tokens: broadhead.get_scheduler_metadata(2, 1, 256, 8, 2, 64, int32(200, 17), tokens_per_split=tokens)
        for tokens in (0, 64, 128)
    }
    for planned, buffer in made.items():
        for asked in made:
            options = {"cache_seqlens": int32(200, 17), "scheduler_metadata": buffer, "tokens_per_split": asked}
            if planned == asked:
                broadhead.flash_attn_with_kvcache(q, k, k, **options)
                continue
            words = f"was made for tokens_per_split={planned}, but this call has tokens_per_split={asked}"
            with pytest.raises(InvalidArgumentError, match=words):
                broadhead.flash_attn_with_kvcache(q, k, k, **options)
    assert len({int(buffer[4]) for buffer in made.values()}) == 3, "the device tells them apart by the tag"


@pytest.mark.parametrize("seqlen_q", [1, 64])
def test_forward_and_metadata_have_one_plan(seqlen_q: int) -> None:
    q, k = torch.randn(2, seqlen_q, 8, 64).to(BF16), torch.randn(2, 256, 2, 64).to(BF16)
    args = AttentionArgs(q, k, k, scheduler_metadata=torch.zeros(17, dtype=torch.int32), tokens_per_split=192)
    found = resolve(check_forward("mha_fwd", args).problem, h200(), FULL)
    request = describe_request(
        2, seqlen_q, 256, 8, 2, 64, None, BF16, None, 0, False, None, 0, 0, None, 0, None, tokens_per_split=192
    )
    planned = resolve(request.problem, h200(), FULL)
    assert found.row is not None and found.schedule is not None
    for field in ("row", "schedule", "metadata_tag", "metadata_config"):
        assert getattr(found, field) == getattr(planned, field), field


# --- the way down -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["flash_attn_with_kvcache", "mha_fwd", "flash_attn_varlen_func"])
def test_it_is_an_argument_of_the_call(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hence of what tells known calls apart: the first call must not decide for the second."""
    calls: list[AttentionArgs] = []
    monkeypatch.setattr(
        known, "run_known", lambda name, need_lse, call: calls.append(AttentionArgs._make(call)) or (None, None)
    )
    q = torch.zeros(1, 1, 2, 16, dtype=BF16)
    more = (int32(0, 1), int32(0, 1)) if function == "flash_attn_varlen_func" else ()
    for tokens in (0, 64, 128):
        getattr(broadhead, function)(q, q, q, *more, tokens_per_split=tokens)
    assert [call.tokens_per_split for call in calls] == [0, 64, 128]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_in_one_graph(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    seen: list[int] = []
    check = forward.check_forward
    monkeypatch.setattr(
        forward, "check_forward", lambda name, args, *how: seen.append(args.tokens_per_split) or check(name, args, *how)
    )

    def step(q: Tensor, k: Tensor, n: Tensor) -> Any:
        plan = broadhead.get_scheduler_metadata(2, 1, 256, 8, 2, 64, n, tokens_per_split=128)
        out = broadhead.flash_attn_with_kvcache(q, k, k, cache_seqlens=n, scheduler_metadata=plan, tokens_per_split=128)
        packed = broadhead.flash_attn_varlen_func(
            q[:, 0], k, k, torch.arange(3, dtype=torch.int32), None, 1, 256, seqused_k=n, tokens_per_split=64
        )
        return out, packed, broadhead.mha_fwd(q, k, k, seqused_k=n, tokens_per_split=192)

    arguments = (torch.randn(2, 1, 8, 64).to(BF16), torch.randn(2, 256, 2, 64).to(BF16), int32(200, 17))
    expected = step(*arguments)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend=backend)(*arguments), expected)
    assert seen == [128, 64, 192] * 2
