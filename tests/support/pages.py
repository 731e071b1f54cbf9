"""The pages of the documentation, taken apart."""

from __future__ import annotations

import linecache
import re
from pathlib import Path
from typing import NamedTuple


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def tables_of(path: Path) -> list[list[list[str]]]:
    """The tables of a page as rows of cells, the line of dashes among them."""
    tables: list[list[list[str]]] = [[]]
    for line in without_code(path.read_text(encoding="utf-8")).splitlines():
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.rstrip()[1:-1])])
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


class Block(NamedTuple):
    """A fenced block of a page: what stands behind the fence, and the text."""

    info: str
    text: str


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [Block(*found) for found in re.findall(r"^```([^\n`]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


class Page:
    """The Python blocks of a page, which run one after the other in one scope."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0
        self.scope: dict[str, object] = {"__name__": "__example__"}

    def run(self, block: Block) -> None:
        name = f"{self.name}, block {self.count}"
        self.count += 1
        # torch.compile and tracebacks read the source of what they meet.
        linecache.cache[name] = (len(block.text), None, block.text.splitlines(keepends=True), name)
        exec(compile(block.text, name, "exec"), self.scope)
