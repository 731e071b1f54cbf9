"""The decode cases of the benchmarks: lengths, bytes, inputs, and that what is wrong posts no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import broadhead
import pytest
import torch
from broadhead.reference import append
from broadhead.reference.append import apply_rotary
from broadhead_bench import accuracy, bars, cases, cases_decode, cli, inputs_decode, measure, summary
from broadhead_bench.peers import broadhead_api
from torch import Tensor

CPU = torch.device("cpu")
STEP = cases.DecodeCase(3, 70, 4, 2, 16, 16)
MIXED = STEP._replace(lengths=(70, 5, 33))
CASCADE = cases.CascadeCase(3, 48, 20, 4, 2, 16, 16)


def test_names() -> None:
    names = {area: [case.name for case in cases.cases_of(area)] for area in cases_decode.DECODE_AREAS}
    assert "dec B64 ctx8192 H16 Hkv2 D256 page1" in names["decode-pages"]
    assert "dec B16 q8 ctx8192 H32 Hkv4 D512 page64" in names["decode-mtp"]
    assert "dec B1 ctx65536 H16 Hkv2 D256 page64 e4m3" in names["decode-fp8"]
    assert "dec B64 ctx8192 H16 Hkv1 D576/512 page64" in names["decode-mla"]
    assert "dec B128 ctx8192 H8 Hkv1 D128 page64 split4096" in names["decode-invariant"]
    assert "cascade B16 prefix8192+1024 H32 Hkv8 D128 page64" in names["cascade"]
    assert "append B16 ctx8192 H32 Hkv8 D128 page64" in names["append"]
    assert "dec B1 ctx1024 H32 Hkv4 D512 page64" in names["latency"]
    assert all(bars.head_dim(name) in (128, 256, 512, 576) for of_area in names.values() for name in of_area)


def test_every_area_runs_alone_and_together(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    arguments = ["--quick", "--device", "cpu", "--budget", "0.001", "--case", "D64", "--out", str(out)]
    assert cli.main(["decode-all", "decode", *arguments]) == cli.OK
    areas = [r["area"] for r in json.loads(out.read_text())]
    assert list(dict.fromkeys(areas)) == list(cases_decode.DECODE_AREAS)  # none twice; the host's cases are not D64


@pytest.mark.parametrize("on_cpu", [False, True])
def test_mixed_lengths_have_a_uniform_twin(on_cpu: bool) -> None:
    pairs = cases.cases_of("decode-mixed", on_cpu)
    for mixed, uniform in zip(pairs[::2], pairs[1::2], strict=True):
        assert isinstance(mixed, cases.DecodeCase)
        assert isinstance(uniform, cases.DecodeCase)
        assert len(mixed.lengths) == mixed.batch
        assert mixed.context == max(mixed.lengths)
        assert mixed._replace(context=uniform.context, lengths=()) == uniform
        assert abs(mixed.tokens - uniform.tokens) <= mixed.batch / 2
        assert mixed.kv_bytes == 4 * sum(mixed.lengths) * mixed.num_heads_kv * mixed.head_dim
    lengths = cases_decode.uniform_lengths(128, 32768)
    assert lengths == cases_decode.uniform_lengths(128, 32768)
    assert lengths != cases_decode.uniform_lengths(128, 32768, seed=1)
    assert min(lengths) >= 1
    assert max(lengths) <= 32768
    assert 32 <= sum(length < 16384 for length in lengths) <= 96


def test_bytes() -> None:
    step = cases.DecodeCase(16, 8192, 32, 8, 128, 64)
    assert step.kv_bytes == 16 * 8192 * 8 * 128 * 2 * 2
    assert step.pages_per_sequence == 128
    assert step._replace(seqlen_q=8).kv_bytes == step.kv_bytes
    assert step._replace(cache="e4m3").kv_bytes == step.kv_bytes / 2
    mla = cases.DecodeCase(64, 8192, 16, 1, 576, 64, "decode-mla", head_dim_v=512)
    assert mla.kv_bytes == 64 * 8192 * 576 * 2
    shared = cases.CascadeCase(16, 8192, 1024, 32, 8, 128, 64)
    assert shared.kv_bytes == (8192 + 16 * 1024) * 8 * 128 * 2 * 2
    assert shared.plain.kv_bytes == 16 * 9216 * 8 * 128 * 2 * 2
    largest = max(case.kv_bytes for case in cases.cases_of("decode-mixed"))  # type: ignore[union-attr]
    assert largest < 20 << 30


@pytest.mark.parametrize("case", [STEP, MIXED, MIXED._replace(page_size=1)])
@pytest.mark.parametrize("shared", [False, True])
def test_sets_are_scattered_over_one_pool(
    case: cases.DecodeCase, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_decode, "set_count", lambda kv_bytes, device: 3)
    monkeypatch.setattr(inputs_decode, "SHARED_POOL_BYTES", 0 if shared else 1 << 40)
    sets = inputs_decode.decode_sets(case, CPU)
    needed = sum(-(-length // case.page_size) for length in case.seqlens)
    assert len(sets) == 3
    everywhere = []
    for each in sets:
        assert each.k_cache is sets[0].k_cache
        counts, indices = each.used_pages()
        assert counts.tolist() == [-(-length // case.page_size) for length in case.seqlens]
        assert len(set(indices.tolist())) == needed
        start = 0
        for row, count in zip(each.page_table, counts.tolist()):
            assert row[:count].tolist() == indices[start : start + count].tolist()
            start += count
        everywhere += indices.tolist()
        assert each.cache_seqlens.tolist() == list(case.seqlens)
    assert each.k_cache.shape[0] == needed * (1 if shared else 3)
    assert sorted(everywhere) == sorted([*range(needed)] * 3 if shared else range(3 * needed))
    assert not torch.equal(sets[0].page_table, sets[1].page_table)


def test_sets_outgrow_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_decode.timing, "l2_bytes", lambda device: 50 << 20)
    for area in cases_decode.DECODE_AREAS:
        for case in cases.cases_of(area):
            assert isinstance(case, (cases.DecodeCase, cases.CascadeCase))
            count = inputs_decode.set_count(case.kv_bytes, torch.device("cuda"))
            assert count >= 2
            assert count * case.kv_bytes >= 4 * (50 << 20)
            assert inputs_decode.set_count(case.kv_bytes, CPU) == 1


def test_error_sees_one_wrong_sequence() -> None:
    """Of a long sequence as of a short one, whose output is larger; and a wrong mask over several queries."""
    case = MIXED._replace(lengths=(2000, 3, 1500), context=2000, seqlen_q=2)
    (inputs,) = inputs_decode.decode_sets(case, CPU)
    reference = accuracy.PagedReference(case, inputs)
    q, k_cache, v_cache, page_table, cache_seqlens = inputs

    def attend(causal: bool) -> Tensor:
        return broadhead.flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=cache_seqlens, page_table=page_table, causal=causal
        )

    out = attend(causal=True)
    limit = accuracy.MAX_ERROR["decode-mixed"]
    assert reference.error(out) <= limit
    for index in range(case.batch):
        wrong = out.clone()
        wrong[index] *= 1.05
        assert reference.error(wrong) > limit
    assert reference.error(attend(causal=False)) > limit
    out[1, 0, 0, 0] = float("nan")
    assert not reference.error(out) <= limit


def test_e4m3_inputs_are_the_same_numbers() -> None:
    (inputs,) = inputs_decode.fp8_decode_sets(STEP._replace(cache="e4m3"), CPU)
    narrow = (inputs.q, inputs.paged.k_cache, inputs.paged.v_cache)
    wide = (inputs.wide.q, inputs.wide.k_cache, inputs.wide.v_cache)
    scales = (inputs.q_descale, inputs.k_descale, inputs.v_descale)
    for values, same, descale in zip(narrow, wide, scales, strict=True):
        assert values.dtype == torch.float8_e4m3fn
        assert descale.shape == (STEP.batch, STEP.num_heads_kv)
        assert torch.equal(values.float() * descale[0, 0], same.float())
        # Six standard errors of the deviation of so many normal numbers.
        assert abs(same.float().std() - 1) < 6 / (2 * same.numel()) ** 0.5
        assert values.float().abs().max() < 448  # nothing was cut off
    assert inputs.k_descale[0, 0] != inputs.v_descale[0, 0]
    assert torch.equal(inputs.paged.q, inputs.wide.q)


def test_latent_inputs_are_views_of_one_cache() -> None:
    """And the same numbers as q and the cache whole, whose V is the first columns."""
    case = STEP._replace(area="decode-mla", num_heads_kv=1, head_dim=24, head_dim_v=16)
    (inputs,) = inputs_decode.latent_sets(case, CPU)
    whole = inputs.paged
    for part in (inputs.rope, inputs.latent, whole.v_cache):
        assert part.untyped_storage().data_ptr() == whole.k_cache.untyped_storage().data_ptr()
    assert torch.equal(torch.cat((inputs.latent, inputs.rope), dim=-1), whole.k_cache)
    assert torch.equal(inputs.latent, whole.v_cache)
    assert torch.equal(torch.cat((inputs.q_latent, inputs.q_rope), dim=-1), whole.q)
    assert (inputs.q_rope.shape[-1], inputs.q_latent.shape[-1]) == (8, 16)
    assert inputs.q_rope.is_contiguous()
    assert inputs.q_latent.is_contiguous()
    assert inputs.softmax_scale == 24**-0.5


def test_append_inputs() -> None:
    case = STEP._replace(area="append")
    (inputs,) = inputs_decode.append_sets(case, CPU)
    inputs.poison()
    assert inputs.paged.k_cache.isnan().any(dim=(1, 2, 3)).sum() == case.batch
    appended = inputs.appended()
    assert not appended.k_cache.isnan().any()
    position = torch.tensor(case.context - 1)
    expected = apply_rotary(inputs.k, inputs.cos, inputs.sin, position, interleaved=False)
    keys, values = appended.gathered(case.context)
    assert torch.equal(keys[:, -1], expected[:, 0])
    assert torch.equal(values[:, -1], inputs.v[:, 0])
    assert accuracy.relative_error(appended.q, inputs.paged.q) > 0.1
    assert accuracy.relative_error(appended.q.norm(dim=-1), inputs.paged.q.norm(dim=-1)) < 1e-2


def test_a_token_that_is_not_stored_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = broadhead_api.Broadhead()
    task = measure.task_of(STEP._replace(area="append"), CPU)
    assert task.prepare(peer).error <= accuracy.MAX_ERROR["append"]
    monkeypatch.setattr(append, "append", lambda *arguments, **options: None)
    assert not task.prepare(peer).error <= accuracy.MAX_ERROR["append"]


def test_invariant_mode_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of broadhead, not of its baseline, and alike for metadata and call."""
    asked: list[tuple[str, int]] = []

    def watched(name: str) -> Any:
        function = getattr(broadhead, name)

        def call(*arguments: Any, tokens_per_split: int = 0, **options: Any) -> Any:
            asked.append((name, tokens_per_split))
            return function(*arguments, **options)

        return call

    for name in ("flash_attn_with_kvcache", "get_scheduler_metadata"):
        monkeypatch.setattr(broadhead, name, watched(name))
    task = measure.task_of(STEP._replace(area="decode-invariant", tokens_per_split=64), CPU)
    for peer, tokens in ((broadhead_api.Broadhead(), 64), (broadhead_api.Baseline(), 0)):
        asked.clear()
        task.prepare(peer)
        assert asked == [("get_scheduler_metadata", tokens), ("flash_attn_with_kvcache", tokens)]


