"""SGLang's FlashAttention backend with its attention functions on broadhead: one subclass, and one for drafts."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...api.metadata import get_scheduler_metadata
from ...errors import UnsupportedError
from . import calls

_MODULE = "sglang.srt.layers.attention.flashattention_backend"
#: Functions that the methods of SGLang's backend find as globals of its module, and not on the instance.
_GLOBALS = ("flash_attn_with_kvcache", "flash_attn_varlen_func", "merge_state_v2")


class _Serving(threading.local):
    """Whether the attention call on this thread was made by our backend, and the images that its tokens see."""

    active = False
    query_ranges: Tensor | None = None


_serving = _Serving()


def _around(name: str) -> Callable[..., Any]:
    ours = getattr(calls, name)

    def hook(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not _serving.active:
            return original(*args, **kwargs)
        if name == "flash_attn_with_kvcache" and _serving.query_ranges is not None:
            kwargs["query_ranges"] = _serving.query_ranges
        return ours(*args, **kwargs)

    return hook


def exclusive_ranges(image_token_ranges: Tensor) -> Tensor:
    """SGLang's images of tokens as ``query_ranges``.

    Args:
        image_token_ranges: int32 ``(T, 2)``, first and last key of the image of each token; -1, -1 for text.

    Returns:
        int32 ``(T, 2)``, first key and the one behind the last; 0, 0 for text.
    """
    begin, end = image_token_ranges.unbind(-1)
    return torch.stack((begin.clamp(min=0), (end + 1).clamp(min=0)), -1)


class BackendClasses(NamedTuple):
    """Classes that need SGLang to be imported."""

    backend: type[Any]
    multi_step: type[Any]


@functools.cache
def backend_classes() -> BackendClasses:
    """Our subclasses of SGLang's FlashAttention backends; makes them, and hooks SGLang's module, on the first call.

    Raises:
        ImportError: SGLang or sgl_kernel is not installed.
        UnsupportedError: this version of SGLang calls its attention in another way.
    """
    from sglang.srt.layers.attention import flashattention_backend as theirs
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    before = {name: getattr(theirs, name) for name in _GLOBALS}
    for name in _GLOBALS:
        HookRegistry.register(f"{_MODULE}.{name}", _around(name), HookType.AROUND)
    HookRegistry.apply_hooks()
    for name, function in before.items():
        # The registry logs a hook that fails, and goes on: the model would then run on other kernels than it says.
        if getattr(theirs, name) is function:
            raise UnsupportedError(
                f"sglang: {_MODULE}.{name} could not be hooked; SGLang's log says why. This integration is written for"
                " SGLang 0.5.23: take that version, or another --attention-backend"
            )

    class BroadheadAttentionBackend(theirs.FlashAttentionBackend):  # type: ignore[misc,name-defined,unused-ignore]
        """SGLang's FlashAttention backend, run by broadhead: paging, speculation and CUDA graphs are SGLang's."""

        def __init__(self, model_runner: Any, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("fa_impl_ver", None)
            super().__init__(model_runner, *args, fa_impl_ver=3, **kwargs)
            if self.kv_cache_is_mxfp8:
                raise UnsupportedError(
                    "sglang: --kv-cache-dtype mxfp8 is a format of FlashAttention 4 that broadhead does not read:"
                    " take fp8_e4m3 or auto"
                )
            # What SGLang asks of version 4 is what we can do beyond version 3: images whose tokens see each other.
            self.fa_impl_ver = 4
            self.flash_attn_with_kvcache = calls.flash_attn_with_kvcache
            self.flash_attn_varlen_func = calls.flash_attn_varlen_func
            self._get_scheduler_metadata = get_scheduler_metadata

        def validate_elastic_cuda_graph_recapture(self) -> None:
            """Nothing is kept of a captured graph that another capture would make wrong."""

        def prepare_paged_mha_query(
            self, q: Tensor, q_rope: Any, k_rope: Any, layer: Any, *, logical_batch_size: int, **kwargs: Any
        ) -> tuple[Any, ...]:
            """Leave q as it is over an FP8 cache, at every head_dim, and expand the scales of the layer.

            Absorbed MLA alone rounds q, as SGLang does: it would else widen the whole cache in every step.
            """
            if self.use_mla:
                kwargs["is_prefill"] = False
                return tuple(
                    super().prepare_paged_mha_query(
                        q, q_rope, k_rope, layer, logical_batch_size=logical_batch_size, **kwargs
                    )
                )
            if self.kv_cache_dtype_str == "auto" or layer.k_scale is None:
                return q, q_rope, k_rope, None, None
            shape = (logical_batch_size, kwargs["kv_head_num"])
            return q, q_rope, k_rope, layer.k_scale.expand(shape), layer.v_scale.expand(shape)

        def forward_decode(self, *args: Any, **kwargs: Any) -> Any:
            return self._serve(super().forward_decode, None, args, kwargs)

        def forward_extend(self, *args: Any, **kwargs: Any) -> Any:
            metadata = self.forward_metadata
            images = metadata.image_token_ranges
            if images is None:
                return self._serve(super().forward_extend, None, args, kwargs)
            self._refuse_images(metadata)
            ranges = getattr(metadata, "broadhead_query_ranges", None)
            if ranges is None:
                # Once a step: every layer reads the same.
                ranges = metadata.broadhead_query_ranges = exclusive_ranges(images)
            metadata.image_token_ranges = None
            try:
                return self._serve(super().forward_extend, ranges, args, kwargs)
            finally:
                metadata.image_token_ranges = images

        def _refuse_images(self, metadata: Any) -> None:
            obstacles = {
                "absorbed MLA": self.use_mla,
                "chunked local attention": self.local_attn_builder is not None,
                "speculative decoding over a sliding window": metadata.swa_spec_metadata is not None,
                "a prefill of embeddings without a cache": self.fa_skip_kv_cache,
                "context parallelism": self.attn_cp_size > 1,
            }
            for name, present in obstacles.items():
                if present:
                    raise UnsupportedError(
                        f"sglang: images whose tokens see each other do not go with {name}: drop one"
                    )

        def _serve(self, forward: Callable[..., Any], ranges: Tensor | None, args: Any, kwargs: Any) -> Any:
            before = _serving.active, _serving.query_ranges
            _serving.active, _serving.query_ranges = True, ranges
            try:
                return forward(*args, **kwargs)
            finally:
                _serving.active, _serving.query_ranges = before

    class BroadheadMultiStepBackend(theirs.FlashAttentionMultiStepBackend):  # type: ignore[misc,name-defined,unused-ignore]
        """The backends of a draft model, one for each step that it drafts."""

        def __init__(self, model_runner: Any, topk: int, speculative_num_steps: int) -> None:
            # Without steps of its own the parent makes no backend.
            super().__init__(model_runner, topk, 1)
            self.speculative_num_steps = speculative_num_steps
            self.attn_backends.extend(
                BroadheadAttentionBackend(
                    model_runner, speculative_step_id=step, topk=topk, speculative_num_steps=speculative_num_steps
                )
                for step in range(speculative_num_steps - 1)
            )

    return BackendClasses(BroadheadAttentionBackend, BroadheadMultiStepBackend)
