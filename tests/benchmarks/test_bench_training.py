"""The benchmarks of training: gradients against autograd in fp64, variants of broadhead, peers, a model, memory."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import broadhead
import pytest
import torch
from broadhead.plan import dispatch
from broadhead_bench import (
    accuracy_backward,
    cases,
    cli,
    measure,
    measure_model,
    timing,
)
from broadhead_bench.peers import base, broadhead_api, broadhead_variants, flash_attention, torch_sdpa
from described import FULL, h200, problem
from torch import Tensor
from torch.nn.attention import SDPBackend

pytestmark = pytest.mark.usefixtures("first_rows")

CPU = torch.device("cpu")
DENSE = cases.DenseCase("backward", 2, 40, 4, 2, 16, True)
PACKED = cases.VarlenCase((5, 40, 17), 4, 2, 16, area="backward-sweep")
MASKS = {
    "full": DENSE._replace(causal=False),
    "causal": DENSE,
    "window": DENSE._replace(window=7),
    "prefix": DENSE._replace(area="prefix-lm", prefix=11),
    "one head": DENSE._replace(batch=1, num_heads_q=3, num_heads_kv=1),
    "packed": PACKED,
    "packed full": PACKED._replace(causal=False),
    "packed window": PACKED._replace(window=4),
}


# --- accuracy --------------------------------------------------------------------------------------------------------


def _visible(case: Any, seqlen: int) -> Tensor:
    """The mask of a case, written down pair by pair."""
    prefix = getattr(case, "prefix", 0)
    return torch.tensor(
        [
            [
                not case.causal or key < prefix or (key <= query and (case.window is None or query - key < case.window))
                for key in range(seqlen)
            ]
            for query in range(seqlen)
        ]
    )


def _exact(case: Any) -> tuple[list[Tensor], Tensor, tuple[Tensor, Tensor, Tensor]]:
    """q, k, v, dout and the gradients of autograd, in fp64."""
    packed = isinstance(case, cases.VarlenCase)
    tokens = (sum(case.seqlens),) if packed else (case.batch, case.seqlen)
    heads = (case.num_heads_q, case.num_heads_kv, case.num_heads_kv, case.num_heads_q)
    *leaves, dout = (torch.randn(*tokens, n, case.head_dim, dtype=torch.float64) for n in heads)
    leaves = [t.requires_grad_() for t in leaves]
    parts = zip(*(t.split(list(case.seqlens)) for t in leaves)) if packed else [leaves]
    outs = []
    for part in parts:
        query, key, value = (t.transpose(-3, -2) for t in part)
        key, value = (t.repeat_interleave(heads[0] // heads[1], dim=-3) for t in (key, value))
        scores = (query @ key.transpose(-1, -2) * case.head_dim**-0.5).masked_fill(
            ~_visible(case, query.shape[-2]), float("-inf")
        )
        outs.append((scores.softmax(-1) @ value).transpose(-3, -2))
    gradients = torch.autograd.grad(torch.cat(outs), leaves, dout)
    return [t.detach() for t in leaves], dout, gradients


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("block", [8, 2048])
def test_errors_of_gradients_are_measured(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference agrees with autograd in fp64, and sees one wrong head or number."""
    monkeypatch.setattr(accuracy_backward, "BLOCK_ROWS", block)
    case = MASKS[name]
    (q, k, v), dout, gradients = _exact(case)
    reference = accuracy_backward.GradientReference(case, q, k, v, dout)
    assert reference.error(gradients) < 1e-5
    for index in range(3):
        for sequence in (0, -1) if isinstance(case, cases.DenseCase) else (slice(5, 45), slice(0, 5)):
            head = (-1 if sequence in (0, slice(5, 45)) else 0) if index else slice(None)
            wrong = [t.clone() for t in gradients]
            wrong[index][sequence][:, head] *= 1.1
            assert reference.error(tuple(wrong)) > 2e-2, (index, sequence)
    nothing = [t.clone() for t in gradients]
    nothing[0].fill_(float("nan"))
    assert not reference.error(tuple(nothing)) <= 2e-2


def test_masks_of_gradients_are_told_apart() -> None:
    (q, k, v), dout, gradients = _exact(MASKS["window"])
    for other in ({"window": 8}, {"window": 6}, {"window": None}, {"prefix": 1}):
        case = MASKS["window"]._replace(**other)
        assert accuracy_backward.GradientReference(case, q, k, v, dout).error(gradients) > 2e-2, other


