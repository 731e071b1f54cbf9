"""Puts a local version label ("0.1.0" -> "0.1.0+cu130") into a built wheel or into prepared metadata.

Wheels of several CUDA versions must differ in name, and the version in pyproject.toml stays the one of the source.
``version_label.py cu130 WHEEL...`` labels built wheels in place.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import sys
import zipfile
from pathlib import Path

VARIABLE = "BROADHEAD_VERSION_LABEL"


def checked_label(label: str, source: str) -> str:
    """`label`, if it is one; `source` says in an error where it came from."""
    if not re.fullmatch(r"[a-z0-9]+(\.[a-z0-9]+)*", label):
        raise SystemExit(f'{source}="{label}" is no version label; accepted: letters a-z and digits, for example cu130')
    return label


def wanted_label() -> str:
    """The label that the environment asks for, or an empty string."""
    label = os.environ.get(VARIABLE, "")
    return checked_label(label, VARIABLE) if label else ""


def label_metadata(text: str, label: str) -> str:
    """METADATA with the label at its version; other fields, the description too, stay as they are."""
    head, separator, body = text.partition("\n\n")
    head, count = re.subn(r"^(Version: [^+\s]+)$", rf"\g<1>+{label}", head, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"METADATA has {count} lines with a version that takes a label, expected 1")
    return head + separator + body


def label_name(name: str, label: str) -> str:
    """ "broadhead-0.1.0.dist-info" or a wheel's file name, with the label behind the version."""
    return re.sub(r"^([^-]+-[^-+]+?)(?=-|\.dist-info)", rf"\g<1>+{label}", name, count=1)


def label_directory(parent: Path, dist_info: str, label: str) -> str:
    """Labels prepared metadata in place; returns the new name of its directory."""
    named = label_name(dist_info, label)
    (parent / dist_info).rename(parent / named)
    metadata = parent / named / "METADATA"
    metadata.write_text(label_metadata(metadata.read_text(encoding="utf-8"), label), encoding="utf-8")
    return named


def label_wheel(wheel: Path, label: str) -> str:
    """Replaces `wheel` by a labelled one beside it; returns its file name."""
    target = wheel.with_name(label_name(wheel.name, label))
    rows: list[tuple[str, str, str]] = []
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as out:
        infos = source.infolist()
        # RECORD lists the files, so it is written last.
        (record,) = (info for info in infos if info.filename.endswith(".dist-info/RECORD"))
        old = record.filename.split("/")[0]
        new = label_name(old, label)
        for info in infos:
            if info is record:
                continue
            data = source.read(info)
            if info.filename == f"{old}/METADATA":
                data = label_metadata(data.decode(), label).encode()
            if info.filename.startswith(f"{old}/"):
                info.filename = f"{new}/{info.filename.removeprefix(f'{old}/')}"
            out.writestr(info, data)
            if not info.is_dir():
                digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                rows.append((info.filename, f"sha256={digest}", str(len(data))))
        record.filename = f"{new}/RECORD"
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([*rows, (record.filename, "", "")])
        out.writestr(record, text.getvalue())
    wheel.unlink()
    return target.name


if __name__ == "__main__":
    for argument in sys.argv[2:]:
        label_wheel(Path(argument), checked_label(sys.argv[1], "version_label.py: the label"))
