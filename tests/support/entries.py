"""A call of every public function with every tensor argument it takes, and kinds of tensors to pass them as."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import broadhead
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FP8 = torch.float8_e4m3fn
PAGES = ((3, 0, 1), (2, 5, 4))


@dataclass
class Entry:
    """One call: ``function(**tensors, **values)``; ``written`` names the tensors that it writes."""

    function: Callable[..., Any]
    tensors: dict[str, Tensor]
    values: dict[str, Any] = field(default_factory=dict)
    written: tuple[str, ...] = ()

    def clone(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.tensors.items()}

    def run(self, tensors: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
        """What it returns, and the tensors that it wrote."""
        result = self.function(**tensors, **self.values)
        found = [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]
        return found, {name: tensors[name] for name in self.written}


def entries(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Entry]:
    """Two sequences, 4 heads over 2 KV heads, head_dim 64, pages of 16 tokens; names of calls by what they take."""

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def int32(*values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def caches() -> dict[str, Tensor]:
        return {"k_cache": randn(6, 16, 2, 64), "v_cache": randn(6, 16, 2, 64)}

    f32 = torch.float32
    lse = {"return_softmax_lse": True}
    plan = {"batch_size": 2, "max_seqlen_q": 1, "max_seqlen_k": 48, "num_heads_q": 4, "num_heads_kv": 2, "headdim": 64}
    paged = {"cache_seqlens": int32(20, 33), "page_table": int32(*PAGES)}
    dense = {"q": randn(2, 5, 4, 64), "k": randn(2, 7, 2, 64), "v": randn(2, 7, 2, 64)}
    packed = {"q": randn(9, 4, 64), "k": randn(11, 2, 64), "v": randn(11, 2, 64)}
    cu = {"cu_seqlens_q": int32(0, 3, 9), "cu_seqlens_k": int32(0, 6, 11)}
    used = {"seqused_q": int32(2, 5), "seqused_k": int32(5, 4)}
    angles = {"rotary_cos": randn(64, 16, dtype=f32), "rotary_sin": randn(64, 16, dtype=f32)}
    decode = {"q": randn(2, 1, 4, 64), **caches()}
    found = {
        "dense": Entry(
            broadhead.flash_attn_func,
            {**dense, "qv": randn(2, 5, 4, 64), "sinks": randn(4, dtype=f32), "prefix_lens": int32(2, 4)},
            {"causal": True, **lse},
        ),
        "dense_out": Entry(
            broadhead.flash_attn_func, {**dense, "out": randn(2, 5, 4, 64)}, {"softcap": 9.0, **lse}, ("out",)
        ),
        "varlen": Entry(
            broadhead.flash_attn_varlen_func,
            {**packed, **cu, **used, "sinks": randn(4, dtype=f32), "out": randn(9, 4, 64)},
            {"max_seqlen_q": 6, "max_seqlen_k": 6, "causal": True, **lse},
            ("out",),
        ),
        "decode": Entry(
            broadhead.flash_attn_with_kvcache,
            {**decode, **paged, "cache_leftpad": int32(1, 2), "out": randn(2, 1, 4, 64)},
            {"causal": True, **lse},
            ("out",),
        ),
        "batch_index": Entry(
            broadhead.flash_attn_with_kvcache,
            {
                "q": randn(9, 4, 64), "k_cache": randn(3, 20, 2, 64), "v_cache": randn(3, 20, 2, 64),
                "cache_seqlens": int32(12, 7), "cache_batch_idx": int32(2, 0), "cu_seqlens_q": int32(0, 3, 9),
            },
            {"max_seqlen_q": 6, **lse},
        ),
        "append": Entry(
            broadhead.flash_attn_with_kvcache,
            {
                **decode, "k": randn(2, 1, 2, 64), "v": randn(2, 1, 2, 64), **paged, **angles,
                "rotary_seqlens": int32(3, 7),
            },
            {"causal": True, **lse},
            ("k_cache", "v_cache"),
        ),
        "append_packed": Entry(
            broadhead.flash_attn_with_kvcache,
            {
                "q": randn(3, 4, 64), **caches(), "k": randn(3, 2, 64), "v": randn(3, 2, 64), **paged,
                "cu_seqlens_q": int32(0, 2, 3), "cu_seqlens_k_new": int32(0, 2, 3),
            },
            {"max_seqlen_q": 2, "causal": True, **lse},
            ("k_cache", "v_cache"),
        ),
        "mha_fwd": Entry(
            broadhead.mha_fwd,
            {
                "q": decode["q"], "k": caches()["k_cache"], "v": caches()["v_cache"], "k_new": randn(2, 1, 2, 64),
                "v_new": randn(2, 1, 2, 64), "seqused_k": int32(20, 33), "page_table": int32(*PAGES),
                "kv_batch_idx": int32(1, 0),
            },
            {"causal": True},
            ("k", "v"),
        ),
        "metadata": Entry(
            broadhead.get_scheduler_metadata,
            {
                "cache_seqlens": int32(20, 33), "cu_seqlens_q": int32(0, 1, 2), "cache_leftpad": int32(1, 2),
                "page_table": int32(*PAGES), "out": torch.full((17,), 9, dtype=torch.int32, device=device),
            },
            {**plan, "page_size": 16, "qkv_dtype": dtype},
            ("out",),
        ),
        "merge": Entry(
            broadhead.merge_attn_states,
            {
                "out_a": randn(5, 4, 32), "lse_a": randn(4, 5, dtype=f32), "out_b": randn(5, 4, 32),
                "lse_b": randn(4, 5, dtype=f32), "out": randn(5, 4, 32),
            },
            {},
            ("out",),
        ),
        "combine": Entry(
            broadhead.flash_attn_combine,
            {
                "out_partial": randn(3, 5, 4, 32, dtype=f32), "lse_partial": randn(3, 5, 4, dtype=f32),
                "out": randn(5, 4, 32),
            },
            {},
            ("out",),
        ),
        "shared_prefix": Entry(
            broadhead.flash_attn_with_shared_prefix,
            {**decode, **paged, "prefix_page_table": int32(1, 4), "out": randn(2, 1, 4, 64)},
            {"prefix_len": 20, **lse},
            ("out",),
        ),
        "qkvpacked": Entry(broadhead.flash_attn_qkvpacked_func, {"qkv": randn(2, 5, 3, 4, 64)}, dict(lse)),
        "kvpacked": Entry(
            broadhead.flash_attn_kvpacked_func, {"q": randn(2, 5, 4, 64), "kv": randn(2, 7, 2, 2, 64)}, dict(lse)
        ),
        "varlen_qkvpacked": Entry(
            broadhead.flash_attn_varlen_qkvpacked_func,
            {"qkv": randn(9, 3, 4, 64), "cu_seqlens": int32(0, 3, 9)},
            {"max_seqlen": 6, **lse},
        ),
    }  # fmt: skip
    if dtype != torch.float32:
        found["fp8_cache"] = Entry(
            broadhead.flash_attn_with_kvcache,
            {
                "q": decode["q"], "k_cache": caches()["k_cache"].to(FP8), "v_cache": caches()["v_cache"].to(FP8),
                **paged, "k_descale": torch.rand(2, 2, device=device), "v_descale": torch.rand(2, 2, device=device),
            },
            dict(lse),
        )  # fmt: skip
    return found


def backward_entries(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Entry]:
    """mha_bwd, dense and varlen."""
    found = {}
    for name, source in (("dense", "dense_out"), ("varlen", "varlen")):
        forward = entries(device, dtype)[source]
        tensors = {key: x for key, x in forward.tensors.items() if key not in ("out", "seqused_q", "seqused_k")}
        values: dict[str, Any] = {"causal": True}
        if name == "varlen":
            values |= {"max_seqlen_q": 6, "max_seqlen_k": 6}
        out, lse = broadhead.mha_fwd(**tensors, **values)
        tensors |= {"dout": torch.randn_like(out), "out": out, "softmax_lse": lse}
        tensors |= {f"d{x}": torch.zeros_like(tensors[x]) for x in ("q", "k", "v")}
        found[f"mha_bwd_{name}"] = Entry(broadhead.mha_bwd, tensors, values, ("dq", "dk", "dv"))
    return found


def tensor_arguments() -> Iterator[tuple[str, str]]:
    """Every (entry, tensor argument) there is."""
    for name, entry in (entries() | backward_entries()).items():
        for argument in entry.tensors:
            yield name, argument


# --- kinds of tensors ------------------------------------------------------------------------------------------------


class Wrapper(torch.Tensor):
    """A tensor around another, without memory of its own: as DTensor, AsyncCollectiveTensor and quantised tensors."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(x: Any) -> Any:
            return x.inner if isinstance(x, Wrapper) else x

        return torch.utils._pytree.tree_map(
            lambda x: Wrapper(x) if type(x) is torch.Tensor else x,
            function(*torch.utils._pytree.tree_map(unwrap, args), **torch.utils._pytree.tree_map(unwrap, kwargs or {})),
        )


