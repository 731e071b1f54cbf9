"""The benchmarks of masks that are given as values: the masks pair by pair, what is asked of whom, what is wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import broadhead
import pytest
import torch
from broadhead_bench import accuracy, accuracy_masks, cases, cases_masks, cli, inputs_masks, measure, summary, timing
from broadhead_bench.cases_masks import CausalityCase, ChunkCase, ImagesCase, TreeCase
from broadhead_bench.peers import base, broadhead_api, flash_attention, torch_flex
from torch import Tensor
from torch.nn.attention import flex_attention

CPU = torch.device("cpu")
IMAGES = ImagesCase("fwd", 60, 4, 2, 16, 7, 2, 17)
TINY = cases_masks.mask_cases(on_cpu=True)
FUNCTIONS = ("flash_attn_func", "flash_attn_with_kvcache")


# --- the masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in cases_masks.mask_cases() if isinstance(c, (ImagesCase, ChunkCase))])
def test_images_lie_in_the_sequence_and_fit_no_tile(case: Any) -> None:
    first = case.context - case.new if isinstance(case, ChunkCase) else 0
    tokens = case.new if isinstance(case, ChunkCase) else case.seqlen
    spans = case.spans
    assert len(spans) == case.images and {end - start for start, end in spans} == {case.image_tokens}
    assert all(start % 64 and end % 64 for start, end in spans)
    ends = [first, *(end for _, end in spans)]
    assert all(before < start for before, (start, _) in zip(ends, spans))
    assert ends[-1] < first + tokens


@pytest.mark.parametrize("window", [None, 7, 25])
@pytest.mark.parametrize("in_window", [False, True])
def test_images_pair_by_pair(window: int | None, in_window: bool) -> None:
    """The reference's mask is that of the contract, its bounds hold all that a block sees, and the tensors say it."""
    case = IMAGES._replace(window=window, in_window=in_window)
    mask, count = accuracy_masks.images_mask(case), case.seqlen
    positions = torch.arange(count)

    def sees(query: int, key: int) -> bool:
        near = window is None or query - key < window
        together = any(start <= query < end and start <= key < end for start, end in case.spans)
        return (key <= query and near) or (together and (near or not in_window))

    expected = torch.tensor([[sees(query, key) for key in range(count)] for query in range(count)])
    assert torch.equal(mask.visible(positions, positions), expected)
    for first in range(0, count, 9):
        low, high = mask.keys(first, min(first + 9, count), count)
        seen = expected[first : first + 9].any(0)
        assert not seen[:low].any() and not seen[high:].any()
        assert seen[low] and seen[high - 1]

    inputs = inputs_masks.images_inputs(case, CPU)
    begin, end = (bound[:, None] for bound in inputs.bounds(case))
    told = (positions >= begin) & (positions < end)
    plain = mask._replace(spans=()).visible(positions, positions)
    assert torch.equal(told | plain, expected)
    # A mask that is compiled is given as the same function of torch.
    blocks = base.images_blocks(case, inputs, 16)
    assert torch.equal(flex_attention.create_mask(blocks.mask_mod, 1, 1, count, count, device="cpu")[0, 0], expected)


@pytest.mark.parametrize("count", [1, 5, 8, 16, 64])
def test_words_are_the_ancestors(count: int) -> None:
    parents = cases_masks.tree_parents(count, random.Random(count))
    assert parents[0] == -1 and all(0 <= parent < index for index, parent in enumerate(parents) if index)
    for index, word in enumerate(cases_masks.tree_words(parents)):
        assert -(2**63) <= word < 2**63
        seen, ancestor = set(range(64 - count)), index
        while ancestor >= 0:
            seen.add(64 - count + ancestor)
            ancestor = parents[ancestor]
        assert {bit for bit in range(64) if word >> bit & 1} == seen


def test_trees_branch_and_differ() -> None:
    case = TreeCase(4, 8192, 32, 8, 128, 64, 64)
    parents = cases_masks.tree_parents(64, random.Random(0))
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    assert [depths.count(depth) for depth in range(max(depths) + 1)] == [1, *[8] * 7, 7]
    assert len(set(case.words)) == case.batch
    chain = cases_masks.tree_words([*range(-1, 63)])
    assert chain[-1] == -1 and case._replace(chain=True).words == (chain,) * 4
    causal = torch.tensor(chain)[:, None] >> torch.arange(64) & 1
    assert torch.equal(causal.bool(), torch.ones(64, 64).tril().bool())


# --- what is asked, and what is wrong --------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What a call has of a mask."""

    ranges: bool
    in_window: bool
    tree: bool
    by_sequence: bool


