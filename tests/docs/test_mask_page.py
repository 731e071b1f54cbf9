"""The page of masks: its pictures are those of the reference and of the oracle, its table has every mask."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import broadhead
import oracle
import pytest
import torch
from broadhead import support
from broadhead.call.arguments import ARGUMENTS
from pages import tables_of

from scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
PAGE, DRAW = ROOT / "docs/masks.md", ROOT / "scripts/draw_masks.py"
#: Of each feature of the table of kernels the argument that asks for it, and what ends its type on the page.
FEATURES = {
    "causal": ("causal", "bool"),
    "causal_by_sequence": ("causal", "`(B,)`"),
    "window": ("window_size", ""),
    "attention_chunk": ("attention_chunk", ""),
    "prefix_lens": ("prefix_lens", ""),
    "query_ranges": ("query_ranges", ""),
    "tree_mask": ("tree_mask", ""),
}
#: Arguments that do not say which keys a query sees. A new argument is here or on the page.
NO_MASKS = {
    "q", "k", "v", "qv", "out", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q",
    "max_seqlen_k", "page_table", "kv_batch_idx", "leftpad_k", "q_descale", "k_descale", "v_descale", "softmax_scale",
    "softcap", "scheduler_metadata", "num_splits", "pack_gqa", "sm_margin", "sinks", "backend", "tokens_per_split",
}  # fmt: skip


draw_masks = load_script(DRAW)


def table() -> list[list[str]]:
    """The rows of the page's table of masks."""
    (found,) = (table for table in tables_of(PAGE) if table[0][0] == "argument")
    assert found[0] == [
        "argument", "type and shape", "rule for query i, at position p, and key j", "forward kernels",
        "backward kernels", "excludes",
    ]  # fmt: skip
    return found[2:]


def argument_of(row: list[str]) -> str:
    (name,) = re.findall(r"`(\w+)`", row[0])
    return name


def pictures(text: str) -> dict[str, list[str]]:
    """The lines of each picture of the page."""
    marked = re.findall(r"<!-- picture of (\w+):.*?-->\n```text\n(.*?)\n```\n<!-- end of picture -->", text, re.DOTALL)
    return {name: block.splitlines() for name, block in marked}


def parsed(lines: list[str], count: int) -> tuple[list[tuple[int, int]], list[list[str]]]:
    """Number and position of each query, and the rows of each of ``count`` panels."""
    rows = [line.split() for line in lines[1:]]
    assert all(len(row) == 2 + count and set("".join(row[2:])) <= {"#", "."} for row in rows)
    return [(int(row[0]), int(row[1])) for row in rows], [[row[2 + i] for row in rows] for i in range(count)]


def visible(panel: Any) -> torch.Tensor:
    """What the oracle shows of a panel, spelled from its arguments anew."""
    given, b = panel.arguments, panel.sequence
    causal = given.get("causal", False)
    causal = causal[b] if isinstance(causal, tuple) else causal
    left, right = given.get("window_size", (-1, -1))
    rule = oracle.Rule(
        1.0,
        window=(left, 0 if causal else right),
        chunk=given.get("attention_chunk", 0),
        prefix=given["prefix_lens"][b] if "prefix_lens" in given else None,
        ranges=given["query_ranges"][b] if "query_ranges" in given else None,
        ranges_in_window=given.get("ranges_in_window", False),
        tree=given["tree_mask"][b] if "tree_mask" in given else None,
    )
    return oracle.visible(panel.seqlen_q, panel.seqlen_k, rule, torch.device("cpu"))


