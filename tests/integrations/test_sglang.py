"""SGLang's own FlashAttention backend runs on broadhead: its forward functions, its lists of backends, its plugins."""

from __future__ import annotations

from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from broadhead.errors import UnsupportedError
from broadhead.integrations.sglang import NAME, plugin
from broadhead.integrations.sglang.backend import backend_classes
from on_device import DEVICE, WIDE
from oracle import Rule, attention
from sglang_batch import Requests, assert_near, make_requests
from sglang_server import batch, layer, load, metadata, publish, runner
from tolerance import OUT_FACTOR, assert_close

theirs: Any = None


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    global theirs
    theirs = load()
    publish(monkeypatch, theirs)


def serving(requests: Requests, **options: Any) -> Any:
    backend = backend_classes().backend(runner(requests, **options))
    backend.forward_metadata = metadata(theirs, requests)
    return backend


def new_rows(requests: Requests) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of this step, taken out of the pool: the backend has to store them."""
    new = torch.cat([slots[-count:] for slots, count in zip(requests.slots, requests.q_lens)])
    k, v = requests.k_pool[new].clone(), requests.v_pool[new].clone()
    requests.k_pool[new], requests.v_pool[new] = float("nan"), float("nan")
    return k, v


@pytest.mark.attends("forward")
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("head_dim", [64, 512])
@pytest.mark.parametrize("window", [-1, 9])
def test_decode(page_size: int, head_dim: int, window: int) -> None:
    requests = make_requests(page_size, head_dims=(head_dim, head_dim))
    backend = serving(requests)
    assert isinstance(backend, theirs.FlashAttentionBackend)
    seqlens, offsets = requests.cache_seqlens, requests.cu_seqlens_q
    plan = backend._compute_scheduler_metadata(len(seqlens), requests.page_table.shape[1] * page_size, seqlens, offsets)
    assert plan.dtype == torch.int32
    backend.forward_metadata.scheduler_metadata = plan
    k, v = new_rows(requests)
    out = backend.forward_decode(requests.q, k, v, layer(requests, window), batch(requests, decode=True))
    assert_near(out, requests, Rule(head_dim**-0.5, (window, 0)))


@pytest.mark.attends("forward")
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("window", [-1, 9])
def test_extend(page_size: int, window: int) -> None:
    requests = make_requests(page_size, [7, 1, 30, 12])
    k, v = new_rows(requests)
    sinks = torch.randn(4, dtype=torch.bfloat16, device=DEVICE)
    backend = serving(requests)
    out = backend.forward_extend(
        requests.q, k, v, layer(requests, window, softcap=15.0), batch(requests, decode=False), sinks=sinks
    )
    assert_near(out, requests, Rule(64**-0.5, (window, 0), softcap=15.0), sinks)


@pytest.mark.attends("forward")
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_verify_in_a_cascade(page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """EAGLE's tree of drafts: the prefix in one call, the branches on pages of one in another, and SGLang's merge."""
    publish(monkeypatch, theirs, topk=2)
    requests = make_requests(page_size, [4, 4, 4])
    k, v = new_rows(requests)
    backend = serving(requests)
    prefix = backend.forward_metadata
    prefix.cache_seqlens_int32 = requests.cache_seqlens - 4
    # Draft i sees itself and draft 0.
    drafts = torch.stack([torch.stack((slots[-4 + i], slots[-4])) for slots in requests.slots for i in range(4)]).int()
    seen = torch.tensor([1, 2, 2, 2] * 3, dtype=torch.int32, device=DEVICE)
    expand = backend.forward_metadata_spec_decode_expand = theirs.FlashAttentionMetadata()
    expand.page_table, expand.cache_seqlens_int32, expand.max_seq_len_q = drafts, seen, 1
    expand.cu_seqlens_q = torch.arange(13, dtype=torch.int32, device=DEVICE)
    expand.cu_seqlens_k = torch.nn.functional.pad(seen.cumsum(0, dtype=torch.int32), (1, 0))
    out = backend.forward_extend(requests.q, k, v, layer(requests), batch(requests, decode=False, verify=True))
    rows = [torch.cat((requests.slots[i // 4][:-4], drafts[i, : seen[i]].long())) for i in range(12)]
    alone = Requests(requests.q, requests.k_pool, requests.v_pool, rows, [1] * 12, page_size, requests.page_table)
    assert_near(out, alone, Rule(64**-0.5))


@pytest.mark.attends("forward")
@pytest.mark.parametrize("head_dim", [64, 512])
def test_cache_of_8_bits(head_dim: int) -> None:
    """The scale of the layer counts at every head_dim, and q keeps its 16 bits."""
    requests = make_requests(16, [5, 1, 9], head_dims=(head_dim, head_dim))
    requests.k_pool, requests.v_pool = (
        (pool.float() / 2).to(torch.float8_e4m3fn) for pool in (requests.k_pool, requests.v_pool)
    )
    backend = serving(requests, kv_cache_dtype="fp8_e4m3")
    out = backend.forward_extend(requests.q, None, None, layer(requests, scale=2.0), batch(requests, decode=False))
    requests.k_pool, requests.v_pool = (pool.float() * 2 for pool in (requests.k_pool, requests.v_pool))
    truth, _ = requests.judge(Rule(head_dim**-0.5, (-1, 0)))
    torch.testing.assert_close(out.view_as(truth).double(), truth, rtol=3e-2, atol=3e-2)


@pytest.mark.attends("forward")
def test_images_see_each_other() -> None:
    requests = make_requests(16, [20, 9], most=1, dtype=WIDE)
    backend = serving(requests)
    assert backend.fa_impl_ver == 4, "Gemma 4's model fills image_token_ranges for that version only"
    images = torch.full((29, 2), -1, dtype=torch.int32, device=DEVICE)
    images[3:9] = torch.tensor([3, 8], device=DEVICE)
    backend.forward_metadata.image_token_ranges = images
    out = backend.forward_extend(requests.q, None, None, layer(requests, 6), batch(requests, decode=False))
    assert backend.forward_metadata.image_token_ranges is images
    wanted: dict[torch.dtype, list[torch.Tensor]] = {torch.float64: [], WIDE: []}
    for q, slots, each in zip(requests.q.split([20, 9]), requests.slots, images.split([20, 9])):
        ends = tuple((max(begin, 0), end + 1) for begin, end in each.tolist())
        rule = Rule(64**-0.5, (6, 0), ranges=ends, ranges_in_window=True)
        for dtype, parts in wanted.items():
            parts.append(
                attention(*(x.to(dtype) for x in (q, requests.k_pool[slots], requests.v_pool[slots])), rule)[0]
            )
    assert_close("out", out, *(torch.cat(x).flatten(1) for x in wanted.values()), WIDE, OUT_FACTOR, "images")


def test_other_backends_keep_their_functions() -> None:
    """SGLang's functions are ours only while our backend calls them."""
    backend_classes()
    with pytest.raises(Exception) as caught:
        theirs.flash_attn_with_kvcache(q=None, k_cache=None, v_cache=None, ver=17)
    assert "17" in str(caught.value) or "ver" in str(caught.value).lower()