def _shared_prefix(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    prefix_page_table: Tensor,
    prefix_len: int,
    page_table: Tensor,
    cache_seqlens: Tensor,
) -> Tensor:
    """Attention over prefix and suffixes, each on its own."""
    rows = q.transpose(0, 1)  # the sequences' tokens as those of one sequence
    table = prefix_page_table[None]
    of_prefix = broadhead.flash_attn_with_kvcache(
        rows, k_cache, v_cache, cache_seqlens=prefix_len, page_table=table, return_softmax_lse=True
    )
    of_suffix = broadhead.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=cache_seqlens, page_table=page_table, return_softmax_lse=True
    )
    out, lse = (t.transpose(0, dim) for t, dim in zip(of_prefix, (1, 2), strict=True))
    return broadhead.merge_attn_states(out, lse, *of_suffix)[0]


@pytest.mark.parametrize(
    "reason, kernel", [("composed: over the prefix, behind row", "row (composed)"), ("row: the first", "row")]
)
def test_records_tell_how_a_prefix_ran(monkeypatch: pytest.MonkeyPatch, reason: str, kernel: str) -> None:
    monkeypatch.setattr(broadhead, "last_dispatch", lambda: ("cuda", "row", reason))
    assert broadhead_api.Broadhead().kernel() == kernel


