"""The block formats of the 4-bit float e2m1: grids whose scales are floats of 8 bits themselves.

mxfp4  groups of 32, scale 2^(floor(log2(absmax)) - 2): e8m0, a power of two (OCP Microscaling Formats v1.0, section
       6.3). A group's largest weight lies in [4, 8) steps, and what is above 6 saturates.
nvfp4  groups of 16, scale = e4m3(absmax / 6 * 2^p) * 2^-p with one p a tensor. The format has one float32 a tensor in
       that place; a power of two loses less than one of e4m3's 18 octaves, makes every scale exact in bfloat16, and
       lets layers that an engine multiplies as one matrix share it without rounding again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.grids.table_grid import TableGrid
from dq_runtime.levels import LARGEST_E4M3, e4m3_shift

E8M0 = (2.0**-126, 2.0**127)  # its 2^-127 is below what bfloat16 holds without denormals
SMALLEST_E4M3 = 2.0**-9
# 2^-9 * 2^-p and 448 * 2^-p are then ordinary bfloat16 numbers.
MOST_SHIFT = 100


class Mxfp4Grid(TableGrid):
    """Power-of-two scales over 32 weights."""

    def _storable(self, reach: Tensor, absmax: Tensor) -> Tensor:
        exponent = torch.frexp(reach)[1] - 1  # floor(log2), exactly
        scale = torch.ldexp(torch.ones_like(reach), exponent - 2).clamp(*E8M0)
        return torch.where(absmax == 0, torch.ones_like(scale), scale).to(self.scale_dtype)


class Nvfp4Grid(TableGrid):
    """Scales of e4m3 over 16 weights, and a power of two a tensor."""

    def _storable(self, reach: Tensor, absmax: Tensor) -> Tensor:
        largest = float(absmax.max()) / self._largest
        if largest > LARGEST_E4M3 * 2.0**MOST_SHIFT:
            raise SpecError(f"a weight of magnitude {float(absmax.max()):.3g} is beyond what nvfp4 holds")
        shift = shift_of(largest)
        local = (reach / self._largest * 2.0**shift).clamp(SMALLEST_E4M3, LARGEST_E4M3)
        local = torch.where(absmax == 0, torch.ones_like(local), local)
        return (local.to(torch.float8_e4m3fn).float() * 2.0**-shift).to(self.scale_dtype)


def shift_of(largest: float) -> int:
    """The largest p at which ``largest`` * 2^p is still an e4m3, within what bfloat16 bears."""
    return 0 if largest == 0 else max(-MOST_SHIFT, min(MOST_SHIFT, e4m3_shift(largest)))
