"""Coordinate descent on the codes: CDQuant (arXiv 2406.17542) and its cyclic form QuantEase (arXiv
2309.01885).

With E = W_hat - W [N, K] and H the damped second moments of the inputs [K, K], moving weight j of a row by delta
changes

    tr(E H E^T)   by   H_jj delta^2 + 2 delta (E H)_j

so the best value of one weight, the others held, is the grid value nearest to w_hat_j - (E H)_j / H_jj. Rows are
independent. ``cyclic``: every weight once a pass, from left to right. ``greedy``: in every row the weight whose move
gains most, K moves a pass. A code moves by at most ``jump`` levels at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.grids import Affine, Grid, Scales
from dq_runtime.rounding.base import Choice, Gram, LayerProblem, options_from
from dq_runtime.rounding.feedback import Near, Walk, walk
from dq_runtime.rounding.gptq import gptq_walk
from dq_runtime.rounding.linalg import Curvature, check_choice, check_damp, curvature, keep_better
from dq_runtime.rounding.sequential import LayerMethod, Outcome


@dataclass(frozen=True)
class Recipe:
    """``start``: the codes of ``nearest`` or of ``gptq`` (by activation). ``passes``: at most so many; rows that
    stopped improving are left alone. ``jump``: levels a code may move at once. ``damp``: lambda over mean(diag H)."""

    order: str = "cyclic"
    start: str = "gptq"
    passes: int = 4
    jump: int = 2
    damp: float = 0.01

    def __post_init__(self) -> None:
        check_choice("cdquant", "order", self.order, ("cyclic", "greedy"))
        check_choice("cdquant", "start", self.start, ("nearest", "gptq"))
        check_damp("cdquant", self.damp)
        for name, value in {"passes": self.passes, "jump": self.jump}.items():
            if value < 1:
                raise SpecError(f"rounding 'cdquant': {name} must be at least 1, got {value}")


class CdQuant(LayerMethod):
    """One weight at a time, again and again."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.recipe = options_from(Recipe, "cdquant", options)

    def layer(self, layer: LayerProblem, gram: Gram, generator: torch.Generator) -> Outcome:
        """One layer."""
        recipe, w = self.recipe, layer.weight()
        if recipe.start == "gptq":
            codes, _ = gptq_walk(layer.grid, layer.scales, w, curvature(gram.inputs, recipe.damp, "activation"))
        else:
            codes = layer.grid.nearest(w, layer.scales)
        curve = curvature(gram.inputs, recipe.damp)
        if recipe.order == "cyclic":
            codes = descend(layer.grid, layer.scales, w, curve, codes, recipe.passes, recipe.jump)
        else:
            codes = descend_greedily(layer.grid, layer.scales, w, curve, codes, recipe.passes * w.shape[1], recipe.jump)
        return keep_better(layer, w, w, curve, Choice(codes))


def descend(grid: Grid, scales: Scales, w: Tensor, curve: Curvature, codes: Tensor, passes: int, jump: int) -> Tensor:
    """Cyclic descent from ``codes`` uint8 [N, K] towards the weight ``w`` float32 [N, K], ``curve`` in natural order.

    A pass is a walk with feedback H_ij / H_jj: the errors e_i of that walk are the moves already made, negated. A row
    whose loss did not fall (by float rounding at a tie) is put back and is finished.
    """
    diagonal = curve.hessian.diagonal()
    feedback = torch.triu(curve.hessian / diagonal, 1)
    value = grid.decode(codes, scales)
    loss = curve.row_losses(value - w)
    going = torch.ones(len(w), 1, dtype=torch.bool, device=w.device)
    for _ in range(passes):
        plan = Walk(grid, scales, curve.order, feedback, near=Near(codes, jump))
        start = value - ((value - w) @ curve.hessian) / diagonal
        moved, _ = walk(plan, start, value)
        moved_value = grid.decode(moved, scales)
        moved_loss = curve.row_losses(moved_value - w)
        going &= (moved_loss < loss).unsqueeze(1)
        if not bool(going.any()):
            break
        codes, value = torch.where(going, moved, codes), torch.where(going, moved_value, value)
        loss = torch.where(going.squeeze(1), moved_loss, loss)
    return codes


def descend_greedily(
    grid: Grid, scales: Scales, w: Tensor, curve: Curvature, codes: Tensor, moves: int, jump: int
) -> Tensor:
    """At most ``moves`` moves in every row of ``codes``, each the one that lowers the row's loss most."""
    if not isinstance(grid.decode_form, Affine):
        raise SpecError(f"order=greedy counts in even steps, which grid {grid.spec.name} has not; use order=cyclic")
    wide = scales.wide(w.shape[1])
    top, scale = 2**grid.decode_form.bits - 1, wide.scale.float()
    hessian, diagonal = curve.hessian, curve.hessian.diagonal()
    rows = torch.arange(len(w), device=w.device)
    codes = codes.clone()
    level = codes.float()  # what follows is of the rows that still move
    slope = (grid.decode(codes, scales) - w) @ hessian
    # A gain below 1e-6 of a step's own cost is float rounding: without this two weights could trade places for ever.
    least = 1e-6 * diagonal * scale.square()
    for _ in range(moves):
        step = (-slope / (diagonal * scale)).round_().clamp_(-jump, jump)
        step = (level + step).clamp_(0, top) - level
        delta = step * scale
        change = delta * (delta * diagonal + 2 * slope)
        change = torch.where(change < -least, change, 0)
        gain, best = change.min(1)
        alive = gain < 0
        if not bool(alive.all()):
            rows, best, level, slope = rows[alive], best[alive], level[alive], slope[alive]
            scale, least, step, delta = scale[alive], least[alive], step[alive], delta[alive]
            if not len(rows):
                break
        at = torch.arange(len(rows), device=w.device)
        level[at, best] += step[at, best]
        slope += delta[at, best].unsqueeze(1) * hessian[best]
        codes[rows, best] = level[at, best].to(torch.uint8)
    return codes
