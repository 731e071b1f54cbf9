"""Makes the attention function, its mask function and its flash functions known to transformers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import broadhead

from ...errors import UnsupportedError
from .attention import attention_forward
from .masks import attention_mask

#: Continuous batching reads "flash" as "builds no mask", and "flash...3" as "reads and writes pages of the cache".
_FLASH_SUFFIX = "_flash_3"
#: The names whose flash functions are broadhead's.
_flash_names: set[str] = set()
#: The name that continuous batching takes, of each name that models ask for.
_names_for_batching: dict[str, str] = {}


def register(name: str = "broadhead") -> None:
    """Make ``attn_implementation=name`` available to transformers, and ``name + "_flash_3"`` for continuous batching.

    The import of this package does it for "broadhead". ``generate_batch`` takes only names with "flash" in them: a
    model that asked for ``name`` has the other one while it runs. A name with "flash" in it is registered alone.

    Args:
        name: how models ask for it.

    Raises:
        ImportError: transformers is missing, or older than the interface that this uses.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

        accepted = inspect.signature(masking_utils.flash_attention_mask).parameters
        if "q_offset" not in accepted and "cache_position" not in accepted:
            raise ImportError("its mask functions take neither q_offset nor cache_position")
    except ImportError as error:
        raise ImportError(
            f"broadhead.integrations.transformers.register: a newer transformers is needed ({error}); install it with: "
            "pip install 'transformers>=4.57'"
        ) from error
    flash_name = name if "flash" in name else name + _FLASH_SUFFIX
    for each in {name, flash_name}:
        AttentionInterface.register(each, attention_forward)
        AttentionMaskInterface.register(each, attention_mask)
    _register_flash_functions(flash_name)
    batching_name = _register_paged(flash_name) or flash_name
    if name != batching_name:
        _names_for_batching[name] = batching_name
        _serve_continuous_batching()


def _register_flash_functions(name: str) -> None:
    """Answer for ``name`` where transformers imports the functions of a flash implementation.

    It does so for every name with "flash" in it, and knows those of its own list and of its hub alone. There is no
    public way to add one.
    """
    from transformers import modeling_flash_attention_utils as utils

    lazy_imports: Callable[..., Any] | None = getattr(utils, "_lazy_imports", None)
    already = bool(_flash_names)
    _flash_names.add(name)
    if lazy_imports is None or (already and getattr(lazy_imports, "answers_for_broadhead", False)):
        return

    def answer(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation not in _flash_names:
            return lazy_imports(implementation, *args, **kwargs)
        functions: tuple[Any, ...] = (broadhead.flash_attn_func, broadhead.flash_attn_varlen_func)
        if hasattr(utils, "_flash_with_kvcache_fn"):
            functions += (broadhead.flash_attn_with_kvcache,)
        if str(implementation).startswith("paged|"):
            functions = tuple(map(_with_sinks, functions))
        return (*functions, utils._pad_input, utils._unpad_input)

    answer.answers_for_broadhead = True  # type: ignore[attr-defined]
    utils._lazy_imports = answer


def _register_paged(flash_name: str) -> str | None:
    """The name that an older transformers takes for continuous batching, which runs its own function by our kernels.

    None: this transformers runs the attention function of the model there.
    """
    from transformers import AttentionInterface

    theirs = AttentionInterface().get("paged|flash_attention_3")
    if theirs is None:
        return None

    def paged_attention(module: Any, *args: Any, **kwargs: Any) -> Any:
        # It reads the window of the layer itself, and no softcap.
        lost = [name for name in ("softcap", "sliding_window") if kwargs.get(name) and not getattr(module, name, None)]
        if lost or kwargs.get("softcap"):
            raise UnsupportedError(
                f"broadhead.integrations.transformers: {lost[0] if lost else 'softcap'} of {type(module).__name__} is"
                " left out by the continuous batching of this transformers, whose tokens would be wrong; install a"
                " newer one with: pip install 'transformers>=5.24'"
            )
        return theirs(module, *args, **kwargs)

    name = f"paged|{flash_name}"
    # Like their own paged names it has no mask function, so that none is made: the offsets say all, and a mask function
    # waits for the device, which the CUDA graphs of continuous batching may not.
    AttentionInterface.register(name, paged_attention)
    _register_flash_functions(name)
    return name


def _with_sinks(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with the sinks by the name that transformers has for them."""

    @functools.wraps(function)
    def call(*args: Any, s_aux: Any = None, **kwargs: Any) -> Any:
        return function(*args, **kwargs, **({} if s_aux is None else {"sinks": s_aux}))

    return call


def _serve_continuous_batching() -> None:
    """Have ``generate_batch`` take the flash name of a model that asked for a name without "flash".

    It would refuse that name, or take a FlashAttention that it finds installed. As with its own changes of the
    implementation, the model gets the name back that it had.
    """
    try:
        from transformers.generation.continuous_batching import continuous_api
    except ImportError:  # transformers before it had continuous batching
        return
    manager: Any = getattr(continuous_api, "ContinuousBatchingManager", None)
    choose: Callable[..., Any] | None = getattr(manager, "switch_to_cb_friendly_attn", None)
    if choose is None or getattr(choose, "answers_for_broadhead", False):
        return

    def switch_to_cb_friendly_attn(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        asked = model.config._attn_implementation
        flash_name = _names_for_batching.get(asked) if isinstance(asked, str) else None
        if flash_name is None:
            return choose(self, model, *args, **kwargs)
        # Models that list the flash implementations which know their sinks would replace this one.
        compatible, base = getattr(model, "_compatible_flash_implementations", None), flash_name.removeprefix("paged|")
        if compatible is not None and base not in compatible:
            model._compatible_flash_implementations = [*compatible, base]
        model.set_attn_implementation(flash_name)
        self._original_attn_impl = asked
        return None

    switch_to_cb_friendly_attn.answers_for_broadhead = True  # type: ignore[attr-defined]
    manager.switch_to_cb_friendly_attn = switch_to_cb_friendly_attn
