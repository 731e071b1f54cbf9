"""Reads which code a kernel library holds, from its section .nv_fatbin: of any machine type, without loading it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

MAGIC = 0xBA55ED50
#: magic, version, bytes of the header, bytes of the entries behind it
HEADER = struct.Struct("<IHHQ")
#: kind, flags, bytes of the entry's header, bytes behind it; the architecture follows at byte 28
ENTRY = struct.Struct("<HHIQ")
ARCH_OFFSET = 28
PTX, CUBIN = 1, 2


class Code(NamedTuple):
    """One architecture's code of one source."""

    arch: int  # 90 for sm_90 and sm_90a
    is_ptx: bool


def sections(data: bytes) -> dict[str, bytes]:
    """The sections of a 64-bit little-endian ELF file."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("no 64-bit little-endian ELF file")
    (offset,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, offset + index * size) for index in range(count)]
    table = headers[names][4]
    found = {}
    for name, _, _, _, begin, length in headers:
        text = data[table + name : data.index(b"\0", table + name)].decode()
        found[text] = data[begin : begin + length]
    return found


def fatbins(data: bytes) -> list[list[Code]]:
    """The code of each fatbin, that is, of each source, in the section's bytes."""
    found = []
    at = 0
    while at + HEADER.size <= len(data):
        magic, _, header_size, size = HEADER.unpack_from(data, at)
        if magic != MAGIC:
            at += 8  # the linker fills up to the next aligned place
            continue
        codes = []
        entry, end = at + header_size, at + header_size + size
        while entry + ENTRY.size <= end:
            kind, _, entry_header, length = ENTRY.unpack_from(data, entry)
            (arch,) = struct.unpack_from("<I", data, entry + ARCH_OFFSET)
            if kind in (PTX, CUBIN):
                codes.append(Code(arch, kind == PTX))
            entry += entry_header + length
        found.append(codes)
        at = end
    return found


def library_code(path: Path) -> list[list[Code]]:
    """The code of each source that is linked into a library; none where it has no section for it."""
    return fatbins(sections(path.read_bytes()).get(".nv_fatbin", b""))
