"""mxfp4 and nvfp4 on disk, as compressed-tensors has them (``mxfp4-pack-quantized``, ``nvfp4-pack-quantized``).

``weight_packed`` uint8 [N, K/2], the even column in the low nibble, codes as sign and magnitude. ``weight_scale`` [N,
G] uint8 (e8m0: 2^(code - 127)) for mxfp4, float8_e4m3fn for nvfp4, whose value is that over ``weight_global_scale``
float32 [1]. Our nvfp4 grid makes that a power of two, 2^p, so that every scale is a bfloat16 here and an e4m3 there;
all layers of a model share the p that every one of them can have, because engines that multiply q, k and v as one
matrix use one for all three.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.levels import LARGEST_E4M3, e4m3_shift, sign_magnitude
from dq_runtime.packing.layout import PackedWeight


def float4_tensors(layer: str, w: PackedWeight, shift: int | None = None) -> dict[str, Tensor]:
    """The tensors of one layer, under their names in it. ``shift``: the p of nvfp4 to use where it is exact. Raises
    :class:`SpecError` for scales that the format cannot hold."""
    codes = sign_magnitude(w.codes())
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    if w.form == "mxfp4":
        return {"weight_packed": packed, "weight_scale": e8m0_of(w.scale)}
    exact = [p for p in (shift, _shift(w.scale)) if p is not None and _holds(w.scale, p)]
    if not exact:
        raise SpecError(f"the scales of {layer} are no 8-bit floats over one power of two, which nvfp4 needs")
    return {
        "weight_packed": packed,
        "weight_scale": (w.scale.double() * 2.0 ** exact[0]).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([2.0 ** exact[0]]),
    }


def e8m0_of(scale: Tensor) -> Tensor:
    """uint8 [N, G]: the exponents of powers of two, bfloat16 [N, G]; :class:`SpecError` for anything else."""
    bits = scale.view(torch.int16).int() & 0xFFFF
    if scale.dtype is not torch.bfloat16 or not bool(((bits & 0x807F == 0) & (bits > 0) | (bits == 0x40)).all()):
        raise SpecError(
            "a scale of mxfp4 is no power of two; round with a method that leaves scales as they were fitted"
        )
    return (bits >> 7).to(torch.uint8)  # of the denormal 2^-127, 0x40, too


def shared_shift(weights: Iterable[PackedWeight]) -> int | None:
    """The largest p that no layer of nvfp4 among these is too large for; None where there is none."""
    return min((_shift(w.scale) for w in weights if w.form == "nvfp4"), default=None)


def _shift(scale: Tensor) -> int:
    """The largest p at which positive finite scales [N, G] are within e4m3."""
    return e4m3_shift(float(scale.max()))


def _holds(scale: Tensor, shift: int) -> bool:
    moved = scale.double() * 2.0**shift
    return bool((moved <= LARGEST_E4M3).all()) and bool((moved.to(torch.float8_e4m3fn).double() == moved).all())
