"""benchmarks/compare_vllm.py and examples/serve_vllm.py, as far as they run without a GPU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import compare_vllm
import gemma4_like
import pytest
import serve_vllm
import torch


def told(tokens: list[int], behind: float = 1.0, image: bool = False) -> dict[str, Any]:
    """A request whose every token is told with the one before it, which is less likely by ``behind``."""
    return {"tokens": tokens, "likeliest": [{str(t): -1.0, str(t - 1): -1.0 - behind} for t in tokens], "image": image}


def result(prefill: float, decode: float, requests: list[dict[str, Any]]) -> dict[str, Any]:
    return {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode, "requests": requests}


def test_tokens_are_compared_up_to_the_first_difference() -> None:
    found = compare_vllm.agreement([told([1, 2, 3]), told([4, 5, 6])], [told([1, 2, 3]), told([4, 9, 6])], 0.1)
    assert (found.requests, found.equal, found.compared, found.near_ties) == (2, 1, 4, 0)
    assert len(found.failures) == 1 and "token 1: 5, not 9" in found.failures[0]


def test_a_near_tie_is_one_in_the_eyes_of_both() -> None:
    """The other's token must be told by both, and within the margin in both."""
    close = {"tokens": [5], "likeliest": [{"5": -1.0, "6": -1.05}], "image": False}
    mirror = {"tokens": [6], "likeliest": [{"6": -1.0, "5": -1.04}], "image": False}
    sure = {"tokens": [6], "likeliest": [{"6": -1.0, "5": -1.4}], "image": False}
    silent = {"tokens": [6], "likeliest": [{"6": -1.0, "7": -1.01}], "image": False}
    assert compare_vllm.agreement([close], [mirror], 0.1).near_ties == 1
    assert compare_vllm.agreement([close], [mirror], 0.045).failures
    assert compare_vllm.agreement([close], [sure], 0.1).failures
    assert compare_vllm.agreement([close], [silent], 0.1).failures


def test_noise_is_that_of_tokens_both_took() -> None:
    one, other = told([7, 8]), told([7, 8])
    other["likeliest"][1]["8"] = -1.25
    assert compare_vllm.agreement([one], [other], 0.1).noise == 0.25


def test_the_best_round_of_each_backend_counts() -> None:
    rounds = {
        "auto": [result(50, 30, [told([1, 2])]), result(200, 20, [told([1, 2])])],
        "triton": [result(100, 60, [told([1, 2])])],
    }
    fine, lines = compare_vllm.summarise(rounds, "triton", 0.1)
    assert fine
    assert "2.000 of the best other" in lines[0] and "0.500 of the best other" in lines[1]
    assert "1 of 1 as triton" in lines[2] and "2 tokens equal" in lines[2]


@pytest.mark.parametrize("name, counts", [("auto", False), ("on", False), ("fa4", True)])
def test_only_tokens_of_broadhead_count(name: str, counts: bool) -> None:
    rounds = {name: [result(1, 1, [told([1, 9], image=True)])], "triton": [result(1, 1, [told([1, 2], image=True)])]}
    fine, lines = compare_vllm.summarise(rounds, "triton", 0.1)
    assert fine is counts
    assert any("image requests: 0 of 1" in line for line in lines)


def test_a_run_without_tokens_does_not_pass() -> None:
    rounds = {"auto": [{"failed": True}], "triton": [result(1, 1, [told([1])])]}
    assert not compare_vllm.summarise(rounds, "triton", 0.1)[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
@pytest.mark.parametrize("program", [serve_vllm, compare_vllm])
def test_without_a_gpu_they_say_what_is_missing(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == 1
    assert "GPU" in capsys.readouterr().out


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Makes a program stand for serve_vllm.py."""

    def write(text: str) -> None:
        (tmp_path / "serve_vllm.py").write_text(text)
        monkeypatch.setattr(compare_vllm, "EXAMPLES", tmp_path)

    return write


def test_a_run_hands_on_the_backend_and_the_model(program: Any) -> None:
    """The command of a run is one that the example takes, and its results and its log come back."""
    program(
        "import json, sys; print('Using CUSTOM backend')\n"
        "json.dump({'arguments': sys.argv[1:]}, open(sys.argv[sys.argv.index('--json') + 1], 'w'))"
    )
    found = compare_vllm.serve("fa4", Path("model"), ["--prompts", "7"], 60)
    options = serve_vllm.parse(found["arguments"])
    assert (options.backend, options.model, options.prompts, found["failed"]) == ("fa4", "model", 7, False)


def test_a_run_that_is_stopped_keeps_what_it_measured(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    program(
        "import json, sys, time; json.dump({'prefill_tokens_per_s': 3.0}, open(sys.argv[sys.argv.index('--json') + 1],"
        " 'w'))\nprint('the last words', flush=True); time.sleep(600)"
    )
    found = compare_vllm.serve("auto", Path("model"), [], 10)
    assert found == {"prefill_tokens_per_s": 3.0, "failed": True}
    assert "stopped after 10 s" in (output := capsys.readouterr().out) and "the last words" in output


def test_images_reach_the_example() -> None:
    assert "--images" in compare_vllm.parse(["--images", "--prompts", "3"])[1]
    assert "--images" not in compare_vllm.parse([])[1]


def test_the_model_has_the_attention_of_gemma_4() -> None:
    transformers = pytest.importorskip("transformers", minversion="5.5")
    config = transformers.Gemma4TextConfig(**{**gemma4_like.SHAPE, "hidden_size": 64})
    assert config.layer_types == (["sliding_attention"] * 5 + ["full_attention"]) * 2
    assert gemma4_like.SHAPE["global_head_dim"] == 512


def test_the_processor_makes_an_image_the_tokens_that_were_promised(tmp_path: Path) -> None:
    """What is written is read back by transformers, and an image never has more tokens than the engine leaves room."""
    transformers = pytest.importorskip("transformers", minversion="5.5")
    pytest.importorskip("PIL")
    pytest.importorskip("torchvision")
    gemma4_like._configuration(gemma4_like.SHAPE).save_pretrained(tmp_path)
    gemma4_like._write_processor(tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert processor.image_token_id == gemma4_like.IMAGE_TOKEN
    assert len(processor.tokenizer) == gemma4_like.VOCABULARY
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.text_config.use_bidirectional_attention == "vision" and config.audio_config is None
    prompt = gemma4_like.image_prompt(random.Random(5), 40)
    ids = prompt["prompt_token_ids"]
    assert len(ids) == 41 and ids.count(gemma4_like.IMAGE_TOKEN) == 1
    text = " ".join(processor.tokenizer.convert_ids_to_tokens(ids))
    made = processor(text=[text], images=[prompt["multi_modal_data"]["image"]])
    tokens = made["input_ids"][0].count(gemma4_like.IMAGE_TOKEN) if isinstance(made["input_ids"], list) else None
    assert tokens is not None and 100 < tokens <= gemma4_like.IMAGE_TOKENS - 2