def test_cascade_inputs_are_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of the documented arguments alone gives what the plain call gives."""
    monkeypatch.setattr(broadhead, "flash_attn_with_shared_prefix", _shared_prefix, raising=False)
    task = measure.task_of(CASCADE, CPU)
    for peer in (broadhead_api.Broadhead(), broadhead_api.Baseline()):
        assert task.prepare(peer).error <= accuracy.MAX_ERROR["cascade"]
    monkeypatch.setattr(
        broadhead, "flash_attn_with_shared_prefix", lambda *a, **k: _shared_prefix(*a, **{**k, "prefix_len": 47})
    )
    assert task.prepare(broadhead_api.Broadhead()).error > accuracy.MAX_ERROR["cascade"]


def test_steps_compare_by_time() -> None:
    """An e4m3 cache has half the bytes: three quarters of the time is a gain, though the rate is lower."""
    common = {"area": "decode-fp8", "case": "dec D128 e4m3"}
    results = [
        {**common, "impl": "broadhead", "value": 2800.0, "seconds": 75e-6},
        {**common, "impl": "baseline", "value": 4200.0, "seconds": 100e-6},
        {**common, "impl": "fa3", "value": 9000.0, "seconds": 10e-6},
    ]
    (row,) = summary.summarize(results)
    assert (row.rival, row.ratio) == ("baseline", pytest.approx(4 / 3))


def test_host_cases_measure_different_calls() -> None:
    peer = broadhead_api.Broadhead()
    results = {}
    for case in cases.cases_of("host"):
        assert isinstance(case, cases.HostCase)
        if isinstance(case.inner, cases.DecodeCase):
            case = case._replace(inner=STEP)
        prepared = measure.task_of(case, CPU).prepare(peer)
        assert prepared.error <= accuracy.MAX_ERROR["host"]
        results[case.kind] = prepared.calls[0]()
    assert results["plan"].dtype == torch.int32
    assert results["decode"].shape == results["append"].shape == (3, 1, 4, 16)
    assert results["dense"].shape == (1, 128, 8, 128)
