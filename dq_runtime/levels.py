"""Grids whose values are no even steps: their tables, in ascending order, so that a code and the next one are
neighbours.

    nf4    the 16 quantiles of a normal distribution of QLoRA (arXiv 2305.14314, appendix E), of magnitude 1
    e2m1   the 4-bit float of OCP's microscaling formats (MX v1.0): +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}, two zeros

What is stored is ``scale * LEVELS[form][code]``; "int" is the one form that has no table. Codes of e2m1 elsewhere are
sign and magnitude (code 8 is -0); :func:`ordered` and :func:`sign_magnitude` are between the two.
"""

from __future__ import annotations

import math
from typing import Any

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
E2M1 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# How the weights of a layer are decoded. The forms of e2m1 differ in what their scales may be: any 16-bit float (fp4),
# a power of two over 32 weights (mxfp4), a float of 8 bits over 16 weights times a power of two a tensor (nvfp4).
INT = "int"
LEVELS: dict[str, tuple[float, ...]] = {"nf4": NF4, "fp4": E2M1, "mxfp4": E2M1, "nvfp4": E2M1}
TABLE_BITS = 4
# The group size that a form has by definition, and the bits that a scale takes on disk (16 otherwise).
GROUP_SIZE = {"mxfp4": 32, "nvfp4": 16}
SCALE_BITS = {"mxfp4": 8, "nvfp4": 8}
LARGEST_E4M3 = 448.0  # the 8-bit float that nvfp4's scales are, over a power of two


def e4m3_shift(largest: float) -> int:
    """The largest p with ``largest`` * 2^p <= 448, of a positive finite number."""
    mantissa, exponent = math.frexp(largest)
    return 9 - exponent if mantissa * 512 <= LARGEST_E4M3 else 8 - exponent


def ordered(stored: Any) -> Any:
    """Codes of e2m1 as sign and magnitude -> ours; uint8 arrays or tensors, 0 .. 15. Magnitude m is code 8 + m where
    the sign is clear and 7 - m where it is set."""
    return stored ^ (8 + 7 * (stored >> 3))


def sign_magnitude(codes: Any) -> Any:
    """The inverse of :func:`ordered`."""
    return codes ^ (15 - 7 * (codes >> 3))
