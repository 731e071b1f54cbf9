"""What the entry point runs in every process of SGLang: registers the backend, and enters its name in lists."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from ..environment import Obstacle, kernel_obstacle, package_obstacle

#: The name for ``--attention-backend``, ``--prefill-attention-backend`` and ``--decode-attention-backend``.
NAME = "broadhead"
#: Checks of models compare the names of backends with lists of their own. While they run, our name reads as this one,
#: which stands in the lists of all models that need windows, sinks or head_dim 512.
STANDS_FOR = "fa4"

_MODEL_HOOK = "sglang.srt.arg_groups.model_hook.handle_model_specific_adjustments"
_DRAFT_FACTORY = "sglang.srt.speculative.draft_utils.DraftBackendFactory._create_backend"
_CP_KIND = "sglang.srt.layers.cp.base.CPAttentionBackendKind.from_string"

_logger = logging.getLogger(__name__)


def obstacle() -> Obstacle | None:
    """Why SGLang would not run on kernels of broadhead here; None: it would.

    The text names what lacks: SGLang, a GPU, kernels in this installation, or a new enough driver.
    """
    missing = package_obstacle("sglang", "sglang.srt", "pip install sglang")
    return missing or kernel_obstacle("sglang")


def register() -> None:
    """Register the backend "broadhead" with SGLang. SGLang's plugin loader calls this; a second call changes nothing.

    Raises:
        ImportError: SGLang is not installed, or has no plugins (0.5.12 and older).
    """
    from sglang.srt.arg_groups import choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if NAME in choices.ATTENTION_BACKEND_CHOICES:
        return
    choices.add_attention_backend_choices([NAME])
    choices.add_draft_attention_backend_choices([NAME])
    choices.add_deterministic_attention_backend_choices([NAME])
    choices.add_radix_supported_deterministic_attention_backend_choices([NAME])
    choices.add_chunked_prefix_cache_attention_backend(NAME)
    HookRegistry.register(_MODEL_HOOK, accept_model, HookType.AROUND)
    HookRegistry.register(_DRAFT_FACTORY, add_draft_backends, HookType.AROUND)
    HookRegistry.register(_CP_KIND, context_parallel_kind, HookType.AROUND)
    _register_factory()


def _register_factory() -> None:
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend(NAME)(create_backend)


def create_backend(runner: Any) -> Any:
    """The backend of a model runner, as SGLang's registry calls it. Logs why no kernel would run, if none would."""
    from .backend import backend_classes

    found = obstacle()
    if found is not None:
        _logger.warning(found.text)
    return backend_classes().backend(runner)


@contextmanager
def _named(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def accept_model(original: Callable[..., Any], server_args: Any) -> Any:
    """Around SGLang's checks of a model: those of Gemma 4 and gpt-oss then accept our name."""
    from sglang.srt.arg_groups import model_hook

    ask = model_hook.attention_backends_of

    def attention_backends_of(config: Any) -> tuple[Any, ...]:
        return tuple(STANDS_FOR if name == NAME else name for name in ask(config))

    with _named(model_hook, "attention_backends_of", attention_backends_of):
        return original(server_args)


def add_draft_backends(
    original: Callable[..., Any], factory: Any, backend_name: str, backends: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Around SGLang's choice of a backend for draft models: "broadhead" is among them."""
    from .backend import backend_classes

    # Only drafts of several tokens have a backend of several steps.
    steps = bool(args[1] if len(args) > 1 else kwargs.get("stamps_children", False))

    def create() -> tuple[str, Any]:
        runner = factory.draft_model_runner
        if steps:
            return NAME, backend_classes().multi_step(runner, factory.topk, factory.speculative_num_steps)
        return NAME, backend_classes().backend(runner, skip_prefill=False)

    return original(factory, backend_name, {**backends, NAME: create}, *args, **kwargs)


def context_parallel_kind(original: Callable[..., Any], cls: Any, value: str) -> Any:
    """Around SGLang's names of backends for context parallelism: ours is called as FlashAttention is."""
    return original(cls, STANDS_FOR if value == NAME else value)
