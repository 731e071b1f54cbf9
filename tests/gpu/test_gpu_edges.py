"""Full GPU set: values out of range. Kernels and the reference on the same device obey one rule; nothing faults."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection

import broadhead
import pytest
import torch
from broadhead import support
from edge_calls import Shape, build, check
from edge_cases import BASE, GROUPS, MASKS, VALUE_MASKS, takes_values, with_values
from edge_rows import PATIENCE, run_edge, shape_of, suited, takes, wait
from gpu_calls import ROWS, TORCH_DTYPES, capture, row_id, value_masks_of
from random_edges import other_values, random_edge

pytestmark = [pytest.mark.gpu, pytest.mark.full]

each_row = pytest.mark.parametrize("row", ROWS, ids=row_id)
REPLAYS = 25
#: Runs of a kernel while another stream changes what it reads.
RACES = 40


@pytest.mark.parametrize("group", GROUPS)
@each_row
def test_row(
    row: support.KernelRow, group: str, only_row: Callable, row_ran: Callable, cuda: torch.device, rng: random.Random
) -> None:
    """The whole table on every row, each edge under two of the masks; rows that differ in dtype alone take others."""
    only_row(row)
    turn = ROWS.index(row)
    for index, base in enumerate(edge for edge in BASE if edge.group == group):
        for shift in (0, 2):
            mask = list(MASKS)[(turn + index + shift) % len(MASKS)]
            edge = suited(row, base.with_(name=f"{base.name}-{mask}", **MASKS[mask]))
            if takes(row, edge):
                run_edge(edge, shape_of(row, turn + index + shift, edge), cuda, rng)
                assert edge.rows_q == 0 or row_ran().id == row.id


@pytest.mark.parametrize("row", [row for row in ROWS if value_masks_of(row)], ids=row_id)
def test_row_values(
    row: support.KernelRow, only_row: Callable, row_ran: Callable, cuda: torch.device, rng: random.Random
) -> None:
    """Ranges, words and causality that are anything, in calls whose lengths and pages are, too."""
    only_row(row)
    turn, ran = ROWS.index(row), 0
    for index, base in enumerate(BASE):
        name = list(VALUE_MASKS)[(turn + index) % len(VALUE_MASKS)]
        edge = suited(row, with_values(base, name)) if takes_values(base, name) else base
        if edge is not base and takes(row, edge):
            run_edge(edge, shape_of(row, turn + index, edge), cuda, rng)
            assert edge.rows_q == 0 or row_ran().id == row.id
            ran += 1
    assert ran


@pytest.mark.parametrize("mask", VALUE_MASKS)
def test_reference_of_values(mask: str, cuda: torch.device, rng: random.Random) -> None:
    """The reference on this device, likewise."""
    shape = Shape(72, 136, heads_q=4, heads_kv=2, dtype=torch.bfloat16)
    for base in BASE:
        if takes_values(base, mask):
            run_edge(with_values(base, mask), shape, cuda, rng, backend="torch")
            assert base.rows_q == 0 or broadhead.last_dispatch()[0] == "torch"


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("base", BASE, ids=lambda edge: edge.name)
def test_reference(base, mask: str, cuda: torch.device, rng: random.Random) -> None:
    """The reference forced on this device: the same table, the same rule."""
    edge = base.with_(name=f"{base.name}-{mask}", **MASKS[mask])
    shape = Shape(72, 136, heads_q=4, heads_kv=2, dtype=torch.bfloat16)
    run_edge(edge, shape, cuda, rng, backend="torch")
    assert broadhead.last_dispatch()[0] == "torch"


@each_row
def test_replays(row: support.KernelRow, only_row: Callable, cuda: torch.device, rng: random.Random) -> None:
    """One captured call under lengths, offsets, page ids and indices that change in place and are out of range."""
    only_row(row)
    for turn in range(3):
        drawn = random_edge(rng, appends=False, packed_k=not row.kv_dtype, values=value_masks_of(row))
        edge = suited(row, drawn)
        if not takes(row, edge) or edge.rows_q == 0:
            continue
        call = build(edge, shape_of(row, turn, edge, everything=True), cuda, rng)
        results: list[tuple[torch.Tensor, torch.Tensor]] = []
        graph = capture(lambda call=call, results=results: results.append(call.run()))
        assert broadhead.last_dispatch()[1] == row.id
        for _ in range(REPLAYS):
            call.change(other_values(edge, rng))
            call.out_store.fill_(float("nan"))
            graph.replay()
            wait(cuda)
            check(call, *results[-1])


# --- values that change while a kernel runs ---------------------------------------------------------------------------

BATCH, COLUMNS, PAGE = 6, 160, 16
#: The sequences whose values change.
VICTIMS = (1, 4, 5)


class Racing:
    """A paged call of six sequences; ``disturb`` writes anything as the lengths, pages and offsets of three of them.

    q is 0, the values of a sequence that is left alone are a number of its own, and so must its output be.
    """

    def __init__(
        self, row: support.KernelRow, seqlen_q: int, packed: bool, cuda: torch.device, values: Collection[str] = ()
    ) -> None:
        dtype = TORCH_DTYPES[row.dtype]
        keys = TORCH_DTYPES[row.kv_dtype or row.dtype]
        pages = BATCH * COLUMNS
        generator = torch.Generator(cuda).manual_seed(0)
        order = torch.randperm(pages, device=cuda, generator=generator).view(BATCH, COLUMNS)
        self.table = order.int()
        k = torch.randn(pages, PAGE, 1, row.head_dim, device=cuda).to(keys)
        value = torch.empty(pages, device=cuda)
        value[order.flatten()] = torch.arange(1.0, BATCH + 1, device=cuda).repeat_interleave(COLUMNS)
        v = value.view(-1, 1, 1, 1).expand(-1, PAGE, 1, row.head_dim_v).to(keys).contiguous()
        self.lengths = torch.full((BATCH,), COLUMNS * PAGE - 3, dtype=torch.int32, device=cuda)
        self.heads, self.seqlen_q = 8, seqlen_q
        lead = (BATCH * seqlen_q,) if packed else (BATCH, seqlen_q)
        q = torch.zeros(*lead, self.heads, row.head_dim, device=cuda).to(dtype)
        self.kwargs = {"q": q, "k_cache": k, "v_cache": v, "cache_seqlens": self.lengths, "page_table": self.table}
        if "qv" in row.requires:
            self.kwargs["qv"] = torch.zeros(*lead, self.heads, row.head_dim_v, device=cuda).to(dtype)
        if "window" in row.requires:
            self.kwargs["window_size"] = (1 << 20, -1)
        if packed:
            offsets = torch.arange(0, BATCH * seqlen_q + 1, seqlen_q, dtype=torch.int32, device=cuda)
            self.kwargs |= {"cu_seqlens_q": offsets, "max_seqlen_q": seqlen_q}
        if "ranges" in values:  # each query sees all keys, be they ahead of it
            everything = torch.tensor([0, 2**31 - 1], dtype=torch.int32, device=cuda)
            self.kwargs |= {"causal": True, "query_ranges": everything.expand(*lead, 2).contiguous()}
        elif "causal_each" in values:
            self.kwargs["causal"] = torch.zeros(BATCH, dtype=torch.int32, device=cuda)
        elif "tree" in values:
            self.kwargs["tree_mask"] = torch.full(lead, -1, device=cuda)
        self.pristine = {name: x.clone() for name, x in self._changing().items()}
        wild = torch.tensor([0, 1, 700, 2560, 2561, 10**6, 2**31 - 1, -1, -(2**31)], dtype=torch.int32, device=cuda)
        choose = lambda *shape: wild[torch.randint(len(wild), shape, device=cuda)]  # noqa: E731
        self.wild_lengths = choose(64, len(VICTIMS))
        self.wild_tables = choose(64, len(VICTIMS), COLUMNS)
        self.wild_ends = choose(64, 1)
        self.wild_ranges = choose(64, seqlen_q, 2)
        self.wild_words = torch.randint(-(2**63), 2**63 - 1, (64, seqlen_q), device=cuda)
        self.victims = torch.tensor(VICTIMS, device=cuda)
        self.others = [b for b in range(BATCH) if b not in VICTIMS]

    def _changing(self) -> dict[str, torch.Tensor]:
        names = ("cache_seqlens", "page_table", "cu_seqlens_q", "query_ranges", "tree_mask", "causal")
        return {name: self.kwargs[name] for name in names if isinstance(self.kwargs.get(name), torch.Tensor)}

    def disturb(self, turn: int) -> None:
        """Overwrite the values of the victims; the last offset is the end of the last of them."""
        self.lengths.index_copy_(0, self.victims, self.wild_lengths[turn % 64])
        self.table.index_copy_(0, self.victims, self.wild_tables[turn % 64])
        if "cu_seqlens_q" in self.kwargs:
            self.kwargs["cu_seqlens_q"][-1:].copy_(self.wild_ends[turn % 64])
        changing = self._changing()
        for name, wild in (("query_ranges", self.wild_ranges), ("tree_mask", self.wild_words)):
            if name in changing:
                rows = changing[name].view(BATCH, *wild.shape[1:])
                rows.index_copy_(0, self.victims, wild[turn % 64].expand(len(VICTIMS), *wild.shape[1:]))
        if "causal" in changing:
            changing["causal"].index_copy_(0, self.victims, self.wild_lengths[turn % 64])

    def restore(self) -> None:
        for name, x in self._changing().items():
            x.copy_(self.pristine[name])

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        return broadhead.flash_attn_with_kvcache(**self.kwargs, num_splits=0, return_softmax_lse=True)

    def wrong(self, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """How many of the sequences left alone are wrong; without waiting."""
        rows = out.view(BATCH, self.seqlen_q, self.heads, -1).float()
        want = torch.arange(1.0, BATCH + 1, device=out.device).view(-1, 1, 1, 1)
        by_sequence = lse.view(self.heads, BATCH, -1).transpose(0, 1) if lse.dim() == 2 else lse
        count = (self.pristine["cache_seqlens"].float().log())[:, None, None]
        bad = ((rows - want).abs() > 1e-2 * want).flatten(1).any(dim=1) | rows.isnan().flatten(1).any(dim=1)
        bad |= ~((by_sequence - count).abs() < 1e-3).flatten(1).all(dim=1)
        return bad[self.others].sum()


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@each_row
def test_another_stream_changes_the_values(
    row: support.KernelRow, packed: bool, only_row: Callable, cuda: torch.device
) -> None:
    """No value makes a kernel fault or hang, also none that comes between two reads; sequences left alone are right.

    Decode is exempt: its CTAs share out the work by the lengths of all sequences, and may not read them at one time.
    """
    only_row(row)
    race(row, Racing(row, 4 if row.phase == "decode" else 70, packed, cuda), cuda)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("row", [row for row in ROWS if value_masks_of(row)], ids=row_id)
def test_another_stream_changes_the_masks(
    row: support.KernelRow, packed: bool, only_row: Callable, cuda: torch.device
) -> None:
    """Ranges, words and causality, too: what a kernel has found out about them beforehand may be wrong later."""
    only_row(row)
    for name in value_masks_of(row):
        race(row, Racing(row, 4 if row.phase == "decode" else 60, packed, cuda, (name,)), cuda)


def race(row: support.KernelRow, case: Racing, cuda: torch.device) -> None:
    assert int(case.wrong(*case.run())) == 0
    assert broadhead.last_dispatch()[1] == row.id
    side, wrong = torch.cuda.Stream(), torch.zeros((), dtype=torch.int64, device=cuda)
    with torch.cuda.stream(side):
        disturb = capture(lambda: [case.disturb(turn) for turn in range(64)])
    for _ in range(RACES):
        case.restore()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            disturb.replay()
        for _ in range(3):
            wrong += case.wrong(*case.run())
        torch.cuda.current_stream().wait_stream(side)
    wait(cuda)
    if row.phase != "decode":
        assert int(wrong) == 0, f"sequences that nobody touched are wrong ({int(wrong)} times), patience {PATIENCE} s"
    case.restore()
    assert int(case.wrong(*case.run())) == 0


# --- threads ----------------------------------------------------------------------------------------------------------


def test_two_threads_of_ten_thousand_kinds(cuda: torch.device) -> None:
    """Both threads make the same calls in another order: their look-ups and insertions meet, and every cache fills."""
    from threaded_calls import run_threads

    assert run_threads(cuda, kinds=10_000, threads=2, backend="cuda") == []
