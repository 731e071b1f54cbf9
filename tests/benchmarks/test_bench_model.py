"""The benchmark of a whole model: a prompt, generation and a step; what is compared; wrong ones get no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import broadhead
import pytest
import torch
from broadhead_bench import bars, cases, cases_model, cli, measure, records
from broadhead_bench.accuracy import attention as oracle
from broadhead_bench.accuracy import causal_visible
from broadhead_bench.cases_model import InferenceCase
from broadhead_bench.measure_inference import GenerationTask, InferenceTask, PrefillTask
from broadhead_bench.measure_model import StepTask
from broadhead_bench.model_attention import register_beside_sdpa
from broadhead_bench.peers import base, broadhead_api, flash_attention, torch_sdpa
from torch import Tensor

pytest.importorskip("transformers")

CPU = torch.device("cpu")
PROMPT, GENERATION, STEP = cases_model.model_cases(on_cpu=True)


def task_of(case: Any) -> Any:
    with torch.no_grad():
        return measure.task_of(case, CPU)


def peer_of(name: str) -> base.Peer:
    """A peer whose models ask for an attention of that name."""
    peer = torch_sdpa.TorchDefault()
    peer.attention_of_transformers = lambda: name  # type: ignore[method-assign]
    return peer


def forgetful() -> str:
    """An attention that forgets the window."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        options.pop("sliding_window", None)
        return sdpa_attention_forward(module, query, key, value, None, **(options | {"is_causal": True}))

    AttentionInterface.register("forgets_window", attention)
    AttentionMaskInterface.register("forgets_window", lambda *_, **__: None)
    return "forgets_window"


def test_what_is_measured() -> None:
    """Gemma 4's attention and the three things that a user does."""
    prompt, generation, step = cases_model.model_cases()
    assert isinstance(prompt, InferenceCase) and isinstance(generation, InferenceCase)
    assert (prompt.batch, prompt.tokens, prompt.measured_tokens) == (1, 32768, 32768)
    assert (generation.batch, generation.measured_tokens) == (8, 8 * generation.new_tokens)
    assert step.area == prompt.area == "model" and step.name.startswith("step S8192 ")
    for case in (prompt, generation, step):
        assert case.model.local == (32, 16, 256, 1024) and case.model.wide == (32, 4, 512, None)
        assert "D256 window1024 D512" in case.name
    assert records.UNITS["model"] == "tokens/s"
    kinds = [type(task_of(case)) for case in (PROMPT, GENERATION, STEP)]
    assert kinds == [PrefillTask, GenerationTask, StepTask]


@pytest.mark.parametrize("case", [PROMPT, GENERATION], ids=["prompt", "generation"])
@torch.no_grad()
def test_right_logits_pass_and_wrong_ones_do_not(case: InferenceCase) -> None:
    task = task_of(case)
    for peer in (broadhead_api.Broadhead(), torch_sdpa.TorchDefault()):
        assert peer.why_unavailable(CPU) is None
        item = task.prepare(peer)
        assert item.error < task.max_error / 2 and item.work == case.measured_tokens
    assert task.prepare(peer_of(forgetful())).error > task.max_error
    with pytest.raises(base.Skip, match="no attention of transformers"):
        task.prepare(flash_attention.Ffpa())
    assert item.calls[0]().shape == (case.batch, case.new_tokens or 16, case.model.vocabulary)


def test_each_sequence_and_token_is_judged_by_itself() -> None:
    task = task_of(GENERATION)
    assert isinstance(task, InferenceTask) and task.checked_sequences == [0, GENERATION.batch - 1]
    first, last = task.reference
    logits = torch.stack([first, torch.zeros_like(first), last])
    assert task._error(logits) == 0.0
    for index, token in ((0, 0), (2, GENERATION.new_tokens - 1)):
        wrong = logits.clone()
        wrong[index, token] *= 1.5
        assert task._error(wrong) == pytest.approx(0.5, rel=1e-5)
    logits[2, 1, 0] = float("nan")
    assert not task._error(logits) <= task.max_error


@torch.no_grad()
def test_generation_goes_on_behind_its_context() -> None:
    """The same tokens at later places give other logits; each implementation has its own cache."""
    task = task_of(GENERATION)
    one = task.prepare(torch_sdpa.TorchDefault()).calls[0]
    second, third = one(), one()
    assert (second - third).norm() > 0.01 * second.norm()
    other = task.prepare(broadhead_api.Broadhead())
    assert other.error < task.max_error / 2, "what the first one generated is not in the second one's cache"


