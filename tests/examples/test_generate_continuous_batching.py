"""examples/generate_continuous_batching.py: the tiny model's tokens are eager's, and other tokens are told."""

from __future__ import annotations

from typing import Any

import broadhead
import generate_continuous_batching as example
import loss_curves
import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")
if not hasattr(transformers, "ContinuousBatchingConfig"):
    pytest.skip(f"transformers {transformers.__version__} has no ContinuousBatchingConfig", allow_module_level=True)
pytest.importorskip("accelerate")

OPTIONS = ["--device", "cpu", "--new-tokens", "3"]


def test_tokens_are_those_of_eager_attention(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    varlen = broadhead.flash_attn_varlen_func
    monkeypatch.setattr(
        broadhead, "flash_attn_varlen_func", lambda *args, **kwargs: calls.append(1) or varlen(*args, **kwargs)
    )
    status = example.main(OPTIONS)
    said = capsys.readouterr().out
    assert status == loss_curves.OK, said
    assert "5 requests, 15 new tokens" in said and calls


def test_other_tokens_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        return [[-1] * new_tokens for _ in prompts]

    monkeypatch.setattr(example, "generate_one_by_one", wrong)
    assert example.main(OPTIONS) == loss_curves.FAILED
    assert "eager attention gives other tokens" in capsys.readouterr().out


def test_a_failed_request_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers catches what its thread raises: the example says it."""

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("no such kernel")

    monkeypatch.setattr(broadhead, "flash_attn_varlen_func", broken)
    monkeypatch.setattr(transformers.modeling_flash_attention_utils, "_loaded_implementation", None, raising=False)
    with pytest.raises(RuntimeError, match="no such kernel"):
        example.main(OPTIONS)


def test_the_likeliest_tokens() -> None:
    """The judge of 16 bits: eager's own tokens pass, and others do not."""
    model = example.make_tiny(0).to(torch.bfloat16)
    prompts = [torch.randint(3, example.VOCABULARY, (length,)).tolist() for length in (4, 9)]
    found = example.generate_one_by_one(model, prompts, 5)
    assert example.are_likeliest(model, prompts, found)
    assert not example.are_likeliest(model, prompts, [found[0], [*found[1][:-1], (found[1][-1] + 1) % 97]])