def test_formats_without_a_kernel_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="mxfp8"):
        serving(make_requests(16), kv_cache_dtype="mxfp8")


@pytest.fixture
def registered() -> Any:
    from sglang.srt.arg_groups import choices
    from sglang.srt.plugins.hook_registry import HookRegistry

    plugin.register()
    HookRegistry.apply_hooks()
    return choices


def test_registration(registered: Any) -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    plugin.register()
    for name in ("", "DRAFT_", "DETERMINISTIC_"):
        assert getattr(registered, f"{name}ATTENTION_BACKEND_CHOICES").count(NAME) == 1
    made = ATTENTION_BACKENDS[NAME](runner(make_requests(16)))
    assert type(made) is backend_classes().backend


@pytest.mark.parametrize("architecture", ["Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "GptOssForCausalLM"])
def test_models_accept_the_name(registered: Any, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    """SGLang's own check of the model, with its list of names, which leaves its module as it was."""
    from sglang.srt.arg_groups import model_hook

    def ask(config: Any) -> tuple[str, str]:
        return config.backend, "triton"

    class Settings(SimpleNamespace):
        """Settings of a server or of a model: those that are not given are None."""

        def __getattr__(self, name: str) -> None:
            return None

    settings = Settings(
        backend=NAME, model_path="here", dcp_size=1, nnodes=1, device="cuda", dtype="bfloat16", _resolved_overrides=[]
    )
    config = Settings(architectures=[architecture], quantization_config=None)
    for name in ("resolving_view", "resolved_view"):
        monkeypatch.setattr(model_hook, name, lambda args: args)
    for name in ("declare_resolution", "handle_mamba_radix_cache", "run_post_process_pass", "validate_declarations"):
        monkeypatch.setattr(model_hook, name, lambda *args, **fields: None)
    monkeypatch.setattr(model_hook, "collect_model_override_declarations", lambda *args: [])
    monkeypatch.setattr(model_hook, "model_config_of", lambda args: Settings(hf_config=config))
    monkeypatch.setattr(model_hook, "parse_connector_type", lambda path: None)
    monkeypatch.setattr(model_hook, "attn_dp_enabled_of", lambda args: False)
    monkeypatch.setattr(model_hook, "attention_backends_of", ask)
    model_hook.handle_model_specific_adjustments(settings)
    assert model_hook.attention_backends_of is ask
    settings.backend = "flex_attention"
    with pytest.raises(AssertionError, match="flex_attention"):
        model_hook.handle_model_specific_adjustments(settings)


def test_drafts(registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.speculative import draft_utils

    monkeypatch.setattr(draft_utils, "attention_backends", lambda: (NAME, NAME))
    monkeypatch.setattr(attention_registry, "attn_backend_wrapper_for_draft_decode", lambda runner, backend: backend)
    made = SimpleNamespace(
        draft_model_runner=runner(make_requests(16)), topk=1, speculative_num_steps=3, draft_attn_backend=None
    )
    create = draft_utils.DraftBackendFactory._create_backend
    steps = create(made, "decode_attention_backend", {}, "no {backend_type}", stamps_children=True)
    assert [type(each) for each in steps.attn_backends] == [backend_classes().backend] * 2
    assert [each.speculative_step_id for each in steps.attn_backends] == [0, 1]
    assert steps.decode_attention_backend_str == NAME
    assert type(create(made, "prefill_attention_backend", {}, "no {backend_type}")) is backend_classes().backend


def test_context_parallelism_knows_the_name(registered: Any) -> None:
    from sglang.srt.layers.cp.base import CPAttentionBackendKind

    assert CPAttentionBackendKind.from_string(NAME) is CPAttentionBackendKind.FLASH_ATTENTION
    with pytest.raises(ValueError):
        CPAttentionBackendKind.from_string("other")


def test_entry_point() -> None:
    found = [each for each in entry_points(group="sglang.srt.plugins") if each.name == NAME]
    if not found:
        pytest.skip("broadhead is not installed as a distribution here")
    assert found[0].load() is plugin.register
