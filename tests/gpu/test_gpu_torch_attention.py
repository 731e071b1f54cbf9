"""torch's SDPA and varlen_attn on a GPU: broadhead's kernels run, forward and backward, up to head_dim 512."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import broadhead
import oracle
import pytest
import torch
import torch.nn.functional as F
from sdpa_calls import check, check_packed, make, offsets

if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
    pytest.skip(f"torch {torch.__version__} has no registry of flash attention", allow_module_level=True)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def activated() -> Iterator[None]:
    from broadhead.integrations import torch_attention

    with torch_attention.activate("cuda"):
        assert torch.nn.attention.current_flash_attention_impl() == "broadhead"
        yield
    assert torch.nn.attention.current_flash_attention_impl() is None


def rule(head_dim: int, window: tuple[int, int]) -> oracle.Rule:
    return oracle.Rule(scale=head_dim**-0.5, window=window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "heads_kv", "head_dim"), [(4, 4, 64), (8, 2, 128), (4, 1, 256), (4, 2, 512)])
def test_sdpa(
    heads: int, heads_kv: int, head_dim: int, causal: bool, dtype: torch.dtype, rng: random.Random, row_ran: Any
) -> None:
    length = rng.randint(100, 400)
    inputs = make((2, heads, length, head_dim), (2, heads_kv, length, head_dim), dtype, "cuda")
    out = F.scaled_dot_product_attention(*inputs, is_causal=causal, enable_gqa=heads != heads_kv)
    row_ran(dtype=dtype, head_dim=head_dim)
    rows: list[tuple[str, str | None, str]] = []
    inputs[0].register_hook(lambda _: rows.append(broadhead.last_dispatch()))
    check(inputs, out, rule(head_dim, (-1, 0 if causal else -1)))
    assert [backend for backend, _, _ in rows] == ["cuda"] and "bwd" in str(rows[0][1]), rows


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (70, 0)])
@pytest.mark.parametrize("head_dim", [128, 512])
def test_varlen_attn(head_dim: int, window: tuple[int, int], rng: random.Random, row_ran: Callable[..., Any]) -> None:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    lengths = [rng.randint(1, 300) for _ in range(4)]
    cu = offsets(lengths, "cuda")
    inputs = make((sum(lengths), 4, head_dim), (sum(lengths), 4, head_dim), torch.bfloat16, "cuda")
    out, lse = varlen_attn(
        *inputs, cu, cu, max(lengths), max(lengths), window_size=window, return_aux=AuxRequest(lse=True)
    )
    row_ran(dtype=torch.bfloat16, head_dim=head_dim)
    check_packed(inputs, cu, cu, out, rule(head_dim, window), lse)


@pytest.mark.parametrize("head_dim", [128, 512])
def test_compiled_code_runs_it(head_dim: int, row_ran: Callable[..., Any]) -> None:
    inputs = make((1, 8, 256, head_dim), (1, 2, 256, head_dim), torch.bfloat16, "cuda")
    torch._dynamo.reset()
    attend = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), fullgraph=True
    )
    out = attend(*inputs)
    row_ran(dtype=torch.bfloat16, head_dim=head_dim)
    check(inputs, out, rule(head_dim, (-1, 0)))
