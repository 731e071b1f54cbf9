"""Compute capabilities: the shared memory that each has, and which machine code runs on it.

Like the table (``support.py``) this imports nothing outside the standard library.
"""

from __future__ import annotations

#: Bytes of shared memory one block may use, by device class (CUDA C++ Programming Guide, technical specifications).
SMEM_99KB = 99 * 1024  # 8.6, 8.9, 12.0
SMEM_163KB = 163 * 1024  # 8.0
SMEM_227KB = 227 * 1024  # 9.0, 10.0, 10.3

#: What a device of each known compute capability offers a block. Unknown capabilities have no row.
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
#: Capabilities with at least 163 KB / 227 KB of shared memory a block.
LARGE_SMEM = tuple(c for c, size in SMEM_BY_CAPABILITY.items() if size >= SMEM_163KB)
HUGE_SMEM = tuple(c for c, size in SMEM_BY_CAPABILITY.items() if size >= SMEM_227KB)
#: Capabilities whose kernels ptxas compiles as it does for 8.0.
BEFORE_SM100 = tuple(c for c in CAPABILITIES if c < (10, 0))
#: All but 10.x, whose kernels take the most registers.
BESIDE_SM100 = tuple(c for c in CAPABILITIES if c[0] != 10)


def arch_covers(arch: str, capability: tuple[int, int]) -> bool:
    """Whether machine code of ``arch`` ("80", "90a", "100f-real") runs on ``capability``.

    Plain targets run on the same major and an equal or higher minor; "a" targets on exactly their own; "f" targets like
    plain ones (CUDA C++ Programming Guide, "Binary Compatibility" and "Family-Specific Features").
    """
    name = arch.removesuffix("-real")
    digits = name.rstrip("af")
    major, minor = int(digits[:-1]), int(digits[-1])
    if name.endswith("a"):
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


def arch_for(capability: tuple[int, int]) -> str:
    """The arch target to build for a capability."""
    major, minor = capability
    return f"{major}{minor}a" if major == 9 else f"{major}{minor}"
