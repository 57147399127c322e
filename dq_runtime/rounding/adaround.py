"""AdaRound (arXiv 2004.10568, equations 21 to 25): learn for each weight whether it goes down or up.

For a layer with weight w, codes lo <= hi around it, scales s and zero points z; V [N, K] is what is learned:

    w_hat = s * (lo + (hi - lo) * h(V) - z),    h(V) = clamp(1.2 * sigmoid(V) - 0.1, 0, 1)   (rectified sigmoid)

    minimise   block error / block error of nearest + strength * mean(1 - |2 h(V) - 1|^beta)

V starts where h(V) is the weight's own fractional position. The regulariser, off for the first fifth of the steps while
the error alone decides, pushes h to 0 or 1; beta falls from 20 (only undecided weights feel it) to 2 by half a cosine.
The error is that of a whole block, as in BRECQ (arXiv 2102.05426), and Adam's rate stays constant, as in its code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.rounding.base import Block, Choice, LayerProblem, options_from
from dq_runtime.rounding.block_loop import BlockMethod, Loop, Search, check_positive, constant

GAMMA, ZETA = -0.1, 1.1  # the stretch of the sigmoid: h reaches 0 and 1 at finite V


@dataclass(frozen=True)
class Recipe:
    """``lr`` is Adam's rate on V; ``strength`` of the regulariser, ``beta_start`` and ``beta_end`` its exponent, and
    ``warmup`` the share of the steps before it begins."""

    iters: int = 200
    batch: int = 8
    lr: float = 0.03
    strength: float = 1.0
    beta_start: float = 20.0
    beta_end: float = 2.0
    warmup: float = 0.2

    def __post_init__(self) -> None:
        self.loop.check("adaround")
        positive = {"lr": self.lr, "strength": self.strength, "beta_start": self.beta_start, "beta_end": self.beta_end}
        check_positive("adaround", **positive)
        if not 0 <= self.warmup < 1:
            raise SpecError(f"rounding 'adaround': warmup must be in [0, 1), got {self.warmup}")

    @property
    def loop(self) -> Loop:
        return Loop(self.iters, self.batch)

    def beta(self, share: float) -> float | None:
        """The exponent once ``share`` of the steps are done; None during the warm-up."""
        if share < self.warmup:
            return None
        progress = (share - self.warmup) / (1 - self.warmup)
        return self.beta_end + 0.5 * (self.beta_start - self.beta_end) * (1 + math.cos(math.pi * progress))


class UpOrDown(Search):
    """V of one layer."""

    def __init__(self, layer: LayerProblem, recipe: Recipe) -> None:
        w, scales = layer.weight(), layer.scales
        self._recipe = recipe
        self.lo, hi = layer.grid.neighbours(w, scales)
        self._free = hi > self.lo
        self._down = layer.grid.decode(self.lo, scales)
        self._step = layer.grid.decode(hi, scales) - self._down
        fraction = (layer.grid.position(w, scales) - self.lo) * self._free
        self.v = torch.logit((fraction - GAMMA) / (ZETA - GAMMA)).requires_grad_()
        self._beta: float | None = None

    def h(self) -> Tensor:
        """The share of the way up, [N, K]."""
        return (torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def begin(self, share: float) -> None:
        self._beta = self._recipe.beta(share)
        self._h: Tensor | None = None

    def learned(self) -> list[tuple[list[Tensor], float]]:
        return [([self.v], self._recipe.lr)]

    def weight(self) -> Tensor:
        self._h = self.h()
        return torch.addcmul(self._down, self._step, self._h)

    def penalty(self) -> Tensor | None:
        if self._beta is None:
            return None
        h = self.h() if self._h is None else self._h  # None: a router sent no token to this expert
        return self._recipe.strength * (1 - (2 * h - 1).abs().pow(self._beta)).mean()

    @torch.no_grad()
    def choice(self) -> Choice:
        return Choice(self.lo + ((self.v > 0) & self._free).to(torch.uint8))  # h > 1/2 exactly where V > 0


class AdaRound(BlockMethod):
    """Block by block, on the layer's own scales; see the module docstring."""

    between_neighbours = True
    any_grid = True
    decay = staticmethod(constant)

    recipe: Recipe

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.recipe = options_from(Recipe, "adaround", options)

    def searches(self, block: Block, generator: torch.Generator) -> dict[str, Search]:
        return {name: UpOrDown(layer, self.recipe) for name, layer in block.layers.items()}