class Subclass(torch.Tensor):
    """A subclass that overrides nothing."""


class Quiet(torch.nn.Parameter):
    """A kind of parameter, as of model code."""


class Watching(torch.Tensor):
    """A subclass with memory of its own that sees every operator, and passes it on as it is."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(function))
        with torch._C._DisableTorchDispatch():  # type: ignore[no-untyped-call]
            return function(*args, **(kwargs or {}))


class Passing(TorchDispatchMode):
    """A mode that sees every operator, and passes it on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "wrapper": Wrapper,
    "subclass": lambda x: x.as_subclass(Subclass),
    "quiet": lambda x: torch.Tensor._make_subclass(Quiet, x),
    "watching": lambda x: torch.Tensor._make_subclass(Watching, x),
    # Nothing negates 8 bits, lazily or not.
    "negated": lambda x: x if x.dtype == FP8 else torch._neg_view(negative(x)),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
}


def negative(x: Tensor) -> Tensor:
    return (-x.float()).to(x.dtype)


def memory_of(x: Tensor) -> Tensor:
    """The numbers of a tensor of any kind, as a torch.Tensor."""
    if isinstance(x, Wrapper):
        return memory_of(x.inner)
    with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():  # type: ignore[no-untyped-call]
        return x.as_subclass(torch.Tensor).resolve_neg()


def check_kind(entry: Entry, arguments: list[str], kind: str) -> None:
    """``arguments`` as tensors of ``kind`` give what plain tensors give, or are refused before anything is written."""
    expected, written = entry.run(entry.clone())
    given = entry.clone()
    given |= {argument: KINDS[kind](given[argument]) for argument in arguments}
    before = {name: memory_of(x).clone() for name, x in given.items()}
    try:
        got, got_written = entry.run(given)
    except broadhead.UnsupportedError as refusal:
        assert kind == "negated", f"{arguments} as {kind}: {refusal}"
        assert "is written" in str(refusal) and any(str(refusal).split()[1] == name for name in arguments), refusal
        for name, x in given.items():
            assert torch.equal(memory_of(x), before[name]), f"{name} was written by a call that was refused"
        return
    tolerance = {"atol": 1e-2, "rtol": 1e-2} if expected[0].dtype.itemsize == 2 else {}
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(
            memory_of(a), b, equal_nan=True, **tolerance, msg=lambda text: f"{arguments} as {kind}: {text}"
        )
    for name, x in got_written.items():
        torch.testing.assert_close(
            memory_of(x).float(), written[name].float(), **tolerance, msg=f"{name} is wrong with {arguments} as {kind}"
        )
