"""SGLang's own backend: compiled packages that it imports and that do not load here are stubbed."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clients import client
from on_device import DEVICE
from sglang_batch import Requests

#: Compiled packages that SGLang imports at its top, and that have no build for a CPU.
_COMPILED = ("sgl_kernel", "torchvision")
_BACKEND = "sglang.srt.layers.attention.flashattention_backend"


class _Name(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of packages that do not load. A name in them is an empty class, or a function that refuses its call."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)

        def name_of(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            if name != "merge_state_v2":  # the one function that SGLang's plugins hook
                return _Name(name, (), {})

            def refuse(*args: Any, **kwargs: Any) -> None:
                raise NotImplementedError(f"{spec.name}.{name} is not here")

            return refuse

        vars(module).update(__getattr__=name_of, __path__=[], __version__="1.0")
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """A stub has nothing to run."""


def load() -> Any:
    """SGLang's module of its FlashAttention backend; skips or fails where SGLang is absent."""
    if importlib.util.find_spec("sglang") is None:
        client("sglang")
    missing = tuple(name for name in _COMPILED if importlib.util.find_spec(name) is None)
    if missing and not any(isinstance(finder, _Stubs) for finder in sys.meta_path):
        sys.meta_path.append(_Stubs(missing))
    return client("sglang", _BACKEND)


class Pool:
    """A pool of KV slots with the methods that the backend calls."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v = k, v

    def set_kv_buffer(self, layer: Any, loc: Any, k: torch.Tensor, v: torch.Tensor, *scales: Any) -> None:
        self.k[loc.loc], self.v[loc.loc] = k.view(-1, *self.k.shape[1:]), v.view(-1, *self.v.shape[1:])

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k, self.v


def runner(requests: Requests, kv_cache_dtype: str = "auto") -> Any:
    """A model runner with what the backend's constructor reads."""
    heads_q, heads_kv = requests.q.shape[1], requests.k_pool.shape[1]
    config = SimpleNamespace(
        is_encoder_decoder=False, context_len=512, attention_arch=None, is_local_attention_model=False,
        head_dim=requests.q.shape[-1], get_num_kv_heads=lambda ranks: heads_kv // ranks,
        hf_text_config=SimpleNamespace(num_attention_heads=heads_q),
    )  # fmt: skip
    return SimpleNamespace(
        sliding_window_size=None, model_config=config, device=str(DEVICE),
        req_to_token_pool=SimpleNamespace(req_to_token=None), token_to_kv_pool=Pool(requests.k_pool, requests.v_pool),
        kv_cache_dtype=requests.k_pool.dtype,
        kv_cache_dtype_str=kv_cache_dtype, page_size=requests.page_size, is_draft_worker=False,
        kv_index_translator=SimpleNamespace(is_translating=False, reads_are_translated=False), use_mla_backend=False,
    )  # fmt: skip


def publish(monkeypatch: pytest.MonkeyPatch, module: Any, topk: int = 0) -> None:
    """The settings of a server, which SGLang publishes at its start."""
    settings = {
        "get_parallel": SimpleNamespace(attn_cp_size=1, attn_tp_size=1, enable_prefill_cp=False, attn_dp_enabled=False),
        "get_spec": SimpleNamespace(speculative_eagle_topk=topk, speculative_num_draft_tokens=None),
        "get_exec": SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=False)),
        "get_model": SimpleNamespace(is_embedding=False),
        "get_schedule": SimpleNamespace(chunked_prefill_size=-1),
        "get_memory": SimpleNamespace(disable_radix_cache=False),
    }
    for name, value in settings.items():
        monkeypatch.setattr(module, name, lambda value=value: value)
    monkeypatch.setattr(module, "get_device_capability", lambda *device: (9, 0))


def layer(requests: Requests, window: int = -1, softcap: float = 0.0, scale: float | None = None) -> Any:
    """A RadixAttention of the model, as far as the backend reads it."""
    from sglang.srt.layers.radix_attention import AttentionType

    head_dim, head_dim_v = requests.q.shape[-1], requests.v_pool.shape[-1]
    heads_q, heads_kv = requests.q.shape[1], requests.k_pool.shape[1]
    scales = None if scale is None else torch.tensor([scale], device=DEVICE)
    return SimpleNamespace(
        layer_id=0, is_cross_attention=False, attn_type=AttentionType.DECODER, sliding_window_size=window,
        logit_cap=softcap, scaling=head_dim**-0.5, head_dim=head_dim, v_head_dim=head_dim_v, tp_q_head_num=heads_q,
        tp_k_head_num=heads_kv, tp_v_head_num=heads_kv, k_scale=scales, v_scale=scales,
    )  # fmt: skip


def batch(requests: Requests, decode: bool, verify: bool = False) -> Any:
    """A ForwardBatch, as far as the backend reads it."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    mode = ForwardMode.DECODE if decode else ForwardMode.TARGET_VERIFY if verify else ForwardMode.EXTEND
    new = torch.cat([slots[-count:] for slots, count in zip(requests.slots, requests.q_lens)])
    return SimpleNamespace(
        batch_size=len(requests.slots), forward_mode=mode, spec_info=None, out_cache_loc=new, _attn_output=None,
        out_cache_loc_is_physical=True, attn_attend_prefix_cache=None, extend_num_tokens=sum(requests.q_lens),
        spec_algorithm=SimpleNamespace(is_uno=lambda: False),
    )  # fmt: skip


def metadata(module: Any, requests: Requests) -> Any:
    """What SGLang fills in for a step, by Triton kernels on a GPU."""
    made = module.FlashAttentionMetadata()
    made.cache_seqlens_int32 = requests.cache_seqlens
    made.cu_seqlens_q, made.max_seq_len_q = requests.cu_seqlens_q, max(requests.q_lens)
    made.cu_seqlens_k = torch.nn.functional.pad(requests.cache_seqlens.cumsum(0, dtype=torch.int32), (1, 0))
    made.max_seq_len_k, made.page_table = int(requests.cache_seqlens.max()), requests.page_table
    return made
