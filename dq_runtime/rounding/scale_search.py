"""Scales by search: per group, the range whose rounding error, weighted by how large each input is, is lowest.

    minimise over f   sum_k h_k * (s_f * (q_k - z_f) - w_k)^2,   q nearest on (s_f, z_f)

with h [K] the mean square of the layer's inputs and (s_f, z_f) those of the group's range shrunk by f: the search that
AutoRound 0.16 starts from, and (with h = 1) that of the grid's own ``scale="mse"``. As there (and in llama.cpp's Q4_0
before it), the scale of a symmetric group may be negative: codes reach one step further below zero than above, -4 to 3
at 3 bits, and the sign decides which side of the weights gets that step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dq_runtime.grids import Scales
from dq_runtime.rounding.base import LayerProblem

# Factors on the range, 0.2 to 1.1. With groups of 64 on SmolLM2 and random h, 0.9% of groups choose less than 0.35 at 2
# bits, 0.1% at 3 and 0.02% at 4; the least chosen was 0.125.
FACTORS = tuple(0.2 + 0.025 * i for i in range(37))


@torch.no_grad()
def searched_scales(layer: LayerProblem, moments: Tensor) -> Scales:
    """The best scales for a layer whose inputs have mean squares ``moments`` [K]; its own where none is better."""
    spec, own = layer.grid.spec, layer.scales
    w, top = layer.weight(), 2**spec.bits - 1
    n, groups = own.scale.shape
    grouped = w.reshape(n, groups, -1)
    h = moments.to(w.device, torch.float32).reshape(1, groups, -1)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if spec.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    middle = torch.full_like(low, float(2 ** (spec.bits - 1)))
    best_s, best_z = own.scale.float(), middle if own.zero is None else own.zero.float()
    best = _weighted_error(grouped, h, best_s, best_z, top)
    finfo = torch.finfo(own.scale.dtype)
    for factor in FACTORS if not spec.symmetric else (*FACTORS, *(-f for f in FACTORS)):
        s = (abs(factor) * (high - low) / top).clamp(finfo.tiny, finfo.max).to(own.scale.dtype).float()
        s = math.copysign(1.0, factor) * s
        z = middle if spec.symmetric else (-factor * low / s).round().clamp(0, top)
        error = _weighted_error(grouped, h, s, z, top)
        better = error < best
        best = torch.where(better, error, best)
        best_s, best_z = torch.where(better, s, best_s), torch.where(better, z, best_z)
    return Scales(best_s.to(own.scale.dtype), None if spec.symmetric else best_z.to(torch.uint8))


def _weighted_error(grouped: Tensor, h: Tensor, s: Tensor, z: Tensor, top: int) -> Tensor:
    """[N, G] of weights [N, G, K/G]."""
    s, z = s.unsqueeze(-1), z.unsqueeze(-1)
    codes = (grouped / s).add_(z).round_().clamp_(0, top)
    return codes.sub_(z).mul_(s).sub_(grouped).square_().mul_(h).sum(-1)
