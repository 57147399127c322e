"""Quantize and dequantize with gradients: what methods that learn codes and scales by gradient descent share.

Shapes: N = out_features, K = in_features, G = K / group_size, top = 2^bits - 1. With w and v [N, K], s and z [N, G]:

    q = clamp(round(w / s + v + z), 0, top),   w_hat = s * (q - z)

Rounding counts as the identity in the backward pass (the straight-through estimator, arXiv 1308.3432); where the clamp
binds, nothing flows to w and v. The scale's gradient is that of LSQ (arXiv 1902.08153).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dq_runtime.grids import Grid, Scales

# A learned range is this share of the start's at least and at most. The upper end is AutoRound's for a searched start;
# the lower one keeps a scale from reaching 0, where sign steps of a fixed size would carry it.
RANGE = (0.1, 2.0)


def rate_factor(bits: int) -> float:
    """What rates of relative changes (of a scale, or of a weight) are multiplied with: 1 up to 4 bits, then half of
    that with every bit, so that a step moves the outermost level by no more than it does at 4 bits. With AutoRound's
    1 / 200 unchanged, one step at 8 bits would move it by 0.6 of a grid step."""
    return min(1.0, 2.0 ** (4 - bits))


class _Snap(torch.autograd.Function):
    """The formula of the module docstring as one node. It keeps 5 bytes a weight for the backward pass and takes 8.6 ms
    both ways for [1536, 576] on a Zen 4 core; composed of torch operations it keeps 12 and takes 13.2 ms."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, v: Tensor | None, s: Tensor, z: Tensor, top: int) -> Tensor:
        exact, position = _positions(w, s, z, v)
        s, z = s.unsqueeze(-1), z.unsqueeze(-1)
        inside = (position >= 0) & (position <= top)
        level = position.clamp_(0, top).sub_(z)
        own = torch.where(inside, level - exact, level)  # d w_hat / d s
        ctx.save_for_backward(inside, own, s)
        return (level * s).reshape(w.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inside, own, s = ctx.saved_tensors
        gradient = gradients[0].reshape(own.shape)
        through = torch.where(inside, gradient, 0)
        shape = gradients[0].shape
        dw = through.reshape(shape) if ctx.needs_input_grad[0] else None
        dv = (through * s).reshape(shape) if ctx.needs_input_grad[1] else None
        ds = (gradient * own).sum(-1) if ctx.needs_input_grad[2] else None
        # Inside, the zero point cancels; outside, w_hat = s * (0 - z) or s * (top - z).
        dz = (through - gradient).mul_(s).sum(-1) if ctx.needs_input_grad[3] else None
        return dw, dv, ds, dz, None


def snap(w: Tensor, s: Tensor, z: Tensor, top: int, v: Tensor | None = None) -> Tensor:
    """w_hat [N, K] of w, with offsets v in grid steps, on scales s and zero points z (whole numbers); all float32."""
    result: Tensor = _Snap.apply(w, v, s, z, top)  # type: ignore[no-untyped-call]
    return result


def codes(w: Tensor, s: Tensor, z: Tensor, top: int, v: Tensor | None = None) -> Tensor:
    """The q of the same formula, uint8 [N, K]."""
    position = _positions(w, s, z, v)[1]
    return position.clamp_(0, top).to(torch.uint8).reshape(w.shape)


def _positions(w: Tensor, s: Tensor, z: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
    """w / s and round(w / s + v + z), [N, G, K/G]."""
    exact = w.detach().reshape(*s.shape, -1) / s.unsqueeze(-1)
    moved = exact + z.unsqueeze(-1) if v is None else (exact + v.reshape(exact.shape)).add_(z.unsqueeze(-1))
    return exact, moved.round_()


class _Served(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, dtype: torch.dtype) -> Tensor:
        finfo = torch.finfo(dtype)
        return s.abs().clamp_(finfo.tiny, finfo.max).copysign_(s).to(dtype).to(s.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


def served(s: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as the checkpoint will hold them: finite, not 0, of the sign they have, rounded to ``dtype`` and widened
    again; the gradient passes unrounded."""
    result: Tensor = _Served.apply(s, dtype)  # type: ignore[no-untyped-call]
    return result


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, top: int) -> Tensor:
        return z.round().clamp_(0, top)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


class LearnedScales:
    """Scales of one layer that follow two learned factors, for the ends of each group's range.

    The start's scale s0 and zero point z0 [N, G] span the range from -s0 * z0 to s0 * (top - z0). With its ends moved
    to ``low`` and ``high`` times that (float32 [N, G], 1 to begin with, see RANGE), s = (upper - lower) / top and
    z = round(-lower / s). On a symmetric grid both factors are one, and z stays the middle code.
    """

    def __init__(self, grid: Grid, start: Scales) -> None:
        self._dtype = start.scale.dtype
        self.top = 2**grid.spec.bits - 1
        self._s0 = start.scale.float()
        self.high = torch.ones_like(self._s0).requires_grad_()
        self.low: Tensor | None = None
        self._z0 = torch.full_like(self._s0, float(2 ** (grid.spec.bits - 1)))
        if start.zero is not None:
            self.low = torch.ones_like(self._s0).requires_grad_()
            self._z0 = start.zero.float()

    @property
    def parameters(self) -> list[Tensor]:
        return [self.high] if self.low is None else [self.high, self.low]

    def now(self, factors: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """s and z, float32 [N, G], differentiable in ``factors`` (by default ``parameters``, in their order); s holds
        only values of the serving dtype, z only codes."""
        high, *low = factors or self.parameters
        if not low:
            return served(self._s0 * high, self._dtype), self._z0
        below = self._s0 * self._z0 * low[0]  # how far the range reaches below 0
        s = served((self._s0 * (self.top - self._z0) * high + below) / self.top, self._dtype)
        z: Tensor = _Whole.apply(below / s, self.top)  # type: ignore[no-untyped-call]
        return s, z

    def confine(self) -> None:
        """Bring the factors back into RANGE after a step of the optimiser."""
        with torch.no_grad():
            for factor in self.parameters:
                factor.clamp_(*RANGE)

    def held(self, s: Tensor, z: Tensor) -> Scales:
        """What :meth:`now` gave, as a :class:`~dq_runtime.rounding.base.Choice` holds it."""
        return Scales(s.to(self._dtype), None if self.low is None else z.to(torch.uint8))
