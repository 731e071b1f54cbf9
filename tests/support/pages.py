"""The pages of the documentation, taken apart."""

from __future__ import annotations

import re
from pathlib import Path


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
