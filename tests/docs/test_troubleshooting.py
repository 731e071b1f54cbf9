"""The page of troubleshooting: its blocks raise, print and warn what stands below them, and it knows every class."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import broadhead
import pytest
import torch
from broadhead import cli, errors
from broadhead.plan import native
from broadhead.run import fallback
from pages import Block, Page, blocks_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/troubleshooting.md"


def is_said(said: str, text: str) -> bool:
    """Whether the page's ``text``, in which "..." stands for anything, is what was said."""
    pattern = ".*".join(re.escape(part) for part in text.strip().split("..."))
    return re.fullmatch(pattern, said.strip(), re.DOTALL) is not None


def raised(page: Page, block: Block) -> str:
    try:
        page.run(block)
    except (broadhead.BroadheadError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    pytest.fail(f"this block of {page.name} raises nothing:\n{block.text}")


def texts() -> list[str]:
    return [block.text for block in blocks_of(PAGE) if block.info.startswith("text")]


def test_wildcards_stand_for_anything_and_nothing_else_does() -> None:
    assert is_said("a: b (c)", "a: ... (c)\n") and is_said("a: b", "a: b")
    assert not is_said("a: b (d)", "a: ... (c)") and not is_said("a: b!", "a: b") and not is_said("aXb", "a.b")


def test_blocks_say_what_stands_below_them(capsys: pytest.CaptureFixture[str]) -> None:
    page, blocks, compared = Page("docs/troubleshooting.md"), blocks_of(PAGE), 0
    for block, below in zip(blocks, [*blocks[1:], Block("", "")], strict=True):
        if block.info == "python":
            page.run(block)
        elif block.info in ("python raises", "python prints"):
            assert below.info in ("text", "text cpu"), f"nothing below:\n{block.text}"
            if block.info == "python raises":
                said = raised(page, block)
            else:
                page.run(block)
                said = capsys.readouterr().out
            if below.info == "text" or not native.build_description().families:  # what a CPU package says
                assert is_said(said, below.text), f"{block.text}says\n{said}\nand the page\n{below.text}"
                compared += 1
        else:
            assert block.info in ("text", "text cpu", "text torch", "text command"), (
                f"the test does not know blocks of {block.info!r}"
            )
    assert compared >= 20


def test_the_warnings_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "_warned", set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fallback.warn_fallback("flash_attn_func", "NVIDIA H200", "dtype fp32 has no CUDA kernel")
        native._note_missing_kernels()
    said = [f"{warning.category.__name__}: {warning.message}" for warning in caught]
    on_page = [text for text in texts() if text.startswith("FallbackWarning")]
    assert len(said) == len(on_page) == 2
    for text in on_page:
        assert any(is_said(warning, text) for warning in said), f"{said} and the page\n{text}"


def test_the_command_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def without_typer() -> None:
        raise ModuleNotFoundError("No module named 'typer'", name="typer")

    monkeypatch.setattr(cli, "build_app", without_typer)
    monkeypatch.setattr(sys, "argv", ["broadhead", "explain"])
    assert cli.main() == 2
    (on_page,) = (block.text for block in blocks_of(PAGE) if block.info == "text command")
    assert is_said(capsys.readouterr().err, on_page)


def test_the_page_knows_every_class() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, value in vars(errors).items():
        if isinstance(value, type) and value.__module__ == errors.__name__:
            assert f"`{name}`" in page or f"`broadhead.{name}`" in page, f"{PAGE.name} does not name {name}"
