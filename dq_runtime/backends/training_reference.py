"""The training ops in plain PyTorch: their living definition. Runs anywhere, holds state in any form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dq_runtime.backends.training import Lerp, TrainingCall, unpack_flags
from dq_runtime.levels import INT, LEVELS
from dq_runtime.rounding.base import AdamStep

# Tokens per chunk of the KL: 64 rows of a 150k vocabulary are 38 MB of float32, instead of gigabytes for a window.
CHUNK = 64
# An x between these is undecided: neither neighbour has won (1% of a step away from one, as the paper's figures count).
DECIDED = (0.01, 0.99)


class ReferenceTraining:
    """Dense weights rebuilt on every pass, one torch call after another."""

    name = "reference"
    compact = False
    layers = None

    def available(self) -> str | None:
        return None

    def can_run(self, call: TrainingCall) -> str | None:
        return None if call.dtype.is_floating_point else f"{call.op} takes floating-point tensors, got {call.dtype}"

    def lerp_mm(self, inputs: Tensor, x: Tensor, w: Lerp) -> Tensor:
        return inputs @ lerp_weight(w, x, inputs.dtype).t()

    def lerp_mm_backward(
        self, grad: Tensor, inputs: Tensor, x: Tensor, w: Lerp, needs: tuple[bool, bool], grad_dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        grad_inputs = grad @ lerp_weight(w, x, grad.dtype) if needs[0] else None
        if not needs[1]:
            return grad_inputs, None
        grad_x = _wide(grad.t() @ inputs, grad.dtype).mul_(lerp_slope(w, grad.dtype))
        return grad_inputs, grad_x.to(grad_dtype)

    @torch.no_grad()
    def projected_adam(
        self, x: Tensor, grad: Tensor, m: Tensor, v: Tensor, y: Tensor, free: Tensor, hyper: AdamStep
    ) -> Tensor:
        state = (x, m, v)
        x, mean, square = x.float(), m.float(), v.float()  # themselves where they are float32
        g = grad.float().mul_(hyper.kl_weight).clamp_(-hyper.clamp, hyper.clamp)
        g.add_(1.0).sub_(y.float(), alpha=2.0).mul_(free if free.dtype == torch.bool else unpack_flags(free, x.shape))
        mean.lerp_(g, 1 - hyper.beta1)
        square.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
        denominator = torch.sqrt(square, out=g).div_(math.sqrt(1 - hyper.beta2**hyper.step)).add_(hyper.epsilon)
        x.mul_(1 - hyper.lr * hyper.weight_decay)
        x.addcdiv_(mean, denominator, value=-hyper.lr / (1 - hyper.beta1**hyper.step))
        x.clamp_(0.0, 1.0)
        if state[0].dtype != torch.float32:
            noise = _noise(x, hyper.step)
            state[1].copy_(stochastic_round(mean, noise, 16))
            state[2].copy_(stochastic_round(square, noise >> 16, 16))
            x = stochastic_round(x, noise >> 10, 13)
            state[0].copy_(x)
        return ((x > DECIDED[0]) & (x < DECIDED[1])).sum()

    def mean_kl_with_grad(self, student: Tensor, teacher: Tensor, out: Tensor) -> Tensor:
        m = student.shape[0]
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        for start in range(0, m, CHUNK):
            rows = slice(start, start + CHUNK)
            log_p = teacher[rows].float().log_softmax(-1)
            log_q = student[rows].float().log_softmax(-1)
            p = log_p.exp()
            total += (p * log_p.sub_(log_q)).sum()
            out[rows] = log_q.exp_().sub_(p).div_(m)
        return total / m


def lerp_weight(w: Lerp, x: Tensor, dtype: torch.dtype) -> Tensor:
    """scale * (lo - zero + x) as a dense [N, K] tensor of ``dtype``, computed in float32 (float64 for a float64 x)."""
    n, k = x.shape
    scale = _wide(w.scale, x.dtype)
    if w.form != INT:
        levels, steps = _table(w, scale.dtype)
        lo = w.codes().long()
        value = torch.addcmul(levels[lo], steps[lo], _wide(x, x.dtype)).view(n, scale.shape[1], -1)
        return value.mul_(scale.unsqueeze(-1)).view(n, k).to(dtype)
    zero: Tensor | float = float(2 ** (w.bits - 1)) if w.zero is None else w.zero.to(scale.dtype).unsqueeze(-1)
    value = torch.add(_wide(x, x.dtype), w.codes()).view(n, scale.shape[1], -1)  # uint8 + float32 in one pass
    return value.sub_(zero).mul_(scale.unsqueeze(-1)).view(n, k).to(dtype)


def lerp_slope(w: Lerp, dtype: torch.dtype = torch.float32) -> Tensor:
    """d w_hat / dX, [N, K] in float32 (float64 for ``dtype`` float64): the distance between the two neighbours."""
    slope = _wide(w.scale, dtype).repeat_interleave(w.k // w.scale.shape[1], 1)
    return slope if w.form == INT else slope * _table(w, slope.dtype)[1][w.codes().long()]


def _table(w: Lerp, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The levels of a table form [16] and how far it is from each to the next [16]; beyond the last as before it."""
    levels = torch.tensor(LEVELS[w.form], dtype=dtype, device=w.scale.device)
    steps = levels.diff()
    return levels, torch.cat([steps, steps[-1:]])


def stochastic_round(value: Tensor, noise: Tensor, dropped: int) -> Tensor:
    """float32 with its lowest ``dropped`` bits cleared, up or down by a chance that makes the rounding unbiased: 16 for
    bfloat16, 13 for float16. ``noise`` int64: its lowest ``dropped`` bits are the dice."""
    step = 2**dropped
    bits = value.contiguous().view(torch.int32).to(torch.int64) & (2**32 - 1)  # sign and magnitude: away from 0 is up
    bits = ((bits + (noise & (step - 1))) & (2**32 - 1)) // step * step
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def _noise(like: Tensor, step: int) -> Tensor:
    """32 bits an element, int64: a hash (the finaliser of MurmurHash3) of the element's index and the step.

    Rounding to nearest would freeze v: its change of a step is 1 - beta2 = 0.1% of it, less than half of bfloat16's
    spacing (0.2 to 0.4%). A hash and no generator: any device makes the same dice, and a resumed run too.
    """
    mask = 2**32 - 1
    h = torch.arange(like.numel(), dtype=torch.int64, device=like.device).view(like.shape)
    h = (h + (step * 0x9E3779B9 & mask)) & mask
    h = _times(h ^ (h >> 16), 0x85EBCA6B)
    h = _times(h ^ (h >> 13), 0xC2B2AE35)
    return h ^ (h >> 16)


def _times(h: Tensor, factor: int) -> Tensor:
    """h * factor modulo 2^32 without leaving int64: 16 bits of the factor at a time."""
    low, high = factor & 0xFFFF, factor >> 16
    return (h * low + (((h * high) & 0xFFFF) << 16)) & (2**32 - 1)


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in the precision in which ``dtype`` is computed: float64 for itself, float32 for all others."""
    return tensor.to(torch.float64 if dtype == torch.float64 else torch.float32)
