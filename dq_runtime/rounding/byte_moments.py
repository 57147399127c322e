"""Adam's two moments in one byte each, rounded stochastically (dither.py), without scales a block.

What Adam needs of its running mean m and mean square v (arXiv 1412.6980) is v to within some percent, over many orders
of magnitude, and m as a share of sqrt(v), which is a number of about 1 for every weight. So with c the bias corrections
sqrt(1 - beta2^t) / (1 - beta1^t) after t steps and b [] an upper bound of v over the layer, kept in float32:

    v   uint8    5 bits of exponent below b, 3 of mantissa: the top bits of the float32, within 2^-3, down to b / 2^31
    m   int8     c m / sqrt(v), Adam's step as a share of the rate, in steps of 4/127; the largest gradient that comes
                 once gives (1 - beta1) / sqrt(1 - beta2) = 3.2, so that almost nothing is cut off

8-bit moments are Dettmers' (arXiv 2110.02861), whose blocks have a scale each and a table of 256 values, rounded to
nearest. With beta2 = 0.999 a step moves v by a thousandth, and the steps of eight bits are a hundred times that: what
rounds to nearest sees only gradients that are 10 times as large as usual.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BETA1, BETA2 = 0.9, 0.999
REACH = 4.0  # the largest c |m| / sqrt(v) that is held
_SHIFT = 20  # of a float32's 23 bits of mantissa, those that v drops
# Above b: v itself may be rounded up by an eighth, and an octave is 8 codes. Below 2^-126 a float32 is denormal.
_HEADROOM, _LEAST = 8, 8


@dataclass
class ByteMoments:
    """Of one layer: ``m`` int8 and ``v`` uint8 [N, K], ``bound`` float32 [] (b above; 0: no gradient has come yet),
    ``steps``: t above."""

    m: Tensor
    v: Tensor
    bound: Tensor
    steps: int = 0

    @classmethod
    def zeros(cls, shape: torch.Size, device: torch.device) -> ByteMoments:
        """Of a layer that has seen no gradient."""
        return cls(
            torch.zeros(shape, dtype=torch.int8, device=device),
            torch.zeros(shape, dtype=torch.uint8, device=device),
            torch.zeros((), device=device),
        )

    def bound_after(self, largest: Tensor) -> Tensor:
        """b after a gradient whose largest magnitude is ``largest``, float32 []."""
        return BETA2 * self.bound + (1 - BETA2) * largest.square()

    def decode(self, rows: slice) -> tuple[Tensor, Tensor]:
        """m and v of some rows, float32, as they were when they were last held."""
        v = (self.v[rows].int() + lowest(self.bound)).bitwise_left_shift_(_SHIFT).view(torch.float32)
        v = v * (self.bound > 0)
        return self.m[rows] * v.sqrt().mul_(REACH / 127 / (correction(self.steps) if self.steps else 1.0)), v

    def encode(self, rows: slice, share: Tensor, v: Tensor, bound: Tensor, dither: tuple[Tensor, Tensor]) -> None:
        """Hold ``share`` = c m / sqrt(v), and v, of some rows, after one more step; :attr:`steps` and :attr:`bound` (to
        ``bound``) change after the last rows."""
        scaled = (share * (127 / REACH)).add_(dither[0]).floor_()
        self.m[rows] = scaled.clamp_(-127, 127).to(torch.int8)
        bits = v.view(torch.int32) + (dither[1] * (1 << _SHIFT)).int()
        self.v[rows] = bits.bitwise_right_shift_(_SHIFT).sub_(lowest(bound)).clamp_(0, 255).to(torch.uint8)


def correction(steps: int) -> float:
    """c above."""
    return float((1 - BETA2**steps) ** 0.5 / (1 - BETA1**steps))


def lowest(bound: Tensor) -> Tensor:
    """The top bits of the float32 that code 0 stands for, int32 []."""
    return ((bound.view(torch.int32) >> _SHIFT) + _HEADROOM - 255).clamp_(min=_LEAST)


def smallest(bound: Tensor) -> Tensor:
    """The v of code 0: what a smaller one counts as, so that the quotient of two vanishing moments stays small."""
    return (lowest(bound) << _SHIFT).view(torch.float32)
