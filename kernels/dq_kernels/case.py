"""One kernel configuration to compile with no GPU, and what its machine code must look like: the seam of offline.py.

A kernel module lists what it ships in ``offline_cases() -> list[Case]``; ``dq_kernels.offline`` compiles and judges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One launch of one kernel.

    ``types``: triton type of every argument that is not a constexpr ("*bf16", "i32"). ``aligned``: integer arguments
    that every launch passes as multiples of 16 (pointers always are). ``mma``: for an arch, the matrix instruction that
    must appear ("HGMMA", "HMMA"). ``async_copies``: 16-byte asynchronous copies must appear. ``no_i2f``: no conversion
    from integer may. ``max_int_ops``: for an arch, the most LOP3, SHF, PRMT and I2F instructions per weight that the
    innermost loop around a matrix instruction may hold; ``weights_per_thread``: weights a thread decodes in one pass of
    that loop.
    """

    label: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    archs: tuple[int, ...] = (80, 90)
    aligned: tuple[str, ...] = ()
    mma: Mapping[int, str] = field(default_factory=dict)
    async_copies: bool = False
    no_i2f: bool = False
    weights_per_thread: int = 0
    max_int_ops: Mapping[int, float] = field(default_factory=dict)
