"""k and v of float8_e4m3fn under bf16 and fp16 q: validation, dispatch, metadata, accuracy and torch.compile."""

from __future__ import annotations

import random
import re
from typing import Any

import broadhead
import pytest
import torch
from broadhead import InvalidArgumentError, InvalidTypeError, UnsupportedError, support
from broadhead.call.arguments import AttentionArgs
from broadhead.call.check import check_forward
from broadhead.call.problem import DTYPE_NAMES
from broadhead.plan import dispatch
from calls import build
from checks import check_against, check_call, check_equal, check_new_rows
from described import ALL_ARCHS, FULL, build_of, forget_plans, h200, problem
from random_calls import drawn_call
from torch import Tensor

E4M3, BF16, FP16 = torch.float8_e4m3fn, torch.bfloat16, torch.float16
QUERY_DTYPES = (BF16, FP16)
NAME = "float8_e4m3fn"


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense(dtype: torch.dtype = BF16, **changes: Any) -> AttentionArgs:
    values = {
        "q": torch.randn(2, 5, 4, 32).to(dtype), "k": torch.randn(2, 7, 2, 32).to(E4M3),
        "v": torch.randn(2, 7, 2, 48).to(E4M3),
    }  # fmt: skip
    return AttentionArgs(**{**values, **changes})


def paged(dtype: torch.dtype = BF16, head_dim: int = 64) -> dict[str, Any]:
    """A decode step over a paged cache, as keyword arguments of flash_attn_with_kvcache."""
    return {
        "q": torch.randn(2, 1, 8, head_dim).to(dtype), "k_cache": torch.randn(32, 16, 2, head_dim).to(E4M3),
        "v_cache": torch.randn(32, 16, 2, head_dim).to(E4M3), "cache_seqlens": int32(200, 17), "causal": True,
        "page_table": torch.randperm(32).to(torch.int32).view(2, 16), "k_descale": torch.rand(2, 2) + 0.5,
        "v_descale": torch.rand(1, 1).expand(2, 2) + 0.5,
    }  # fmt: skip


# --- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", QUERY_DTYPES, ids=str)
def test_problem(dtype: torch.dtype) -> None:
    found = check_forward("f", dense(dtype, k_descale=torch.ones(2, 2))).problem
    assert (found.dtype, found.kv_dtype) == (DTYPE_NAMES[dtype], NAME)
    assert "descale" in found.features and found.obstacles == ()
    for uniform in (dtype, E4M3):
        same = dense(uniform, k=torch.randn(2, 7, 2, 32).to(uniform), v=torch.randn(2, 7, 2, 48).to(uniform))
        assert check_forward("f", same).problem.kv_dtype == ""


def test_keys_and_values_need_16_elements_where_queries_need_8() -> None:
    """Kernels move 16 bytes: strides and addresses of 8-bit tensors are multiples of 16 elements."""
    k = torch.randn(2, 7, 2, 40).to(E4M3)[..., :32]
    (obstacle,) = check_forward("f", dense(k=k)).problem.obstacles
    assert "strides of k" in obstacle and "multiples of 16 elements" in obstacle
    q = torch.randn(2, 5, 4, 40).to(BF16)[..., :32]
    assert check_forward("f", dense(q=q)).problem.obstacles == ()
    mixed = {"kv_dtype": NAME, "head_dim": 72, "head_dim_v": 24}
    plan = dispatch.resolve(problem(**mixed), h200(), FULL)
    for name, size in (("head_dim", 72), ("head_dim_v", 24)):
        assert f"kernels take {name} in multiples of 16 with dtype bf16 over {NAME} k and v, not {size}" in plan.reason