@torch.no_grad()
def test_kernels_of_every_layer_are_noted() -> None:
    task = task_of(PROMPT)
    assert len(task.model.model.layers) == 2
    told = iter(["behind the model", "row1", "row2", "row1"])
    peer = torch_sdpa.TorchDefault()
    peer.kernel = lambda: next(told)  # type: ignore[method-assign]
    next(told)
    assert task.prepare(peer).kernel == "row1, row2"
    assert task.prepare(torch_sdpa.TorchDefault()).kernel is None
    fallback = broadhead_api.Broadhead()
    fallback._backend = "cuda"  # as on a GPU, where a layer that no kernel ran is an error
    with pytest.raises(RuntimeError, match="ran the torch fallback instead of a kernel"):
        task.prepare(fallback)
    assert not any(layer.self_attn._forward_hooks for layer in task.model.model.layers)


@pytest.mark.parametrize("case", [PROMPT, GENERATION], ids=["prompt", "generation"])
@torch.no_grad()
def test_heads_that_a_peer_lacks_run_on_sdpa(case: InferenceCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow heads run its own function, with window and scale; wide ones SDPA, which is right there."""
    seen: set[tuple[int, tuple[int, int]]] = set()

    def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window_size: tuple[int, int]) -> Tensor:
        seen.add((q.shape[-1], window_size))
        return broadhead.flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=window_size)

    peer, task = peer_of(register_beside_sdpa("test", attention)), task_of(case)
    assert task.prepare(peer).error < task.max_error / 2
    assert seen == {(32, (23, 0)), (64, (-1, -1))}
    seen.clear()
    monkeypatch.setattr("broadhead_bench.model_attention.WIDEST", 32)
    assert task.prepare(peer).error < task.max_error / 2
    assert seen == {(32, (23, 0))}


@pytest.mark.parametrize("queries", [40, 1])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("name", ["fa2", "fa3"])
def test_flash_functions_get_scale_and_window(
    name: str, queries: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU they run; here what they are given is read by the formula."""
    from transformers import AttentionInterface

    def formula(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int) -> Tensor:
        visible = causal_visible(torch.arange(queries) + 40 - queries, 40, None if left < 0 else left + 1)
        return torch.stack([oracle(q[b] * scale * q.shape[-1] ** 0.5, k[b], v[b], visible) for b in range(2)])

    def operator(q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float, **given: int) -> tuple[Tensor]:
        assert rest == (None, None, queries, 40, 0.0, True, False)
        return (formula(q, k, v, scale, given.get("window_size_left", -1)),)

    def function(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window_size: Any) -> Tensor:
        assert causal
        return formula(q, k, v, softmax_scale, window_size[0])

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", operator)
    peer: base.Peer = torch_sdpa.TorchFlash("fa2", torch_sdpa.SDPBackend.FLASH_ATTENTION)
    if name == "fa3":
        peer = flash_attention.FlashAttention3()
        peer._module = type("module", (), {"flash_attn_func": staticmethod(function)})
    known = peer.attention_of_transformers()
    assert "model" in peer.areas and "head_dim 512 by SDPA" in peer.versions()["note"]
    q, k, v = torch.randn(2, 4, queries, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    out, _ = AttentionInterface()[known](None, q, k, v, None, scaling=0.7, sliding_window=window)
    mask = causal_visible(torch.arange(queries) + 40 - queries, 40, window)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask, scale=0.7, enable_gqa=True
    )
    torch.testing.assert_close(out.double(), expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_it_stands_beside_sdpa_and_the_flash_packages() -> None:
    values = {"broadhead": 4.0, "sdpa": 1.0, "fa2": 2.0, "fa3": 3.0}
    found = bars.comparisons("model", "prefill B1", values)
    assert [each.rival for each in found] == ["sdpa", "fa3", "fa2"]
    assert {each.impl for each in found} == {"broadhead"} and {each.least for each in found} == {None}
    assert [each.rival for each in bars.comparisons("model", "prefill B1", {"broadhead": 4.0})] == ["sdpa"]


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.json"
    arguments = ["model", "--quick", "--device", "cpu", "--budget", "0.001", "--case", "generate", "--out", str(out)]
    assert cli.main(arguments) == cli.OK
    found = json.loads(out.read_text())
    (case,) = (case for case in cases.cases_of("model", on_cpu=True) if case.name.startswith("generate"))
    assert [(record["case"], record["impl"]) for record in found] == [(case.name, "broadhead"), (case.name, "sdpa")]
    for record in found:
        assert record["value"] == pytest.approx(12 / record["seconds"], rel=1e-3)
    printed = capsys.readouterr().out
    assert "model, tokens/s" in printed and "skip fa3: needs a CUDA device" in printed
