"""Generation of transformers through broadhead: static caches under torch.compile, and continuous batching."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import broadhead
import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter
from transformers_models import PAGES_BY_NAME, Waits, batching, ids, integration, make, output_of, padding, transformers


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    integration.register()


@pytest.fixture(autouse=True)
def _forget_graphs() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def decode_compiled(name: str, attention: str, compiled: bool) -> tuple[torch.Tensor, int]:
    """Tokens of a left-padded prompt by a compiled step over a static cache, and the number of graphs."""
    model, mask = make(name), padding(2, 7, "left")
    model.set_attn_implementation(attention)
    counter = CompileCounter()
    step = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
    torch.manual_seed(5)
    cache = transformers.StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        logits = model(input_ids=ids(2, 7), attention_mask=mask, past_key_values=cache).logits
        tokens = [logits[:, -1:].argmax(-1)]
        longer = torch.nn.functional.pad(mask, (0, 5), value=1)
        for _ in range(3):
            logits = step(input_ids=tokens[-1], attention_mask=longer, past_key_values=cache).logits
            tokens.append(logits[:, -1:].argmax(-1))
    return torch.cat(tokens, dim=1), counter.frame_count


@pytest.mark.parametrize("name", ["llama", "gemma4"])
def test_static_cache_compiles_into_as_many_graphs_as_sdpa(name: str) -> None:
    expected, _ = decode_compiled(name, "eager", compiled=False)
    _, graphs_of_sdpa = decode_compiled(name, "sdpa", compiled=True)
    torch._dynamo.reset()
    tokens, graphs = decode_compiled(name, "broadhead", compiled=True)
    assert torch.equal(tokens, expected)
    assert graphs == graphs_of_sdpa


def test_generate_compiles_the_static_cache() -> None:
    """The masks of generate are made outside of the graph, which they must not change from step to step."""
    model, mask, prompt = make("llama"), padding(2, 7, "left"), ids(2, 7)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    model.set_attn_implementation("eager")
    expected = model.generate(prompt, **options)
    model.set_attn_implementation("broadhead")
    config = transformers.CompileConfig(fullgraph=True, dynamic=None, backend="eager", mode=None)
    config._compile_all_devices = True
    torch._dynamo.utils.counters.clear()
    tokens = model.generate(prompt, cache_implementation="static", compile_config=config, **options)
    assert torch.equal(tokens, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_forward_compiles_without_a_cache() -> None:
    """As in training: unpadded, and padded at the ends of rows. What the graph cannot know it asserts."""
    model, tokens, mask = make("mistral"), ids(2, 9), padding(2, 9, "right")
    with torch.no_grad():
        expected = [output_of(model, "eager", input_ids=tokens, use_cache=False)]
        expected.append(output_of(model, "eager", input_ids=tokens, attention_mask=mask, use_cache=False))
        model.set_attn_implementation("broadhead")
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        got = [compiled(input_ids=tokens, use_cache=False).logits]
        got.append(compiled(input_ids=tokens, attention_mask=mask, use_cache=False).logits)
        torch.testing.assert_close(got[0], expected[0], rtol=0, atol=2e-4 * expected[0].abs().max().item())
        live = mask.bool()
        torch.testing.assert_close(got[1][live], expected[1][live], rtol=0, atol=2e-4 * expected[1].abs().max().item())

        torn = torch.ones_like(mask)
        torn[1, 3:5] = 0
        with pytest.raises(RuntimeError, match="padding must lie at the ends"):
            compiled(input_ids=tokens, attention_mask=torn, use_cache=False)
        positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]).expand(2, -1)
        with pytest.raises(RuntimeError, match="cu_seq_lens_q"):
            compiled(input_ids=tokens, position_ids=positions, use_cache=False)


def test_packed_sequences_compile_by_their_offsets() -> None:
    model, tokens = make("llama"), ids(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    with torch.no_grad():
        expected = output_of(model, "eager", input_ids=tokens, position_ids=positions, use_cache=False)
        model.set_attn_implementation("broadhead")
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        given = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 5, "max_length_k": 5}
        got = compiled(input_ids=tokens, position_ids=positions, use_cache=False, **given).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4 * expected.abs().max().item())


def test_prefix_under_compile() -> None:
    """With a padding mask a compiled model has its prefix; without one it cannot be found, and is not left out."""
    model, tokens, mask = make("hrm_text"), ids(2, 9), padding(2, 9, "right")
    types = torch.zeros(2, 9, dtype=torch.long)
    types[:, :4] = 1
    with torch.no_grad():
        expected = output_of(
            model, "eager", input_ids=tokens, attention_mask=mask, token_type_ids=types, use_cache=False
        )
        model.set_attn_implementation("broadhead")
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        got = compiled(input_ids=tokens, attention_mask=mask, token_type_ids=types, use_cache=False).logits
        live = mask.bool()
        torch.testing.assert_close(got[live], expected[live], rtol=0, atol=2e-4 * expected.abs().max().item())
        # What versions do whose models make the mask in the graph is right, too.
        unpadded = output_of(model, "eager", input_ids=tokens, token_type_ids=types, use_cache=False)
        model.set_attn_implementation("broadhead")
        try:
            got = compiled(input_ids=tokens, token_type_ids=types, use_cache=False).logits
        except RuntimeError as error:
            assert "cannot find a prefix" in str(error)
        else:
            torch.testing.assert_close(got, unpadded, rtol=0, atol=2e-4 * unpadded.abs().max().item())


@pytest.mark.parametrize(
    ("name", "asked"),
    [("llama", "broadhead_flash_3"), ("mistral", "broadhead"), ("gemma2", "broadhead"), ("gpt_oss", "broadhead")],
)
def test_continuous_batching(name: str, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """generate_batch takes both names, runs broadhead's attention, and gives the tokens of eager attention."""
    calls = []
    varlen = broadhead.flash_attn_varlen_func

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return varlen(*args, **kwargs)

    monkeypatch.setattr(broadhead, "flash_attn_varlen_func", counted)
    # transformers keeps the functions of the last name that it imported.
    monkeypatch.setattr(transformers.modeling_flash_attention_utils, "_loaded_implementation", None, raising=False)
    model = make(name)
    prompts = [ids(1, length)[0].tolist() for length in (5, 11, 3)]
    model.set_attn_implementation("eager")
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = [model.generate(torch.tensor([p]), eos_token_id=None, **options)[0, len(p) :].tolist() for p in prompts]
    model.set_attn_implementation(asked)
    config = transformers.GenerationConfig(eos_token_id=-1, pad_token_id=0, **options)
    pages = batching(name, 4, num_blocks=32, max_batch_tokens=64)
    results = model.generate_batch(
        inputs=prompts, generation_config=config, continuous_batching_config=pages, progress_bar=False
    )
    assert not [result.error for result in results.values() if result.error]
    assert [result.generated_tokens for result in results.values()] == expected
    assert len(calls) >= model.config.num_hidden_layers * 4
    assert model.config._attn_implementation == asked