def test_the_pictures_are_those_of_the_reference() -> None:
    result = subprocess.run([sys.executable, str(DRAW), str(PAGE), "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", draw_masks.PICTURES)
def test_the_pictures_are_those_of_the_oracle(name: str) -> None:
    panels = draw_masks.PICTURES[name]
    lines = pictures(PAGE.read_text(encoding="utf-8"))[name]
    labels, drawn = parsed(lines, len(panels))
    shift = panels[0].seqlen_k - panels[0].seqlen_q
    assert labels == [(i, i + shift) for i in range(panels[0].seqlen_q)]
    for panel, rows in zip(panels, drawn, strict=True):
        assert panel.caption in lines[0]
        assert [[key == "#" for key in row] for row in rows] == visible(panel).tolist(), panel.caption


@pytest.mark.parametrize("name", draw_masks.PICTURES)
def test_the_pictures_are_what_the_public_function_does(name: str) -> None:
    """With q = 0 each key that is seen has the same weight, and the values of the keys are rows of the identity."""
    for panel in draw_masks.PICTURES[name]:
        dtypes = {"prefix_lens": torch.int32, "query_ranges": torch.int32, "tree_mask": torch.int64}
        given = {key: torch.tensor(x, dtype=dtypes[key]) if key in dtypes else x for key, x in panel.arguments.items()}
        if isinstance(given.get("causal"), tuple):
            given["causal"] = torch.tensor(given["causal"])
        width = -(-panel.seqlen_k // 8) * 8
        batch = next((len(x) for x in given.values() if isinstance(x, torch.Tensor)), 1)
        q, k = torch.zeros(batch, panel.seqlen_q, 1, 8), torch.zeros(batch, panel.seqlen_k, 1, 8)
        v = torch.eye(panel.seqlen_k, width)[None, :, None].expand(batch, -1, -1, -1)
        out = broadhead.flash_attn_func(q, k, v, **given)[panel.sequence, :, 0, : panel.seqlen_k]
        assert (out > 0).tolist() == visible(panel).tolist(), panel.caption


def test_ranges_and_words_are_those_that_callers_make() -> None:
    spans = [(3, 7), (8, 11)]
    made = broadhead.make_query_ranges([spans], 8, 12)
    assert made.tolist() == [[list(pair) for pair in sequence] for sequence in draw_masks.IMAGES]
    assert f"make_query_ranges([{spans}], 8, 12)" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", draw_masks.PICTURES)
def test_a_wrong_picture_is_found(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One key of the last line is turned."""
    text = PAGE.read_text(encoding="utf-8")
    line = pictures(text)[name][-1]
    wrong = line[:-1] + ("." if line[-1] == "#" else "#")
    begin = text.index(f"<!-- picture of {name}:")
    page = tmp_path / "masks.md"
    page.write_text(text[:begin] + text[begin:].replace(line, wrong, 1), encoding="utf-8")
    assert draw_masks.update(page, check=True) == 1 and "out of date" in capsys.readouterr().err
    assert draw_masks.update(page, check=False) == 0 and page.read_text(encoding="utf-8") == text


def test_a_predicate_that_changed_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    mask = draw_masks.load_source("reference/mask.py")
    hidden = mask.KeyMask.hidden
    monkeypatch.setattr(mask.KeyMask, "hidden", lambda *arguments: _without_last(hidden(*arguments)))
    assert draw_masks.update(PAGE, check=True) == 1 and "out of date" in capsys.readouterr().err


def _without_last(hidden: torch.Tensor | None) -> torch.Tensor | None:
    """The last query sees the last key no more."""
    if hidden is None:
        return None
    hidden = hidden.clone()
    hidden[..., -1, -1] = True
    return hidden


@pytest.mark.parametrize("old, new", [("picture of causal:", "picture of nothing:"), ("picture of", "drawing of")])
def test_a_missing_picture_is_found(tmp_path: Path, old: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "masks.md"
    page.write_text(PAGE.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    assert draw_masks.update(page, check=False) == 1 and "causal" in capsys.readouterr().err


def test_the_table_has_every_mask() -> None:
    named = {argument_of(row) for row in table()}
    public = {"causal" if name == "causal_by_sequence" else name for name in ARGUMENTS}
    assert named == public - NO_MASKS, "docs/masks.md or NO_MASKS lacks an argument, or has one that is gone"
    assert set(FEATURES) == set(support.MASK_FEATURES)
    assert {*FEATURES, "window_size", "ranges_in_window"} - {"window"} <= set(draw_masks.PICTURES)


def test_the_table_says_which_kernels_have_a_mask() -> None:
    rows = table()
    for feature, (argument, kind) in FEATURES.items():
        (row,) = (row for row in rows if argument_of(row) == argument and row[1].endswith(kind))
        for direction, cell in (("forward", row[3]), ("backward", row[4])):
            has = {feature in kernel.features for kernel in support.ROWS if kernel.direction == direction}
            assert {"all": {True}, "none": {False}}[cell] == has, f"{feature}, {direction}"


def test_the_functions_take_the_masks_that_the_page_says() -> None:
    masks = {argument_of(row) for row in table()}
    for name in broadhead.__all__:
        if (name.startswith("flash_attn_") and name != "flash_attn_combine") or name in ("mha_fwd", "mha_bwd"):
            taken = masks & set(inspect.signature(getattr(broadhead, name)).parameters)
            lacking = {"mha_bwd": {"tree_mask"}, "flash_attn_with_shared_prefix": masks - {"causal"}}.get(name, set())
            assert masks - taken == lacking, name


def test_the_contract_has_the_same_masks() -> None:
    (contract,) = (t for t in tables_of(ROOT / "docs/contract.md") if t[0][:2] == ["argument", "value"])
    assert [argument_of(row) for row in contract[2:]] == [argument_of(row) for row in table()]


def test_every_mask_has_a_section_with_its_picture() -> None:
    """The link of a row leads to a heading, and the next picture draws its argument."""
    text = PAGE.read_text(encoding="utf-8")
    for row in table():
        (anchor,) = re.findall(r"\(#([\w-]+)\)", row[0])
        (section,) = (
            part for part in text.split("\n### ")[1:] if part.partition("\n")[0].lower().replace(" ", "-") == anchor
        )
        panels = [panel for name in pictures(section) for panel in draw_masks.PICTURES[name]]
        values = [panel.arguments[argument_of(row)] for panel in panels if argument_of(row) in panel.arguments]
        assert values, f"no picture of {row[0]}"
        if argument_of(row) == "causal":
            assert all(isinstance(value, bool) for value in values) == (row[1] == "bool"), row[0]
