"""Every backward row: masks, head dims, groups and lengths around its tiles, random calls, sums in a fixed order."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import broadhead
import pytest
import torch
from broadhead import support
from broadhead.call import problem
from broadhead.plan import dispatch
from broadhead.run import backward
from broadhead.run.cuda_backend import forget_calls
from calls import Built, Call, build
from checks import check_gradients, random_gradients
from gpu_calls import EXTRAS, MASK_FEATURES, MASKS, TORCH_DTYPES, VALUE_MASKS, row_cases, row_id, value_masks_of
from masks import Drawn
from random_calls import random_call

pytestmark = pytest.mark.gpu

FORWARD_ROWS = tuple(row for row in support.ROWS if row.direction == "forward")
BACKWARD_ROWS = tuple(row for row in support.ROWS if row.direction == "backward")
GROUPS = ((4, 4), (4, 2), (6, 1))
#: Calls of each random test, as in test_gpu_fuzz.py.
CALLS = int(os.environ.get("BROADHEAD_FUZZ_CALLS", "25"))

each_row = pytest.mark.parametrize("row", BACKWARD_ROWS, ids=row_id)


#: Ids of the rows that computed gradients. Autograd calls them in a thread of its own, so that last_dispatch() of the
#: thread of the test does not tell.
LAUNCHED: list[str] = []


@pytest.fixture
def only_backward(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[support.KernelRow], None]]:
    """`only_backward(row)`: gradients run on that row or are refused."""
    launch = backward.launch_backward

    def record(args: Any, call: Any, plan: Any, *rest: Any) -> Any:
        LAUNCHED.append(plan.row.id)
        return launch(args, call, plan, *rest)

    monkeypatch.setattr(backward, "launch_backward", record)
    monkeypatch.setattr(problem, "DQ_SUM_ROWS", 0)  # fused rows run short sequences here, too

    def forget() -> None:
        dispatch._decided.cache_clear()
        forget_calls()

    def show(row: support.KernelRow) -> None:
        capability = torch.cuda.get_device_capability()
        if capability not in row.capabilities:
            pytest.skip(f"{row.id} runs on {row.capabilities}, this device is {capability}")
        monkeypatch.setattr(dispatch, "ROWS", (*FORWARD_ROWS, row))
        forget()

    forget()
    yield show
    forget()


def run(row: support.KernelRow | None, built: Built) -> dict[str, torch.Tensor]:
    """Gradients of a call, with NaN coming in at the rows that no sequence owns; they are checked.

    row: that must compute them; None: no row does.
    """
    LAUNCHED.clear()
    leaves = built.requires_grad()
    built.kwargs.pop("out", None)
    out, lse = built.run()
    found, grad_out, grad_lse = random_gradients(built, leaves, out, lse)
    some = all(built.kwargs[name].numel() for name in ("q", "k"))
    expected = [row.id] if some and row is not None else []
    assert expected == LAUNCHED, "which row ran"
    check_gradients(built, found, grad_out, grad_lse)
    return found


def call_of(row: support.KernelRow, seqlens_q: tuple[int, ...], seqlens_k: tuple[int, ...], **options: Any) -> Call:
    sizes = {"head_dim": row.head_dim, "head_dim_v": row.head_dim_v, "dtype": TORCH_DTYPES[row.dtype]}
    return Call("varlen", seqlens_q, seqlens_k, **{**sizes, **options})


#: Masks that have gradients.
TRAINED = {**MASKS, **{name: options for name, options in VALUE_MASKS.items() if "tree" not in options}}


@pytest.mark.parametrize("row, mask", row_cases(TRAINED, BACKWARD_ROWS))
def test_masks(row: support.KernelRow, mask: str, only_backward: Callable, cuda: torch.device, rng: Any) -> None:
    only_backward(row)
    extras = list(EXTRAS.values())
    extra = extras[(list(TRAINED).index(mask) + row.head_dim // 8) % len(extras)]
    rows, cols = row.tile.tile_m, row.tile.tile_n
    heads = dict(zip(("heads_q", "heads_kv"), rng.choice(GROUPS), strict=True))
    lengths = (rows, 1, 0, 2 * rows + 65, cols + 7), (rows, 64, 9, 3 * rows + 3, 63)
    call = call_of(row, *lengths, **heads, **TRAINED[mask], **extra)
    slack = {"slack_q": rng.choice((0, 3)), "slack_k": rng.choice((0, 2)), "tail": rng.choice((0, 5))}
    run(row, build(call.with_(**slack), cuda, rng))


@pytest.mark.parametrize("row", [row for row in BACKWARD_ROWS if "ranges" in value_masks_of(row)], ids=row_id)
def test_ranges_about_tiles(row: support.KernelRow, only_backward: Callable, cuda: torch.device, rng: Any) -> None:
    """Each pair of a begin and an end at most one key from an edge of a tile: of the row's own, of others, far from
    the queries, ahead of them, under a window that lets nothing else through and under none."""
    only_backward(row)
    for step in dict.fromkeys((row.tile.tile_m, row.tile.tile_n, 64)):
        marks = [edge + by for edge in (0, step, 2 * step, 4 * step) for by in (-1, 0, 1) if edge + by >= 0]
        pairs = [(a, b) for a in marks for b in marks if a <= b]
        for options in ({"window": (0, 0)}, {"window": (step, 0), "ranges_in_window": True}, {}):
            rng.shuffle(pairs)
            ranges = Drawn([tuple(pairs), tuple(pairs[:33])], f"pairs of {step}")
            call = call_of(row, (len(pairs), 33), (max(len(pairs), 5 * step + 9), 4 * step), heads_q=4, heads_kv=2)
            run(row, build(call.with_(ranges=ranges, causal=True, **options), cuda, rng))


@pytest.mark.filterwarnings("ignore::broadhead.FallbackWarning")
@pytest.mark.parametrize("row", [row for row in BACKWARD_ROWS if len(value_masks_of(row)) < 2], ids=row_id)
def test_rows_without_a_mask_refuse_it(
    row: support.KernelRow,
    only_backward: Callable,
    cuda: torch.device,
    rng: random.Random,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the name of its feature; where fallbacks are allowed, the torch reference gives output and gradients."""
    only_backward(row)
    for name, values in (("ranges", "random"), ("causal_each", (True, False))):
        if name in value_masks_of(row):
            continue
        call = call_of(row, (130, 9), (200, 70), heads_q=2, heads_kv=1, **{name: values})
        monkeypatch.setenv("BROADHEAD_STRICT", "1")
        refused = build(call, cuda, rng)
        refused.requires_grad()
        with pytest.raises(broadhead.UnsupportedError, match=MASK_FEATURES[name]):
            refused.run(out=None)
        monkeypatch.setenv("BROADHEAD_STRICT", "0")
        run(None, build(call, cuda, rng))
        assert broadhead.last_dispatch()[0] == "torch"