def _watch(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any] | None = None) -> list[Asked]:
    """Note what the attention functions are asked for; ``change``: other values of the arguments that they get."""
    asked: list[Asked] = []

    def watched(right: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            given = (options.get("query_ranges") is not None, options.get("ranges_in_window", False))
            by_sequence = isinstance(options["causal"], Tensor)
            asked.append(Asked(*given, options.get("tree_mask") is not None, by_sequence))
            options |= {name: value for name, value in (change or {}).items() if name in options}
            return right(*arguments, **options)

        return call

    for name in FUNCTIONS:
        monkeypatch.setattr(broadhead, name, watched(getattr(broadhead, name)))
    return asked


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_the_baseline_is_the_same_call_without_the_mask(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _watch(monkeypatch)
    task = measure.task_of(case, CPU)
    with_mask, without = (task.prepare(peer) for peer in (broadhead_api.Broadhead(), broadhead_api.Baseline()))
    assert max(with_mask.error, without.error) <= task.max_error
    images, halves = isinstance(case, (ImagesCase, ChunkCase)), isinstance(case, CausalityCase)
    expected = Asked(images, getattr(case, "in_window", False), isinstance(case, TreeCase), halves)
    assert asked == [expected, *[Asked(False, False, False, False)] * (2 if halves else 1)]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"query_ranges": None, "ranges_in_window": False}, (ImagesCase, ChunkCase)),
        ({"ranges_in_window": False}, ImagesCase),
        ({"tree_mask": None}, TreeCase),
        ({"causal": True}, CausalityCase),
        ({"causal": False}, (ImagesCase, ChunkCase, TreeCase, CausalityCase)),
    ],
)
def test_a_mask_that_is_forgotten_shows(change: dict[str, Any], wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In outputs as in gradients, of rows inside and outside of images."""
    _watch(monkeypatch, change)
    for case in TINY:
        if not isinstance(case, wrong) or (change == {"ranges_in_window": False} and not case.in_window):
            continue
        if change == {"causal": False} and isinstance(case, TreeCase):
            continue  # all keys in front of the last 64 are visible either way
        if change == {"causal": False} and isinstance(case, ImagesCase) and case.window is not None:
            continue  # the window has a right side of its own
        task = measure.task_of(case, CPU)
        assert not task.prepare(broadhead_api.Broadhead()).error <= task.max_error, case.name


def test_wrong_masks_post_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _watch(monkeypatch, {"query_ranges": None, "ranges_in_window": False, "tree_mask": None})
    out = tmp_path / "results.json"
    assert cli.main(["masks", "--quick", "--device", "cpu", "--budget", "0.001", "--out", str(out)]) == cli.BROKEN
    right = {(record["impl"], record["case"]) for record in json.loads(out.read_text())}
    both = {case.name for case in TINY if isinstance(case, CausalityCase)}
    assert right == {("baseline", case.name) for case in TINY} | {("broadhead", name) for name in both}
    assert "wrong result" in capsys.readouterr().out


def test_an_older_version_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(broadhead, "make_query_ranges")
    out = tmp_path / "results.json"
    assert cli.main(["masks", "--quick", "--device", "cpu", "--budget", "0.001", "--out", str(out)]) == cli.OK
    assert not out.exists()
    assert f"skip broadhead, {TINY[0].name}: this version of broadhead has no masks" in capsys.readouterr().out


def test_memory_and_head_starts_are_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "peak_bytes", lambda call, device: 7)
    for case in TINY:
        task = measure.task_of(case, CPU)
        task.on_gpu = True
        gradients = isinstance(case, ImagesCase) and case.direction != "fwd"
        assert task.prepare(broadhead_api.Broadhead()).peak_bytes == (7 if gradients else None)
        assert task.head_start == (1e-3 if gradients else 0.0)


@pytest.mark.parametrize(
    ("case", "value", "bar", "met"),
    [
        ("fwd S16384 H32 Hkv16 D256 window1024 images8x256", 110, "<= 1.1", True),
        ("bwd S16384 H32 Hkv4 D512 causal images8x256", 120, "", None),
        ("tree B16 q64 ctx8192 H32 Hkv8 D128 page64", 111, "<= 1.1", False),
        ("fwd B8 S4096 H32 Hkv8 D128 half causal", 90, "", None),
    ],
)
def test_masks_compare_by_time(case: str, value: float, bar: str, met: bool | None) -> None:
    """With the call without the mask, not with the fastest peer; below 1, the mask has saved time."""
    values = {"broadhead": value, "baseline": 100, "flex": 50}
    common = {"area": "masks", "case": case, "seconds": 1e-3}
    (row,) = summary.summarize([{**common, "impl": impl, "value": v} for impl, v in values.items()])
    assert (row.rival, row.ratio, row.bar, row.met) == ("baseline", pytest.approx(value / 100), bar, met)


# --- peers -----------------------------------------------------------------------------------------------------------

LAYER = IMAGES._replace(seqlen=200, window=30, image_tokens=60)


@pytest.mark.parametrize("case", [LAYER, LAYER._replace(in_window=True), LAYER._replace(window=None)])
def test_flex_computes_the_case(case: ImagesCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled, which torch can do on a CPU for the forward pass."""
    compiled: list[Any] = []
    peer = torch_flex.Flex()
    monkeypatch.setattr(peer, "_compile", lambda: compiled.append(1) or flex_attention.flex_attention)
    assert peer.why_unavailable(CPU) is not None
    task = measure.task_of(case, CPU)
    for _ in range(2):
        assert task.prepare(peer).error <= task.max_error
    assert compiled == [1], "once"
    with pytest.raises(base.Skip, match="head_dim 256"):
        peer.images(case._replace(head_dim=512), task.inputs)


class Blocks(NamedTuple):
    """FlashAttention-4's type, as far as it is used."""

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int]

    def dense(self, columns: int) -> tuple[Tensor, Tensor]:
        """Which blocks are partly visible, and which fully, ``(rows, columns)``."""
        found = []
        for counts, indices in ((self.mask_block_cnt, self.mask_block_idx), (self.full_block_cnt, self.full_block_idx)):
            assert counts.dtype == indices.dtype == torch.int32
            blocks = torch.zeros(counts.shape[-1], columns, dtype=torch.bool)
            for row, count in enumerate(counts[0, 0].tolist()):
                blocks[row, indices[0, 0, row, :count].long()] = True
            found.append(blocks)
        return found[0], found[1]


