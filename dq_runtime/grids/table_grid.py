"""Grids of tabulated levels: nf4 (arXiv 2305.14314) and fp4, the 4-bit float e2m1, with one 16-bit scale a group.

scale = absmax / largest level; the mse rule searches around it. Between two codes the code axis runs evenly, so that a
weight's position says how far it lies on the way from one level to the next; outside the table it runs on at the last
interval's pace. Codes whose levels coincide (the two zeros of e2m1) have an interval of no length, where nothing lies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.grids.base import Scales, Table
from dq_runtime.grids.int_grid import MSE_FACTORS
from dq_runtime.levels import E2M1
from dq_runtime.spec import GridSpec


class TableGrid:
    """One of :data:`dq_runtime.levels.LEVELS` with one scale per group of a row."""

    def __init__(self, spec: GridSpec) -> None:
        self.spec = spec
        self.decode_form = Table(spec.bits, spec.name)
        self.scale_dtype: torch.dtype = getattr(torch, spec.scale_dtype)
        self._levels = torch.tensor(self.decode_form.levels)
        self._middles = (self._levels[1:] + self._levels[:-1]) / 2
        self._largest = max(self.decode_form.levels)
        codes = torch.arange(len(self._levels))
        # Ties go to the even magnitude, as conversions to e2m1 do; nf4 has no such rule.
        half = len(codes) // 2
        magnitude = torch.where(codes < half, half - 1 - codes, codes - half)
        self._even = (magnitude if self.decode_form.levels == E2M1 else codes) % 2 == 0

    def fit(self, w: Tensor) -> Scales:
        """Scales of a finite float weight [N, K]; K must be a multiple of the group size."""
        groups = w.float().reshape(w.shape[0], self.spec.groups(w.shape[1]), -1)
        absmax = groups.abs().amax(-1)
        best = self._storable(absmax, absmax)
        if self.spec.scale == "mse":
            best_error = self._squared_error(groups, best)
            for factor in MSE_FACTORS:
                trial = self._storable(absmax * factor, absmax)
                error = self._squared_error(groups, trial)
                better = error < best_error
                best_error, best = torch.where(better, error, best_error), torch.where(better, trial, best)
        return Scales(best)

    def _storable(self, reach: Tensor, absmax: Tensor) -> Tensor:
        """Scales [N, G] of groups that reach as far as ``reach``, as they are stored; ``absmax`` [N, G] is that of the
        weights, the same for every reach that is tried."""
        exact, finfo = reach / self._largest, torch.finfo(self.scale_dtype)
        if float((absmax / self._largest).max()) > finfo.max:
            raise SpecError(
                f"a weight of magnitude {float(absmax.max()):.3g} needs a scale that {self.spec.scale_dtype} cannot "
                "hold; use scale_dtype bfloat16"
            )
        exact = torch.where(absmax == 0, torch.ones_like(exact), exact)  # a group of zeros decodes to 0 at any scale
        return exact.clamp(finfo.tiny, finfo.max).to(self.scale_dtype)

    def position(self, w: Tensor, scales: Scales) -> Tensor:
        v = w.float() / self._expand(scales, w.shape[1])
        levels = self._levels.to(v.device)
        below = (torch.bucketize(v, levels, right=True) - 1).clamp(0, len(levels) - 2)
        gap = (levels[1:] - levels[:-1])[below]
        return (v - levels[below]) / gap + below

    def neighbours(self, w: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
        v, top = self.position(w, scales), len(self._levels) - 1
        return v.floor().clamp(0, top).to(torch.uint8), v.ceil().clamp(0, top).to(torch.uint8)

    def nearest(self, w: Tensor, scales: Scales) -> Tensor:
        """Ties go to the even magnitude."""
        v = w.float() / self._expand(scales, w.shape[1])
        return self._nearest(v)

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype = torch.float32) -> Tensor:
        values = self._levels.to(codes.device)[codes.long()]
        return (values * self._expand(scales, codes.shape[1])).to(dtype)

    def _nearest(self, v: Tensor) -> Tensor:
        middles = self._middles.to(v.device)
        down, up = torch.bucketize(v, middles), torch.bucketize(v, middles, right=True)
        return torch.where(self._even.to(v.device)[up], up, down).to(torch.uint8)

    def _squared_error(self, groups: Tensor, scale: Tensor) -> Tensor:
        s = scale.float().unsqueeze(-1)
        values = self._levels.to(groups.device)[self._nearest(groups / s).long()]
        return values.mul_(s).sub_(groups).square_().sum(-1)

    @staticmethod
    def _expand(scales: Scales, k: int) -> Tensor:
        s, size = scales.scale.float(), k // scales.scale.shape[1]
        return s if size == 1 else s.repeat_interleave(size, dim=1)