@pytest.mark.parametrize("asked", ["broadhead_flash_3", "broadhead"])
def test_continuous_batching_waits_for_nothing(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU captures forward passes in CUDA graphs, where nothing may be read back, in prefill or in decode."""
    from transformers.generation.continuous_batching import initialization

    runner = pytest.importorskip("transformers.generation.continuous_batching.model_runner").ModelRunner
    for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache"):  # the reference reads the lengths

        def attend(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return torch.zeros_like(q)

        monkeypatch.setattr(broadhead, name, functools.wraps(getattr(broadhead, name))(attend))
    monkeypatch.setattr(transformers.modeling_flash_attention_utils, "_loaded_implementation", None, raising=False)
    # As on a GPU: pages are read in decode, and inputs are padded to the sizes of graphs.
    monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", lambda *args: None)
    start, step = runner.__init__, runner._forward_process_and_sample
    waits: dict[bool, list[str]] = {}

    def padded(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self.pad_inputs = True

    def counted(self: Any, *args: Any) -> None:
        with Waits() as seen:
            step(self, *args)
        waits.setdefault(self.inputs_and_outputs.use_block_table, []).extend(seen.seen)

    monkeypatch.setattr(runner, "__init__", padded)
    monkeypatch.setattr(runner, "_forward_process_and_sample", counted)
    model = make("llama")
    model.set_attn_implementation(asked)
    results = model.generate_batch(
        inputs=[ids(1, length)[0].tolist() for length in (5, 11, 3)],
        generation_config=transformers.GenerationConfig(
            eos_token_id=-1, pad_token_id=0, max_new_tokens=4, do_sample=False
        ),
        continuous_batching_config=batching("llama", 4, num_blocks=32, max_batch_tokens=64),
        progress_bar=False,
    )
    assert not [result.error for result in results.values() if result.error]
    assert waits == {False: [], True: []}


@pytest.mark.skipif(not PAGES_BY_NAME, reason="continuous batching runs the attention function of the model")
@pytest.mark.parametrize("left_out", ["softcap", "sliding_window"])
def test_continuous_batching_that_leaves_a_mask_out_is_refused(left_out: str) -> None:
    attend = transformers.AttentionInterface()["paged|broadhead_flash_3"]
    with pytest.raises(broadhead.UnsupportedError, match=f"{left_out} of Module is left out"):
        attend(torch.nn.Module(), **{left_out: 5})


def test_continuous_batching_of_others_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of another implementation is chosen for by transformers, which is asked once."""
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager as Manager

    chosen = Manager.switch_to_cb_friendly_attn
    integration.register()
    assert Manager.switch_to_cb_friendly_attn is chosen, "register wraps what it has wrapped"
    model, manager = make("llama"), Manager.__new__(Manager)
    model.set_attn_implementation("eager")
    asked = (
        {"auto_switch_to_flash": False}
        if "auto_switch_to_flash" in transformers.ContinuousBatchingConfig.__dataclass_fields__
        else {}
    )
    chosen(manager, model, **asked)
    assert model.config._attn_implementation == "paged|eager"


def test_the_import_registers() -> None:
    program = (
        "import broadhead.integrations.transformers\n"
        "from transformers import AutoModelForCausalLM, LlamaConfig\n"
        "config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=1,"
        " num_attention_heads=1)\n"
        "model = AutoModelForCausalLM.from_config(config, attn_implementation='broadhead')\n"
        "import torch, broadhead\n"
        "model(torch.arange(5)[None])\n"
        "assert broadhead.last_dispatch()[0] == 'torch', broadhead.last_dispatch()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_flash_functions_of_the_registered_name() -> None:
    from transformers import modeling_flash_attention_utils as utils

    integration.register("other")
    integration.register("my_flash_2")
    wrapper = utils._lazy_imports
    integration.register()
    assert utils._lazy_imports is wrapper
    for name in ("broadhead_flash_3", "other_flash_3", "my_flash_2"):
        assert utils._lazy_imports(name)[:2] == (broadhead.flash_attn_func, broadhead.flash_attn_varlen_func)
        assert name in integration.registration._flash_names
    with pytest.raises((ImportError, ValueError)):
        utils._lazy_imports("flash_of_nobody")
