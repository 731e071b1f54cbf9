"""Compute capabilities: the shared memory that each has, and which machine code runs on it.

Like the table (``support.py``) this imports nothing outside the standard library.
"""

from __future__ import annotations

import functools

#: Bytes of shared memory one block may use, by device class (CUDA C++ Programming Guide, technical specifications).
SMEM_99KB = 99 * 1024  # 8.6, 8.9, 12.0
SMEM_163KB = 163 * 1024  # 8.0
SMEM_227KB = 227 * 1024  # 9.0, 10.0, 10.3

#: What a device of each known compute capability offers a block. Others run the rows that run on all of these.
SMEM_BY_CAPABILITY: dict[tuple[int, int], int] = {
    (8, 0): SMEM_163KB,
    (8, 6): SMEM_99KB,
    (8, 7): SMEM_163KB,
    (8, 9): SMEM_99KB,
    (9, 0): SMEM_227KB,
    (10, 0): SMEM_227KB,
    (10, 3): SMEM_227KB,
    (12, 0): SMEM_99KB,
    (12, 1): SMEM_99KB,
}

CAPABILITIES = tuple(SMEM_BY_CAPABILITY)
#: Capabilities of the devices on which kernels have been executed. For others they are compiled, never executed.
EXECUTED = ((9, 0),)
#: What ends an architecture of which a library holds PTX: a driver compiles it for newer devices.
PTX_SUFFIX = "-virtual"
#: Capabilities with at least 163 KB / 227 KB of shared memory a block.
LARGE_SMEM = tuple(c for c, size in SMEM_BY_CAPABILITY.items() if size >= SMEM_163KB)
HUGE_SMEM = tuple(c for c, size in SMEM_BY_CAPABILITY.items() if size >= SMEM_227KB)
#: Capabilities whose kernels ptxas compiles as it does for 8.0.
BEFORE_SM100 = tuple(c for c in CAPABILITIES if c < (10, 0))
#: All but 10.x, whose kernels take the most registers.
BESIDE_SM100 = tuple(c for c in CAPABILITIES if c[0] != 10)


def is_later(capability: tuple[int, int]) -> bool:
    """Whether the table does not know a capability that can run portable code: one newer than the oldest it knows."""
    return capability not in SMEM_BY_CAPABILITY and capability > CAPABILITIES[0]


def smem_of(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block may count on: what every capability since 8.0 has where it is unknown."""
    return SMEM_BY_CAPABILITY.get(capability, SMEM_99KB if is_later(capability) else 48 * 1024)


def is_ptx(arch: str) -> bool:
    """Whether an architecture names PTX ("103-virtual"), not machine code."""
    return arch.endswith(PTX_SUFFIX)


def capability_of(arch: str) -> tuple[int, int]:
    """The compute capability that an architecture ("90a", "100f-real", "103-virtual") is named after."""
    digits = arch.partition("-")[0].rstrip("af")
    return int(digits[:-1]), int(digits[-1])


@functools.lru_cache(maxsize=1024)  # a decision asks it of every row
def arch_covers(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code of ``arch`` ("80", "90a", "100f-real", "103-virtual") runs on ``capability``.

    Machine code of plain targets runs on the same major and an equal or higher minor; of "a" targets on exactly their
    own; of "f" targets like that of plain ones. PTX runs on its own capability and on every later one (CUDA C++
    Programming Guide, "Binary Compatibility", "PTX Compatibility" and "Family-Specific Features").
    """
    own = capability_of(arch)
    if is_ptx(arch):
        return capability >= own
    if arch.removesuffix("-real").endswith("a"):
        return capability == own
    return capability[0] == own[0] and capability[1] >= own[1]


def arch_for(capability: tuple[int, int]) -> str:
    """The arch target to build for a capability."""
    major, minor = capability
    return f"{major}{minor}a" if major == 9 else f"{major}{minor}"


def capability_text(capability: tuple[int, int]) -> str:
    """(9, 0) -> "9.0"."""
    return f"{capability[0]}.{capability[1]}"


def execution_note(capability: tuple[int, int]) -> str:
    """What a user must know about kernels on a capability where none has been executed; empty where some have."""
    if capability in EXECUTED:
        return ""
    executed = ", ".join(map(capability_text, EXECUTED))
    text = f"compiled, never executed: kernels have run on compute capability {executed} alone"
    if is_later(capability):
        text += f". The table does not know {capability_text(capability)}: the portable kernels within 99 KB serve it"
    return text