@pytest.mark.parametrize("area", ["backward", "backward-sweep", "prefix-lm", "training"])
def test_wrong_gradients_post_no_time(
    area: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The output is right; dk is five percent too large."""

    def bend(right: Any) -> Any:
        def bent(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Any:
            if k.requires_grad:
                k = k * 1.0
                k.register_hook(lambda gradient: gradient * 1.05)
            return right(q, k, *rest, **options)

        return bent

    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        monkeypatch.setattr(broadhead, name, bend(getattr(broadhead, name)))
    out = tmp_path / "results.json"
    arguments = [area, "--quick", "--device", "cpu", "--seed", "1", "--out", str(out)]
    arguments += ["--case", "layer"] if area == "training" else []
    assert cli.main(arguments) == cli.BROKEN
    written = json.loads(out.read_text()) if out.exists() else []
    assert {record["impl"] for record in written} <= {"sdpa"}
    assert "wrong result" in capsys.readouterr().out


# --- implementations -------------------------------------------------------------------------------------------------


def test_the_portable_variant_runs_portable_kernels_alone() -> None:
    """Inside its context, on a device that has others; outside nothing has changed."""
    peer = broadhead_variants.Portable()
    assert peer.why_unavailable(CPU) is not None
    backward = problem(direction="backward")
    before = dispatch.ROWS, dispatch._decided
    for _ in range(2):
        assert dispatch.resolve(backward, h200(), FULL).row.id.startswith("sm90_bwd_")
        with peer.context():
            assert dispatch.resolve(backward, h200(), FULL).row.id.startswith("sm80_bwd_")
            assert dispatch.resolve(problem(), h200(), FULL).row.id.startswith("sm90_")
    with pytest.raises(ZeroDivisionError), peer.context():
        raise ZeroDivisionError
    assert (dispatch.ROWS, dispatch._decided) == before


def test_the_deterministic_variant_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def record(right: Any) -> Any:
        return lambda *a, **o: asked.append(o.get("deterministic", False)) or right(*a, **o)

    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        monkeypatch.setattr(broadhead, name, record(getattr(broadhead, name)))
    for case in (DENSE, PACKED):
        task = measure.task_of(case, CPU)
        for peer in (broadhead_api.Broadhead(), broadhead_variants.Deterministic()):
            task.prepare(peer)
    assert asked == [False, True, False, True]


def test_the_kernel_of_a_record_is_that_of_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the forward pass; a fallback among them is an error on a GPU."""
    last: list[Any] = [("cuda", "some_fwd", "")]
    monkeypatch.setattr(broadhead, "last_dispatch", lambda: last[0])
    peer = broadhead_api.Broadhead()
    task = measure.task_of(DENSE, CPU)
    call = peer.backward(task.case, task.inputs, task.dout)
    for found in (("cuda", "some_bwd", ""), ("torch", None, "no kernel")):
        last[0] = found
        call()
        last[0] = ("cuda", "some_fwd", "")
        peer._backend = "cuda"
        if found[1]:
            assert peer.kernel() == "some_bwd"
            assert peer.kernel() == "some_fwd", "read once"
        else:
            with pytest.raises(RuntimeError, match="no kernel"):
                peer.kernel()


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any, max_q: int, max_k: int, dropout: float, causal: bool,
    debug: bool, **window: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """torch's operator of FlashAttention-2."""
    assert dropout == 0.0 and not debug
    options = {"causal": causal}
    if window:
        options["window_size"] = (window["window_size_left"], window["window_size_right"])
    if cu_q is None:
        return (broadhead.flash_attn_func(q, k, v, **options),)
    return (broadhead.flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, **options),)


def _fa2(monkeypatch: pytest.MonkeyPatch) -> base.Peer:
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", _flash_forward)
    return torch_sdpa.TorchFlash("fa2", SDPBackend.FLASH_ATTENTION)


def _fa4(monkeypatch: pytest.MonkeyPatch) -> base.Peer:
    def dense(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: Any) -> tuple[Tensor, None]:
        return broadhead.flash_attn_func(q, k, v, causal=causal, window_size=window_size), None

    def packed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
        return broadhead.flash_attn_varlen_func(q, k, v, **options), None

    peer = flash_attention.FlashAttention4()
    peer._module = SimpleNamespace(flash_attn_func=dense, flash_attn_varlen_func=packed)
    return peer


