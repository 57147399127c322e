"""Rotary position embedding (RoFormer, arXiv 2104.09864), half-split as Hugging Face stores its weights.

A head's first ``dim`` values are rotated: values i and i + dim/2 by the angle ``position * frequency[i]``. Scalings
only change the frequencies: linear divides them, llama3 divides the slow ones (Llama 3.1), longrope divides each by its
own factor, of which there is a set for short and a set for long contexts (LongRoPE, arXiv 2402.13753; "su" in Phi-3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Llama3Scaling:
    """Frequencies whose wavelength exceeds ``original_context / low`` are divided by ``factor``, those below
    ``original_context / high`` are kept, the ones between are interpolated."""

    factor: float
    low: float
    high: float
    original_context: int


@dataclass(frozen=True)
class LongRopeScaling:
    """One divisor per frequency (``dim / 2`` of them): ``short`` up to ``original_context`` positions, else ``long``.
    cos and sin are multiplied by ``attention_factor``."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_context: int
    attention_factor: float


@dataclass(frozen=True)
class Rope:
    """Which angles a layer rotates by. ``theta`` is the base; ``scaling`` a divisor of all frequencies (1.0: none), or
    one of the two schemes above."""

    dim: int
    theta: float
    scaling: float | Llama3Scaling | LongRopeScaling = 1.0

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by."""
        return self.scaling.attention_factor if isinstance(self.scaling, LongRopeScaling) else 1.0

    def frequencies(self, capacity: int) -> Tensor:
        """Radians per position, float32 [dim / 2], for sequences of at most ``capacity`` positions.

        The length decides between longrope's two sets. It is that of the whole cache, not the one reached so far: keys
        already in the cache are rotated for good, and a mixture of both sets is neither.
        """
        base = 1.0 / (self.theta ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim))
        if isinstance(self.scaling, LongRopeScaling):
            divisors = self.scaling.long if capacity > self.scaling.original_context else self.scaling.short
            steps = torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim
            return 1.0 / (torch.tensor(divisors, dtype=torch.float32) * self.theta**steps)
        if isinstance(self.scaling, Llama3Scaling):
            return _llama3(base, self.scaling)
        return base / self.scaling


def _llama3(base: Tensor, s: Llama3Scaling) -> Tensor:
    wavelength = 2 * math.pi / base
    blend = (s.original_context / wavelength - s.low) / (s.high - s.low)
    blended = (1 - blend) * base / s.factor + blend * base
    scaled = torch.where(wavelength > s.original_context / s.low, base / s.factor, blended)
    return torch.where(wavelength < s.original_context / s.high, base, scaled)


def rotation(frequencies: Tensor, positions: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What :func:`rotate` multiplies by at ``positions`` int64 [B, T]: (cos, cos) and (-sin, sin), [B, 1, T, dim] each,
    computed in float32 and rounded to ``dtype``."""
    angles = (positions.unsqueeze(-1).float() * frequencies).unsqueeze(1)
    cos, sin = (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, T, D] with its first ``dim`` values of every head rotated; the rest is passed through."""
    dim = cos.shape[-1]
    turned = x[..., :dim]
    turned = torch.addcmul(turned * cos, turned.roll(dim // 2, -1), sin)  # rolled by half: the halves swapped
    return turned if dim == x.shape[-1] else torch.cat((turned, x[..., dim:]), -1)
