"""lmdeploy's FlashAttention-3 classes run on ours: prefill, speculative decoding with its metadata, wider head dims."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from broadhead.errors import InvalidArgumentError
from broadhead.integrations import lmdeploy as integration
from clients import client
from on_device import DEVICE
from oracle import Rule
from sglang_batch import Requests, assert_near, make_requests


@pytest.fixture
def theirs() -> Any:
    surface = client("compat").install("flash_attn_interface")
    yield client("lmdeploy", "lmdeploy.pytorch.backends.cuda.attention.fa3")
    surface.uninstall()


def attention_of(theirs: Any, requests: Requests, window: int | None, softcap: float) -> Any:
    """lmdeploy's class; what it does by Triton on a GPU, the copy of the pages into rows, is done by indices here."""
    made = object.__new__(theirs.FA3Impl)
    heads_q, heads_kv, head_dim = requests.q.shape[1], requests.k_pool.shape[1], requests.q.shape[-1]
    third_party = client("lmdeploy", "lmdeploy.pytorch.third_party.flash_attn_interface")
    vars(made).update(
        num_heads=heads_q, num_kv_heads=heads_kv, head_size=head_dim, v_head_size=head_dim, scale=head_dim**-0.5,
        sliding_window=(-1, -1) if window is None else (window, window), logit_softcapping=softcap, causal=True,
        flash_attn_varlen_func_v3=third_party.flash_attn_varlen_func,
        flash_attn_with_kvcache_v3=third_party.flash_attn_with_kvcache,
    )  # fmt: skip
    return made


def metadata(requests: Requests, decoding: bool) -> SimpleNamespace:
    lengths = requests.cache_seqlens
    return SimpleNamespace(
        is_decoding=decoding, block_offsets=requests.page_table, kv_seqlens=lengths.long(),
        q_seqlens=torch.tensor(requests.q_lens, device=DEVICE), kv_start_loc=lengths.cumsum(0) - lengths,
        kv_flatten_size=int(lengths.sum()), quant_policy=0, cu_seqlens_q=requests.cu_seqlens_q,
        cu_seqlens_k=torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        max_kv_seqlen=int(lengths.max()), scheduler_metadata=None, kernel_metadata=(),
    )  # fmt: skip


@pytest.mark.attends("forward")
@pytest.mark.parametrize("head_dim", [64, 256, 512])
@pytest.mark.parametrize("window, softcap", [(None, 0.0), (7, 0.0), (None, 20.0)])
def test_prefill(theirs: Any, head_dim: int, window: int | None, softcap: float) -> None:
    requests = make_requests(64, [7, 1, 30, 12], head_dims=(head_dim, head_dim))
    impl = attention_of(theirs, requests, window, softcap)

    def flatten(k: torch.Tensor, v: torch.Tensor, *lengths: Any, out_size: int, **others: Any) -> list[torch.Tensor]:
        rows = torch.cat(requests.slots)
        padding = (0, 0, 0, 0, 0, out_size - len(rows))
        return [torch.nn.functional.pad(pool.flatten(0, 1)[rows], padding, value=float("nan")) for pool in (k, v)]

    impl.flatten_kv_cache = flatten
    given = metadata(requests, decoding=False)
    out = impl._forward_prefill(requests.q, requests.paged(requests.k_pool), requests.paged(requests.v_pool), given, 30)
    left = -1 if window is None else window
    assert_near(out, requests, Rule(head_dim**-0.5, (left, 0), softcap=softcap))


@pytest.mark.attends("forward")
@pytest.mark.parametrize("head_dim", [64, 512])
@pytest.mark.parametrize("with_metadata", [False, True])
def test_speculative_decoding(theirs: Any, head_dim: int, with_metadata: bool) -> None:
    requests = make_requests(64, [3, 3, 3, 3], head_dims=(head_dim, head_dim))
    impl = attention_of(theirs, requests, None, 0.0)
    given = metadata(requests, decoding=True)
    if with_metadata:
        step = SimpleNamespace(
            model_config=SimpleNamespace(block_size=64, dtype=torch.bfloat16),
            input_ids=torch.zeros(1, 12, device=DEVICE),
            is_decoding=True,
        )
        theirs.update_fa3_metadata(
            given, step, num_heads_q=4, num_heads_kv=2, head_size=head_dim, v_head_size=head_dim, sliding_window=None
        )
        assert given.scheduler_metadata.dtype == torch.int32
        assert given.max_kv_seqlen == requests.page_table.shape[1] * 64
    impl.get_step_kernel_metadata = lambda metadata: None
    out = impl._decoding_speculative(
        requests.q, requests.paged(requests.k_pool), requests.paged(requests.v_pool), given, 3
    )
    assert_near(out, requests, Rule(head_dim**-0.5, (-1, 0)))


def test_wider_head_dims(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 256 this build's kernels are asked; everything else stays with lmdeploy."""
    asked: list[tuple[Any, ...]] = []

    def _enable_fa3(*call: Any) -> bool:
        asked.append(call)
        return not call[0] and not call[1] and call[3] <= 256

    module = ModuleType("attention")
    module._enable_fa3 = _enable_fa3  # type: ignore[attr-defined]
    monkeypatch.setattr(integration, "supports", lambda head_size: head_size <= 512)
    integration.widen(module)
    integration.widen(module)
    ask = module._enable_fa3  # type: ignore[attr-defined]
    assert [ask(False, False, 1, size) for size in (128, 256, 512, 576)] == [True, True, True, False]
    assert not ask(False, True, 1, 512) and not ask(True, False, 1, 512)
    assert [call[3] for call in asked] == [128, 256, 256, 576, 256, 256]


def test_head_dims_without_kernels_here() -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels may run here")
    assert not integration.supports(512)


def test_enable_leaves_another_package_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "_FLASH_ATTN_3", ("torch",))
    with pytest.raises(InvalidArgumentError, match="flash_attn_interface, which is left as it is"):
        integration.enable()