E5M2 = torch.float8_e5m2
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "v alone": (
        {"k": torch.ones(2, 7, 2, 32, dtype=BF16)},
        InvalidTypeError,
        r"v must have the dtype of k, .*bfloat16",
    ),
    "k alone": ({"v": torch.ones(2, 7, 2, 48, dtype=BF16)}, InvalidTypeError, r"v must have the dtype of k, .*e4m3fn"),
    "fp32 q": (
        {"q": torch.ones(2, 5, 4, 32)},
        InvalidTypeError,
        r"k must have the dtype of q, torch.float32, or, with bf16 or fp16 q, torch.float8_e4m3fn, got .*e4m3fn",
    ),
    "e5m2": (
        {"k": torch.ones(2, 7, 2, 32).to(E5M2), "v": torch.ones(2, 7, 2, 48).to(E5M2)},
        InvalidTypeError,
        r"k must have the dtype of q, torch.bfloat16, or.*got torch.float8_e5m2",
    ),
    "fp16 keys": (
        {"k": torch.ones(2, 7, 2, 32).half(), "v": torch.ones(2, 7, 2, 48).half()},
        InvalidTypeError,
        r"k must have the dtype of q.*got torch.float16",
    ),
    "q_descale": (
        {"q_descale": torch.ones(2, 2), "k_descale": torch.ones(2, 2)},
        InvalidArgumentError,
        r"q_descale must be None with torch.bfloat16 q over torch.float8_e4m3fn k and v.*drop q_descale",
    ),
    "k_descale": ({"k_descale": torch.ones(2, 4)}, InvalidArgumentError, r"k_descale must have shape.*\(2, 4\)"),
    "v_descale": ({"v_descale": torch.ones(2, 2).double()}, InvalidTypeError, r"v_descale must be fp32"),
    "sinks": ({"sinks": torch.ones(4).half()}, InvalidTypeError, r"sinks must be fp32 or of the dtype of q"),
    "out": ({"out": torch.ones(2, 5, 4, 48)}, InvalidTypeError, r"out must have dtype torch.bfloat16"),
    "qv": ({"qv": torch.ones(2, 5, 4, 48).to(E4M3)}, InvalidTypeError, r"qv must have the dtype of q"),
    "gradient": (
        {"q": torch.ones(2, 5, 4, 32, dtype=BF16, requires_grad=True)},
        UnsupportedError,
        r"bfloat16 q over torch.float8_e4m3fn k and v has no gradient.*no_grad",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(case: str) -> None:
    changes, error, words = BAD[case]
    with pytest.raises(error) as caught:
        check_forward("some_function", dense(**changes))
    text = str(caught.value)
    assert text.startswith("some_function: ") and re.search(words, text), text


def test_a_cache_is_named_as_the_caller_named_it() -> None:
    call = paged()
    with pytest.raises(InvalidTypeError, match="flash_attn_with_kvcache: v_cache must have the dtype of k_cache"):
        broadhead.flash_attn_with_kvcache(**{**call, "v_cache": call["v_cache"].to(BF16)})
    with pytest.raises(InvalidTypeError, match=r"flash_attn_with_kvcache: k_cache must have the dtype of q, .*float32"):
        broadhead.flash_attn_with_kvcache(**{**call, "q": call["q"].float()})


def test_gradients_are_refused_wherever_they_are_asked_for() -> None:
    args = dense()
    leaf = args.q.clone().requires_grad_(True)
    for function in (broadhead.flash_attn_func, torch.compile(broadhead.flash_attn_func, backend="eager")):
        with pytest.raises(UnsupportedError, match=r"flash_attn_func.*has no gradient"):
            function(leaf, args.k, args.v)
        with torch.no_grad():
            function(leaf, args.k, args.v)
    with pytest.raises(UnsupportedError, match=r"mha_bwd.*has no gradient.*pass k and v as torch.bfloat16"):
        broadhead.mha_bwd(torch.randn(2, 5, 4, 48).to(BF16), args.q, args.k, args.v)


# --- accuracy ---------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "dense": {},
    "varlen": {"ragged_q": True, "packed_k": True},
    "paged": {"page_size": 16, "k_layout": "interleaved"},
    "ragged_paged": {"ragged_q": True, "page_size": 16, "leftpad": True},
    "cache": {"used_k": True, "batch_idx": True},
}
OPTIONS = {
    "causal": {"causal": True},
    "window_sinks": {"window": (9, 0), "sinks": "fp32"},
    "softcap": {"softcap": 2.5, "head_dim": 32, "head_dim_v": 16},
    "qv": {"qv": True, "head_dim_v": 48, "causal": True},
    "one_query": {"longest_q": 1, "causal": True},
}


@pytest.mark.parametrize("dtype", QUERY_DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_dequantised_truth(layout: str, option: str, dtype: torch.dtype, rng: random.Random) -> None:
    """Against fp64 attention of the numbers that k and v times their factors are; NaN in all that is nobody's."""
    dtypes = {"dtype": dtype, "kv_dtype": E4M3, "descale": rng.choice(("kv", "one"))}
    built = build(drawn_call(rng, **LAYOUTS[layout], **OPTIONS[option], **dtypes), torch.device("cpu"), rng)
    given, given_lse = check_call(built)
    out, lse = built.run(out=None)
    assert out.dtype == dtype
    check_against(built, out, lse)
    check_new_rows(built, out, lse)
    live = built.live_mask()
    check_equal(given.flatten(0, -3)[live], out.flatten(0, -3)[live])
    check_equal(given_lse, lse)


def test_factors_left_out_are_1(seed: int) -> None:
    call = paged()
    ones = {"k_descale": torch.ones(2, 2), "v_descale": torch.ones(1).expand(2, 2)}
    first = broadhead.flash_attn_with_kvcache(**{**call, **ones})
    second = broadhead.flash_attn_with_kvcache(**{**call, "k_descale": None, "v_descale": None})
    # Not bit for bit: torch's own attention may run a call without factors.
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, broadhead.flash_attn_with_kvcache(**call))