def _fa4(case: ImagesCase, monkeypatch: pytest.MonkeyPatch) -> flash_attention.FlashAttention4:
    """A stand-in that computes what its arguments say, and looks at the blocks."""
    positions = torch.arange(case.seqlen)
    seen = accuracy_masks.images_mask(case).visible(positions, positions)
    rows, columns = flash_attention.FA4_BLOCK_SIZE

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask_mod: int,
        aux_tensors: list[Tensor],
        block_sparse_tensors: Blocks,
        block_sparse_tensors_bwd: Blocks,
    ) -> tuple[Tensor, None]:
        padded = torch.nn.functional.pad(seen, (0, -case.seqlen % columns, 0, -case.seqlen % rows))
        tiles = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        some, every = tiles.any(dim=(1, 3)), tiles.all(dim=(1, 3))
        for found, transposed in ((block_sparse_tensors, False), (block_sparse_tensors_bwd, True)):
            assert found.block_size == (rows, columns)
            partly, fully = found.dense(some.shape[0 if transposed else 1])
            assert torch.equal(partly | fully, some.T if transposed else some)
            assert not (fully & ~(every.T if transposed else every)).any()
        ranges = torch.stack(aux_tensors, dim=-1)[None]
        window = (mask_mod - 1, 0) if case.window else (-1, 0)
        return broadhead.flash_attn_func(q, k, v, causal=True, window_size=window, query_ranges=ranges), None

    peer = flash_attention.FlashAttention4()
    peer._module = SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setattr(peer, "_mask_tools", lambda window: (window, Blocks))
    return peer


@pytest.mark.parametrize("direction", ["fwd", "bwd", "fwd+bwd"])
@pytest.mark.parametrize("case", [LAYER, LAYER._replace(in_window=True), LAYER._replace(window=None)])
def test_fa4_computes_the_case(case: ImagesCase, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = measure.task_of(case._replace(direction=direction), CPU)
    assert task.prepare(_fa4(case, monkeypatch)).error <= task.max_error


def test_fa4_without_mask_functions_is_skipped() -> None:
    peer = flash_attention.FlashAttention4()
    peer._module = SimpleNamespace(flash_attn_func=lambda q, k, v, causal: q)
    with pytest.raises(base.Skip, match="no mask_mod"):
        measure.task_of(LAYER, CPU).prepare(peer)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_peers_say_what_they_lack(case: Any) -> None:
    with pytest.raises(base.Skip):
        measure.task_of(case, CPU).prepare(base.Peer())
    assert "masks" not in base.Peer.areas
    assert accuracy.MAX_ERROR["masks"] == 1e-2 and case in cases.cases_of("masks", on_cpu=True)
