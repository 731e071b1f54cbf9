"""Which layers broadhead takes from vLLM: what the environment asks for, where it is ahead, what its build can run."""

from __future__ import annotations

import enum
import os
from typing import NamedTuple

import torch

import broadhead
from broadhead.errors import InvalidArgumentError
from broadhead.plan.native import BuildDescription, build_description, build_help

#: The environment variable that says which layers are taken without --attention-backend.
VARIABLE = "BROADHEAD_VLLM"
#: What vLLM calls a cache of float8_e4m3fn.
FP8_CACHES = ("fp8", "fp8_e4m3")
CACHE_DTYPES = ("auto", "float16", "bfloat16", *FP8_CACHES)
MAX_HEAD_SIZE = 512
HOPPER = (9, 0)
#: Query tokens that stand for prefill and decode where kernels are asked for.
_PHASES = {"prefill": 4096, "decode": 1}


class Mode(enum.Enum):
    """What BROADHEAD_VLLM asks for."""

    FLAG = "unset"  # only by --attention-backend CUSTOM
    AUTO = "auto"  # where the kernels are ahead
    ON = "on"  # everywhere


class Layer(NamedTuple):
    """What vLLM asks of the attention of a layer, by the names of its AttentionSelectorConfig."""

    head_size: int
    dtype: torch.dtype = torch.bfloat16
    kv_cache_dtype: str | None = "auto"
    use_mm_prefix: bool = False


def read_mode() -> Mode:
    """The mode that the environment asks for. Errors as for parse_mode."""
    return parse_mode(os.environ.get(VARIABLE))


def parse_mode(value: str | None) -> Mode:
    """The mode that a value of BROADHEAD_VLLM asks for; None: it is not set.

    Raises:
        InvalidArgumentError: it is not "auto", "on" or nothing.
    """
    text = (value or "").strip().lower()
    if not text:
        return Mode.FLAG
    for mode in (Mode.AUTO, Mode.ON):
        if text == mode.value:
            return mode
    raise InvalidArgumentError(
        f"{VARIABLE} must be auto (where the kernels of broadhead are ahead), on (everywhere) or unset (only by"
        f" --attention-backend CUSTOM), got {text!r}"
    )


def is_fp8(kv_cache_dtype: str | None) -> bool:
    """Whether the cache is of float8_e4m3fn."""
    return kv_cache_dtype in FP8_CACHES


def where_ahead(layer: Layer, capability: tuple[int, int]) -> tuple[bool, str]:
    """Whether BROADHEAD_VLLM=auto takes a layer on a device, and why: ``(ahead, reason)``."""
    on = f"compute capability {capability[0]}.{capability[1]}"
    if layer.use_mm_prefix and is_fp8(layer.kv_cache_dtype):
        return True, "image ranges over an FP8 cache, for which vLLM has no FlashAttention"
    if capability == HOPPER and layer.head_size > 256:
        return True, f"head size {layer.head_size} on {on}, above the 256 of FlashAttention 3"
    if capability == HOPPER and layer.use_mm_prefix and layer.head_size == 256:
        # FlashAttention 4 of vLLM 0.24 also loses the window, and the positions of chunks, where it gets a mask.
        return True, f"image ranges of head size 256 on {on}, which FlashAttention 4 runs as a mask over all keys"
    if capability < HOPPER and layer.head_size >= 256:
        return True, f"head size {layer.head_size} on {on}, where FlashAttention 2 and Triton are behind"
    return False, f"head size {layer.head_size} on {on} is left to the backend that vLLM chooses"


def missing(layer: Layer, capability: tuple[int, int], build: BuildDescription | None = None) -> str | None:
    """Why broadhead has no kernel for a layer on a device of that capability; None: it has them.

    The text says whether the request, the GPU or the build is at fault. ``build`` stands for this installation.
    """
    if layer.head_size % 8 or not 0 < layer.head_size <= MAX_HEAD_SIZE:
        return f"broadhead takes head sizes that are multiples of 8 up to {MAX_HEAD_SIZE}, got {layer.head_size}"
    if layer.dtype not in (torch.bfloat16, torch.float16):
        return f"broadhead has kernels for bfloat16 and float16, got {layer.dtype}"
    if layer.kv_cache_dtype is not None and layer.kv_cache_dtype not in CACHE_DTYPES:
        return f"broadhead takes caches of {', '.join(CACHE_DTYPES)}, got {layer.kv_cache_dtype}"
    for phase, seqlen_q in _PHASES.items():
        fp8 = is_fp8(layer.kv_cache_dtype)
        found, reason = broadhead.is_supported(
            head_dim=layer.head_size,
            dtype=layer.dtype,
            kv_dtype=torch.float8_e4m3fn if fp8 else layer.dtype,
            descale=fp8,
            num_heads_q=8,
            seqlen_q=seqlen_q,
            seqlen_k=4096,
            causal=True,
            page_size=16,
            varlen=True,
            query_ranges=layer.use_mm_prefix and seqlen_q > 1,
            device=capability,
            build=build,
        )
        if not found:
            return f"broadhead has no kernel for the {phase} of head size {layer.head_size} here: {reason}"
    return None


def decide(
    mode: Mode, layer: Layer, capability: tuple[int, int], build: BuildDescription | None = None
) -> tuple[bool, str]:
    """Whether a layer for which vLLM may choose the backend goes to broadhead, and why: ``(taken, reason)``."""
    if mode is Mode.FLAG:
        return False, f"{VARIABLE} is not set: only --attention-backend CUSTOM takes it"
    if mode is Mode.ON:
        wanted, why = True, f"{VARIABLE}=on"
    else:
        wanted, why = where_ahead(layer, capability)
    if not wanted:
        return False, why
    hopper = (build_description() if build is None else build).family("sm90")
    if mode is Mode.AUTO and capability == HOPPER and (hopper is None or not hopper.covers(capability)):
        return False, f"this build has no kernels made for Hopper, and others are not ahead; {build_help('90a')}"
    lacking = missing(layer, capability, build)
    return (True, why) if lacking is None else (False, lacking)
