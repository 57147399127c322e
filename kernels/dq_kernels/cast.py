"""float32 -> the dtype of activations, to nearest also where the interpreter would truncate.

The interpreter's cast to bf16 drops the low 16 bits (1.9999 becomes 1.9922; triton 3.6). Kernels that round in the
middle of their work cannot leave that to PyTorch, as ``dequant.stage`` does for a last step, so they round by hand
there: once the low bits are zero, dropping them is exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def round_to(x, DTYPE: tl.constexpr, BY_HAND: tl.constexpr):
    """float32 x in DTYPE, to nearest, ties to even. ``BY_HAND``: see :func:`by_hand`."""
    if BY_HAND:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


def by_hand(dtype: torch.dtype) -> bool:
    """The BY_HAND of :func:`round_to` for tensors of ``dtype``: bf16 in the interpreter."""
    return dtype == torch.bfloat16 and bool(triton.knobs.runtime.interpret)