# --- dispatch ---------------------------------------------------------------------------------------------------------


MIXED_ROWS = tuple(row for row in support.ROWS if row.kv_dtype)


@pytest.mark.parametrize("seqlen_q, tile", [(1, ""), (1024, "_m32")])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rows_serve_their_own_dtypes(dtype: str, seqlen_q: int, tile: str) -> None:
    """Few queries and many: no prefill kernel takes them."""
    features = ("descale", "gqa", "lse")
    asked = problem(dtype=dtype, kv_dtype=NAME, seqlen_q=seqlen_q, features=features)
    plan = dispatch.resolve(asked, h200(), FULL)
    assert plan.row is not None and plan.row.id == f"sm80_fwd_decode_d128{tile}_{dtype}_kve4m3", plan.reason
    reasons = {refusal.row_id: refusal.reason for refusal in dispatch.refusals(asked, h200(), FULL)}
    assert reasons[f"sm90_fwd_d128_{dtype}"] == f"takes dtype {dtype}, not {dtype} over {NAME} k and v"
    assert reasons["sm90_fwd_d128_e4m3"] == f"takes dtype {NAME}, not {dtype} over {NAME} k and v"
    for other in (problem(dtype=dtype, seqlen_q=seqlen_q), problem(dtype=NAME, seqlen_q=seqlen_q, features=features)):
        plan = dispatch.resolve(other, h200(), FULL)
        assert plan.row is not None and not plan.row.kv_dtype
    reasons = {refusal.row_id: refusal.reason for refusal in dispatch.refusals(problem(), h200(), FULL)}
    assert reasons[MIXED_ROWS[0].id] == f"takes dtype bf16 over {NAME} k and v, not bf16"


def test_refusals_name_both_dtypes() -> None:
    mixed = {"kv_dtype": NAME}
    kind = f"CUDA kernel for bf16 over {NAME} k and v"
    for changes, words in (
        ({"head_dim": 528}, f"head_dim 528 exceeds 512, the largest of any {kind}"),
        ({"features": ("lse", "qv")}, f"there is no {kind} with qv"),
    ):
        plan = dispatch.resolve(problem(**mixed, **changes), h200(), FULL)
        assert plan.row is None and words in plan.reason, plan.reason
    asked = problem(**mixed, seqlen_q=1)
    plan = dispatch.resolve(asked, h200(), build_of(*ALL_ARCHS, without=tuple(row.id for row in MIXED_ROWS)))
    text = dispatch.refusal_text("mha_fwd", asked, h200(), plan)
    assert plan.row is None and plan.left_out and "kernel sm80_fwd_decode_d128_bf16_kve4m3 is left out" in text
    assert f"dtype=bf16, kv_dtype={NAME}, features" in text
    plan = dispatch.resolve(problem(dtype="fp32"), h200(), FULL)
    assert f"kernels take bf16, bf16 over {NAME} k and v, {NAME}, fp16, fp16 over" in plan.reason


def test_no_row_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "ROWS", tuple(row for row in support.ROWS if not row.kv_dtype))
    forget_plans(monkeypatch)
    plan = dispatch.resolve(problem(kv_dtype=NAME, features=("descale", "lse")), h200(), FULL)
    assert (
        not plan.left_out and f"dtype bf16 over {NAME} k and v has no CUDA kernel; kernels take bf16, " in plan.reason
    )


@pytest.mark.usefixtures("first_rows")
def test_explain_and_matrix() -> None:
    asked = {"head_dim": 128, "seqlen_k": 8192, "descale": True, "device": h200(), "build": FULL}
    text = broadhead.explain(kv_dtype=E4M3, **asked)
    assert f"dtype bf16 over {NAME} k and v" in text and "kernel sm80_fwd_decode_d128_bf16_kve4m3" in text
    assert broadhead.is_supported(dtype=FP16, kv_dtype=E4M3, **asked)[0]
    call = paged()
    tensors = (call["q"], call["k_cache"], call["v_cache"])
    assert "kernel sm80_fwd_decode_d64_bf16_kve4m3" in broadhead.explain(*tensors, **{**asked, "head_dim": None})
    for wrong in ({"dtype": torch.float32, "kv_dtype": E4M3}, {"kv_dtype": FP16}, {"kv_dtype": "e4m3"}):
        with pytest.raises(InvalidTypeError, match="explain: kv_dtype must be dtype"):
            broadhead.explain(**{**asked, **wrong})
    entries = {entry.kernel: entry for entry in broadhead.support_matrix(FULL)}
    assert (entries["sm80_fwd_d64_fp16"].dtype, entries["sm80_fwd_d64_fp16"].kv_dtype) == ("fp16", "fp16")
    for row in support.ROWS:
        assert entries[row.id].kv_dtype == (row.kv_dtype or row.dtype)