@pytest.mark.parametrize("make", [_fa2, _fa4])
@pytest.mark.parametrize("name", MASKS)
def test_adapters_compute_the_gradients(name: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = measure.task_of(MASKS[name], CPU)
    prepared = task.prepare(make(monkeypatch))
    assert prepared.error <= task.max_error
    assert [t.shape for t in prepared.calls[0]()] == [t.shape for t in task.inputs[:3]]


@pytest.mark.parametrize("name", ["window", "causal", "prefix"])
def test_both_directions_are_in_the_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards: list[int] = []
    right = broadhead.flash_attn_func
    monkeypatch.setattr(broadhead, "flash_attn_func", lambda *a, **o: forwards.append(1) or right(*a, **o))
    area = "prefix-lm" if name == "prefix" else "training"
    task = measure.task_of(MASKS[name]._replace(area=area), CPU)
    for peer, passes in ((broadhead_api.Broadhead(), 1), (broadhead_api.Baseline(), 2), (torch_sdpa.TorchDefault(), 0)):
        if area == "training" and peer.name == "baseline":
            continue
        forwards.clear()
        prepared = task.prepare(peer)
        assert prepared.error <= task.max_error and len(forwards) == passes
        prepared.calls[0]()
        assert len(forwards) == 2 * passes
        assert prepared.work == 80


# --- the model -------------------------------------------------------------------------------------------------------


def test_a_wrong_attention_of_a_model_is_seen() -> None:
    """One that forgets the window."""
    pytest.importorskip("transformers")
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def forgetful(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        options.pop("sliding_window", None)
        return sdpa_attention_forward(module, query, key, value, None, **(options | {"is_causal": True}))

    AttentionInterface.register("forgetful", forgetful)
    AttentionMaskInterface.register("forgetful", lambda *_, **__: None)
    (case,) = (c for c in cases.cases_of("training", on_cpu=True) if isinstance(c, cases.StepCase))
    torch.manual_seed(0)
    task = measure.task_of(case, CPU)
    right, wrong = torch_sdpa.TorchDefault(), torch_sdpa.TorchDefault()
    wrong.attention_of_transformers = lambda: "forgetful"  # type: ignore[method-assign]
    assert task.prepare(right).error < task.max_error / 2
    assert task.prepare(wrong).error > task.max_error
    with pytest.raises(base.Skip, match="no attention of transformers"):
        task.prepare(flash_attention.Ffpa())
    prepared = task.prepare(right)
    assert prepared.work == case.tokens
    gradients = prepared.calls[0]()
    assert len(gradients) == len([*task.model.parameters()]), "all of them, so that no memory of theirs is forgotten"
    assert all(weight.grad is None for weight in task.model.parameters())


def test_without_transformers_a_step_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "results.json"
    arguments = ["training", "--quick", "--device", "cpu", "--budget", "0.001", "--out", str(out)]
    assert cli.main(arguments) == cli.OK
    assert {record["case"].split()[0] for record in json.loads(out.read_text())} == {"layer"}
    assert "transformers is not installed" in capsys.readouterr().out


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake device: the peak, less what lay there before and what the call returns."""
    now = {"allocated": 1000, "peak": 50_000}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: now["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: now["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: now.update(peak=now["allocated"]))
    whole = torch.empty(100, dtype=torch.float32)

    def call() -> tuple[Tensor, ...]:
        now["peak"] += 400 + 77 + 8
        return whole[:50], whole[50:], torch.empty(4, dtype=torch.bfloat16)

    assert timing.peak_bytes(call, CPU) == 77
    assert timing.held_bytes(whole[1:]) == 400


@pytest.mark.parametrize(("case", "measured"), [(DENSE, 7), (DENSE._replace(area="forward"), None)])
def test_memory_is_measured_of_gradients(case: Any, measured: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "peak_bytes", lambda call, device: 7)
    task = measure.task_of(case, CPU)
    assert task.prepare(broadhead_api.Broadhead()).peak_bytes is None
    task.on_gpu = True
    assert task.prepare(broadhead_api.Broadhead()).peak_bytes == measured


def test_how_gradients_and_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step a few times; all else often, and each call when the host has enqueued it."""
    asked: list[float] = []
    monkeypatch.setattr(timing, "L2Flusher", lambda device, head_start: asked.append(head_start))
    monkeypatch.setattr(timing, "time_interleaved", lambda calls, flush, budget, least: asked.append(least) or [])
    for kind in (measure.BackwardTask, measure_model.StepTask, measure.ForwardTask):
        task = kind.__new__(kind)
        task.on_gpu, task.device = True, CPU
        task.time([], 0.1)
    assert asked == [1e-3, timing.MIN_REPETITIONS, 0.0, 5, 0.0, timing.MIN_REPETITIONS]


def test_the_device_idles_behind_a_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[int] = []
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 1 << 10)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    timing.L2Flusher(CPU)()
    assert slept == []
    timing.L2Flusher(CPU, 2e-3)()
    assert slept == [int(2e-3 * timing.CLOCK)]
