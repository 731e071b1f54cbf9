"""The torch fallback against the oracle: every layout, mask and option of the contract, forward and backward."""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

import compare
import pytest
import torch
from broadhead import reference
from broadhead.reference import core as reference_core
from cases import Case, Spec, build
from torch import Tensor
from torch.fx.experimental import _config as shape_config
from torch.utils._python_dispatch import TorchDispatchMode

LAYOUTS = {
    "dense": {},
    "varlen": {"layout_q": "varlen", "layout_k": "varlen"},
    "paged": {"layout_k": "paged"},
    "ragged_paged": {"layout_q": "varlen", "layout_k": "paged"},
    "dense_q_packed_k": {"layout_k": "varlen"},
}
MASKS = {
    "full": {},
    "causal": {"window_right": 0},
    "local": {"window_left": 5, "window_right": 3},
    "left_only": {"window_left": 6},
    "right_only": {"window_right": 4},
    "sliding": {"window_left": 7, "window_right": 0},
    "diagonal": {"window_left": 0, "window_right": 0},
    "chunk": {"attention_chunk": 7},
    "chunk_causal": {"attention_chunk": 7, "window_right": 0},
    "chunk_sliding": {"attention_chunk": 9, "window_left": 4, "window_right": 0},
    "prefix": {"window_right": 0, "prefix": True},
    "prefix_sliding": {"window_left": 5, "window_right": 0, "prefix": True},
}
OPTIONS = {
    "softcap": {"softcap": 2.5},
    "sinks": {"sinks": True, "window_right": 0},
    "softcap_sinks_local": {"softcap": 2.0, "sinks": True, "window_left": 5, "window_right": 2},
    "scale_1": {"softmax_scale": 1.0},
    "mqa": {"num_heads_q": 6, "num_heads_kv": 1},
    "mha": {"num_heads_q": 3, "num_heads_kv": 3, "window_right": 0},
    "narrow_v": {"head_dim": 24, "head_dim_v": 8},
    "wide_v": {"head_dim": 8, "head_dim_v": 40, "window_right": 0},
    "qv": {"head_dim": 8, "head_dim_v": 32, "qv": True, "window_right": 0},
    "qv_softcap": {"qv": True, "softcap": 2.0},
    "more_queries": {"max_seqlen_q": 41, "max_seqlen_k": 19, "window_right": 0},
    "more_queries_sinks": {"max_seqlen_q": 41, "max_seqlen_k": 19, "window_right": 0, "sinks": True},
    "one_query": {"max_seqlen_q": 1, "window_right": 0},
    "one_query_sliding": {"max_seqlen_q": 1, "window_left": 8, "window_right": 0},
    "no_queries": {"max_seqlen_q": 0},
    "no_keys": {"max_seqlen_k": 0, "sinks": True},
    "no_sequences": {"batch": 0},
    "one_sequence": {"batch": 1, "window_right": 0},
    "seqused_q": {"seqused_q": True, "window_right": 0},
    "seqused_k": {"seqused_k": True, "window_right": 0},
    "seqused_both": {"seqused_q": True, "seqused_k": True, "window_left": 4, "window_right": 1},
    "batch_idx": {"batch_idx": True, "seqused_k": True, "window_right": 0},
    "leftpad": {"leftpad": True, "seqused_k": True, "window_right": 0},
    "leftpad_chunk": {"leftpad": True, "attention_chunk": 6, "window_left": 9, "window_right": 0, "prefix": True},
    "interleaved": {"storage": "interleaved", "window_right": 0},
    "strided_q": {"strided_q": True},
    "descale": {"descale": True, "window_right": 0},
    "descale_qv": {"descale": True, "qv": True},
}


#: As on a CPU in eager mode, where lengths are read, and as on a device, where none is.
on_a_cpu = functools.partial(reference.attention, read_lengths=True)
on_a_device = functools.partial(reference.attention, read_lengths=False)


def run(case: Case, out: Tensor | None = None, fn: Any = on_a_cpu) -> tuple[Tensor, Tensor]:
    return fn(**case.arguments(), out=out)


def check_forward(case: Case, fn: Any = on_a_cpu) -> None:
    """Without and with a poisoned ``out=``."""
    out, lse = run(case, fn=fn)
    compare.assert_attention(case, out, lse)
    compare.assert_dead_rows(case, out, None, lse)
    poisoned = torch.full_like(out, float("nan"))
    before = poisoned.clone()
    same, lse_again = run(case, poisoned, fn)
    assert same is poisoned
    compare.assert_dead_rows(case, poisoned, before)
    live = case.live_rows()
    torch.testing.assert_close(poisoned[live], out[live], rtol=0, atol=0)
    torch.testing.assert_close(lse_again, lse, rtol=0, atol=0)


def gradients(case: Case, through_lse: bool = True, fn: Any = on_a_cpu) -> None:
    """Backward with NaN coming in at the rows that no sequence owns."""
    leaves = case.requires_grad()
    out, lse = fn(**case.arguments())
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    if not through_lse:
        grad_lse.zero_()
    poisoned = grad_out.clone()
    poisoned[~case.live_rows()] = float("nan")
    found = torch.autograd.grad([out, lse], list(leaves.values()), [poisoned, grad_lse])
    compare.assert_gradients(case, dict(zip(leaves, found, strict=True)), grad_out, grad_lse)


