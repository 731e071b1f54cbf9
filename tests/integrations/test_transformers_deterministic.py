"""What transformers says of deterministic gradients reaches broadhead's functions, by the layer or by its variable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import broadhead
import pytest
import torch
from transformers_models import VOCABULARY, ids, integration, make, output_of, padding, transformers

VARIABLE = "FLASH_ATTENTION_DETERMINISTIC"
FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache", "mha_fwd")


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    integration.register()


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Which function was called, with which ``deterministic``."""
    monkeypatch.delenv(VARIABLE, raising=False)
    calls: list[tuple[str, bool]] = []

    def recording(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **how: calls.append((name, how["deterministic"])) or function(*args, **how)

    for name in FUNCTIONS:
        monkeypatch.setattr(broadhead, name, recording(name, getattr(broadhead, name)))
    return calls


def holes() -> torch.Tensor:
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[1, 5:9] = 0
    return mask


def offsets() -> torch.Tensor:
    return torch.tensor([0, 7, 38], dtype=torch.int32)


#: Inputs of a model for each way that a layer runs, and the function that it then calls.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "unpadded": ("flash_attn_func", {}),
    "left": ("mha_fwd", {"attention_mask": padding(2, 19, "left")}),
    "right": ("mha_fwd", {"attention_mask": padding(2, 19, "right")}),
    "between tokens": ("mha_fwd", {"attention_mask": holes()}),
    "packed": ("flash_attn_varlen_func", {"position_ids": torch.cat([torch.arange(7), torch.arange(12)])[None]}),
    "offsets": ("flash_attn_varlen_func", {"cu_seq_lens_q": offsets(), "cu_seq_lens_k": offsets()}),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_hands_it_on(way: str, reached: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    function, inputs = WAYS[way]
    model = make("llama")
    layers = model.config.num_hidden_layers

    def run(**how: Any) -> list[tuple[str, bool]]:
        reached.clear()
        with torch.no_grad():
            output_of(model, "broadhead", input_ids=ids(2, 19), use_cache=False, **inputs, **how)
        return list(reached)

    assert run() == [(function, False)] * layers
    assert run(deterministic=True) == [(function, True)] * layers
    monkeypatch.setenv(VARIABLE, "1")
    assert run() == [(function, True)] * layers
    assert run(deterministic=False) == [(function, False)] * layers, "what the layer says goes first"
    monkeypatch.setenv(VARIABLE, "0")
    assert run() == [(function, False)] * layers


def test_pages_hand_it_on(reached: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 2, 1, 16) for _ in range(3))
    cache = {"k_cache": torch.randn(2, 4, 2, 16), "v_cache": torch.randn(2, 4, 2, 16)}
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": torch.arange(2), "cu_seq_lens_k": torch.tensor([0, 3])}
    monkeypatch.setenv(VARIABLE, "1")
    integration.attention_forward(torch.nn.Module(), q, k, v, None, block_table=table, **cache, **lengths)
    assert reached == [("flash_attn_with_kvcache", True)]


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_config_of_modernbert(deterministic: bool, reached: list[tuple[str, bool]]) -> None:
    """Its layers pass ``deterministic``; they do so in training, too."""
    config = transformers.ModernBertConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        local_attention=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
        deterministic_flash_attn=deterministic, reference_compile=False,
    )  # fmt: skip
    model = transformers.ModernBertModel(config)
    model.set_attn_implementation("broadhead")
    model(input_ids=ids(2, 21)).last_hidden_state.square().sum().backward()
    assert [asked for _, asked in reached] == [deterministic] * 2


def test_transformers_own_wrapper_finds_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """It hands a flash function only what its signature names."""
    from transformers import modeling_flash_attention_utils as utils

    if not hasattr(utils, "_lazy_define_process_function"):
        pytest.skip("this transformers has no such wrapper")
    monkeypatch.setenv(VARIABLE, "1")
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        process = utils._lazy_define_process_function(getattr(broadhead, name))
        assert process(query_length=3, key_length=3, is_causal=True)["deterministic"] is True
        assert process(query_length=3, key_length=3, is_causal=True, deterministic=False)["deterministic"] is False


def test_compiled_code_reads_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    asked: list[bool] = []
    q = torch.randn(1, 2, 40, 16, requires_grad=True)
    layer = torch.nn.Module()

    def attend(q: torch.Tensor) -> torch.Tensor:
        return integration.attention_forward(layer, q, q, q, None)[0]

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if str(node.target) == "broadhead.mha_fwd":
                names = [argument.name for argument in torch.ops.broadhead.mha_fwd.default._schema.arguments]
                asked.append(dict(zip(names, node.args, strict=True))["deterministic"])
        return graph.forward

    monkeypatch.setenv(VARIABLE, "1")
    torch.compile(attend, fullgraph=True, backend=backend)(q).sum().backward()
    assert asked == [True]
