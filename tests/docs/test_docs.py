"""The documentation holds: links lead to files, tables have one shape, examples run, numbers are of the results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.attention
from pages import Page, blocks_of, tables_of, without_code

ROOT = Path(__file__).resolve().parents[2]
#: Sphinx copies pages of the repository to docs/_repository.
GUIDES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_repository" not in path.parts)
PAGES = sorted([*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CODE_OF_CONDUCT")), *GUIDES])
#: Pages beside the code.
MAPS = [ROOT / name / "README.md" for name in ("benchmarks", "csrc", "csrc/decode", "packages")]
#: Its Python blocks run where torch has a registry of flash attention implementations.
TORCH_PAGE = "docs/torch.md"
#: Its blocks raise: test_troubleshooting.py.
ERRORS_PAGE = "docs/troubleshooting.md"
#: What may stand behind the fence of a block, so that no Python is left out by a slip.
FENCES = {"", "bash", "python", "python no-test", "sh", "text", "{eval-rst}", "{toctree}"}
#: Columns of the tables of numbers, and the names that the result files have for them.
COLUMNS = {
    "broadhead": "broadhead",
    "dense": "baseline",
    "no window": "baseline",
    "bf16": "baseline",
    "plain call": "baseline",
    "step alone": "baseline",
    "free schedule": "baseline",
    "FA2": "fa2",
    "FA3": "fa3",
    "FA4": "fa4",
    "FFPA": "ffpa",
    "FlexAttention": "flex",
    "FlashInfer": "flashinfer",
    "cuDNN": "cudnn",
    "memory-efficient": "memeff",
}


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors_of(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", without_code(path.read_text(encoding="utf-8")), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.strip().lower())
        found.add(words.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", [*PAGES, *MAPS], ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page_id(page)} links to {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors_of(path), f"{page_id(page)} links to {target}, which has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_tables_have_one_shape(page: Path) -> None:
    for table in tables_of(page):
        begin = f"{page_id(page)}: the table that begins with {' | '.join(table[0])}"
        assert len(table) > 1 and all(re.fullmatch(r":?-+:?", cell) for cell in table[1]), f"{begin} has no header"
        assert len({len(row) for row in table}) == 1, f"{begin} has rows of {sorted({len(row) for row in table})} cells"
        for row in table:
            assert all(len(cell) <= 400 for cell in row), f"{begin} has a cell of more than 400 characters: {row}"


def test_the_index_names_every_page() -> None:
    """Those who read it in the repository by a link, those who read the site in the bar at its side."""
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    trees = {line for block in blocks_of(ROOT / "docs/index.md") for line in block.text.splitlines()}
    for page in GUIDES:
        name = page.relative_to(ROOT / "docs").as_posix()
        if name != "index.md":
            assert f"({name})" in index, f"docs/index.md does not link to {name}"
            assert name.removesuffix(".md") in trees, f"docs/index.md has no toctree with {name}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def examples() -> list[str]:
    """The pages with Python blocks that run."""
    pages = [page for page in PAGES if any(block.info == "python" for block in blocks_of(page))]
    return [page_id(page) for page in pages if page_id(page) != ERRORS_PAGE]


@pytest.mark.parametrize("page", examples())
@pytest.mark.filterwarnings("ignore::broadhead.FallbackWarning")
def test_examples_run(page: str) -> None:
    if page == TORCH_PAGE and not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        pytest.skip(f"torch {torch.__version__} has no registry of flash attention")
    run = Page(page)
    for block in blocks_of(ROOT / page):
        if block.info == "python":
            run.run(block)


@pytest.mark.parametrize("page", [page for page in PAGES if page_id(page) != ERRORS_PAGE], ids=page_id)
def test_blocks_are_of_a_known_kind(page: Path) -> None:
    for block in blocks_of(page):
        assert block.info in FENCES, f"{page_id(page)} has a block of {block.info!r}:\n{block.text}"


def test_the_commands_of_explain_run() -> None:
    pytest.importorskip("typer", reason="the command needs typer and rich, of the extra demo")
    pytest.importorskip("rich", reason="the command needs typer and rich, of the extra demo")
    shell = [block.text for page in PAGES for block in blocks_of(page) if block.info == "sh"]
    commands = [line.split()[1:] for line in "".join(shell).splitlines() if line.startswith("broadhead explain")]
    assert commands
    for command in commands:
        result = subprocess.run([sys.executable, "-m", "broadhead", *command], capture_output=True, text=True)
        assert result.returncode == 0, f"broadhead {' '.join(command)}: {result.stderr}"


def results() -> dict[tuple[str, str], list[float]]:
    """The values of each case and implementation, over all result files."""
    found: dict[tuple[str, str], list[float]] = {}
    for path in sorted((ROOT / "benchmarks/results").glob("*.json")):
        for record in json.loads(path.read_text(encoding="utf-8")):
            if record["value"] is not None:
                found.setdefault((record["case"], record["impl"]), []).append(record["value"])
    return found


def is_rounded(text: str, value: float) -> bool:
    digits = len(text.partition(".")[2])
    return f"{value:.{digits}f}" == text


@pytest.mark.parametrize("page", ["docs/performance.md"])
def test_numbers_are_those_of_the_results(page: str) -> None:
    """In tables whose first column holds cases of the benchmarks; a footnote may stand behind a number."""
    known, checked = results(), 0
    for table in tables_of(ROOT / page):
        if table[0][0] != "case":
            continue
        for row in table[2:]:
            case = row[0].strip("`")
            for column, cell in zip(table[0][1:], row[1:], strict=True):
                impl = COLUMNS.get(re.sub(r"\W*\[\^\w+\]$", "", column).strip())
                number = re.sub(r"\[\^\w+\]", "", cell).strip("* ")
                if impl is None or not re.fullmatch(r"[\d.]+", number):
                    continue
                values = known.get((case, impl), [])
                assert any(is_rounded(number, value) for value in values), f"{case}, {column}: {number} of {values}"
                checked += 1
    assert checked > 100


def test_the_readme_has_six_numbers_of_the_results() -> None:
    """Each row: case, ratios, the numbers that they are ratios of (broadhead's first), the file."""
    (table,) = (table for table in tables_of(ROOT / "README.md") if "result file" in table[0])
    rows = table[2:]
    assert len(rows) == 6
    for _, ratios, numbers, link in rows:
        (target,) = re.findall(r"\(([^)]+\.json)\)", link)
        values = [r["value"] for r in json.loads((ROOT / target).read_text(encoding="utf-8")) if r["value"] is not None]
        measured = re.findall(r"[\d.]+", numbers)
        for number in measured:
            assert any(is_rounded(number, value) for value in values), f"{target} has no {number}"
        ours, *peers = (float(number) for number in measured)
        claimed = [float(ratio) for ratio in re.findall(r"([\d.]+) of", ratios)]
        found = sorted(peer / ours if numbers.endswith(" us") else ours / peer for peer in peers)
        assert claimed == pytest.approx(found, abs=0.05 if numbers.endswith(" us") else 0.006), ratios


def test_the_glossary_has_the_terms_of_the_page_for_newcomers() -> None:
    page = without_code((ROOT / "docs/kernels.md").read_text(encoding="utf-8"))
    glossary = (ROOT / "docs/glossary.md").read_text(encoding="utf-8").lower()
    defined = set(re.findall(r"^- \*\*(.+?)\*\*", glossary, re.MULTILINE))
    defined |= {part for term in defined for part in re.split(r", | and ", term)}
    for term in re.findall(r"\*\*(.+?)\*\*", page):
        assert {term.lower(), term.lower().removesuffix("s")} & defined, f"docs/glossary.md does not define {term}"
