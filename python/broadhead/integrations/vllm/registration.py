"""The plugin: registers the backend with vLLM, and takes the layers that BROADHEAD_VLLM asks for."""

from __future__ import annotations

import functools
import logging
from typing import Any

from .policy import VARIABLE, Layer, Mode, decide, read_mode

#: The class that vLLM imports.
BACKEND = "broadhead.integrations.vllm.BroadheadBackend"
#: Set on the functions of vLLM that were wrapped: plugins are loaded more than once.
_MARK = "_wrapped_by_broadhead"

# Below vLLM's logger, which has handlers in every process of vLLM.
logger = logging.getLogger("vllm.broadhead")


def register() -> None:
    """Register the backend as CUSTOM, and with BROADHEAD_VLLM=auto or on take layers that have no other by a flag.

    vLLM calls it in every process. It may be called more than once.

    Raises:
        InvalidArgumentError: BROADHEAD_VLLM has another value than "auto", "on" or nothing.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    mode = read_mode()
    custom = AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != BACKEND:
        logger.warning(
            "broadhead: --attention-backend CUSTOM stays %s, which another plugin registered first;"
            " VLLM_PLUGINS=broadhead loads broadhead alone",
            custom.get_path(),
        )
        return
    register_backend(custom, BACKEND)
    if mode is Mode.FLAG:
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        logger.warning(
            "broadhead: %s=%s takes no layer, because vLLM runs on %s and not on CUDA",
            VARIABLE,
            mode.value,
            current_platform.device_name or "no device",
        )
        return
    take_over(type(current_platform), mode)
    keep_choice_open(mode)


def take_over(platform: Any, mode: Mode) -> None:
    """Make a platform class of vLLM choose broadhead for the layers of a mode. Backends given by a flag stay."""
    original = platform.get_attn_backend_cls
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def choose(cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **options: Any) -> Any:
        if selected_backend is None:
            path = _choice(cls, mode, attn_selector_config)
            if path is not None:
                return path
        return original(selected_backend, attn_selector_config, *args, **options)

    setattr(choose, _MARK, True)
    platform.get_attn_backend_cls = classmethod(choose)


def _choice(platform: Any, mode: Mode, config: Any) -> str | None:
    """The class for a layer that broadhead takes, else None."""
    from .backend import BroadheadBackend

    device = platform.get_device_capability()
    capability = (device.major, device.minor)
    layer = Layer(config.head_size, config.dtype, config.kv_cache_dtype, config.use_mm_prefix)
    taken, why = (False, "MLA and sparse attention have their own backends")
    if not config.use_mla and not config.use_sparse:
        taken, why = decide(mode, layer, capability)
    if taken:
        refused = BroadheadBackend.validate_configuration(device_capability=device, **config._asdict())
        if refused:
            taken, why = False, "; ".join(refused)
    if taken:
        logger.info("broadhead takes attention of head size %d: %s", config.head_size, why)
        return BACKEND
    # BROADHEAD_VLLM=on promises every layer: where it can not hold, it says so.
    level = logging.WARNING if mode is Mode.ON else logging.INFO
    logger.log(level, "broadhead leaves attention of head size %d to vLLM: %s", config.head_size, why)
    return None


def keep_choice_open(mode: Mode) -> None:
    """Undo that vLLM sets TRITON_ATTN for a Gemma 4 without FlashAttention 4, where broadhead takes all its layers."""
    from vllm.model_executor.models import config as models

    gemma = getattr(models, "Gemma4Config", None)
    original = getattr(gemma, "verify_and_update_config", None)
    if gemma is None or original is None or getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def verify(vllm_config: Any) -> None:
        chosen = vllm_config.attention_config.backend
        original(vllm_config)
        forced = vllm_config.attention_config.backend
        if chosen is None and forced is not None and _takes_all(mode, vllm_config):
            vllm_config.attention_config.backend = None
            logger.info("broadhead takes all layers of Gemma 4, for which vLLM would have set %s", forced.name)

    setattr(verify, _MARK, True)
    gemma.verify_and_update_config = staticmethod(verify)


def _takes_all(mode: Mode, vllm_config: Any) -> bool:
    """Whether the layers of both head sizes would be taken."""
    from vllm.platforms import current_platform

    device = current_platform.get_device_capability()
    if device is None:
        return False
    model = vllm_config.model_config
    cache = vllm_config.cache_config.cache_dtype
    layers = [Layer(size, model.dtype, cache, model.is_mm_prefix_lm) for size in _head_sizes(model)]
    return all(decide(mode, layer, (device.major, device.minor))[0] for layer in layers)


def _head_sizes(model: Any) -> set[int]:
    """Those of the layers of a Gemma 4. Newer versions of vLLM have them by layer."""
    layers = model.model_arch_config
    if hasattr(layers, "__getitem__"):
        return {layers[i].head_size for i in range(layers.total_num_hidden_layers)}
    return {model.hf_text_config.head_dim, model.hf_text_config.global_head_dim}