def check(case: Case) -> None:
    for fn in (on_a_cpu, on_a_device):
        check_forward(case, fn)
        gradients(case, fn=fn)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks(layout: str, mask: str, seed: int) -> None:
    check(build(Spec(**LAYOUTS[layout], **MASKS[mask]), seed))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_options(layout: str, option: str, seed: int) -> None:
    options = dict(OPTIONS[option])
    if options.get("batch_idx") and layout in ("varlen", "dense_q_packed_k"):
        pytest.skip("a batch index selects rows of a cache; packed keys have none")
    check(build(Spec(**LAYOUTS[layout], **options), seed))


@pytest.mark.parametrize("storage", ["separate", "interleaved", "overlapping"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 32, 48, 64, 128, 256])
def test_page_sizes(page_size: int, storage: str, seed: int) -> None:
    spec = Spec(layout_q="varlen", layout_k="paged", page_size=page_size, storage=storage)
    longest = min(3 * page_size + 2, 300)
    check(build(dataclasses.replace(spec, max_seqlen_k=longest, window_right=0), seed))
    sliding = dataclasses.replace(spec, max_seqlen_k=longest, window_left=20, window_right=0, sinks=True)
    check_forward(build(sliding, seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes(layout: str, dtype: torch.dtype, seed: int) -> None:
    spec = Spec(**LAYOUTS[layout], dtype=dtype, window_right=0, head_dim=32, sinks=True)
    check(build(spec, seed))
    check(build(dataclasses.replace(spec, softcap=3.0, window_left=9, sinks=False), seed))


@pytest.mark.parametrize("q_dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8(layout: str, q_dtype: torch.dtype, seed: int) -> None:
    spec = Spec(**LAYOUTS[layout], dtype=q_dtype, kv_dtype=torch.float8_e4m3fn, descale=True, window_right=0)
    case = build(spec, seed)
    out, lse = run(case)
    assert out.dtype == torch.bfloat16
    compare.assert_attention(case, out, lse)
    compare.assert_dead_rows(case, out, None, lse)


@pytest.mark.parametrize("head_dim", [72, 256, 512])
def test_head_dims(head_dim: int, seed: int) -> None:
    spec = Spec(head_dim=head_dim, layout_q="varlen", layout_k="paged", window_right=0, dtype=torch.bfloat16)
    check(build(spec, seed))


@pytest.mark.parametrize("number", range(40))
def test_anything_goes(number: int, seed: int) -> None:
    """Random combinations of everything."""
    rng = random.Random(seed)

    def maybe(p: float = 0.3) -> bool:
        return rng.random() < p

    layout = rng.choice(list(LAYOUTS.values()))
    kv, group, equal_dims = rng.randint(1, 3), rng.randint(1, 4), maybe(0.6)
    head_dim = 8 * rng.randint(1, 6)
    packed_k, paged = layout.get("layout_k") == "varlen", layout.get("layout_k") == "paged"
    spec = Spec(
        **layout,
        **rng.choice(list(MASKS.values())),
        batch=rng.randint(1, 5),
        max_seqlen_q=rng.choice([1, 2, 9, 33]),
        max_seqlen_k=rng.randint(1, 90),
        num_heads_q=kv * group,
        num_heads_kv=kv,
        head_dim=head_dim,
        head_dim_v=head_dim if equal_dims else 8 * rng.randint(1, 6),
        dtype=rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]),
        page_size=rng.choice([1, 2, 3, 16, 48]),
        storage=rng.choice(["separate", "interleaved"] + (["overlapping"] if equal_dims and paged else [])),
        softcap=rng.choice([0.0, 0.0, 3.0]),
        softmax_scale=rng.choice([None, 0.3]),
        sinks=maybe(),
        qv=maybe(0.2),
        descale=maybe(0.2),
        seqused_q=maybe(),
        seqused_k=maybe(),
        leftpad=maybe(),
        batch_idx=maybe() and not packed_k,
        strided_q=maybe(),
        padding=maybe(0.7),
    )
    check(build(spec, seed))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_of_queries(layout: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same results when a call takes many chunks, down to one query each."""
    monkeypatch.setattr(reference_core, "CPU_QUERIES", 1)
    for scores in (1, 4 * 3 * 43 * 5):
        monkeypatch.setattr(reference_core, "CPU_SCORES", scores)
        for mask in ("full", "causal", "local", "chunk_sliding", "prefix_sliding"):
            check(build(Spec(**LAYOUTS[layout], **MASKS[mask], sinks=True, dtype=torch.bfloat16), seed))
        check(build(Spec(**LAYOUTS[layout], max_seqlen_q=41, max_seqlen_k=19, window_right=0, qv=True), seed))


class _LargestTensor(TorchDispatchMode):
    """Records the most elements of a tensor that any op returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and not func.is_view:
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("layout", ["dense", "ragged_paged"])
def test_memory_is_bounded(layout: str, seed: int) -> None:
    """8k x 8k (67M scores) never holds more than the bound, forward and backward."""
    n, options = 8192, {"layout_q": "dense"} | LAYOUTS[layout]
    spec = Spec(
        **options, batch=1, max_seqlen_q=n, max_seqlen_k=n, num_heads_q=1, num_heads_kv=1, head_dim=8,
        window_left=1000, window_right=0, freed=False, padding=False,
    )  # fmt: skip
    case = build(spec, seed)
    leaves = case.requires_grad()
    with _LargestTensor() as largest:
        out, _ = run(case)
        torch.autograd.grad(out.sum(), list(leaves.values()))
    assert largest.numel <= reference_core.CPU_SCORES


def test_32k_is_chunked() -> None:
    """The chunk length of 32k x 32k and 16 heads, on a CPU and elsewhere."""
    n = 32768
    k = torch.empty(16, 1, 8)
    mask: Any = type("Mask", (), {"num_rows": n})
    q = torch.empty(1, 1, 16, 8).expand(1, n, 16, 8)
    for device in ("cpu", "meta"):
        x = reference_core.Operands(q.to(device), k, k, None, None, 16)
        assert reference_core.chunk_size(x, mask) * 16 * n <= reference_core.MAX_SCORES


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_in_one_graph(layout: str, seed: int) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(reference.attention, fullgraph=True, backend="aot_eager", dynamic=False)
    options = {"window_left": 9, "window_right": 0, "sinks": True, "softcap": 4.0}
    case = build(Spec(**LAYOUTS[layout], **options, seqused_q=layout != "dense"), seed)
    with torch.no_grad():
        out, lse = compiled(**case.arguments())
    compare.assert_attention(case, out, lse)
    compare.assert_dead_rows(case, out, None, lse)
    gradients(case, fn=compiled)


# Sizes that happen to be equal in the first call need not be in the second.
@shape_config.patch(use_duck_shape=False)
def test_compiles_with_dynamic_shapes(seed: int) -> None:
    """One compiled graph serves another batch, other lengths and another pool."""
    torch._dynamo.reset()
    compiled = torch.compile(reference.attention, fullgraph=True, backend="aot_eager", dynamic=True)
    spec = Spec(layout_q="varlen", layout_k="paged", window_right=0)
    for changes in ({}, {"batch": 5, "max_seqlen_q": 29, "max_seqlen_k": 77}):
        case = build(dataclasses.replace(spec, **changes), seed)
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile" if changes else "default"):
            out, lse = compiled(**case.arguments())
        compare.assert_attention(case, out, lse)
        compare.assert_dead_rows(case, out, None, lse)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_tensor_is_read(layout: str, seed: int) -> None:
    """No op that copies a tensor's value to Python: the call can be captured in a CUDA graph."""

    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    case = build(Spec(**LAYOUTS[layout], window_left=9, window_right=0, prefix=True, sinks=True, seqused_q=True), seed)
    with NoSync():
        run(case, fn=on_a_device)


def test_autocast_does_not_lower_the_precision(seed: int) -> None:
    case = build(Spec(window_right=0), seed)
    leaves = case.requires_grad()
    expected = run(case)
    (expected_q,) = torch.autograd.grad(expected[0].sum(), [leaves["q"]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = run(case)
        (grad_q,) = torch.autograd.grad(out.sum(), [leaves["q"]])
    torch.testing.assert_close((out, lse, grad_q), (*expected, expected_q), rtol=0, atol=0)


def test_two_passes_write_one_out(seed: int) -> None:
    """Prefill and decode rows of one batch by two calls into one output, as prefix-LM users do."""
    case = build(Spec(layout_q="varlen", layout_k="paged", window_right=0, batch=4), seed)
    out = torch.full((*case.q.shape[:-1], case.v.shape[-1]), float("nan"))
    live = case.live_rows()
    for parity in (0, 1):
        used = [n if b % 2 == parity else 0 for b, n in enumerate(case.seqlens_q)]
        case.options["seqused_q"] = torch.tensor(used, dtype=torch.int32)
        part = dataclasses.replace(case, seqlens_q=used)
        before = out.clone()
        run(part, out)
        compare.assert_dead_rows(part, out, before)
    assert not out[live].isnan().any() and out[~live].isnan().all()


def test_gradcheck(seed: int) -> None:
    """Analytic gradients against finite differences, through out (the LSE is fp32)."""
    options = {"window_left": 4, "window_right": 1, "softcap": 2.0, "sinks": True, "qv": True}
    spec = Spec(batch=2, max_seqlen_q=3, max_seqlen_k=7, head_dim=2, dtype=torch.float64, freed=False, **options)
    case = build(spec, seed)
    case.options["sinks"] = case.options["sinks"].double()
    leaves = case.requires_grad()

    def function(*tensors: Tensor) -> Tensor:
        return reference.attention(**{**case.arguments(), **dict(zip(leaves, tensors, strict=True))})[0]

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))
