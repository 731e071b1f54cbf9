"""benchmarks/compare_vllm.py and examples/serve_vllm.py, as far as they run without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import compare_vllm
import pytest
import serve_vllm
import torch


def result(prefill: float, decode: float, tokens: list[list[int]]) -> dict[str, Any]:
    return {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode, "tokens": tokens}


def test_agreement_counts_tokens_before_the_first_difference() -> None:
    assert compare_vllm.agreement([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 9, 6]]) == (1, 4)
    assert compare_vllm.agreement([[7]], [[8]]) == (0, 0)


def test_the_best_round_of_each_backend_counts() -> None:
    rounds = {
        "auto": [result(50, 30, [[1, 2]]), result(200, 20, [[1, 2]])],
        "triton": [result(100, 60, [[1, 2]])],
    }
    same, lines = compare_vllm.summarise(rounds, "triton")
    assert same
    assert "2.000 of the best other" in lines[0] and "0.500 of the best other" in lines[0]
    assert "1 of 1 requests as triton, 2 of 2 tokens" in lines[0]
    rounds["auto"][0]["tokens"] = [[1, 3]]
    assert not compare_vllm.summarise(rounds, "triton")[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
@pytest.mark.parametrize("program", [serve_vllm, compare_vllm])
def test_without_a_gpu_they_say_what_is_missing(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == 1
    assert "GPU" in capsys.readouterr().out


def test_a_run_hands_on_the_backend_and_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of a run is one that the example takes."""

    def run(command: list[str], **_: Any) -> Any:
        options = serve_vllm.parse(command[2:])
        assert (options.backend, options.model, options.prompts) == ("fa4", "model", 7)
        Path(options.json).write_text(json.dumps(result(1, 2, [[3]])))
        return type("Run", (), {"returncode": 0, "stdout": "Using CUSTOM backend", "stderr": ""})

    monkeypatch.setattr(compare_vllm.subprocess, "run", run)
    assert compare_vllm.serve("fa4", Path("model"), ["--prompts", "7"]) == result(1, 2, [[3]])


def test_the_model_has_the_attention_of_gemma_4() -> None:
    transformers = pytest.importorskip("transformers", minversion="5.5")
    config = transformers.Gemma4TextConfig(**{**serve_vllm.SHAPE, "hidden_size": 64})
    assert config.layer_types == (["sliding_attention"] * 5 + ["full_attention"]) * 2
    assert serve_vllm.SHAPE["global_head_dim"] == 512
