"""The tables of levels that codes of 4 bits may be places in, ascending: those of dq_runtime/levels.py, which a test
compares (this package imports nothing from there)."""

from __future__ import annotations

import triton
import triton.language as tl

NF4 = tl.constexpr(
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    )
)  # fmt: skip
E2M1 = tl.constexpr((-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
# Form of a weight -> its table. Kernels know "int" and these names of tables.
TABLE_OF = {"int": "int", "nf4": "nf4", "fp4": "e2m1", "mxfp4": "e2m1", "nvfp4": "e2m1"}


@triton.jit
def level(code, TABLE: tl.constexpr):
    """The level of each code, float32: 16 selects, where no PTX looks it up."""
    LEVELS: tl.constexpr = NF4 if TABLE == "nf4" else E2M1
    found = tl.zeros_like(code).to(tl.float32)
    for i in tl.static_range(16):
        found = tl.where(code == i, LEVELS[i], found)
    return found