def test_command_line() -> None:
    runner = pytest.importorskip("typer.testing").CliRunner()
    from broadhead.cli_commands import app

    result = runner.invoke(app, ["explain", "--kv-dtype", "e4m3", "--device", "9.0"])
    assert result.exit_code == 0 and f"dtype bf16 over {NAME} k and v" in result.output
    for option in ("--dtype", "--kv-dtype"):
        result = runner.invoke(app, ["explain", option, "int8"])
        assert result.exit_code == 2 and f"{option} must be one of" in result.output


# --- scheduler metadata -----------------------------------------------------------------------------------------------


def metadata(qkv_dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> Tensor:
    return broadhead.get_scheduler_metadata(
        2, 1, 256, 8, 2, 64, int32(200, 17), qkv_dtype=qkv_dtype, kv_dtype=kv_dtype, page_size=16, causal=True
    )


@pytest.mark.parametrize("q_dtype, kv_dtype", [(BF16, E4M3), (FP16, E4M3), (BF16, BF16), (E4M3, E4M3)])
def test_metadata_of_either_dtype_serves_where_kv_dtype_is_left_out(
    q_dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    """vLLM names the dtype of the cache, others that of q. What names both, or neither, must be right."""
    call = {**paged(q_dtype), "k_descale": None, "v_descale": None}
    call |= {name: call[name].to(kv_dtype) for name in ("k_cache", "v_cache")}
    for made_q, made_kv in [(a, b) for a in (BF16, FP16, E4M3) for b in (None, a, E4M3)]:
        made = metadata(made_q, made_kv)
        named = (made_q, made_kv) == (q_dtype, kv_dtype)
        if named or (made_kv is None and made_q in (q_dtype, kv_dtype)):
            broadhead.flash_attn_with_kvcache(**call, scheduler_metadata=made)
        else:
            field = "qkv_dtype" if made_q != q_dtype else "kv_dtype"
            with pytest.raises(InvalidArgumentError, match=f"scheduler_metadata was made for {field}="):
                broadhead.flash_attn_with_kvcache(**call, scheduler_metadata=made)


def test_metadata_of_the_right_dtypes_has_the_plan_of_the_call() -> None:
    from broadhead.call.metadata_request import describe_request

    call = paged()
    args = AttentionArgs(
        call["q"], call["k_cache"], call["v_cache"], seqused_k=call["cache_seqlens"], page_table=call["page_table"],
        causal=True, k_descale=call["k_descale"], scheduler_metadata=torch.zeros(17, dtype=torch.int32),
    )  # fmt: skip
    described = (2, 1, 256, 8, 2, 64, None, BF16, 16, 0, True, None, 0, 0, None, 0, None)
    found = dispatch.resolve(check_forward("mha_fwd", args).problem, h200(), FULL)
    for kv_dtype, same in ((E4M3, True), (None, False)):
        planned = dispatch.resolve(describe_request(*described, None, kv_dtype).problem, h200(), FULL)
        assert found.row is not None and (planned.row is found.row) == same
        assert (planned.metadata_tag == found.metadata_tag) == same and (planned.schedule == found.schedule) >= same


@pytest.mark.parametrize(
    "wrong", [(BF16, FP16), (torch.float32, E4M3), (E4M3, BF16), (BF16, torch.int8), (BF16, "bf16")]
)
def test_metadata_refuses_dtypes_that_no_call_has(wrong: tuple) -> None:
    with pytest.raises(InvalidTypeError, match="get_scheduler_metadata: kv_dtype must be None, qkv_dtype"):
        metadata(*wrong)


# --- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_in_one_graph(backend: str) -> None:
    torch.compiler.reset()

    def step(q: Tensor, k: Tensor, v: Tensor, table: Tensor, n: Tensor, k_descale: Tensor, v_descale: Tensor) -> Any:
        plan = broadhead.get_scheduler_metadata(
            2, 1, 256, 8, 2, 64, n, page_size=16, causal=True, kv_dtype=torch.float8_e4m3fn
        )
        return broadhead.flash_attn_with_kvcache(
            q, k, v, page_table=table, cache_seqlens=n, causal=True, k_descale=k_descale, v_descale=v_descale,
            scheduler_metadata=plan, return_softmax_lse=True,
        )  # fmt: skip

    names = ("q", "k_cache", "v_cache", "page_table", "cache_seqlens", "k_descale", "v_descale")
    call = paged()
    arguments = [call[name] for name in names]
    compiled = torch.compile(step, fullgraph=True, backend=backend)(*arguments)
    assert compiled[0].dtype == BF16
    torch.testing.assert_close(compiled, step(*arguments), rtol=0, atol=0)
