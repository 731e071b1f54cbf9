"""Result files: JSON lists of records. Nothing here needs broadhead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a result file; none if there is no such file.

    Raises:
        ValueError: the file holds something else than a list of records.
    """
    if not path.exists() or path.stat().st_size == 0:
        return []
    try:
        records = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a JSON file: {error}; give another --out") from error
    if not isinstance(records, list) or not all(isinstance(r, dict) and "case" in r for r in records):
        raise ValueError(f"{path} does not hold a list of benchmark records; give another --out")
    return records


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Write a result file in one step, so that an interrupted run leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(records, indent=1) + "\n")
    partial.replace(path)