@each_row
def test_head_dims(row: support.KernelRow, only_backward: Callable, cuda: torch.device, rng: Any) -> None:
    """NaN lies behind the last column of each head, or the next tensor does."""
    only_backward(row)
    d, dv = row.head_dim, row.head_dim_v
    for head_dim, head_dim_v in ((8, dv), (d, 8), (d - 8, dv - 8), (d, dv - 24), (max(8, d // 2 - 8), dv // 2)):
        options = {"head_dim": head_dim, "head_dim_v": head_dim_v, "heads_q": 4, "causal": True}
        run(row, build(call_of(row, (row.tile.tile_m + 3, 9), (row.tile.tile_n + 3, 70), **options), cuda, rng))


@pytest.mark.curated
@each_row
def test_dense(row: support.KernelRow, only_backward: Callable, cuda: torch.device, rng: Any) -> None:
    only_backward(row)
    for seqlen_q, seqlen_k in ((1, 1), (70, 200), (200, 70), (129, 129)):
        call = call_of(row, (seqlen_q,) * 2, (seqlen_k,) * 2, heads_q=4, heads_kv=2, causal=seqlen_q == seqlen_k)
        run(row, build(call.with_(function="func"), cuda, rng))


@each_row
def test_infinite_gradient_of_the_lse(
    row: support.KernelRow, only_backward: Callable, cuda: torch.device, rng: Any
) -> None:
    """D is infinite where a gradient of the LSE is: dK then has the signs of q, and other heads do not notice."""
    only_backward(row)
    built = build(call_of(row, (130,), (200,), heads_q=2, heads_kv=2).with_(function="func"), cuda, rng)
    leaves = built.requires_grad()
    built.kwargs.pop("out", None)
    out, lse = built.run()
    grad_out, grad_lse = torch.randn_like(out), torch.zeros_like(lse)
    clean = torch.autograd.grad((out, lse), [*leaves.values()], (grad_out, grad_lse), retain_graph=True)
    grad_lse[0, 0, 7] = float("inf")
    found = torch.autograd.grad((out, lse), [*leaves.values()], (grad_out, grad_lse))
    before, after = (dict(zip(leaves, gradients, strict=True)) for gradients in (clean, found))
    assert torch.equal(after["k"][0, :, 0], (leaves["q"][0, 7, 0] * float("inf")).expand(200, -1))
    for name in ("q", "k", "v"):
        torch.testing.assert_close(after[name][:, :, 1], before[name][:, :, 1], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("row", [row for row in BACKWARD_ROWS if "deterministic" in row.features], ids=row_id)
def test_sums_have_an_order(row: support.KernelRow, only_backward: Callable, cuda: torch.device, rng: Any) -> None:
    only_backward(row)
    call = call_of(row, (300, 300), (300, 300), heads_q=6, heads_kv=2, causal=True).with_(function="func")
    built = build(call, cuda, rng)
    leaves = built.requires_grad()
    built.kwargs.pop("out", None)
    grad_out: torch.Tensor | None = None
    first: tuple[torch.Tensor, ...] = ()
    for _ in range(100):
        out, _ = built.run(deterministic=True)
        grad_out = torch.randn_like(out) if grad_out is None else grad_out
        found = torch.autograd.grad(out, [*leaves.values()], grad_out)
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


@pytest.mark.filterwarnings("ignore::broadhead.FallbackWarning")
@pytest.mark.parametrize("sharing", ["page_table", "kv_batch_idx"])
def test_rows_that_sequences_share(sharing: str, cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """1024 sequences over the same bf16 keys: their gradients are added in fp32, and in one order in every run."""
    monkeypatch.setenv("BROADHEAD_STRICT", "0")  # no backward row takes them
    owners = torch.zeros((1024, 1) if sharing == "page_table" else 1024, dtype=torch.int32, device=cuda)
    q = torch.randn(1024, 1, 1, 32, device=cuda).bfloat16()
    k, v = (torch.randn(1, 8, 1, 32, device=cuda).bfloat16().requires_grad_() for _ in range(2))
    first: tuple[torch.Tensor, ...] = ()
    for _ in range(20):
        out, _ = broadhead.mha_fwd(q, k, v, **{sharing: owners})
        found = torch.autograd.grad(out, (k, v), torch.ones_like(out))
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
    scores = q[:, 0, 0].double() @ k.detach()[0, :, 0].double().T * 32**-0.5
    weights = torch.softmax(scores, dim=1).sum(dim=0)
    torch.testing.assert_close(first[1][0, :, 0, 0].double(), weights, rtol=2**-7, atol=0)


@each_row
def test_random_calls(row: support.KernelRow, seed: int, only_backward: Callable, cuda: torch.device) -> None:
    """Whatever the row takes: calls that append or read pages are left out."""
    only_backward(row)
    ran = 0
    for i in range(12 * CALLS):
        rng = random.Random(seed + i)
        torch.manual_seed(seed + i)
        longest = rng.choice((3, row.tile.tile_n + 1, 2 * row.tile.tile_m + 5, 400))
        dims = tuple(range(8, row.head_dim + 1, 8))
        values = [name for name in value_masks_of(row) if name != "tree"]
        call = random_call(
            rng, (TORCH_DTYPES[row.dtype],), longest, head_dims=(rng.choice(dims),), decode=0.2, values=values
        )
        if call.function == "kvcache" or call.page_size or call.dim_v > row.head_dim_v:
            continue
        try:
            run(row, build(call.with_(num_splits=None, pack_gqa=None, tokens_per_split=0), cuda, rng))
        except AssertionError as error:
            raise AssertionError(f"case {i} (seed {seed + i}): {call}") from error
        ran += 1
        if ran == CALLS:
            break
    assert ran >= CALLS // 3
